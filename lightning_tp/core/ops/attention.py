"""`nn.MultiheadAttention` in plain operations: torch's own forward is one call of a fused function, which can't be traced, or run on some heads.

The numbers are those of `torch.nn.functional.multi_head_attention_forward`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_tp._compat import without_dispatch_modes, without_torch_function
from lightning_tp.core.comm.axis import Axis
from lightning_tp.core.comm.transitions import partial_to_invariant
from lightning_tp.core.modules.call_site import MODEL_CODE
from lightning_tp.core.modules.swap_class import swap_class

_TORCHS: Callable[..., Any] = F.multi_head_attention_forward
WRITTEN_OUT = "attention_written_out"  # the name of its code, in call sites
MODEL_CODE.add(__file__)


def written_out(axis: Axis | None) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """Return `torch.nn.functional.multi_head_attention_forward` in plain operations, with the same arguments; `axis` if a rank has some heads."""

    def attention_written_out(
        *args: Any, static_k: Any = None, static_v: Any = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        if static_k is not None or static_v is not None:  # keys and values of heads that are there already
            return _TORCHS(*args, static_k=static_k, static_v=static_v, **kwargs)
        return _multi_head_attention(*args, **kwargs, axis=axis)

    return attention_written_out


def _multi_head_attention(
    query: Tensor, key: Tensor, value: Tensor, embed_dim_to_check: int, num_heads: int, in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None, bias_k: Tensor | None, bias_v: Tensor | None, add_zero_attn: bool, dropout_p: float, out_proj_weight: Tensor,
    out_proj_bias: Tensor | None, training: bool = True, key_padding_mask: Tensor | None = None, need_weights: bool = True,
    attn_mask: Tensor | None = None, use_separate_proj_weight: bool = False, q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None, v_proj_weight: Tensor | None = None, *, average_attn_weights: bool = True, is_causal: bool = False,
    axis: Axis | None, batch_first: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """As torch's function: (L, N, E), with `batch_first` (N, L, E), or (L, E) -> the same, and the attention weights if they are needed."""
    batched = query.dim() == 3
    if not batched:
        query, key, value = (t.unsqueeze(0) for t in (query, key, value))
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    elif not batch_first:
        query, key, value = (t.transpose(0, 1) for t in (query, key, value))
    separate: Any = (q_proj_weight, k_proj_weight, v_proj_weight)
    wq, wk, wv = separate if in_proj_weight is None or use_separate_proj_weight else in_proj_weight.chunk(3)
    bq, bk, bv = (None,) * 3 if in_proj_bias is None else in_proj_bias.chunk(3)
    q, k, v = F.linear(query, wq, bq), F.linear(key, wk, bk), F.linear(value, wv, bv)
    k, v, num_added = _with_added_keys(k, v, bias_k, bias_v, add_zero_attn)
    if num_added:
        if is_causal and key_padding_mask is None and not need_weights:
            attn_mask = None  # as torch: the mask is that of the queries and keys in their order, the added ones last
        attn_mask, key_padding_mask = (None if m is None else F.pad(m, (0, num_added)) for m in (attn_mask, key_padding_mask))
    N, L, S, width = q.shape[0], q.shape[1], k.shape[1], embed_dim_to_check // num_heads
    q = q.view(N, L, num_heads, width).transpose(1, 2)  # (N, H, L, F)
    k = k.view(N, S, num_heads, width).transpose(1, 2)  # (N, H, S, F)
    v = v.view(N, S, num_heads, width).transpose(1, 2)
    mask, p = _additive_mask(attn_mask, key_padding_mask, N, num_heads, q.dtype), dropout_p if training else 0.0
    y, weights = _attended(q, k, v, mask, p, need_weights, is_causal)
    y = y.permute(2, 0, 1, 3).reshape(L, N, num_heads * width)  # lies in memory as torch's own, for the dropout that follows
    out = F.linear(y, out_proj_weight, out_proj_bias)
    out = out.squeeze(1) if not batched else out.transpose(0, 1) if batch_first else out
    return out, None if weights is None else _returned_weights(weights, average_attn_weights, batched, num_heads, axis)


