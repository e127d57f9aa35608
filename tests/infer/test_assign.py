"""Which weights can't be sharded and why, and which rank has which feature of the others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_tp.infer.assign import (
    factor_to_share,
    leaks_partial_gradients,
    refused_by_calls,
    sets_smaller_than_tp,
    weights_inside,
)
from lightning_tp.infer.calls.recorder import CallChanges
from lightning_tp.infer.record import record_calls
from tests.infer.tiny import Tiny, assigned, workload


def smaller(model: nn.Module, tp: int) -> dict[Any, str]:
    return sets_smaller_than_tp(workload(model).trace(set(), {}).trace, tp, dict(model.named_parameters()))


@pytest.mark.parametrize(("tp", "refused"), [(2, []), (3, ["qkv.weight"]), (9, ["qkv.weight"]), (10, ["up.weight", "qkv.weight"])])
def test_weights_of_fewer_sets_of_features_than_ranks_are_not_sharded(tp: int, refused: list[str]) -> None:
    found = smaller(Tiny(), tp)
    assert [name for name, _ in found] == refused
    assert all("needs features from several ranks" in why for why in found.values())


def test_a_weight_that_would_be_sharded_by_rows_and_by_columns_is_not() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.square, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.square(self.first(x).relu())
            return self.last(self.square(x).relu())

    found = smaller(Twice(), 2)
    assert found == {("square.weight", d): "one of its uses would shard its rows, another its columns" for d in (0, 1)}


def test_features_are_dealt_out_in_order_as_torch_chunks_and_heads_stay_together() -> None:
    found = assigned(workload())
    owner = {name: found.owner[nodes].tolist() for (name, _), nodes in found.trace.nodes.items()}
    assert owner["up.weight"] == owner["down.weight"] == [0] * 5 + [1] * 4
    assert owner["qkv.weight"] == [0, 0, 1, 1] * 3
    assert owner["o.weight"] == [0, 0, 1, 1]
    assert owner["head.weight"] == [0] * 150 + [1] * 150
    assert found.owner[0] == -1
    assert found.logits == {"head.weight": 300}
    assert found.layers["qkv.weight"] == "qkv" and not found.mixed


def test_heads_are_dealt_out_whole_where_tp_does_not_divide_them() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.o = nn.Linear(4, 10), nn.Linear(10, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.o(self.q(x).unflatten(-1, (5, 2)).softmax(-1).flatten(-2))

    found = assigned(workload(Heads()))
    assert found.owner[found.trace.nodes["q.weight", 0]].tolist() == [0] * 4 + [1] * 6


def test_a_layer_that_two_modules_use_or_that_has_a_forward_of_its_own_has_no_style() -> None:
    class Own(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    model = Tiny()
    model.up = Own(4, 9)
    assert "up.weight" not in assigned(workload(model)).layers and "down.weight" in assigned(workload(model)).layers


def test_what_leaves_the_model_or_is_too_small_is_refused() -> None:
    one = workload()
    found, recording = assigned(one), record_calls(one, assigned(one))
    assert refused_by_calls(found, recording.changes, recording.outputs, 2) == {}
    small = refused_by_calls(found, recording.changes, recording.outputs, 5)  # 300 rows, 64 of them for each of 5 ranks
    assert small == {("head.weight", 0): "output too small to be worth sharding"}
    features = found.trace.nodes["up.weight", 0][None]
    assert refused_by_calls(found, CallChanges(), (features,), 2) == {("up.weight", 0): "the model returns its features"}
    broken = CallChanges(broken=[(features[:, :1], "`f` of them")])
    assert refused_by_calls(found, broken, (), 2) == {("up.weight", 0): "`f` of them"}


def test_code_that_fails_keeps_the_weights_of_the_innermost_module_whole_that_has_some() -> None:
    trace = assigned(workload()).trace
    assert weights_inside("up", "why", trace) == {("up.weight", 0): "`up` does not run on local shards (why)"}
    assert [n for n, _ in weights_inside("down.act", "why", trace)] == ["up.weight", "qkv.weight", "head.weight"]


class Fused(nn.Module):
    """Four heads of queries, one of keys, in one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.qk, self.o = nn.Linear(4, 10), nn.Linear(4 * 3, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.qk(x).split((8, 2), -1)
        scores = q.view(2, 3, 4, 2).transpose(1, 2) @ k[:, None].mT
        return self.o(scores.transpose(1, 2).flatten(2))


def test_the_part_of_a_fused_weight_that_joins_the_others_may_be_shared() -> None:
    trace = workload(Fused()).trace(set(), {}).trace
    refused = {("qk.weight", 0): "why"}
    found = factor_to_share(refused, trace)
    assert found is not None and found[0] == ("qk.weight", 0)
    assert found[1].tolist() == [False] * 8 + [True] * 2
    assert factor_to_share({**refused, ("other.weight", 0): ""}, trace) is not None  # it makes no features
    assert factor_to_share({("o.weight", 1): "why"}, trace) is None


def test_features_that_every_rank_has_leak_where_they_come_out() -> None:
    run = workload(Fused()).trace(set(), {("qk.weight", 0): torch.tensor([False] * 8 + [True] * 2)})
    assert not leaks_partial_gradients(run)

    class Leaks(Fused):
        def forward(self, x: Tensor) -> Any:  # type: ignore[override]
            return super().forward(x), self.qk(x)[..., 8:]

    run = workload(Leaks()).trace(set(), {("qk.weight", 0): torch.tensor([False] * 8 + [True] * 2)})
    assert leaks_partial_gradients(run)
