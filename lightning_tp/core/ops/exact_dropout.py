"""Exact dropout: apply the mask that one process would draw, cut to this rank's region of the activation.

Every rank draws the mask of the full activation from the shared stream, which is tp times the work: for comparing runs. To cut it, the region
has to be known. What ran last before the dropout tells it, and the shape of the shard; where that is not enough, it is an error. Known are
hidden features and attention heads behind a column-parallel layer, and shards of the sequence.
"""

from __future__ import annotations

import math
from collections.abc import Callable
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


# ---------------------------------------------------------------------------------------------------- finding the region


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


@dataclass(frozen=True)
class ShardedInput:
    """A shard that is to be dropped out, and what is known about it."""

    shape: tuple[int, ...]
    shapes: list[tuple[int, ...]]  # of all ranks
    axis: Axis
    module: nn.Module | None  # whose forward calls dropout
    layer: LayerOutput | None  # of the last layer with a sharded weight

    @property
    def features(self) -> torch.Size | None:
        """The shape (B, S, local features) that the layer gave, if the shards of its features are in order and of one kind on all ranks."""
        usable = self.layer is not None and self.layer.in_rank_order and len({len(shape) for shape in self.shapes}) == 1
        return self.layer.shape if self.layer is not None and usable and len(self.layer.shape) == 3 else None

    def span(self, dim: int) -> tuple[int, int, int] | None:
        """(length of the full dim, start, stop) of the shard; None if all shards are of one length."""
        lengths = [shape[dim] for shape in self.shapes]
        start = sum(lengths[: self.axis.rank])
        return None if len(set(lengths)) == 1 else (sum(lengths), start, start + lengths[self.axis.rank])


def dropout_region(call: FunctionCall, x: ShardedInput) -> DropoutRegion:
    """Find out which region of the full activation a shard is.

    Raises:
        TPError: if that can't be told, or one process would draw another kind of mask.
    """
    region = None
    if x.module is not None and call.func in SUPPORTED:
        rules = _AFTER_COLUMN_PARALLEL if x.layer is not None and x.layer.column_parallel else _ELSEWHERE
        region = next((found for rule in rules if (found := rule(call, x)) is not None), None)
    if region is None:
        raise TPError(
            f'`dropout="exact"`: {type(x.module).__name__} draws random numbers (`{call.name}`) for a shard of shape {x.shape}, and it can\'t '
            'be told which region of the full activation that is, nor what one process would draw for it. Use `dropout="independent"`.'
        )
    return region


def _weights_of_multihead_attention(call: FunctionCall, x: ShardedInput) -> DropoutRegion | None:
    """(N, local heads, L, S) in the code of `attention.py`."""
    return DropoutRegion(1) if isinstance(x.module, nn.MultiheadAttention) and len(x.shape) == 4 else None


def _hidden_features(call: FunctionCall, x: ShardedInput) -> DropoutRegion | None:
    """(B, S, local features), as the column-parallel layer gave them."""
    matches = (features := x.features) is not None and len(x.shape) == 3 and x.shape[:2] == features[:2] and call.func is not SDPA
    return DropoutRegion(2, span=x.span(2)) if matches else None


def _heads(call: FunctionCall, x: ShardedInput) -> DropoutRegion | None:
    """(B, local heads, ..), where the column-parallel layer gave (B, S, ..) or (S, B, ..)."""
    matches = (features := x.features) is not None and len(x.shape) == 4 and x.shape[0] in features[:2]
    return DropoutRegion(1, span=x.span(1)) if matches else None


def _heads_in_batch(call: FunctionCall, x: ShardedInput) -> DropoutRegion | None:
    """(B * local heads, S, ..), where the column-parallel layer gave (B, S, ..)."""
    if (features := x.features) is None or len(x.shape) != 3 or any(shape != x.shape for shape in x.shapes):
        return None
    batch, tokens = features[:2]
    return DropoutRegion(0, heads=x.shape[0] // batch) if x.shape[0] % batch == 0 and x.shape[1] == tokens else None


def _sequence_shard(call: FunctionCall, x: ShardedInput) -> DropoutRegion | None:
    """(B, local tokens, ..)."""
    seq_len = x.axis.seq_len
    matches = seq_len is not None and len(x.shape) == 3 and x.shape[SEQUENCE_DIM] == math.ceil(seq_len / x.axis.size)
    return DropoutRegion(SEQUENCE_DIM, sequence=True) if matches else None


Rule = Callable[[FunctionCall, ShardedInput], "DropoutRegion | None"]
_AFTER_COLUMN_PARALLEL: tuple[Rule, ...] = (_weights_of_multihead_attention, _hidden_features, _heads, _heads_in_batch)
_ELSEWHERE: tuple[Rule, ...] = (_weights_of_multihead_attention, _sequence_shard)
