"""What has to change in a recorded call on a rank: a table, torch function -> rule.

A rule is a function of a recorded call that returns what changes in it, or raises `NotOnShards`. Operands that every rank has whole are cut where
they lie beside the split dim of the others, counted from the last, as broadcasting has it. Equal sizes do not prove that: `try_on_shards.py`
tries it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from lightning_tp.infer.calls.layouts import Layouts, OnRanks, Sharded
from lightning_tp.infer.calls.local_sizes import PerRankInt, fraction, local_of, per_rank_ints, whole_of
from lightning_tp.infer.calls.recorded_call import Change, Given, NotOnShards, RecordedCall
from lightning_tp.infer.calls.try_on_shards import fitting_operands
from lightning_tp.infer.follow.features import gradient_is_partial
from lightning_tp.infer.follow.ops import JOINS, MOVES_ALONG_ONE_DIM, OPERANDS_STAY_WHOLE, PRODUCTS, PRODUCTS_WITH_SUMMAND, RANDOM
from lightning_tp.styles.calls.call import CONVOLUTIONS, FIRST_SIZE, SIZE_CALLS, SPLIT_CALLS, Operand
from lightning_tp.styles.calls.run_call import dim_of_item
from lightning_tp.styles.split import Ownership

Rule = Callable[[RecordedCall], Change]
Part = tuple[int, Ownership]  # (dim counted from the last, which rank has which index)
Factors = tuple[tuple[tuple[int, int, int], ...], ...]  # for each rank, (position, numerator, denominator)


def combine(call: RecordedCall) -> Change:
    """`x * mask`: an operand that every rank has whole is cut beside the split dim of the others."""
    # (path, split dim counted from the last) of the first sharded operand
    sharded = next(((g.path, g.tensor.ndim - g.layout.dim) for g in call.given if isinstance(g.layout, Sharded)), None)
    reference: OnRanks | None = None
    if not call.sums_over_ranks:  # there, what lies beside the split dim is summed over, and not in the result
        reference = next((x for x in (*call.results, *call.given) if isinstance(x.layout, Sharded)), None)
    operands = []
    for g in call.given:
        if g.layout is not None or g.is_split:
            continue  # this rank's shard already
        part = None if reference is None else _part_beside(call.name, g, reference)
        beside = sharded[0] if part and sharded and sharded[1] == part[0] else None
        operands.append(Operand(g.path, part, _enters(call, g), beside))
    return _with_operands(call, operands)


def _with_operands(call: RecordedCall, operands: list[Operand]) -> Change:
    return Change(replace(call.unchanged, operands=tuple(o for o in operands if o.part is not None or o.enter)))


def _enters(call: RecordedCall, g: Given) -> bool:
    """Return whether ranks compute partial gradients of an operand, which are equal outside of the call."""
    sharded = any(isinstance(r.layout, Sharded) for r in call.results)
    return ((sharded or call.partial_results) and g.equal_gradient) or (sharded and g.partial_inside)


def _part_beside(name: str, g: Given, reference: OnRanks) -> Part | None:
    """Return the part that a rank needs of a whole operand, beside the split dim of another tensor; None for all of it."""
    t, other, layout = g.tensor, reference.tensor, reference.layout
    assert isinstance(layout, Sharded)
    from_last = other.ndim - layout.dim
    if name in OPERANDS_STAY_WHOLE and not (name == "linear" and g.path in ((2,), ("bias",))):
        return None
    if name in PRODUCTS and from_last <= 2 and not (name in PRODUCTS_WITH_SUMMAND and g.path == (0,)):
        return None  # its rows or columns are its own
    if name == "scaled_dot_product_attention" and from_last != 3:
        return None
    if t.ndim < from_last or (name in JOINS and t.ndim == other.ndim and t.shape[layout.dim] != other.shape[layout.dim]):
        return None
    size, length = t.shape[t.ndim - from_last], other.shape[layout.dim]
    if size == length != 1:
        return from_last, layout.ownership
    if name == "scaled_dot_product_attention" and size > 1:
        raise NotOnShards(f"{size} heads beside {length}")
    return None


def einsum(call: RecordedCall) -> Change:
    """`einsum("bhqd,hd->bhq", x, w)`: dims that have the letter of a split dim are cut."""
    equation = call.args[0].replace(" ", "") if isinstance(call.args[0], str) else ""
    terms, _, result = equation.partition("->")
    letters = terms.split(",")
    if "..." in equation or not result or len(letters) != len(call.given):
        if all(g.facts.label is not None or g.is_split for g in call.given):
            return Change(call.unchanged)
        raise NotOnShards(f"the equation `{equation}`")
    owners = {}
    for word, x in zip((*letters, result), call.tensors, strict=True):
        if isinstance(x.layout, Sharded):
            owners[word[x.layout.dim]] = x.layout.ownership
    operands = []
    for g, word in zip(call.given, letters, strict=True):
        if not g.is_split:
            split = [] if isinstance(g.layout, Sharded) else [i for i, letter in enumerate(word) if letter in owners]
            part = (g.tensor.ndim - split[0], owners[word[split[0]]]) if split else None
            operands.append(Operand(g.path, part, (bool(owners) and g.equal_gradient) or _enters(call, g)))
    return _with_operands(call, operands)


def convolve(call: RecordedCall) -> Change:
    """`conv1d(x, weight, bias, groups=8)` of split output channels: the bias is cut; with groups, so is a whole input, and there are fewer."""
    change = combine(call)
    weight = next(g.tensor for g in call.given if g.path in ((1,), ("weight",)))
    channels = weight.ndim - 1  # from the last
    out, layout = call.results[0].tensor, call.results[0].layout
    if not isinstance(layout, Sharded) or layout.dim != out.ndim - channels:
        return change
    ownership, length = layout.ownership, out.shape[layout.dim]
    groups = int(whole_of(call.argument(6, "groups", 1)))
    parts: dict[object, Part] = {}
    for g in call.given:
        if g.path in ((2,), ("bias",)) and g.facts.label is None and not g.is_split:
            parts[g.path] = 1, ownership
        elif g.path in ((0,), ("input",)) and groups > 1 and g.layout is None and not g.is_split:
            owner = torch.tensor([r for r, n in ownership.runs * (length // ownership.period) for _ in range(n)])
            of_inputs = owner[:: length // groups].repeat_interleave(g.tensor.shape[g.tensor.ndim - channels] // groups)
            parts[g.path] = channels, Ownership.of(of_inputs)
    enters = {o.path: o.enter for o in change.call.operands}
    operands = [o for o in change.call.operands if o.path not in parts]
    operands += [Operand(g.path, parts[g.path], enters.get(g.path, False)) for g in call.given if g.path in parts]
    of_ranks = tuple(ownership.local(length, r) * groups // length for r in range(call.tp)) if groups > 1 else ()
    return Change(replace(call.unchanged, operands=tuple(operands), groups=of_ranks))


def resize(call: RecordedCall) -> Change:
    """`x.view(B, T, heads, -1)`: each size that is not the one of the result's shard is multiplied."""
    x, out = call.given[0], call.results[0]
    given = _sizes_given(call)
    if not given and x.layout is out.layout is None:
        return Change(call.unchanged)
    if not given and (call.kwargs.get("shape") or call.kwargs.get("size")):
        raise NotOnShards("sizes by keyword")
    if given and not isinstance(given[0], int):  # view(dtype)
        return Change(call.unchanged)
    wanted = out.sizes(call.tp)
    if call.name == "unflatten":
        start = call.args[1] % x.tensor.ndim
        wanted = wanted[start : start + len(given)]
    elif call.name == "repeat":
        before = [(1,) * call.tp] * (len(given) - x.tensor.ndim) + x.sizes(call.tp)
        wanted = [tuple(n // b for n, b in zip(ns, bs, strict=True)) for ns, bs in zip(wanted, before, strict=True)]
    pairs = [
        (g, local_of(g, call.tp) if whole_of(g) == -1 else of, local_of(g, call.tp)) for g, of in zip(given, wanted, strict=True)
    ]
    # how a wrong size follows from that of a shard may be another matter with another batch: code is to read the full one
    wrong = {id(g) for g, want, have in pairs if want != have}
    right = tuple(n for n in per_rank_ints(given) if id(n) not in wrong)
    return Change(replace(call.unchanged, sizes=factors([(want, have) for _, want, have in pairs], call.tp)), right)


def full_sizes(call: RecordedCall) -> Change | None:
    """Give full sizes to a call that makes a tensor of which every rank has all; None for one with other numbers beside the sizes."""
    if call.name in ("full", "new_full"):
        return None
    given = _sizes_given(call)
    pairs = [((n.whole,) * call.tp, n.local) if isinstance(n, PerRankInt) else ((), ()) for n in given]
    return Change(replace(call.unchanged, sizes=factors(pairs, call.tp)), per_rank_ints(given))


def _sizes_given(call: RecordedCall) -> list[Any]:
    first = FIRST_SIZE.get(call.name, 1)
    packed = len(call.args) == first + 1 and isinstance(call.args[first], (tuple, list))
    return list(call.args[first] if packed else call.args[first:])


def factors(pairs: list[tuple[tuple[int, ...], tuple[int, ...]]], tp: int) -> Factors:
    """Return by what the sizes that ranks have are multiplied to be those that are wanted; () if nothing changes."""
    of_ranks = tuple(
        tuple((at, *fraction(want[rank], have[rank])) for at, (want, have) in enumerate(pairs) if want and want[rank] != have[rank])
        for rank in range(tp)
    )
    return of_ranks if any(of_ranks) else ()


def split(call: RecordedCall) -> Change:
    """`x.split(width, -1)`: pieces of the split dim have the sizes that a rank has of each."""
    x, layout = call.given[0].tensor, call.given[0].layout
    dim = call.argument(2, "dim", 0) % x.ndim
    if not isinstance(layout, Sharded) or layout.dim != dim:
        return Change(call.unchanged)
    how = call.args[1] if len(call.args) > 1 else next(iter(v for k, v in call.kwargs.items() if k != "dim"))
    lengths = call.given[0].sizes(call.tp)[dim]
    of_pieces = [r.sizes(call.tp)[dim] for r in call.results]
    wanted = tuple(tuple(piece[rank] for piece in of_pieces) for rank in range(call.tp))
    same = all(_pieces_of(call.name, how, lengths[rank], rank, call.tp) == wanted[rank] for rank in range(call.tp))
    numbers = per_rank_ints(how if isinstance(how, (tuple, list)) else [how])
    return Change(call.unchanged if same else replace(call.unchanged, pieces=wanted), numbers)


def _pieces_of(name: str, how: Any, length: int, rank: int, tp: int) -> tuple[int, ...] | None:
    """Return the sizes of the pieces that the call makes of a dim on a rank as it stands; None where they are not worked out."""
    if name == "tensor_split":
        return None
    if not isinstance(how, int):
        return tuple(local_of(h, tp)[rank] for h in how)
    number = local_of(how, tp)[rank]
    if name in ("chunk", "unsafe_chunk"):
        return tuple(len(c) for c in torch.arange(length).chunk(number))
    return tuple(min(number, length - i) for i in range(0, length, number)) if number else ()


def getitem(call: RecordedCall) -> Change:
    """`x[..., :width]`: a slice of the split dim has the bounds of what it takes from a rank's shard."""
    x, layout, index = call.given[0].tensor, call.given[0].layout, call.args[1]
    items = list(index) if isinstance(index, tuple) else [index]
    if not isinstance(layout, Sharded):
        return Change(call.unchanged)
    position = next((n for n in range(len(items)) if dim_of_item(items, n, x.ndim) == layout.dim), None)
    if position is None:
        return Change(call.unchanged)
    item = items[position]
    if not isinstance(item, slice):
        raise NotOnShards("an index into the split dimension")
    bounds = (item.start, item.stop, item.step)
    numbers = per_rank_ints(bounds)
    length = x.shape[layout.dim]
    taken = torch.zeros(length, dtype=torch.bool)
    taken[slice(*(None if b is None else int(whole_of(b)) for b in bounds))] = True
    changes, same = [], True
    for rank in range(call.tp):
        places = taken[layout.ownership.index(rank, length)]  # (local length,)
        wanted = places.nonzero().squeeze(1)
        steps = wanted.diff()
        if bool((steps != steps[:1]).any()):
            raise NotOnShards("a slice that is not a slice of each shard", sizes=numbers)
        have = torch.arange(places.numel())[slice(*(None if b is None else local_of(b, call.tp)[rank] for b in bounds))]
        same &= torch.equal(have, wanted)
        first, last = (int(wanted[0]), int(wanted[-1]) + 1) if wanted.numel() else (0, 0)
        changes.append((position, first, last, int(steps[0]) if steps.numel() else 1, places.numel()))
    return Change(call.unchanged if same else replace(call.unchanged, items=tuple(changes)), numbers)


def move_along_one_dim(call: RecordedCall) -> Change:
    """`x.select(0, 1)`: nothing changes where it moves along another dim than the split one."""
    layout = call.given[0].layout
    if not isinstance(layout, Sharded):
        return combine(call)
    dim = call.kwargs.get("dim", call.args[1] if len(call.args) > 1 and isinstance(call.args[1], int) else 0)
    if call.name != "movedim" and dim % call.given[0].tensor.ndim == layout.dim:
        raise NotOnShards("along the split dimension")
    return Change(call.unchanged)


# all other functions: `combine`
RULES: dict[str, Rule] = {
    **dict.fromkeys(SIZE_CALLS, resize),
    **dict.fromkeys(SPLIT_CALLS, split),
    **dict.fromkeys(MOVES_ALONG_ONE_DIM, move_along_one_dim),
    **dict.fromkeys(CONVOLUTIONS, convolve),
    "__getitem__": getitem,
    "einsum": einsum,
}


def _of_function(call: RecordedCall, change: Change, layouts: Layouts, tried: set[Any]) -> Change:
    """An `autograd.Function` may stay if it is right on shards. One of activations that all ranks have gets equal gradients inside."""
    if call.runs_modules or call.sums_over_ranks or call.vocabulary is not None:
        raise NotOnShards("an autograd.Function that runs modules, or reads or makes features by itself")
    try:
        return replace(change, call=replace(change.call, operands=fitting_operands(call, change.call, layouts, tried)))
    except NotOnShards:
        if any(x.layout is not None for x in call.tensors) or any(g.is_split for g in call.given):
            raise
    outside = [g for g in call.given if gradient_is_partial(g.facts.label) or g.facts.param is not None]
    return Change(replace(call.unchanged, operands=tuple(Operand(g.path, leave=True) for g in outside)))


def change_of(call: RecordedCall, layouts: Layouts, tried: set[Any]) -> Change:
    """Return what has to change on each rank in a call that something sharded takes part in.

    Raises:
        NotOnShards: if it can't run on shards.
    """
    if len(call.products) > 1:
        raise NotOnShards("several products inside one call, or one whose rows are not split alike")
    for x in call.tensors:
        if isinstance(x.layout, str):
            raise NotOnShards(x.layout, [x.tensor])
    change = RULES.get(call.name, combine)(call)
    if call.is_function:
        return _of_function(call, change, layouts, tried)
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
