"""What has to change in a recorded call on a rank: a table, torch function -> rule, and what comes before and after the rule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from lightning_tp.infer.calls import operands, sizes
from lightning_tp.infer.calls.layouts import Layouts, Sharded
from lightning_tp.infer.calls.recorded_call import Change, NotOnShards, RecordedCall
from lightning_tp.infer.calls.try_on_shards import fitting_operands
from lightning_tp.infer.follow.ops import MOVES_ALONG_ONE_DIM, RANDOM
from lightning_tp.styles.calls.call import CONVOLUTIONS, SIZE_CALLS, SPLIT_CALLS, Operand

Rule = Callable[[RecordedCall], Change]


def move_along_one_dim(call: RecordedCall) -> Change:
    """`x.select(0, 1)`: nothing changes where it moves along another dim than the split one."""
    layout = call.given[0].layout
    if not isinstance(layout, Sharded):
        return operands.combine(call)
    dim = call.kwargs.get("dim", call.args[1] if len(call.args) > 1 and isinstance(call.args[1], int) else 0)
    if call.name != "movedim" and dim % call.given[0].tensor.ndim == layout.dim:
        raise NotOnShards("along the split dimension")
    return Change(call.unchanged)


# all other functions: `operands.combine`
RULES: dict[str, Rule] = {
    **dict.fromkeys(SIZE_CALLS, sizes.resize),
    **dict.fromkeys(SPLIT_CALLS, sizes.split),
    **dict.fromkeys(MOVES_ALONG_ONE_DIM, move_along_one_dim),
    **dict.fromkeys(CONVOLUTIONS, operands.convolve),
    "__getitem__": sizes.getitem,
    "einsum": operands.einsum,
}


def change_of(call: RecordedCall, layouts: Layouts, tried: set[Any]) -> Change:
    """Return what has to change in a call on each rank.

    Args:
        call: one that something sharded takes part in.
        layouts: of the run.
        tried: see `fitting_operands`.

    Raises:
        NotOnShards: if it can't run on shards.
    """
    if len(call.products) > 1:
        raise NotOnShards("several products inside one call, or one whose rows are not split alike")
    for x in call.tensors:
        if isinstance(x.layout, str):
            raise NotOnShards(x.layout, [x.tensor])
    change = RULES.get(call.name, operands.combine)(call)
    if call.vocabulary is not None:
        entering = tuple(Operand(g.path, None, True) for g in call.given if g.facts.param is None and g.facts.grad)
        return replace(change, call=replace(change.call, logits=call.vocabulary, operands=entering))
    if call.sums_over_ranks:
        return replace(change, call=replace(change.call, leave=True))
    if call.name in RANDOM:
        return change
    try:
        return replace(change, call=replace(change.call, operands=fitting_operands(call, change.call, layouts, tried)))
    except NotOnShards as no:
        raise NotOnShards(str(no), no.tensors, change.sizes) from no
