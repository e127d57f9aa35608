from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lightning_tp as ltp
from lightning_tp.core.comm.state import I
from lightning_tp.infer.calls.local_sizes import PerRankInt
from lightning_tp.infer.calls.recorder import CallRecorder, untracked_size_reads
from lightning_tp.infer.follow.run import run
from lightning_tp.styles import RewrittenCalls
from lightning_tp.styles.calls.call import Call, Operand
from lightning_tp.styles.split import Ownership


class Recording:
    """One recording of two layers of eight features, of which rank 0 has the first, with something between them.

    Args:
        between: what is done, given the module and the features.
        inputs: `(x,)` and what else `between` is given.
        first: how many of each eight features rank 0 has.
        options: attributes of the recorder.
    """

    def __init__(
        self, between: Any, *inputs: Tensor, whole_reads: Any = (), heads: Any = None, first: int = 4, **options: Any
    ) -> None:
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b, self.w = nn.Linear(4, 8), nn.Linear(8, 4), nn.Parameter(torch.ones(8))

            def forward(self, x: Tensor, *more: Tensor) -> Tensor:
                out: Tensor = self.b(between(self, self.a(x), *more))
                return out

        self.net, self.inputs, self.recorders = Net(), inputs or (torch.zeros(2, 3, 4),), []
        self.whole_reads, self.heads, self.options = set(whole_reads), heads or {}, options
        trace, _, _ = run(self.net, self.call, self.inputs, set(), {})
        self.nodes = trace.nodes
        owner = torch.full((trace.classes.count,), -1)
        for features in trace.nodes.values():
            owner[features] = (torch.arange(n := features.numel()) * 8 >= first * n).long()
        self.owner = owner.where(torch.arange(owner.numel()) > 0, -1)
        _, _, self.tracer = run(self.net, self.call, self.inputs, set(), {}, self.make)
        self.recorder = self.recorders[0]
        self.diverging, PerRankInt.diverging = PerRankInt.diverging, set()

    @staticmethod
    def call(model: nn.Module, inputs: Any) -> Any:
        return model(*inputs)

    def make(self, tracer: Any) -> CallRecorder:
        tracer.owner = self.owner
        self.recorders.append(CallRecorder(tracer, self.owner, 2, {"a", "b"}, self.heads, self.nodes, self.whole_reads))
        for name, value in self.options.items():
            setattr(self.recorders[-1], name, value)
        return self.recorders[-1]

    @property
    def calls(self) -> list[Call]:
        return [c for c in self.recorder.found.calls.get("", []) if c.changes]

    @property
    def broken(self) -> list[str]:
        return [why for _, why in self.recorder.found.broken]

    def untracked(self) -> set[Any]:
        return untracked_size_reads(self.net, self.call, self.inputs, set(), {}, self.make, None, self.recorder, self.tracer)


def test_sizes_that_are_passed_as_sizes_may_be_local() -> None:
    found = Recording(lambda m, x: x.view(-1, x.shape[-1]).view(2, 3, x.size(2)))
    assert found.calls == [] and found.diverging == set() and not found.recorder.uneven
    assert {read[:2] for read in found.recorder.local_reads} == {("", "__get__"), ("", "size")}


