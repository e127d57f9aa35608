"""Cut the mask that one process would draw to this rank's part of an activation."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

from lightning_tp.core.comm.axis import Axis
from lightning_tp.errors import TPError


@dataclass(frozen=True)
class Part:
    """Which part of the whole activation a rank has.

    Args:
        dim: the dim that is split.
        heads: this rank's heads, where they lie in `dim` behind the batch: (B * heads, ..).
        span: (length of the whole, first, last + 1) along `dim`; None: as long as all the others, in the order of the ranks.
        sequence: the tokens are split; the last rank has padding.
    """

    dim: int
    heads: int | None = None
    span: tuple[int, int, int] | None = None
    sequence: bool = False

    def of_whole(self, local: Tensor, axis: Axis, fill: Callable[[Tensor], Tensor]) -> Tensor:
        """`fill(ones in the shape of the whole)`, of it the part in the shape of `local`."""
        dim, size, tp, rank = self.dim, local.shape[self.dim], axis.size, axis.rank
        if self.heads is not None:
            batch, rest = size // self.heads, local.shape[dim + 1 :]
            whole = fill(local.new_ones((batch * tp * self.heads, *rest))).view(batch, tp * self.heads, *rest)
            return whole.narrow(1, rank * self.heads, self.heads).reshape(local.shape)
        length, start, stop = self.span or (tp * size, rank * size, (rank + 1) * size)
        if self.sequence:
            length = axis.seq_len or length
            start, stop = min(start, length), min(stop, length)
        shape = [length if d == dim else n for d, n in enumerate(local.shape)]
        order = sorted(range(local.ndim), key=local.stride, reverse=True)  # torch draws in the order of the memory
        part = fill(torch.empty_permuted(shape, order, dtype=local.dtype, device=local.device).fill_(1)).narrow(
            dim, start, stop - start
        )
        if stop - start < size:  # padding
            missing = [size - (stop - start) if d == dim else n for d, n in enumerate(local.shape)]
            part = torch.cat((part, local.new_zeros(missing)), dim)
        return part


def _out_dim(layer: nn.Module) -> int:
    return 0 if isinstance(layer, nn.Linear) else 1 if hasattr(layer, "nf") else -1


def _span(lengths: list[int], rank: int) -> tuple[int, int, int] | None:
    start = sum(lengths[:rank])
    return None if len(set(lengths)) == 1 else (sum(lengths), start, start + lengths[rank])


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    part: Part,
    axis: Axis,
) -> Tensor:
    """`F.scaled_dot_product_attention` by its math kernel, with this rank's part of the mask of all heads."""
    if query.is_cuda and (torch.backends.cuda.flash_sdp_enabled() or torch.backends.cuda.mem_efficient_sdp_enabled()):
        raise TPError(
            '`dropout="exact"`: the flash and memory-efficient kernels of SDPA have masks of their own, which nothing else can draw. Let both '
            "runs use the math kernel: `with torch.nn.attention.sdpa_kernel(SDPBackend.MATH): trainer.fit(..)`."
        )
    root = math.sqrt(1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if enable_gqa:
        key, value = (t.repeat_interleave(query.shape[-3] // t.shape[-3], -3) for t in (key, value))
    scores = (query * root) @ (key * root).transpose(-2, -1)
    if is_causal:
        scores = scores.masked_fill(
            torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril().logical_not(), -math.inf
        )
    if attn_mask is not None:
        scores = scores.masked_fill(attn_mask.logical_not(), -math.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    weights = torch.softmax(scores, -1)
    weights = weights * part.of_whole(weights.detach().contiguous(), axis, lambda ones: F.dropout(ones, dropout_p, True))
    return weights @ value
