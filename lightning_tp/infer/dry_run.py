"""Run a plan on the shards of one rank, without other ranks: what raises is not sharded.

A safety net under the inference: it follows the features of the full model, and code may do with a shard what could not be foreseen. The
numbers that come out mean nothing, since those of the other ranks are missing; only that the code runs is checked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from lightning_tp.apply.bind import BindError, bind_styles, local_parameter, replace_parameters
from lightning_tp.core.comm.axis import Axis
from lightning_tp.core.comm.fake_world import FakeGroup
from lightning_tp.core.modules.blocks import enclosing
from lightning_tp.core.modules.snapshot import MetaWeights, has_more_than, preserve_modules
from lightning_tp.errors import TPError
from lightning_tp.infer.blocks.repeated import RepeatedBlocks, skip_copies
from lightning_tp.infer.blocks.workload import Workload
from lightning_tp.infer.follow.gradients import gradients_apart
from lightning_tp.infer.follow.meta import Values
from lightning_tp.plan.checked import CheckedPlan
from lightning_tp.plan.plan import Plan
from lightning_tp.styles import PrepareInput, PrepareOutput

MOST_COPIED = 50_000_000  # parameters, above which the shards have no values


class Failure(NamedTuple):
    """What raised on a rank."""

    module: str  # whose code it was; "" if that is not known
    why: str  # the error in one line


class _LoneAxis(Axis):
    """The tensor-parallel axis of a rank whose peers are not there: it gets copies of what it sends. Counts collectives by name."""

    def __init__(self, rank: int, size: int) -> None:
        self.calls: Counter[str] = Counter()
        super().__init__(FakeGroup(rank, size, note=lambda kind, size: self.calls.update([kind])))

    def __deepcopy__(self, memo: dict[int, Any]) -> _LoneAxis:
        return self


def dry_run(workload: Workload, plan: Plan) -> Failure | None:
    """Run the plan forward on the shards of the first and of the last rank; one of the blocks that do the same.

    Returns:
        What raised first; None if all ran.
    """
    model, tp = workload.model, workload.tp
    if tp == 1:
        return None
    if has_more_than(model, MOST_COPIED):
        with MetaWeights(model):
            return dry_run(workload, plan)
    try:
        checked = plan.check(model, tp)
    except TPError as error:
        return Failure("", str(error)[:120])
    blocks = blocks_of_one_plan(workload.blocks, checked)
    for rank in (0, tp - 1):
        with preserve_modules(model):
            if failure := _run_rank(workload, blocks, checked, rank):
                return failure
    return None


def blocks_of_one_plan(blocks: RepeatedBlocks, plan: CheckedPlan) -> RepeatedBlocks:
    """Return the blocks that do the same, and whose layers have the same styles; those at the boundaries of a stream stand alone."""
    ends = {e.where for e in plan.entries if isinstance(e.style, (PrepareInput, PrepareOutput))}
    styles: dict[str, list[tuple[str, str]]] = {n: [] for n in {*blocks.copies, *blocks.copies.values()}}
    for entry in plan.entries:
        if block := enclosing(entry.where, styles):
            styles[block].append((entry.where[len(block) :], repr(entry.style)))
    return blocks.refined({n: tuple(of_block) for n, of_block in styles.items() if n not in ends})


def _bind(model: nn.Module, plan: CheckedPlan, axis: Axis) -> None:
    replace_parameters(model, plan, lambda name, p, split: local_parameter(p, split, axis.rank))
    bind_styles(model, plan, axis)


def _run_rank(workload: Workload, blocks: RepeatedBlocks, plan: CheckedPlan, rank: int) -> Failure | None:
    model = workload.model
    with _running_modules(model) as running:
        try:
            _bind(model, plan, _LoneAxis(rank, workload.tp))
            values, inputs = _known_values(model, workload.inputs)
            with gradients_apart(model), skip_copies(model, blocks), values:
                workload.call(model, inputs)
        except BindError as error:
            return Failure(error.where, _line(error))
        except Exception as error:
            if ("meta" in str(error) or "device" in str(error)) and any(p.is_meta for p in model.parameters()):
                return None  # it decides by values, which are not there: it may run with them
            return Failure(running[-1] if running else "", _line(error))
    return None


@contextmanager
def _running_modules(model: nn.Module) -> Iterator[list[str]]:
    """Yield the names of the modules whose forward runs at the moment, outermost first."""
    names = {id(m): n for n, m in model.named_modules()}
    running: list[str] = []

    def leave(module: nn.Module, args: Any, out: Any) -> None:
        if id(module) in names:
            running.pop()

    handles = [
        register_module_forward_pre_hook(lambda m, _: running.append(names[id(m)]) if id(m) in names else None),
        register_module_forward_hook(leave),
    ]
    try:
        yield running
    finally:
        for handle in handles:
            handle.remove()


def _known_values(model: nn.Module, inputs: Any) -> tuple[Any, Any]:
    """Return, for a model on the meta device, a mode in which code may decide by values that depend on no weights, and the inputs there."""
    if not any(p.is_meta for p in model.parameters()):
        return nullcontext(), inputs
    values = Values(model)
    return values, values.onto_meta(inputs)


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:120]


def count_collectives(
    model: nn.Module, loss_of: Callable[[nn.Module, Any], Tensor], inputs: Any, plan: CheckedPlan, tp: int
) -> dict[str, int]:
    """Count the collectives on the tensor-parallel axis in one forward and backward of a rank, by name; nothing is sent.

    Args:
        model: on any device; left as it was. With weights, the rank computes as if all others had its shards.
        loss_of: runs it on the inputs.
        inputs: on any device.
        plan: checked against it.
        tp: ranks.
    """
    if has_more_than(model, MOST_COPIED):
        with MetaWeights(model):
            return count_collectives(model, loss_of, inputs, plan, tp)
    axis = _LoneAxis(0, tp)
    with preserve_modules(model):
        model.eval()
        _bind(model, plan, axis)
        shards = dict(model.named_parameters())
        values, inputs = _known_values(model, inputs)
        with values:
            loss_of(model, inputs).backward()
        summed = {(s.sum_over(tp), shards[n].dtype) for n, s in plan.splits.items() if n in shards and shards[n].grad is not None}
    partial_gradients = sum(n > 1 for n, _ in summed)  # all at once, for each dtype and number of ranks that have a part
    return dict(axis.calls + Counter({"all-reduce": partial_gradients}))
