"""One linear layer that computes several things at once: q, k and v; gate and up.

Each part is split by itself, so that a rank's output is its shard of every part, in the order of the parts: the model's own
`chunk` or `split` then finds (q / tp | k / tp | v / tp) where it looked for (q | k | v).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from lightning_tp.core.comm.axis import State
from lightning_tp.core.comm.transitions import transition
from lightning_tp.core.modules.swap_class import swap_class
from lightning_tp.errors import TPError
from lightning_tp.styles.base import BindContext, Style, check_state, linear_dims, set_sizes
from lightning_tp.styles.linear import _Colwise
from lightning_tp.styles.split import Split, check_heads, even_split, head_split


@dataclass(frozen=True)
class FusedColwise(Style):
    """Split a fused linear layer part by part: weight (q + 2 kv, in) -> local ((q + 2 kv) / tp, in).

    Args:
        parts: how many equal parts (2 for gate and up, 3 for q, k and v of the same size), or the size of each.
        heads: how many heads each part has: as many numbers as parts, or one for all. A part with fewer heads than tp
            (the key/value heads of grouped queries) is shared by neighbouring ranks, and its gradient summed over them.
        input: what arrives: "gathered" (an enclosing module saw to it), "replicate" or "sequence".

    Example:
        >>> from torch import nn
        >>> qkv = FusedColwise(parts=(64, 16, 16), heads=(4, 1, 1)).splits(nn.Linear(64, 96), "qkv", tp=2)["weight"]
        >>> qkv.ranges[1], qkv.sum_over, qkv.sum_rows
        (((32, 64), (64, 80), (80, 96)), 2, (32, 64))
    """

    name: ClassVar[str] = "fused_colwise"
    parts: int | tuple[int, ...] = 3
    heads: int | tuple[int, ...] | None = None
    input: State | None = None

    def __post_init__(self) -> None:
        for option in ("parts", "heads"):  # a list comes from JSON
            if isinstance(value := getattr(self, option), list):
                object.__setattr__(self, option, tuple(value))

    def splits(self, module: nn.Module, where: str, tp: int) -> dict[str, Split]:
        out_dim, _, shape = linear_dims(module, where, self.name)
        check_state(self, "input", ("gathered", "replicate", "sequence"), where)
        length = shape[out_dim]
        parts = self._parts(where, length)
        heads = self._heads(where, len(parts))
        names = {"weight": _fused_split(where, parts, heads, out_dim, tp)}
        if getattr(module, "bias", None) is not None:
            names["bias"] = _fused_split(where, parts, heads, 0, tp)
        return names

    def bind(self, module: nn.Module, site: BindContext) -> None:
        out_dim, _, shape = linear_dims(module, site.where, self.name)
        set_sizes(module, out_features=shape[out_dim], nf=shape[out_dim])
        enter = transition(self.input or "gathered", "gathered")
        if enter is not None:
            swap_class(module, _Colwise, _axis=site.axis, _enter=enter, _gather=None)

    def to_torch(self, module: nn.Module) -> Any:
        raise TPError(
            "torch.distributed.tensor.parallel has no style for a fused weight: ColwiseParallel would give one rank q and half of k. "
            "Split the layer in one for each part, or use `backend='local'`."
        )

    def _parts(self, where: str, length: int) -> tuple[int, ...]:
        if isinstance(self.parts, int):
            if length % self.parts:
                raise TPError(
                    f"`{where}`: {length} output features are not {self.parts} equal parts. Give their sizes: `parts=(.., ..)`."
                )
            return (length // self.parts,) * self.parts
        if sum(self.parts) != length:
            raise TPError(f"`{where}`: the parts {self.parts} add up to {sum(self.parts)}, the layer has {length} output features.")
        return self.parts

    def _heads(self, where: str, num_parts: int) -> tuple[int | None, ...]:
        if self.heads is None or isinstance(self.heads, int):
            return (self.heads,) * num_parts
        if len(self.heads) != num_parts:
            raise TPError(f"`{where}`: {len(self.heads)} numbers of heads for {num_parts} parts. Give one for each part.")
        return self.heads


def _fused_split(where: str, parts: tuple[int, ...], heads: tuple[int | None, ...], dim: int, tp: int) -> Split:
    """The splits of all parts behind each other; shared parts have to be neighbours (k and v are)."""
    splits: list[Split] = []
    offset = 0
    query_heads = max((h for h in heads if h is not None), default=None)
    for size, num_heads in zip(parts, heads, strict=True):
        if num_heads is None:
            split = even_split(size, dim, tp)
            ranges = tuple(tuple((a + offset, b + offset) for a, b in r) for r in split.ranges)
            splits.append(Split(dim, ranges))
        else:
            assert query_heads is not None
            check_heads(where, num_heads, query_heads, size, tp)
            splits.append(head_split(size, dim, tp, num_heads, offset=offset))
        offset += size
    ranges = tuple(tuple(r for split in splits for r in split.ranges[rank]) for rank in range(tp))
    shared = [i for i, split in enumerate(splits) if split.sum_over > 1]
    if not shared:
        return Split(dim, ranges)
    first, last = shared[0], shared[-1]
    if shared != list(range(first, last + 1)) or len({splits[i].sum_over for i in shared}) > 1:
        raise TPError(f"`{where}`: parts with {heads} heads over tp={tp}: the shared ones have to lie side by side.")
    lengths = [split.length(0) for split in splits]  # heads are equal, so every rank's lengths are
    rows = (sum(lengths[:first]), sum(lengths[: last + 1]))
    return Split(dim, ranges, sum_over=splits[first].sum_over, sum_rows=rows)
