from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_tp.errors import TPError
from lightning_tp.infer.follow.meta import Values
from lightning_tp.infer.follow.run import leaves, run
from lightning_tp.infer.follow.trace import FeatureTrace


def traced(model: nn.Module, *inputs: Any, whole: Any = (), shared: Any = None) -> tuple[FeatureTrace, Any, Any]:
    return run(model, lambda m, x: m(*x), inputs, set(whole), shared or {})


class Net(nn.Module):
    """Two weights and what is done between them."""

    def __init__(self, between: Any, width: int = 8) -> None:
        super().__init__()
        self.a, self.b, self.between = nn.Linear(4, width), nn.Linear(width, 4), between

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.between(self.a(x)))


def classes_of(trace: FeatureTrace, key: tuple[str, int]) -> list[int]:
    """The classes of a weight's features, numbered in the order in which they come."""
    found = trace.classes.find(trace.nodes[key]).tolist()
    order = list(dict.fromkeys(found))
    return [order.index(c) for c in found]


def test_a_pair_of_layers_makes_and_ends_features() -> None:
    trace, _, _ = traced(Net(F.gelu), torch.zeros(2, 3, 4))
    assert {(u.name, u.dim, u.kind) for u in trace.uses} == {("a.weight", 0, "out"), ("b.weight", 1, "in")}
    made, ended = trace.nodes["a.weight", 0], trace.nodes["b.weight", 1]
    assert torch.equal(trace.classes.find(made), trace.classes.find(ended))
    assert classes_of(trace, ("a.weight", 0)) == list(range(8))


def test_a_softmax_joins_what_it_runs_over() -> None:
    trace, _, _ = traced(Net(lambda x: x.unflatten(-1, (2, 4)).softmax(-1).flatten(-2)), torch.zeros(2, 3, 4))
    assert classes_of(trace, ("a.weight", 0)) == [0, 0, 0, 0, 1, 1, 1, 1]


def test_a_norm_over_the_width_joins_all() -> None:
    trace, _, _ = traced(Net(nn.LayerNorm(8)), torch.zeros(2, 3, 4))
    assert set(classes_of(trace, ("a.weight", 0))) == {0}
    assert "between.weight" in trace.local_uses


def test_a_gate_meets_its_up() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(4, 8), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            gate, up = self.up(x).chunk(2, -1)
            return self.down(F.silu(gate) * up)

    trace, _, _ = traced(Gated(), torch.zeros(2, 4))
    assert classes_of(trace, ("up.weight", 0)) == [0, 1, 2, 3, 0, 1, 2, 3]


def test_what_is_known_to_be_needed_whole_makes_no_features() -> None:
    trace, _, _ = traced(Net(F.gelu), torch.zeros(2, 4), whole={("a.weight", 0)})
    assert ("a.weight", 0) not in trace.nodes
    assert trace.whole_uses["a.weight"] == {"a"}


def test_a_padded_start_goes_with_the_features_beside_it() -> None:
    trace, _, _tracer = traced(Net(lambda x: F.pad(x, (0, 0, 1, 0))), torch.zeros(2, 3, 4))
    assert classes_of(trace, ("a.weight", 0)) == list(range(8))


def test_a_parameter_that_meets_shards_and_whole_activations_is_both() -> None:
    class Scaled(Net):
        def __init__(self) -> None:
            super().__init__(F.gelu)
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x) * self.scale) * self.scale

    trace, _, _ = traced(Scaled(), torch.zeros(2, 4))
    assert "scale" in trace.local_uses
    assert "scale" in trace.whole_uses


def test_a_weight_with_two_flattened_dims_is_split_along_one() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.o = nn.Parameter(torch.zeros(3, 4, 6)), nn.Parameter(torch.zeros(3, 6, 4))

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("bhk,hkd->bd", torch.einsum("bd,hdk->bhk", x, self.w), self.o)

    trace, _, _ = traced(Heads(), torch.zeros(2, 4))
    assert {(u.name, u.dim, u.kind) for u in trace.uses} == {("w", 2, "out"), ("o", 1, "in")}


def test_what_every_rank_has_beside_its_shards_may_not_meet_whole_activations() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            split, kept = self.a(x).chunk(2, -1)
            return self.b(split) + kept * self.b.bias * x

    mask = torch.arange(8) >= 4
    trace, _, _ = traced(Shared(), torch.zeros(2, 4, requires_grad=True), shared={("a.weight", 0): mask})
    assert not trace.nodes["a.weight", 0][4:].any()
    assert trace.local_uses["b.bias"]


def test_the_cross_entropy_is_a_sink() -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 16)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(self.head(x), y)

    trace, _, _ = traced(Head(), torch.zeros(2, 4), torch.tensor([1, 2]))
    assert classes_of(trace, ("head.weight", 0)) == list(range(16))
    assert len(trace.logits) == 1


def test_leaves_look_into_lists_dicts_and_dataclasses() -> None:
    @dataclass
    class Out:
        a: Tensor
        b: Any

    x = torch.zeros(1)
    assert len(leaves(Out(x, [{"c": x}, (x, None)]))) == 3
    assert leaves(object()) == []


def test_tensors_of_the_cpu_that_meet_some_on_the_meta_device() -> None:
    layer, held = nn.Linear(4, 4).to("meta"), torch.arange(4.0)
    values = Values(layer)
    known = values.onto_meta(torch.ones(4))
    with values:
        assert (layer(torch.zeros(2, 4)) * held).is_meta  # as the inputs are not moved by hand either
        assert (known + held).sum().item() == 10  # no weight has a part in it
        written = torch.zeros(4)
        written += known
        assert not written.is_meta and (written * known).is_meta
        with pytest.raises(TPError, match="depends on weights"):
            (written * known).sum().item()  # what it holds now is not known
    assert held.tolist() == [0, 1, 2, 3]
