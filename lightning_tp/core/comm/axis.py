"""The tensor-parallel axis as one rank sees it, and how a length is cut into shards."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.compiler import is_compiling

SEQUENCE_DIM = 1  # of activations (B, S, d)


class Axis:
    """The tensor-parallel axis as one rank sees it: its process group, and what one forward pass has to remember.

    Args:
        group: the process group of the axis.

    Attributes:
        rank, size: this rank's place in the group, and the size of the group.
        seq_len: the length of the sequence that was last sharded; see `sequence.py`.
        seq_len_changed: another length with shards of the same size was sharded before, so that a shard does not tell its length.
        on_backward: called by every collective of a backward pass; see `shards/gradients.py`.
        sum: called in place of the collective that reduces partial sums, (terms, scatter) -> sums; see `apply/activation_checkpointing.py`.
        summing: a matmul runs whose result is a partial sum.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank = group.rank()
        self.size = group.size()
        self.seq_len: int | None = None
        self.seq_len_changed = False
        self.on_backward: Callable[[], None] | None = None
        self.sum: Callable[[Tensor, bool], Tensor] | None = None
        self.summing = False
        self._shared: tuple[Tensor, tuple[int, bool, bool], Tensor] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Axis:
        memo[id(self)] = twin = Axis(self.group)  # a process group can't be copied; a copied model talks over the same one
        return twin

    def share(self, x: Tensor, enter: Callable[[Tensor, Axis], Tensor]) -> Tensor:
        """Return `enter(x)`, computed once for all modules that are called with the same `x` (q, k and v; gate and up).

        One collective in forward instead of three, and one in backward: autograd adds the three gradients before it.
        """
        if is_compiling():
            return self._share(x, enter)
        if x.is_inference():
            return enter(x, self)  # counts no versions: it could have been written to
        state = (x._version, x.requires_grad, torch.is_grad_enabled())
        shared = self._shared
        if shared is not None and shared[0] is x and shared[1] == state:
            return shared[2]
        y = enter(x, self)
        self._shared = (x, state, y)
        return y

    @torch.compiler.disable
    def _share(self, x: Tensor, enter: Callable[[Tensor, Axis], Tensor]) -> Tensor:
        return self.share(x, enter)

    def forget(self) -> None:
        """Drop the activation that `share` keeps; called when its readers have read it."""
        self._shared = None


def even_shard(length: int, rank: int, tp: int) -> range:
    """Return the indices that `rank` holds of a dim of this length: ceil(length / tp) each, as `torch.chunk`, the last ones less.

    Example:
        >>> [len(even_shard(341, r, 2)) for r in range(2)]
        [171, 170]
    """
    shard = math.ceil(length / tp)
    return range(min(rank * shard, length), min((rank + 1) * shard, length))
