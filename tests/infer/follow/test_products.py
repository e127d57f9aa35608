from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.infer.follow.traced import Net, classes_of, labels_of, traced


class Weights(nn.Module):
    """Plain parameters of these shapes, and what is computed with them."""

    def __init__(self, forward: Any, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.compute = forward
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.zeros(shape)))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.compute(self, x)
        return out


def uses(trace: Any) -> set[tuple[str, int, str]]:
    return {(u.name, u.dim, u.kind) for u in trace.uses}


def test_a_pair_of_layers_makes_features_and_sums_over_them() -> None:
    trace, out, tracer = traced(Net(F.gelu), torch.zeros(2, 3, 4))
    assert uses(trace) == {("a.weight", 0, "out"), ("b.weight", 1, "in")}
    made, summed = trace.nodes["a.weight", 0], trace.nodes["b.weight", 1]
    assert torch.equal(trace.classes.find(made), trace.classes.find(summed))
    assert classes_of(trace, ("a.weight", 0)) == [*range(1, 9)]
    assert tracer.shadow(out).label is None


def test_sums_over_ranks_may_stay_partial() -> None:
    _, out, tracer = traced(Net(F.gelu), torch.zeros(2, 4), deferring=True)
    label = tracer.shadow(out).label
    assert label is not None and label.shape == (2, 4) and not label.any()


def test_a_gate_is_joined_with_its_up_projection() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(4, 8), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            gate, up = self.up(x).chunk(2, -1)
            return self.down(F.silu(gate) * up)

    trace, _, _ = traced(Gated(), torch.zeros(2, 4))
    assert classes_of(trace, ("up.weight", 0)) == [1, 2, 3, 4, 1, 2, 3, 4]


def test_a_weight_with_two_flattened_dims_is_split_along_one() -> None:
    heads = Weights(lambda m, x: torch.einsum("bhk,hkd->bd", torch.einsum("bd,hdk->bhk", x, m.w), m.o), w=(3, 4, 6), o=(3, 6, 4))
    trace, _, _ = traced(heads, torch.zeros(2, 4))
    assert uses(trace) == {("w", 2, "out"), ("o", 1, "in")}


@pytest.mark.parametrize("left", [False, True])
def test_a_weight_may_stand_on_either_side(left: bool) -> None:
    def compute(m: Any, x: Tensor) -> Tensor:
        return (m.w.t() @ x.t()).t() @ m.o if left else x @ m.w @ m.o

    trace, _, _ = traced(Weights(compute, w=(4, 6), o=(6, 4)), torch.zeros(2, 4))
    assert uses(trace) == {("w", 1, "out"), ("o", 0, "in")}
    assert torch.equal(trace.classes.find(trace.nodes["w", 1]), trace.classes.find(trace.nodes["o", 0]))


def test_the_columns_of_a_fused_weight_that_one_product_has_are_noted() -> None:
    def compute(m: Any, x: Tensor) -> Tensor:
        return (x @ m.w[0] @ m.o[0]) + (x @ m.w[1] @ m.o[1])

    trace, _, _ = traced(Weights(compute, w=(2, 4, 6), o=(2, 6, 4)), torch.zeros(2, 4))
    assert trace.pieces == {("w", 2): []}  # all columns of it, once for each expert
    flat = Weights(lambda m, x: (x @ m.w[:, :2]).sum() + (x @ m.w[:, 2:]).sum(), w=(4, 6))
    trace, _, _ = traced(flat, torch.zeros(2, 4))
    assert [p.tolist() for p in trace.pieces["w", 1]] == [[0, 1], [2, 3, 4, 5]]


def test_a_product_of_activations_joins_what_it_sums_over() -> None:
    scores = Net(lambda x: (x.unflatten(-1, (2, 4)).transpose(0, 1) @ x.unflatten(-1, (2, 4)).transpose(0, 1).mT).sum())
    trace, _, _ = traced(Weights(lambda m, x: scores.between(x @ m.w), w=(4, 8)), torch.zeros(3, 4))
    assert len(trace.operands) == 2  # the factors, each of all features
    trace, out, tracer = traced(Weights(lambda m, x: (x @ m.w) @ torch.zeros(8, 5), w=(4, 8)), torch.zeros(3, 4))
    assert set(classes_of(trace, ("w", 1))) == {1}
    assert labels_of(trace, tracer, out) == [[1] * 5] * 3


def test_heads_with_a_matrix_each_keep_features_of_their_own() -> None:
    def compute(m: Any, x: Tensor) -> Tensor:
        heads = (x @ m.q).view(3, 2, 4).transpose(0, 1)  # (2 heads, 3, 4)
        return torch.bmm(heads, m.each)

    trace, out, tracer = traced(Weights(compute, q=(4, 8), each=(2, 4, 5)), torch.zeros(3, 4))
    assert uses(trace) == {("q", 1, "out"), ("each", 0, "out")}
    assert classes_of(trace, ("q", 1)) == [1, 1, 1, 1, 2, 2, 2, 2]
    assert labels_of(trace, tracer, out) == [[[1] * 5] * 3, [[2] * 5] * 3]


