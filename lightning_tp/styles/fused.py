"""One linear layer that computes several things at once: q, k and v; gate and up.

Each part is split by itself, so that a rank's output is its shard of every part, in the order of the parts: the model's own `chunk` or
`split` then finds (q / tp | k / tp | v / tp) where it would find (q | k | v).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import nn

from lightning_tp.core.comm.state import SEQUENCE, I, R, S, State
from lightning_tp.core.comm.transitions import transition
from lightning_tp.core.modules.swap_class import swap_class
from lightning_tp.errors import TPError
from lightning_tp.styles.base import BindContext, PlanContext, Style, linear_dims, set_sizes
from lightning_tp.styles.linear import _Colwise
from lightning_tp.styles.split import Split, check_heads, even_split, head_split


@dataclass(frozen=True)
class FusedColwise(Style):
    """Split a fused linear layer part by part: weight (q + 2 kv, in) -> local ((q + 2 kv) / tp, in).

    Args:
        parts: how many equal parts (2 for gate and up, 3 for q, k and v of the same size), or the size of each.
        heads: how many heads each part has: as many numbers as parts, or one for all. A part with fewer heads than tp (the key/value heads
            of grouped-query attention) is shared by neighbouring ranks, and its gradient summed over them.
        input: the state in which its input arrives: `R` (taken to it by an enclosing module), `I` or `S(1)`.

    Example:
        >>> from torch import nn
        >>> qkv = FusedColwise(parts=(64, 16, 16), heads=(4, 1, 1)).splits(nn.Linear(64, 96), "qkv", tp=2)["weight"]
        >>> qkv.ranges[1], qkv.sum_over(2), qkv.shared_rows
        (((32, 64), (64, 80), (80, 96)), 2, (32, 64))
    """

    name: ClassVar[str] = "fused_colwise"
    states: ClassVar[dict[str, tuple[State, ...]]] = {"input": (R, I, SEQUENCE)}
    parts: int | tuple[int, ...] = 3
    heads: int | tuple[int | None, ...] | None = None
    input: State | None = None

    def splits(self, module: nn.Module, where: str, tp: int) -> dict[str, Split]:
        out_dim, _, shape = linear_dims(module, where, self.name)
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
        enter = transition(self.input or R, R)
        if enter is not None:
            swap_class(module, _Colwise, _axis=site.axis, _enter=enter, _gather=None)

    def fill_in(self, where: str, module: nn.Module | None, plan: PlanContext) -> Style:
        return self if self.input is not None else replace(self, input=R if plan.is_inside_boundary(where) else plan.stream)

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
    """The splits of all parts behind each other; parts that ranks share have to be neighbours (k and v are)."""
    ranges: list[tuple[tuple[int, int], ...]] = [()] * tp
    offset = 0
    query_heads = max((h for h in heads if h is not None), default=None)
    for size, num_heads in zip(parts, heads, strict=True):
        if num_heads is None:
            part = even_split(size, dim, tp)
        else:
            assert query_heads is not None
            check_heads(where, num_heads, query_heads, size, tp)
            part = head_split(size, dim, tp, num_heads)
        ranges = [of + tuple((a + offset, b + offset) for a, b in own) for of, own in zip(ranges, part.ranges, strict=True)]
        offset += size
    split = Split(S(dim), tuple(ranges))
    try:
        split.sum_over(tp)
    except TPError:
        raise TPError(
            f"`{where}`: parts with {heads} heads over tp={tp}: the parts that ranks share have to lie side by side in the weight, and be shared "
            "by the same number of ranks."
        ) from None
    return split
