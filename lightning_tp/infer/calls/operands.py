"""Rules of calls that combine tensors: which operand that every rank has whole is cut, and of which ranks compute partial gradients.

Each is a function of a recorded call that returns what changes in it, or raises `NotOnShards`. Operands are cut where they lie beside the
split dim of the others, counted from the last, as broadcasting has it. Equal sizes do not prove that: `try_on_shards.py` tries it.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lightning_tp.infer.calls.layouts import OnRanks, Sharded
from lightning_tp.infer.calls.local_sizes import whole_of
from lightning_tp.infer.calls.recorded_call import Change, Given, NotOnShards, RecordedCall
from lightning_tp.infer.follow.ops import JOINS, OPERANDS_STAY_WHOLE, PRODUCTS, PRODUCTS_WITH_SUMMAND
from lightning_tp.styles.calls.call import Operand
from lightning_tp.styles.split import Ownership

Part = tuple[int, Ownership]  # (dim counted from the last, which rank has which index)


def combine(call: RecordedCall) -> Change:
    """`x * mask`: an operand that every rank has whole is cut beside the split dim of the others."""
    sharded = [g for g in call.given if isinstance(g.layout, Sharded)]
    reference: OnRanks | None = None
    if not call.sums_over_ranks:  # there, what lies beside the split dim is summed over, and not in the result
        reference = next((x for x in (*call.results, *call.given) if isinstance(x.layout, Sharded)), None)
    operands = []
    for g in call.given:
        if g.layout is not None or g.is_split:
            continue  # this rank's shard already
        part = None if reference is None or not _may_be_cut(call.name, g) else _part_beside(call.name, g, reference)
        beside = sharded[0].path if part and sharded and _is_beside(sharded[0], part) else None
        operands.append(Operand(g.path, part, _enters(call, g), beside))
    return _with_operands(call, operands)


def _with_operands(call: RecordedCall, operands: list[Operand]) -> Change:
    return Change(replace(call.unchanged, operands=tuple(o for o in operands if o.part is not None or o.enter)))


def _enters(call: RecordedCall, g: Given) -> bool:
    """Return whether ranks compute partial gradients of an operand, which are equal outside of the call."""
    sharded = any(isinstance(r.layout, Sharded) for r in call.results)
    return ((sharded or call.partial_results) and g.equal_gradient) or (sharded and g.partial_inside)


def _may_be_cut(name: str, g: Given) -> bool:
    return name not in OPERANDS_STAY_WHOLE or (name == "linear" and g.path in ((2,), ("bias",)))


def _is_beside(g: Given, part: Part) -> bool:
    return isinstance(g.layout, Sharded) and g.tensor.ndim - g.layout.dim == part[0]


def _part_beside(name: str, g: Given, reference: OnRanks) -> Part | None:
    """Return the part that a rank needs of a whole operand, beside the split dim of another tensor; None for all of it."""
    t, other, layout = g.tensor, reference.tensor, reference.layout
    assert isinstance(layout, Sharded)
    from_last = other.ndim - layout.dim
    if name in PRODUCTS and from_last <= 2 and not (name in PRODUCTS_WITH_SUMMAND and g.path == (0,)):
        return None  # its rows or columns are its own
    if name == "scaled_dot_product_attention" and from_last != 3:
        return None
    if name in JOINS and t.ndim == other.ndim and t.shape[layout.dim] != other.shape[layout.dim]:
        return None
    if t.ndim < from_last:
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
            operands.append(Operand(g.path, part, bool(owners) and g.equal_gradient))
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


def check_broadcast(call: RecordedCall, t: Tensor, layout: Sharded) -> None:
    """Check that operands of a call lie beside each other, as those of a pointwise operation do: for one that can't be tried.

    Raises:
        NotOnShards: if they do not, and one of them has the size of the split dim.
    """
    others = [g.tensor for g in call.given if g.tensor is not t and g.tensor.ndim and g.facts.label is None]
    try:
        shape = torch.broadcast_shapes(t.shape, *(o.shape for o in others))
    except RuntimeError:
        shape = None
    as_broadcast = shape is not None and (not call.results or call.results[0].tensor.shape == shape)
    if not as_broadcast and any(o.numel() > 1 for o in others) and any(t.shape[layout.dim] in o.shape for o in others):
        raise NotOnShards("operands that do not broadcast, one of which has the size of the split dimension")
