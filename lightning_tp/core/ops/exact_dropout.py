"""Exact dropout: apply the mask that one process would draw, cut to this rank's region of the activation.

Every rank draws the mask of the full activation from the shared stream, which is tp times the work: for comparing runs. To cut it, the region
has to be known. What ran last before the dropout tells it, and the shape of the shard; where that is not enough, it is an error. Known are
hidden features and attention heads behind a column-parallel layer, and shards of the sequence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_tp._compat import math_attention_weights
from lightning_tp.core.comm.axis import SEQUENCE_DIM, Axis
from lightning_tp.core.ops.random_calls import SDPA, FunctionCall
from lightning_tp.errors import TPError

SUPPORTED = frozenset({F.dropout, torch.dropout, SDPA})


@dataclass(frozen=True)
class DropoutRegion:
    """The region of the full activation that a rank's shard is.

    Args:
        dim: the sharded dim.
        heads: number of local heads, where `dim` is batch and heads in one: (B * heads, ..).
        span: (length of the full dim, start, stop); None if all shards are of one length, in the order of the ranks.
        sequence: `dim` is the sequence, of which the last rank's shard may be padded.
    """

    dim: int
    heads: int | None = None
    span: tuple[int, int, int] | None = None
    sequence: bool = False

    def mask(self, shard: Tensor, axis: Axis, p: float) -> Tensor:
        """Draw the mask of the full activation and return this rank's region of it, of the shard's shape: 0 or 1 / (1 - p), 0 in padding."""
        dim, size = self.dim, shard.shape[self.dim]
        if self.heads is not None:
            all_heads, rest = axis.size * self.heads, shard.shape[dim + 1 :]
            full = F.dropout(shard.new_ones((size // self.heads * all_heads, *rest)), p, True)
            full = full.view(size // self.heads, all_heads, *rest)
            return full.narrow(1, axis.rank * self.heads, self.heads).reshape(shard.shape)
        length, start, stop = self.span or (axis.size * size, axis.rank * size, (axis.rank + 1) * size)
        if self.sequence:
            length = axis.seq_len or length
            start, stop = min(start, length), min(stop, length)
        shape = [length if d == dim else n for d, n in enumerate(shard.shape)]
        order = sorted(range(shard.ndim), key=shard.stride, reverse=True)  # torch draws in the order of the memory
        ones = torch.empty_permuted(shape, order, dtype=shard.dtype, device=shard.device).fill_(1)
        region = F.dropout(ones, p, True).narrow(dim, start, stop - start)
        if (padding := size - (stop - start)) > 0:
            zeros = shard.new_zeros([padding if d == dim else n for d, n in enumerate(shard.shape)])
            region = torch.cat((region, zeros), dim)
        return region


def run_exact(call: FunctionCall, region: DropoutRegion, axis: Axis) -> Tensor:
    """Make a call of one of `SUPPORTED` on a shard, with the mask that one process would draw."""
    if call.func is SDPA:
        return _attention(*call.args, **call.kwargs, region=region, axis=axis)
    x = call.input
    out = x * region.mask(x.detach(), axis, call.p)
    return x.copy_(out) if call.argument("inplace", 3) else out


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False, *,
    scale: float | None = None, enable_gqa: bool = False, region: DropoutRegion, axis: Axis,
) -> Tensor:  # fmt: skip
    """`F.scaled_dot_product_attention` by its math kernel, with this rank's heads of the mask."""
    if query.is_cuda and (torch.backends.cuda.flash_sdp_enabled() or torch.backends.cuda.mem_efficient_sdp_enabled()):
        raise TPError(
            '`dropout="exact"`: the flash and memory-efficient kernels of SDPA draw masks that nothing else can draw. Use the math kernel in '
            "both runs: `with torch.nn.attention.sdpa_kernel(SDPBackend.MATH): trainer.fit(..)`."
        )
    weights = math_attention_weights(query, key, value, attn_mask, is_causal, scale=scale, enable_gqa=enable_gqa)
    if enable_gqa:
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    return (weights * region.mask(weights.detach().contiguous(), axis, dropout_p)) @ value


@dataclass(frozen=True)
class LayerOutput:
    """What a layer with a sharded weight gave."""

    shape: torch.Size  # of its local output
    column_parallel: bool  # its output features are sharded; else what follows is a shard of the sequence, or replicated
    in_rank_order: bool  # the shards of its features lie behind each other in the order of the ranks


