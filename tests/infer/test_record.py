"""A run with a rank for each feature shows which calls change, and is repeated where code computes with the size of a shard."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lightning_tp.infer.record import record_calls
from tests.infer.tiny import Tiny, assigned, workload


def changed(found: Any) -> list[tuple[str, str]]:
    return [(module, c.name) for module, calls in found.changes.calls.items() for c in calls if c.changes]


def test_calls_that_have_full_sizes_in_them_change() -> None:
    one = workload()
    found = record_calls(one, assigned(one))
    assert changed(found) == [("", "view"), ("", "reshape")]
    assert not found.changes.broken
    assert [label.shape[-1] for label in found.outputs] == [300]


def test_parameters_meet_shards_where_ranks_have_different_elements() -> None:
    class Scaled(Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.shift = (
                nn.Parameter(nn.init.ones_(self.up.bias.detach().clone())[:1]),
                nn.Parameter(self.down.bias.detach()),
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x + self.down(self.up(x).relu() * self.scale) + self.shift)

    one = workload(Scaled())
    trace = record_calls(one, assigned(one)).trace
    assert set(trace.local_uses) >= {"scale"} and "scale" not in trace.whole_uses
    assert "shift" in trace.whole_uses and "shift" not in trace.local_uses


def test_what_prepares_a_run_is_given_the_tracer_of_each() -> None:
    class Counts(nn.Module):
        """Its loop runs as often as a rank has features: a size that has to be read in full."""

        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.up(x)
            if y.shape[-1] != 8:
                return x
            return self.down(y.relu())

    one = workload(Counts())
    prepared: list[Any] = []
    found = record_calls(one, assigned(one), prepared.append)
    assert len(prepared) >= 2 and len(set(map(id, prepared))) == len(prepared)
    assert changed(found) == [("", "__get__")]


def test_hooks_that_a_run_is_prepared_with_are_gone_after_it() -> None:
    one = workload()
    record_calls(one, assigned(one), lambda tracer: one.model.up.register_forward_hook(lambda *_: None) and None)
    assert not one.model.up._forward_hooks
