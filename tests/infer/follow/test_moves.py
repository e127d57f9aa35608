from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_tp.infer.follow.moves import _cat
from lightning_tp.infer.follow.run import run
from lightning_tp.infer.follow.tracer import AtenCall
from tests.infer.follow.traced import Net, classes_of, labels_of, traced

APART = [*range(1, 9)]


class Features(nn.Module):
    """Eight features, and what is done with them."""

    def __init__(self, between: Any) -> None:
        super().__init__()
        self.w, self.between = nn.Parameter(torch.zeros(4, 8)), between

    def forward(self, x: Tensor) -> Any:
        return self.between(x @ self.w)


def moved(between: Any, rows: int = 2) -> Any:
    """The sets of the features of each element of what comes out."""
    trace, out, tracer = traced(Features(between), torch.zeros(rows, 4))
    return labels_of(trace, tracer, out)


@pytest.mark.parametrize(
    ("between", "labels"),
    [
        (lambda x: x.view(4, 4), [[1, 2, 3, 4], [5, 6, 7, 8]] * 2),
        (lambda x: x.t(), [[n, n] for n in APART]),
        (lambda x: x[0, ::2], [1, 2, 3, 4]),
        (lambda x: x[0].roll(1), [1, 2, 3, 4, 5, 6, 7, 8]),
        (lambda x: x[0].flip(0).roll(1)[:2], [1, 2]),
        (lambda x: x[0, [0, 0, 7]], [1, 1, 2]),
        (lambda x: x[0].gather(0, torch.tensor([7, 0, 7])), [1, 2, 1]),
        (lambda x: torch.stack((x[0, :2], x[1, :2])), [[1, 2], [1, 2]]),
        (lambda x: x[0].unfold(0, 4, 2), [[1, 2, 3, 4], [3, 4, 5, 6], [5, 6, 7, 8]]),
        (lambda x: x[0].as_strided((2, 2), (4, 1)), [[1, 2], [3, 4]]),
        (lambda x: torch.view_as_complex(x[0].view(4, 2)), [1, 2, 3, 4]),
        (lambda x: torch.view_as_real(torch.view_as_complex(x[0].view(4, 2))), [[1, 1], [2, 2], [3, 3], [4, 4]]),
        (lambda x: x.to(torch.float64)[0], APART),
    ],
)
def test_labels_are_moved_as_the_data_is(between: Any, labels: Any) -> None:
    assert moved(between) == labels


def test_padding_goes_with_the_features_beside_it() -> None:
    assert moved(lambda x: F.pad(x, (0, 0, 1, 0))) == [APART] * 3
    assert moved(lambda x: torch.cat((torch.zeros(1, 8), x))) == [APART] * 3
    assert moved(lambda x: F.pad(x, (1, 0))) == [[0, *APART]] * 2  # it lies beside features that differ


def test_concatenation_skips_empty_tensors_and_takes_no_memory_for_constant_dims() -> None:
    parts = [torch.zeros(0, dtype=torch.int64), torch.arange(4).expand(1000, 4), torch.arange(2).expand(1000, 2)]
    joined = _cat(parts, AtenCall(torch.ops.aten.cat.default, (parts, -1), {}, None, [], []))
    assert joined[7].tolist() == [0, 1, 2, 3, 0, 1] and joined.stride(0) == 0


def test_an_index_that_is_not_known_joins_what_it_may_take() -> None:
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.router = nn.Linear(4, 8), nn.Linear(4, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x).gather(1, self.router(x).topk(2).indices)

    trace, _, _ = traced(Routed().to("meta"), torch.zeros(2, 4), whole={("router.weight", 0)})
    assert set(classes_of(trace, ("a.weight", 0))) == {1}
    trace, _, _ = traced(Routed(), torch.zeros(2, 4), whole={("router.weight", 0)})
    assert classes_of(trace, ("a.weight", 0)) == APART


def test_a_parameter_that_is_moved_is_known_by_its_coordinates() -> None:
    param = nn.Parameter(torch.zeros(2, 3))

    def call(model: nn.Module, x: Tensor) -> Tensor:
        return param.t().reshape(-1)[1:3]

    model = nn.Module()
    model.register_parameter("p", param)
    _, out, tracer = run(model, call, torch.zeros(1), set(), {})
    view = tracer.shadow(out).param
    assert view.name == "p" and [c.tolist() for c in view.coordinates] == [[1, 0], [0, 1]]


def test_a_softmax_joins_what_it_runs_over() -> None:
    trace, _, _ = traced(Net(lambda x: x.unflatten(-1, (2, 4)).softmax(-1).flatten(-2)), torch.zeros(2, 3, 4))
    assert classes_of(trace, ("a.weight", 0)) == [1, 1, 1, 1, 2, 2, 2, 2]


@pytest.mark.parametrize(
    ("between", "labels"),
    [
        (lambda x: x.view(2, 2, 4).sum(-1), [[1, 2], [1, 2]]),
        (lambda x: x.view(2, 2, 4).mean(2, keepdim=True), [[[1], [2]], [[1], [2]]]),
        (lambda x: x.view(2, 2, 4).sum((0, 2)), [1, 2]),
        (lambda x: x.sum(0), APART),
        (lambda x: x.sum(), 1),
        (lambda x: x.view(2, 2, 4).topk(3).values[0], [[1] * 3, [2] * 3]),
        (lambda x: x.view(2, 2, 4).sort(1).values[0], [[1, 2, 3, 4]] * 2),
        (lambda x: torch.linalg.vector_norm(x.view(2, 2, 4), dim=-1), [[1, 2], [1, 2]]),
        (lambda x: torch.fft.fft(x).real, [[1] * 8] * 2),  # nothing is known of it
        (lambda x: x[:, :4] * x[:, 4:], [[1, 2, 3, 4]] * 2),
        (lambda x: x + torch.rand_like(x).bernoulli_(), [APART] * 2),
        (lambda x: torch.where(x > 0, x, x[:, :1]), [[1] * 8] * 2),
    ],
)
def test_operators_join_what_they_combine(between: Any, labels: Any) -> None:
    assert moved(between) == labels


def test_a_norm_over_the_width_joins_all_features_of_a_row() -> None:
    trace, _, _ = traced(Net(nn.LayerNorm(8)), torch.zeros(2, 3, 4))
    assert set(classes_of(trace, ("a.weight", 0))) == {1}
    assert trace.local_uses["between.weight"] == {"between"}
    trace, _, _ = traced(nn.LayerNorm(4), torch.zeros(2, 4))
    assert trace.whole_uses == {"weight": {""}, "bias": {""}}


def test_tables_that_are_looked_up_are_noted() -> None:
    trace, _, _ = traced(nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 2)), torch.tensor([1, 2]))
    assert trace.looked_up == {"0.weight": {"0"}}
