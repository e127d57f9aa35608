"""What rules leave open: states of inputs and outputs, boundaries, heads, gradients of replicated modules."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from examples.llama import PLAN
from lightning_tp.core.comm.state import SEQUENCE, I, R
from lightning_tp.plan.plan import Plan
from lightning_tp.styles import Colwise, PrepareInput, Replicate, Rowwise
from tests.plan.test_check import MLP, SPLIT, tiny


def styles(plan: Plan) -> dict[str, Any]:
    return {e.where: e.style for e in plan.entries if e.style.splits_parameters}


QKV = {"attn.q": "colwise", "attn.k": "colwise", "attn.v": "colwise", "attn.o": "rowwise"}


def test_the_stream_decides_what_arrives_and_what_leaves() -> None:
    model = nn.Sequential(nn.Embedding(10, 8), MLP(), nn.Linear(8, 10))
    rules = {"0": "vocab_embedding", "1.up": "colwise", "1.down": "rowwise", "2": "vocab_head"}
    whole = styles(Plan({**rules, "1.norm": "replicate"}).check(model, tp=2))
    assert whole["0"].output == whole["1.down"].output == I
    assert whole["1.up"].input == whole["2"].input == I
    shards = styles(Plan({**rules, "1.norm": "sequence"}).check(model, tp=2))
    assert shards["0"].output == shards["1.down"].output == SEQUENCE
    assert shards["1.up"].input == shards["2"].input == SEQUENCE


def test_a_door_is_found_where_the_input_can_be_gathered_once() -> None:
    plan = Plan(PLAN).check(tiny(), tp=2)
    doors = {e.where: e for e in plan.entries if isinstance(e.style, PrepareInput)}
    assert list(doors) == [f"layers.{i}.{part}" for i in range(2) for part in ("attention", "feed_forward")]
    assert doors["layers.0.attention"].style == PrepareInput(arrives="S(1)", wanted="R")
    assert doors["layers.0.attention"].reason == "input all-gathered once for wq, wk, wv; wo reduces"
    assert styles(plan)["layers.0.attention.wq"].input == R
    assert not any(isinstance(e.style, PrepareInput) for e in Plan(PLAN).without_sequence_parallel().check(tiny(), tp=2).entries)


def test_no_door_around_a_norm_on_shards_of_the_sequence() -> None:
    model = nn.ModuleDict({"blocks": nn.ModuleList(MLP() for _ in range(2))})
    plan = Plan({**SPLIT, "blocks.*.norm": "sequence"}).check(model, tp=2)
    assert styles(plan)["blocks.0.up"].input == SEQUENCE  # it gathers for itself
    assert not any(isinstance(e.style, PrepareInput) for e in plan.entries)


def test_a_door_that_is_given_is_not_doubled() -> None:
    rules = {**PLAN, "layers.*.attention": PrepareInput(arg="x")}
    plan = Plan(rules).check(tiny(), tp=2)
    doors = [e.style for e in plan.entries if e.where == "layers.1.attention"]
    assert doors == [PrepareInput(arrives="S(1)", arg="x")]
    assert styles(plan)["layers.1.attention.wq"].input == R


class Heads(nn.Module):
    def __init__(self, heads: int, kv_heads: int, size: int, **attributes: int) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(8, heads * size), nn.Linear(8, kv_heads * size)
        self.v, self.o = nn.Linear(8, kv_heads * size), nn.Linear(heads * size, 8)
        for name, value in attributes.items():
            setattr(self, name, value)


@pytest.mark.parametrize(
    "attributes, found",
    [
        ({"head_dim": 6}, True),
        ({"head_size": 6}, True),
        ({"d_head": 6}, True),
        ({"attention_head_size": 6}, True),
        ({"num_heads": 4}, True),
        ({"n_heads": 4}, True),
        ({"n_head": 4}, True),
        ({"num_attention_heads": 4}, True),
        ({"nhead": 4}, True),
        ({"head_dim": 6, "num_heads": 99}, True),
        ({"head_dim": 5}, False),  # does not divide them: it means something else
        ({"num_heads": 5}, False),
        ({"num_heads": 0}, False),
        ({}, False),
    ],
    ids=str,
)
def test_heads_are_found_by_the_sizes_that_the_module_stores(attributes: dict[str, int], found: bool) -> None:
    model = nn.ModuleDict({"attn": Heads(4, 2, 6, **attributes)})
    of = styles(Plan(QKV).check(model, tp=2))
    q, k = ((4, 4), (2, 4)) if found else ((None, None), (None, None))
    assert (of["attn.q"].heads, of["attn.q"].query_heads) == q
    assert (of["attn.k"].heads, of["attn.k"].query_heads) == (of["attn.v"].heads, of["attn.v"].query_heads) == k


def test_heads_that_are_given_stay() -> None:
    model = nn.ModuleDict({"attn": Heads(4, 2, 6, head_dim=6)})
    of = styles(Plan({**QKV, "attn.k": Colwise(heads=1, query_heads=4)}).check(model, tp=2))
    assert of["attn.k"].heads == 1 and of["attn.v"].heads == 2


def test_an_mlp_has_no_heads_and_neither_has_a_gathered_output() -> None:
    model = nn.ModuleDict({"attn": Heads(4, 1, 6, head_dim=6), "mlp": MLP(hidden=341)})
    rules = {**QKV, "mlp.up": "colwise", "mlp.down": "rowwise", "**": "replicate"}
    gathered = {"attn.q": Colwise(output="I"), "attn.k": Colwise(output="I"), "attn.o": Rowwise(input="I")}
    plan = Plan({**rules, **gathered}).check(model, tp=2)
    assert styles(plan)["mlp.up"].heads is None
    assert plan.splits["attn.k.weight"].ranges == (((0, 3),), ((3, 6),))
    assert plan.splits["attn.v.weight"].ranges == (((0, 6),), ((0, 6),))


def test_which_full_parameters_have_a_partial_gradient() -> None:
    class Attention(Heads):
        def __init__(self) -> None:
            super().__init__(4, 4, 6, head_dim=6)
            self.q_norm, self.norm = nn.LayerNorm(6), nn.LayerNorm(8)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn, self.norm = Attention(), nn.LayerNorm(8)

    rules = {**QKV, "**": "replicate"}
    plan = Plan(rules).check(Model(), tp=2)
    states = {name: split.state for name, split in plan.splits.items() if "norm" in name and "weight" in name}
    # beside split layers a norm may stand before, between or behind them: its first gradients tell
    assert states == {"attn.q_norm.weight": None, "attn.norm.weight": None, "norm.weight": I}
    assert "(6,) gradient checked in the first backward pass" in str(plan)
    inside = Plan({**rules, "norm": "sequence"}).check(Model(), tp=2)  # now attn has a boundary, and all inside is replicated
    states = {name: split.state for name, split in inside.splits.items() if "norm" in name and "weight" in name}
    assert states == {"attn.q_norm.weight": R, "attn.norm.weight": R, "norm.weight": R}
    given = Plan({**rules, "attn.q_norm": Replicate(state="I")}).check(Model(), tp=2)
    assert given.splits["attn.q_norm.weight"].state == I


def test_between_gathered_layers_gradients_are_whole() -> None:
    """As Olmo 2 does it: norms over the full width of q and k, so that their outputs are gathered."""

    class Attention(Heads):
        def __init__(self) -> None:
            super().__init__(4, 2, 6, head_dim=6)
            self.q_norm, self.k_norm = nn.RMSNorm(24), nn.RMSNorm(12)

    whole = Colwise(output="I")
    rules = {"attn.q": whole, "attn.k": whole, "attn.v": whole, "attn.o": Rowwise(input="I"), "**": "replicate"}
    plan = Plan(rules).check(nn.ModuleDict({"attn": Attention()}), tp=2)
    assert [plan.splits[f"attn.{n}_norm.weight"].sum_over(2) for n in "qk"] == [1, 1]