def test_a_matrix_that_heads_share_is_needed_whole() -> None:
    def compute(m: Any, x: Tensor) -> Tensor:
        return (x @ m.q).view(3, 2, 4) @ m.shared

    trace, out, tracer = traced(Weights(compute, q=(4, 8), shared=(4, 5)), torch.zeros(3, 4))
    assert uses(trace) == {("q", 1, "out")}
    assert trace.local_uses == {"shared": {""}}
    assert labels_of(trace, tracer, out) == [[[1] * 5, [2] * 5]] * 3


def test_a_bias_goes_with_the_features_that_it_is_added_to() -> None:
    trace, _, _ = traced(Net(F.gelu), torch.zeros(2, 4))
    assert trace.local_uses == {"a.bias": {"a"}} and trace.whole_uses == {"b.bias": {"b"}}
    added = Weights(lambda m, x: torch.addmm(x @ m.w, x, m.v), w=(4, 6), v=(4, 6))
    trace, out, tracer = traced(added, torch.zeros(2, 4))
    assert torch.equal(trace.classes.find(trace.nodes["w", 1]), trace.classes.find(trace.nodes["v", 1]))
    assert labels_of(trace, tracer, out) == [[1, 2, 3, 4, 5, 6]] * 2


@pytest.mark.parametrize("known", [False, True])
def test_an_expert_without_tokens_is_split_as_in_its_other_uses(known: bool) -> None:
    def compute(m: Any, x: Tensor) -> Tensor:
        return x[:0] @ m.w @ m.o

    of_before = {("w", 1, "out"), ("o", 0, "in")} if known else set()
    trace, _, _ = traced(Weights(compute, w=(4, 6), o=(6, 4)), torch.zeros(2, 4), known=of_before)
    assert uses(trace) == of_before
    assert trace.whole_uses == ({} if known else {"w": {""}, "o": {""}})


@pytest.mark.parametrize("gathered", [False, True])
def test_a_split_weight_may_read_a_partial_gradient_if_it_is_told_so(gathered: bool) -> None:
    shared = {("w", 1): torch.ones(6, dtype=torch.bool)}
    model = Weights(lambda m, x: x @ m.w @ m.o, w=(4, 6), o=(6, 4))
    trace, out, tracer = traced(model, torch.zeros(2, 4), shared=shared, gathered=gathered, known={("o", 1, "out")})
    assert uses(trace) == {("w", 1, "out")} | ({("o", 1, "out")} if gathered else set())
    assert bool(tracer.label(out).any()) == gathered
    assert ("o" in trace.local_uses) != gathered


def test_rows_that_are_not_split_alike_are_apart() -> None:
    """(3, 2 x 4) times a weight, where the last product has the features of the first one on another rank."""
    model = Weights(lambda m, x: (x @ m.w) @ m.o, w=(4, 6), o=(6, 4))
    owner = torch.tensor([-1, 0, 0, 0, 1, 1, 1])
    _, _, tracer = traced(model, torch.zeros(2, 4), owner=owner)
    assert ("apart", "o") not in tracer.events and ("in", "o") in tracer.events
    batched = Weights(lambda m, x: torch.bmm((x @ m.w).view(2, 2, 3).transpose(0, 1), m.o), w=(4, 6), o=(2, 3, 4))
    _, _, tracer = traced(batched, torch.zeros(2, 4), owner=owner, whole={("o", 0)})
    assert ("apart", "o") in tracer.events


def test_groups_of_rows_have_weights_that_are_split_alike() -> None:
    offsets = torch.tensor([1, 3], dtype=torch.int32)

    def compute(m: Any, x: Tensor) -> Tensor:
        return torch._grouped_mm(torch._grouped_mm(x, m.w, offs=offsets), m.o, offs=offsets)

    model = Weights(compute, w=(2, 16, 8), o=(2, 8, 16)).to(torch.bfloat16)
    trace, _, _ = traced(model, torch.zeros(3, 16, dtype=torch.bfloat16))
    assert uses(trace) == {("w", 2, "out"), ("o", 1, "in")}


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_attention_joins_the_features_of_a_head_and_of_those_that_share_its_keys(kv_heads: int) -> None:
    def compute(m: Any, x: Tensor) -> Tensor:
        q = (x @ m.q).view(1, 3, 4, 2).transpose(1, 2)  # (1, 4, 3, 2)
        k, v = ((x @ w).view(1, 3, kv_heads, 2).transpose(1, 2).repeat_interleave(4 // kv_heads, 1) for w in (m.k, m.v))
        return F.scaled_dot_product_attention(q, k, v)

    trace, out, tracer = traced(Weights(compute, q=(4, 8), k=(4, 2 * kv_heads), v=(4, 2 * kv_heads)), torch.zeros(3, 4))
    heads = [1, 1, 2, 2, 3, 3, 4, 4] if kv_heads == 4 else [1, 1, 1, 1, 2, 2, 2, 2]
    assert classes_of(trace, ("q", 1)) == heads
    assert torch.equal(trace.classes.find(trace.nodes["k", 1]), trace.classes.find(trace.nodes["v", 1]))
    assert [row[0][0] for row in labels_of(trace, tracer, out)[0]] == heads[::2]
