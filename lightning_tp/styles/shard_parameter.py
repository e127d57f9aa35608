"""The style of a parameter that is split by itself, outside of a layer: a stack of experts, a scale for each head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from lightning_tp.styles.base import Style
from lightning_tp.styles.split import Split, split_of_ranges


@dataclass(frozen=True)
class ShardParameter(Style):
    """Split one parameter by itself, as the code of its module needs it.

    Args:
        dim: the dim that is split.
        ranges: for each rank the (start, stop) ranges of it.

    Example:
        >>> ShardParameter(0, (((0, 2),), ((2, 4),))).split(tp=2).local_shape((4, 3), rank=1)
        (2, 3)
    """

    name: ClassVar[str] = "shard"
    dim: int = 0
    ranges: tuple[tuple[tuple[int, int], ...], ...] = ()

    def split(self, tp: int) -> Split:
        """Return the same as a `Split`."""
        return split_of_ranges(self.ranges, self.dim)

    def splits(self, module: nn.Module, where: str, tp: int) -> dict[str, Split]:
        return {name: self.split(tp) for name, _ in module.named_parameters()}
