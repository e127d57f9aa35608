"""Handle the inputs and the loss of a traced step: resize a batch, count its samples and tokens, and reduce an output to a loss."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_tp.core.trees import map_tensors, tensors_in
from lightning_tp.errors import TPError
from lightning_tp.infer.search import call_with

LossOf = Callable[[nn.Module, Any], Tensor]


def loss_of(loss_fn: Callable[..., Tensor] | None) -> LossOf:
    """Return (model, inputs) -> scalar loss, by `loss_fn(output)` or `loss_fn(output, inputs)`; None: by `default_loss`."""
    fn: Callable[..., Tensor] = loss_fn or default_loss
    takes_inputs = _takes_two(fn)

    def loss(model: nn.Module, inputs: Any) -> Tensor:
        output = call_with(model, inputs)
        try:
            found = fn(output, inputs) if takes_inputs else fn(output)
        except TPError:
            raise
        except Exception as error:
            raise TPError(
                f"`loss_fn` raised {type(error).__name__}: {' '.join(str(error).split())}. It is called with the model's output "
                f"(a {type(output).__name__}), on the meta device."
            ) from error
        if not isinstance(found, Tensor) or found.numel() != 1:
            what = f"a tensor of shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
            raise TPError(f"`loss_fn` returned {what}, but has to return a scalar. Reduce it, for example by `.mean()`.")
        return found.reshape(())

    return loss


def _takes_two(fn: Callable[..., Any]) -> bool:
    try:
        parameters = inspect.signature(fn).parameters.values()
    except (TypeError, ValueError):
        return False
    return sum(p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters) > 1


def default_loss(output: Any, inputs: Any) -> Tensor:
    """Return the loss in the output; else the next-token loss, where logits and tokens fit; else a random projection.

    `TPError` if the output has no floating-point tensor.
    """
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(loss, Tensor):
        return loss
    value = next((t for t in tensors_in(output) if t.is_floating_point()), None)
    if value is None:
        raise TPError(
            f"The model returns a {type(output).__name__} without a floating-point tensor, so there is no loss to take. Pass a `loss_fn` "
            "(in a script: return it as the third value)."
        )
    tokens = next((t for t in tensors_in(inputs) if t.dtype == torch.int64 and t.ndim == 2), None)
    if tokens is not None and _are_logits_of(value, tokens):
        return nn.functional.cross_entropy(value.flatten(0, 1)[:-1], tokens.flatten()[1:])
    noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(0)).to(value.device, value.dtype)
    return (value * noise).sum() / math.sqrt(max(1, value.numel()))


def _are_logits_of(value: Tensor, tokens: Tensor) -> bool:
    if value.ndim != 3 or value.shape[:2] != tokens.shape:
        return False
    return tokens.is_meta or int(tokens.max()) < value.shape[2]


def resized(inputs: Any, batch: int | None, seq: int | None) -> Any:
    """Return the inputs with another batch size and sequence length.

    The batch is dim 0 of every tensor. The sequence is dim 1 of tokens, and every dim of a 4D mask that is as long.

    Raises:
        TPError: for a sequence length of inputs without tokens.

    Example:
        >>> resized({"tokens": torch.zeros(1, 8, dtype=torch.long)}, 4, 16)["tokens"].shape
        torch.Size([4, 16])
    """
    tensors = [t for t in tensors_in(inputs) if t.ndim]
    tokens = next((t for t in tensors if t.ndim >= 2 and not t.is_floating_point()), None)
    if seq is not None and tokens is None:
        raise TPError(
            "`seq` changes the length of tokens, but the inputs have no tokens (an integer tensor of two dims). Pass inputs of that length instead."
        )
    length = tokens.shape[1] if tokens is not None else None
    size = (tokens if tokens is not None else tensors[0]).shape[0] if tensors else 0

    def change(t: Tensor) -> Tensor:
        shape = list(t.shape)
        if t.ndim and batch is not None and t.shape[0] == size:
            shape[0] = batch
        if seq is not None and (not t.is_floating_point() or t.ndim >= 4):  # tokens, or a mask
            for dim in range(1, t.ndim if t.ndim == 4 else min(t.ndim, 2)):
                if t.shape[dim] == length:
                    shape[dim] = seq
        return t if shape == list(t.shape) else _repeated(t, shape)

    return map_tensors(change, inputs)


def _repeated(t: Tensor, shape: list[int]) -> Tensor:
    if t.is_meta:
        return torch.empty(shape, dtype=t.dtype, device="meta")
    times = [-(-new // old) for new, old in zip(shape, t.shape)]
    return t.repeat(times)[tuple(slice(n) for n in shape)].contiguous()


class BatchCount(NamedTuple):
    """What a batch counts: its samples, its tokens, and what `tokens` counts ("samples" where there are no tokens)."""

    samples: int
    tokens: int
    unit: str


def count_batch(inputs: Any) -> BatchCount:
    """Count the samples and tokens of a batch.

    Example:
        >>> count_batch({"tokens": torch.zeros(2, 8, dtype=torch.long)})
        BatchCount(samples=2, tokens=16, unit='tokens')
    """
    tensors = [t for t in tensors_in(inputs) if t.ndim]
    tokens = next((t for t in tensors if t.ndim == 2 and not t.is_floating_point() and t.dtype != torch.bool), None)
    if tokens is not None:
        return BatchCount(tokens.shape[0], tokens.numel(), "tokens")
    samples = tensors[0].shape[0] if tensors else 1
    return BatchCount(samples, samples, "samples")


def check_size(name: str, value: Any) -> None:
    """Raise a `TPError` for a size that is no whole number above 0; None is allowed."""
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise TPError(f"`{name}={value!r}`: give a whole number, 1 or more.")