@pytest.mark.parametrize(
    "between",
    [
        lambda m, x: x * torch.arange(x.shape[-1]),
        lambda m, x: x * x.shape[-1],
        lambda m, x: x * (1 if x.shape[-1] > 4 else 2),
        lambda m, x: x / x.numel(),
        lambda m, x: x.reshape(-1, x.shape[-1] + 1 - 1, 1).view(2, 3, x.shape[-1] * 2 // 2) * float(x.shape[-1]),
    ],
)
def test_numbers_that_code_computes_with_have_to_be_full(between: Any) -> None:
    found = Recording(between)
    assert len(found.diverging) == 1
    again = Recording(between, whole_reads=found.diverging)
    assert again.diverging == set()
    reads = [c for c in again.recorder.found.calls[""] if c.name in ("__get__", "numel")]
    assert {c.sizes for c in reads} == {(((2, 2, 1),),) * 2}


def test_a_size_that_is_read_in_a_loop_is_full_for_all_if_for_one() -> None:
    def between(m: Any, x: Tensor) -> Tensor:
        widths = [t.shape[-1] for t in (x, torch.zeros(8))]
        return x * torch.arange(widths[0])

    found = Recording(between)
    again = Recording(between, whole_reads=found.diverging)
    reads = [c for c in again.recorder.found.calls[""] if c.name == "__get__"]
    assert [c.sizes for c in reads] == [(((2, 2, 1),),) * 2, ()]


def test_what_a_loop_or_a_list_does_with_a_size_is_seen_in_a_second_run() -> None:
    assert len(Recording(lambda m, x: sum((m.w.sum() for _ in range(x.shape[-1])), x)).untracked()) == 1
    assert len(Recording(lambda m, x: x + torch.tensor([*range(9)][x.shape[-1]])).untracked()) == 1
    assert len(Recording(lambda m, x: 0.5 * x.shape[-1] * x).untracked()) == 1

    def counted(m: Any, x: Tensor) -> Tensor:
        return x * len(x.permute(2, 0, 1))

    (read,) = Recording(counted).untracked()
    again = Recording(counted, whole_reads={read})
    assert read[1] == "__len__" and again.untracked() == set()
    assert [c.sizes for c in again.calls] == [(((0, 2, 1),),) * 2]
    assert Recording(lambda m, x: x.view(2, 3, x.shape[-1])).untracked() == set()
    assert Recording(lambda m, x: x + 1).untracked() == set()


def test_where_ranks_have_different_sizes_the_last_rank_is_run_too() -> None:
    by_size = [0, 0, 0, 0, 0, 1, 0, 0, 0]  # as in one process on a rank with 3 or 4 features; not on one with 5

    def between(m: Any, x: Tensor) -> Tensor:
        return x + torch.tensor(by_size[x.shape[-1]])

    uneven = Recording(between, first=3)
    assert uneven.recorder.uneven and len(uneven.untracked()) == 1
    assert Recording(between).untracked() == set()


def test_a_gradient_that_is_equal_on_all_ranks_enters_where_it_is_combined_with_shards() -> None:
    x, scale = torch.zeros(2, 3, 4), torch.ones(3, 1, requires_grad=True)
    (call,) = Recording(lambda m, x, scale: x * scale, x, scale).calls
    assert call.operands == (Operand((1,), None, enter=True),)
    assert Recording(lambda m, x, scale: x * scale, x, scale.detach()).calls == []
    assert Recording(lambda m, x, scale: x * scale, x, torch.ones(3, 1, dtype=torch.int64)).calls == []


@pytest.mark.parametrize(("kind", "enters"), [("mixed", True), ("outside", True), ("tables", False)])
def test_a_parameter_enters_if_its_gradient_is_not_left_partial(kind: str, enters: bool) -> None:
    found = Recording(lambda m, x: x * m.w, **{kind: {"w"}})
    (call,) = found.calls
    assert call.operands == (Operand((1,), (1, Ownership(((0, 4), (1, 4)))), enters, (0,)),)


def test_a_product_with_the_weight_of_another_module_sums_over_ranks() -> None:
    (call,) = Recording(lambda m, x: torch.matmul(x, m.b.weight.t()).repeat(1, 1, 2)).calls
    assert (call.name, call.leave, call.operands) == ("matmul", True, ())


def test_logits_of_a_head_stay_split() -> None:
    found = Recording(lambda m, x: F.linear(torch.zeros(2, 3, 4, requires_grad=True), m.a.weight), heads={"a.weight": 8})
    (call,) = found.calls
    assert (call.name, call.logits, call.operands) == ("linear", 8, (Operand((0,), None, enter=True),))


def test_what_can_not_run_on_shards_is_named_with_its_module() -> None:
    found = Recording(lambda m, x: x.roll(1, -1))
    assert found.broken == ["`roll` in `the model`: its result on shards is another one"]
    assert found.recorder.found.broken[0][0].max() == 8
    found = Recording(lambda m, x: F.embedding(torch.tensor([[0, 1, 2]] * 2), m.a.weight).repeat(1, 1, 2))
    assert found.broken == ["`embedding` in `the model`: it looks up rows of a split table"]
    found = Recording(lambda m, x: F.embedding(torch.tensor([[0, 1, 2]] * 2), m.a.weight).repeat(1, 1, 2), tables={""})
    assert found.broken == []
    found = Recording(lambda m, x: torch.linalg.multi_dot([x[0], m.b.weight.t(), m.a.weight.t()])[None])
    assert len(found.broken) == 2 and "several products" in found.broken[0]


def test_a_whole_tensor_made_with_a_size_of_a_shard_is_made_with_the_full_one() -> None:
    def between(m: Any, x: Tensor) -> Tensor:
        return x + torch.zeros(x.shape[-1]).sum()

    assert len(Recording(between).diverging) == 1
    found = Recording(between, remakes=True)
    assert found.diverging == set()
    (call,) = found.calls
    assert (call.name, call.sizes) == ("zeros", (((0, 2, 1),),) * 2)


def test_what_is_written_into_is_compared_with_what_it_was() -> None:
    def between(m: Any, x: Tensor) -> Tensor:
        y = x + 1
        y.mul_(torch.arange(8.0))
        return y

    found = Recording(between)
    assert [(c.name, len(c.operands)) for c in found.calls] == [("mul_", 1)] and found.broken == []


def test_modules_that_a_style_runs_are_not_recorded() -> None:
    found = Recording(lambda m, x: x.relu())
    assert {*found.recorder.found.calls} == {""}
    assert {c.name for c in found.recorder.found.calls[""]} == {"relu"}


def test_nothing_is_recorded_while_code_is_shown_the_sizes_of_a_rank() -> None:
    found = Recording(lambda m, x: x.roll(1, -1).view(2, 3, x.shape[-1]))
    found.untracked()
    assert len(found.recorders) == 2 and not found.recorders[1].found.broken and not found.recorders[1].found.calls
    assert PerRankInt.shown is None


def calls_of(between: Any, width: int = 8) -> list[Call]:
    """What changes in a module that does something between two layers."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.w = nn.Linear(4, width), nn.Linear(width, 4), nn.Parameter(torch.ones(width))

        def forward(self, x: Tensor) -> Tensor:
            return self.b(between(self, self.a(x)))

    plan = ltp.infer_plan(Net(), (torch.zeros(2, 3, 4),), tp=2).without_sequence_parallel()
    return [c for r in plan.rules if isinstance(r.style, RewrittenCalls) for c in r.style.calls]


def test_nothing_changes_where_sizes_are_read_from_shards() -> None:
    assert calls_of(lambda m, x: x.view(x.shape[0], x.size(1), x.shape[-1]).relu()) == []


def test_a_size_that_is_known_as_a_whole_is_changed() -> None:
    (call,) = calls_of(lambda m, x: x.view(2, 3, 8).relu())
    assert (call.name, call.sizes) == ("view", (((2, 1, 2),), ((2, 1, 2),)))


def test_a_slice_is_taken_where_it_lies_on_a_rank() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 16), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return self.b(y[..., :8] * y[..., 8:])

    plan = ltp.infer_plan(Net(), (torch.zeros(2, 3, 4),), tp=2).without_sequence_parallel()
    items = [c.items for r in plan.rules if isinstance(r.style, RewrittenCalls) for c in r.style.calls]
    assert items == [((1, 0, 4, 1, 8), (1, 0, 4, 1, 8)), ((1, 4, 8, 1, 8), (1, 4, 8, 1, 8))]


def test_a_whole_operand_is_cut_where_it_lies_beside_the_split_dim() -> None:
    (call,) = calls_of(lambda m, x: x * torch.arange(8.0))
    (operand,) = call.operands
    assert operand.part == (1, Ownership(((0, 4), (1, 4))))
    assert not operand.enter


def test_a_loop_over_one_place_in_the_code_holds_turns() -> None:
    def twice(m: Any, x: Tensor) -> Tensor:
        whole = torch.zeros(2, 3, 8)
        whole, x = (t.view(2, 3, 8) for t in (whole, x))
        return x + whole

    views = [c for c in calls_of(twice) if c.name == "view"]
    assert [bool(c.sizes) for c in views] == [False, True]


@pytest.mark.parametrize(
    "between",
    [lambda m, x: x.cumsum(-1), lambda m, x: x.sort(-1).values, lambda m, x: x[..., [3, 1, 0, 2, 7, 5, 4, 6]] @ torch.randn(8, 8)],
)
def test_what_needs_all_features_keeps_the_weights_whole_or_gathers_them(between: Any) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.b(between(self, self.a(x))))

    plan = ltp.infer_plan(Net(), (torch.zeros(2, 3, 4),), tp=2).without_sequence_parallel()
    style = next((r.style for r in plan.rules if r.pattern == "a"), None)
    assert style is None or style.output == I  # type: ignore[attr-defined]
