"""Run a model on the meta device as a GPU (or the CPU) would run it: under autocast, and with that device's fused kernels.

The meta device has no autocast, writes attention out, and keeps a dropout mask in the dtype of the activation. A `TorchFunctionMode` runs
instead what the device has, and saves the same tensors for the backward, so that the bytes counted on the meta device are those of the device.

| call | on "cuda" | on "cpu" |
|---|---|---|
| `F.scaled_dot_product_attention` | saves q, k, v, mask, output and one float32 per row (flash attention) | the same, but written out with dropout |
| `F.dropout` | saves one byte per element | as on the meta device |
| `F.rms_norm` | saves its input and one float32 per row | as on the meta device |
| matmuls under autocast | operands in half precision | the same |
| softmax, norms, losses under autocast | float32 | float32 for losses only |

The lists of autocast are the essential part of PyTorch's (docs, "Autocast Op Reference"); a kernel that is not listed keeps its dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.overrides import TorchFunctionMode

from lightning_tp._compat import flash_attention_on_meta

SDPA = F.scaled_dot_product_attention
HALF = frozenset(
    {
        F.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__, torch.mm, Tensor.mm, torch.bmm, Tensor.bmm,
        torch.addmm, Tensor.addmm, torch.baddbmm, Tensor.baddbmm, torch.addbmm, Tensor.addbmm, torch.mv, Tensor.mv, torch.einsum,
        torch.conv1d, torch.conv2d, torch.conv3d, torch.chain_matmul, F.conv1d, F.conv2d, F.conv3d, SDPA,
    }
)  # fmt: skip
LOSSES = frozenset(
    {F.cross_entropy, F.nll_loss, F.mse_loss, F.binary_cross_entropy_with_logits, F.kl_div, F.l1_loss, F.smooth_l1_loss}
)
FLOAT = LOSSES | frozenset(
    {
        F.softmax, torch.softmax, Tensor.softmax, F.log_softmax, torch.log_softmax, Tensor.log_softmax, F.layer_norm, torch.layer_norm,
        F.group_norm, torch.group_norm, torch.pow, Tensor.pow, Tensor.__pow__, torch.rsqrt, Tensor.rsqrt, torch.exp, Tensor.exp, torch.log,
        Tensor.log, torch.norm, Tensor.norm, torch.sum, Tensor.sum, torch.cumsum, Tensor.cumsum, torch.prod, Tensor.prod, F.softplus,
    }
)  # fmt: skip


class Kernels(TorchFunctionMode):
    """The mode of a device, "cuda" or "cpu": under autocast to `half` (None: without), and with attention that is fused or written out."""

    def __init__(self, device: str, half: torch.dtype | None, *, fused_attention: bool = True) -> None:
        super().__init__()
        self.cuda = device != "cpu"
        self.half = half
        self.fused_attention = fused_attention
        # id of a weight -> (it, its cast), until the forward ends, as autocast caches them
        self.casts: dict[int, tuple[Tensor, Tensor]] = {}
        self.autocasts: list[tuple[frozenset[Any], Callable[[Any], Any]]] = []
        if half is not None:
            self.autocasts = [(HALF, self._to_half), (FLOAT if self.cuda else LOSSES, _to_float)]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for functions, cast in self.autocasts:
            if func in functions:
                args, kwargs = [cast(x) for x in args], {k: cast(v) for k, v in kwargs.items()}
                break
        if func is SDPA:
            return self._attention(*args, **kwargs)
        if self.cuda and func is F.dropout:
            return self._dropout(*args, **kwargs)
        if self.cuda and func is F.rms_norm and self._is_plain(args[0]):
            return _RMSNorm.apply(args[0], *_norm_arguments(*args[1:], **kwargs))
        return func(*args, **kwargs)

    @staticmethod
    def _is_plain(x: Tensor) -> bool:
        return type(x) is Tensor and x.is_meta

    def _to_half(self, x: Any) -> Any:
        if isinstance(x, (list, tuple)):
            return type(x)(self._to_half(v) for v in x)
        if not isinstance(x, Tensor) or x.dtype is not torch.float32:
            return x
        if not (x.is_leaf and x.requires_grad):
            return x.to(self.half)
        found = self.casts.get(id(x))
        if found is None:
            found = self.casts[id(x)] = (x, x.to(self.half))
        return found[1]

    def _dropout(self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if not training or p == 0 or not self._is_plain(input):
            return F.dropout(input, p, training, inplace)
        return torch.native_dropout(input, p, True)[0]

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        wide, narrow = query.shape[-1], value.shape[-1]
        fused = self.fused_attention and self._is_plain(query) and query.ndim == 4 and (self.cuda or dropout_p == 0)
        if not fused or narrow > wide or (attn_mask is not None and attn_mask.requires_grad):
            return SDPA(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        if narrow < wide:  # the kernels take values as wide as keys
            value = F.pad(value, (0, wide - narrow))
        return flash_attention_on_meta(query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale)[0][..., :narrow]


def _to_float(x: Any) -> Any:
    return x.float() if isinstance(x, Tensor) and x.dtype in (torch.bfloat16, torch.float16) else x


def _norm_arguments(normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None) -> tuple[int, Tensor | None]:
    return len(normalized_shape), weight


class _RMSNorm(Function):
    """(.., d) -> (.., d), saving what `torch._fused_rms_norm` saves."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dims: int, weight: Tensor | None) -> Tensor:
        rows = x.new_empty(x.shape[: x.ndim - dims], dtype=torch.float32)
        ctx.save_for_backward(x, weight, rows)
        return torch.neg(x)  # one kernel that reads x and writes as much

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, _ = ctx.saved_tensors
        if weight is None:
            return torch.mul(grad, x), None, None
        return torch.mul(grad, x), None, torch.empty_like(weight)