def _with_added_keys(k: Tensor, v: Tensor, bias_k: Tensor | None, bias_v: Tensor | None, zero: bool) -> tuple[Tensor, Tensor, int]:
    """Append the keys and values of `add_bias_kv` and `add_zero_attn`, and say how many: (N, S, E) -> (N, S + number, E)."""
    if bias_k is not None and bias_v is not None:
        k, v = torch.cat((k, bias_k.repeat(k.shape[0], 1, 1)), 1), torch.cat((v, bias_v.repeat(v.shape[0], 1, 1)), 1)
    if zero:
        k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
    return k, v, (bias_k is not None) + zero


def _attended(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, p: float, need_weights: bool, is_causal: bool
) -> tuple[Tensor, Tensor | None]:
    """(N, H, L, F), and the weights (N, H, L, S) if they are needed."""
    if not need_weights:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p, is_causal=is_causal and mask is None), None
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    weights = F.dropout(torch.softmax(scores if mask is None else scores + mask, dim=-1), p)
    return weights @ v, weights


def _additive_mask(attn_mask: Tensor | None, padding: Tensor | None, batch: int, heads: int, dtype: torch.dtype) -> Tensor | None:
    """One mask (N or 1, H or 1, L or 1, S) of what is added to the scores."""
    masks = []
    if attn_mask is not None:
        masks.append(attn_mask.view(batch, heads, *attn_mask.shape[1:]) if attn_mask.dim() == 3 else attn_mask[None, None])
    if padding is not None:
        masks.append(padding[:, None, None, :])
    masks = [torch.zeros_like(m, dtype=dtype).masked_fill_(m, -math.inf) if m.dtype == torch.bool else m.to(dtype) for m in masks]
    return None if not masks else masks[0] if len(masks) == 1 else masks[0] + masks[1]


def _returned_weights(weights: Tensor, average: bool, batched: bool, heads: int, axis: Axis | None) -> Tensor:
    """The attention weights of all heads, where a rank has some: (N, L, S), or (N, H, L, S) of its own heads without `average`."""
    if average:
        with without_torch_function(), without_dispatch_modes():
            mean = weights.sum(1) / heads  # over the heads of this rank
        weights = mean if axis is None else partial_to_invariant(mean, axis)
    return weights if batched else weights.squeeze(0)


class _WrittenOut(nn.MultiheadAttention):
    _axis: Axis | None

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None, need_weights: bool = True,
        attn_mask: Tensor | None = None, average_attn_weights: bool = True, is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """As `nn.MultiheadAttention.forward`."""
        return _multi_head_attention(
            query, key, value, self.embed_dim, self.num_heads, self.in_proj_weight, self.in_proj_bias, self.bias_k, self.bias_v,
            self.add_zero_attn, self.dropout, self.out_proj.weight, self.out_proj.bias, self.training, key_padding_mask, need_weights,
            attn_mask, False, self.q_proj_weight, self.k_proj_weight, self.v_proj_weight,
            average_attn_weights=average_attn_weights, is_causal=is_causal, axis=self._axis, batch_first=self.batch_first,
        )  # fmt: skip


def can_be_written_out(module: nn.Module) -> bool:
    """Return whether this is an `nn.MultiheadAttention` that runs its own class's forward."""
    code = getattr(type(module).forward, "__code__", None)
    return isinstance(module, nn.MultiheadAttention) and code is nn.MultiheadAttention.forward.__code__


def bind_attention(module: nn.Module, axis: Axis) -> None:
    """Write an `nn.MultiheadAttention` out for good."""
    torch.backends.mha.set_fastpath_enabled(False)  # the fused layer of nn.TransformerEncoder reads full weights
    swap_class(module, _WrittenOut, _axis=axis)


@contextmanager
def readable_attention(model: nn.Module) -> Iterator[None]:
    """Write every attention of a model out, until this exits."""
    changed: list[tuple[Any, type]] = []
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        for module in model.modules():
            if can_be_written_out(module):
                changed.append((module, type(module)))
                swap_class(module, _WrittenOut, _axis=None)
        F.multi_head_attention_forward = written_out(None)
        yield
    finally:
        F.multi_head_attention_forward = _TORCHS
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for module, cls in changed:
            module.__class__ = cls
            del module.__dict__["_axis"]