class LastSplitLayer:
    """Remember the output of the layer with a sharded weight that ran last."""

    output: LayerOutput | None = None

    def watch(self, model: nn.Module) -> None:
        """See the outputs of all layers of a model whose weight is sharded."""
        for module in model.modules():
            shard = getattr(getattr(module, "weight", None), "_tp_shard", None)
            if shard is not None and shard.split.dim is not None:
                split = shard.split
                output_dim = 0 if isinstance(module, nn.Linear) else 1 if hasattr(module, "nf") else None  # `nf`: Conv1D of GPT-2
                in_order = shard.sum_over > 1 or all(
                    len(a) == len(b) and all(i[1] == j[0] for i, j in zip(a, b)) for a, b in zip(split.ranges, split.ranges[1:])
                )
                module.register_forward_hook(partial(self._remember, split.dim == output_dim, in_order))

    def _remember(self, column_parallel: bool, in_order: bool, module: nn.Module, args: Any, out: Any) -> None:
        if isinstance(out, Tensor):
            self.output = LayerOutput(out.shape, column_parallel, in_order)


def dropout_region(
    call: FunctionCall, shapes: list[tuple[int, ...]], axis: Axis, module: nn.Module | None, layer: LayerOutput | None
) -> DropoutRegion:
    """Find out which region of the full activation the input of a call is.

    `shapes` are those of all ranks, `module` is the one whose forward makes the call, `layer` is what the last layer with a sharded weight gave.

    Raises:
        TPError: if that can't be told, or one process would draw another kind of mask.
    """
    shape = tuple(call.input.shape)
    region = _region(call.func, shape, shapes, axis, module, layer) if module is not None and call.func in SUPPORTED else None
    if region is None:
        raise TPError(
            f'`dropout="exact"`: {type(module).__name__} draws random numbers (`{call.name}`) for a shard of shape {shape}, and it can\'t '
            'be told which region of the full activation that is, nor what one process would draw for it. Use `dropout="independent"`.'
        )
    return region


def _region(
    func: Any, shape: tuple[int, ...], shapes: list[tuple[int, ...]], axis: Axis, module: nn.Module, layer: LayerOutput | None
) -> DropoutRegion | None:
    if isinstance(module, nn.MultiheadAttention) and len(shape) == 4:
        return DropoutRegion(1)  # (N, local heads, L, S) in the code of `attention.py`
    if layer is None or not layer.column_parallel:
        seq_len = axis.seq_len
        is_shard = seq_len is not None and len(shape) == 3 and shape[SEQUENCE_DIM] == math.ceil(seq_len / axis.size)
        return DropoutRegion(SEQUENCE_DIM, sequence=True) if is_shard else None  # (B, local tokens, ..)
    return _region_of_features(func, shape, shapes, axis, layer)


def _region_of_features(
    func: Any, shape: tuple[int, ...], shapes: list[tuple[int, ...]], axis: Axis, layer: LayerOutput
) -> DropoutRegion | None:
    """The region of what a column-parallel layer gave, in one of the shapes that attention code gives it."""
    if not layer.in_rank_order or len(layer.shape) != 3 or any(len(other) != len(shape) for other in shapes):
        return None
    batch, tokens = layer.shape[:2]
    if len(shape) == 3 and shape[:2] == (batch, tokens) and func is not SDPA:
        return DropoutRegion(2, span=_span(shapes, 2, axis.rank))  # (B, S, local features), as the layer gave them
    if len(shape) == 4 and shape[0] in (batch, tokens):
        return DropoutRegion(1, span=_span(shapes, 1, axis.rank))  # (B, local heads, ..), after (B, S, ..) or (S, B, ..)
    if len(shape) == 3 and shape[0] % batch == 0 and shape[1] == tokens and all(other == shape for other in shapes):
        return DropoutRegion(0, heads=shape[0] // batch)  # (B * local heads, S, ..), where the layer gave (B, S, ..)
    return None


def _span(shapes: list[tuple[int, ...]], dim: int, rank: int) -> tuple[int, int, int] | None:
    """(length of the full dim, start, stop) of a rank's shard; None if all shards are of one length."""
    lengths = [shape[dim] for shape in shapes]
    start = sum(lengths[:rank])
    return None if len(set(lengths)) == 1 else (sum(lengths), start, start + lengths[rank])
