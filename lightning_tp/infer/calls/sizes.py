"""Rules of calls that are given numbers: sizes of a view, pieces of a split, bounds of a slice.

Each is a function of a recorded call that returns what changes in it, or raises `NotOnShards`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from lightning_tp.infer.calls.layouts import Sharded
from lightning_tp.infer.calls.local_sizes import PerRankInt, fraction, local_of, whole_of
from lightning_tp.infer.calls.recorded_call import Change, NotOnShards, RecordedCall
from lightning_tp.styles.calls.call import FIRST_SIZE
from lightning_tp.styles.calls.run_call import dim_of_item

Factors = tuple[tuple[tuple[int, int, int], ...], ...]  # for each rank, (position, numerator, denominator)


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
    right = tuple(n for n in _per_rank(given) if id(n) not in wrong)
    return Change(replace(call.unchanged, sizes=_factors([(want, have) for _, want, have in pairs], call.tp)), right)


def full_sizes(call: RecordedCall) -> Change | None:
    """Give full sizes to a call that makes a tensor of which every rank has all, though code gives it sizes that it read from shards.

    Returns:
        None for one with other numbers beside the sizes.
    """
    if call.name in ("full", "new_full"):
        return None
    given = _sizes_given(call)
    pairs = [((n.whole,) * call.tp, n.local) if isinstance(n, PerRankInt) else ((), ()) for n in given]
    return Change(replace(call.unchanged, sizes=_factors(pairs, call.tp)), _per_rank(given))


def _sizes_given(call: RecordedCall) -> list[Any]:
    first = FIRST_SIZE.get(call.name, 1)
    packed = len(call.args) == first + 1 and isinstance(call.args[first], (tuple, list))
    return list(call.args[first] if packed else call.args[first:])


def _per_rank(numbers: Any) -> tuple[PerRankInt, ...]:
    return tuple(n for n in numbers if isinstance(n, PerRankInt))


def _factors(pairs: list[tuple[tuple[int, ...], tuple[int, ...]]], tp: int) -> Factors:
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
    numbers = _per_rank(how if isinstance(how, (tuple, list)) else [how])
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
    numbers = _per_rank(bounds)
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
