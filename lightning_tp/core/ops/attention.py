"""`nn.MultiheadAttention`, written out: its own forward is one call of a fused function, which can't be looked into or run on some heads.

The same numbers as `torch.nn.functional.multi_head_attention_forward`, in plain operations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_tp.core.comm.axis import Axis
from lightning_tp.core.comm.transitions import partial_to_invariant
from lightning_tp.core.modules.swap_class import swap_class


class _Attention(nn.MultiheadAttention):
    _axis: Axis | None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `nn.MultiheadAttention.forward`; (L, N, E) or (N, L, E) with batch_first, or without N."""
        batched = query.dim() == 3
        if not batched:
            query, key, value = (t.unsqueeze(0) for t in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = (t.transpose(0, 1) for t in (query, key, value))
        q, k, v = self._projected(query, key, value)
        y, weights = _attended(
            q, k, v, self.num_heads, self.head_dim, self.bias_k, self.bias_v, self.add_zero_attn, key_padding_mask, need_weights, attn_mask,
            is_causal, self.dropout if self.training else 0.0,
        )  # fmt: skip
        out = F.linear(y, self.out_proj.weight, self.out_proj.bias)
        if not batched:
            out = out.squeeze(1)
        elif self.batch_first:
            out = out.transpose(0, 1)
        return out, None if weights is None else _shown(weights, average_attn_weights, batched, self.num_heads, self._axis)

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self._qkv_same_embed_dim:
            wq, wk, wv = self.in_proj_weight.chunk(3)
        else:
            wq, wk, wv = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
        bq, bk, bv = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return F.linear(query, wq, bq), F.linear(key, wk, bk), F.linear(value, wv, bv)


def written_out(axis: Axis | None) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """`torch.nn.functional.multi_head_attention_forward` in plain operations, with the same arguments."""

    def attention_written_out(
        query: Tensor, key: Tensor, value: Tensor, embed_dim_to_check: int, num_heads: int, in_proj_weight: Tensor | None,
        in_proj_bias: Tensor | None, bias_k: Tensor | None, bias_v: Tensor | None, add_zero_attn: bool, dropout_p: float, out_proj_weight: Tensor,
        out_proj_bias: Tensor | None, training: bool = True, key_padding_mask: Tensor | None = None, need_weights: bool = True,
        attn_mask: Tensor | None = None, use_separate_proj_weight: bool = False, q_proj_weight: Tensor | None = None,
        k_proj_weight: Tensor | None = None, v_proj_weight: Tensor | None = None, static_k: Tensor | None = None,
        static_v: Tensor | None = None, average_attn_weights: bool = True, is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        if static_k is not None or static_v is not None:  # keys and values of heads that are there already: torch's own
            return _TORCHS(
                query, key, value, embed_dim_to_check, num_heads, in_proj_weight, in_proj_bias, bias_k, bias_v, add_zero_attn, dropout_p,
                out_proj_weight, out_proj_bias, training, key_padding_mask, need_weights, attn_mask, use_separate_proj_weight, q_proj_weight,
                k_proj_weight, v_proj_weight, static_k, static_v, average_attn_weights, is_causal,
            )  # fmt: skip
        batched = query.dim() == 3
        if not batched:
            query, key, value = (t.unsqueeze(1) for t in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        query, key, value = (t.transpose(0, 1) for t in (query, key, value))
        if use_separate_proj_weight:
            wq, wk, wv = q_proj_weight, k_proj_weight, v_proj_weight
        else:
            wq, wk, wv = in_proj_weight.chunk(3)  # type: ignore[union-attr]
        bq, bk, bv = (None,) * 3 if in_proj_bias is None else in_proj_bias.chunk(3)
        q, k, v = F.linear(query, wq, bq), F.linear(key, wk, bk), F.linear(value, wv, bv)  # type: ignore[arg-type]
        y, weights = _attended(
            q, k, v, num_heads, embed_dim_to_check // num_heads, bias_k, bias_v, add_zero_attn, key_padding_mask, need_weights, attn_mask,
            is_causal, dropout_p if training else 0.0,
        )  # fmt: skip
        out = F.linear(y, out_proj_weight, out_proj_bias)
        if not batched:
            out = out.squeeze(1)
        return out, None if weights is None else _shown(weights, average_attn_weights, batched, num_heads, axis)

    return attention_written_out


WRITTEN_OUT = "attention_written_out"  # the name of its code, in the places of calls
_TORCHS = F.multi_head_attention_forward


def _attended(
    q: Tensor, k: Tensor, v: Tensor, heads: int, width: int, bias_k: Tensor | None, bias_v: Tensor | None, zero: bool, padding: Tensor | None,
    need_weights: bool, attn_mask: Tensor | None, is_causal: bool, p: float,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The attention of projected queries (N, L, E), keys and values (N, S, E): (L, N, E), and its weights (N, H, L, S) if they are needed."""
    N, L = q.shape[0], q.shape[1]
    if bias_k is not None and bias_v is not None:  # one more key and value for all
        k, v = torch.cat((k, bias_k.repeat(N, 1, 1)), 1), torch.cat((v, bias_v.repeat(N, 1, 1)), 1)
    if zero:
        k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
    more = (bias_k is not None) + zero
    if more:
        if is_causal and padding is None and not need_weights:
            attn_mask = None  # as torch: the mask is that of the queries and keys in their order, the further ones last
        attn_mask, padding = (None if m is None else F.pad(m, (0, more)) for m in (attn_mask, padding))
    q = q.view(N, L, heads, width).transpose(1, 2)  # (N, H, L, F)
    k = k.view(N, k.shape[1], heads, width).transpose(1, 2)  # (N, H, S, F)
    v = v.view(N, v.shape[1], heads, width).transpose(1, 2)
    mask = _mask(attn_mask, padding, N, heads, q.dtype)
    if need_weights:
        weights = torch.softmax(_masked((q * width**-0.5) @ k.transpose(-2, -1), mask), dim=-1)
        weights = F.dropout(weights, p)
        y = weights @ v
    else:
        weights = None
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p, is_causal=is_causal and mask is None)
    return y.permute(2, 0, 1, 3).reshape(
        L, N, heads * width
    ), weights  # lies in memory as torch's own, for the dropout that follows


def _shown(weights: Tensor, average: bool, batched: bool, heads: int, axis: Axis | None) -> Tensor:
    """The attention weights that are returned: of all heads, though a rank has some."""
    if average:
        with torch._C.DisableTorchFunction(), torch.utils._python_dispatch._disable_current_modes():
            mean = weights.sum(1) / heads  # heads of this rank
        weights = mean if axis is None else partial_to_invariant(mean, axis)
    return weights if batched else weights.squeeze(0)


def _mask(attn_mask: Tensor | None, padding: Tensor | None, batch: int, heads: int, dtype: torch.dtype) -> Tensor | None:
    """One additive mask (N or 1, H or 1, L or 1, S)."""
    masks = []
    if attn_mask is not None:
        attn_mask = attn_mask.view(batch, heads, *attn_mask.shape[1:]) if attn_mask.dim() == 3 else attn_mask[None, None]
        masks.append(_additive(attn_mask, dtype))
    if padding is not None:
        masks.append(_additive(padding[:, None, None, :], dtype))
    return None if not masks else masks[0] if len(masks) == 1 else masks[0] + masks[1]


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))


def _masked(scores: Tensor, mask: Tensor | None) -> Tensor:
    return scores if mask is None else scores + mask


def can_be_written_out(module: nn.Module) -> bool:
    """Whether this is an `nn.MultiheadAttention` that runs its own class's forward."""
    return (
        isinstance(module, nn.MultiheadAttention)
        and getattr(type(module).forward, "__code__", None) is nn.MultiheadAttention.forward.__code__
    )


def bind_attention(module: nn.Module, axis: Axis) -> None:
    """Write the attention out, for good."""
    torch.backends.mha.set_fastpath_enabled(False)  # the fused layer of nn.TransformerEncoder reads whole weights
    swap_class(module, _Attention, _axis=axis)


@contextmanager
def readable_attention(model: nn.Module) -> Iterator[None]:
    """Write every attention of the model out, for as long as this runs."""
    changed: list[tuple[Any, type]] = []
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        for module in model.modules():
            if can_be_written_out(module):
                changed.append((module, type(module)))
                swap_class(module, _Attention, _axis=None)
        F.multi_head_attention_forward = written_out(None)
        yield
    finally:
        F.multi_head_attention_forward = _TORCHS
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, cls in changed:
            module.__class__ = cls
            del module.__dict__["_axis"]
