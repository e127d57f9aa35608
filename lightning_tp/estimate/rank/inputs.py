"""Inputs and losses of a traced step: other sizes of a batch, what they count, and the loss of an output."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only

from lightning_tp.errors import TPError
from lightning_tp.infer.search import call_with

LossOf = Callable[[nn.Module, Any], Tensor]


def default_loss(output: Any, inputs: Any) -> Tensor:
    """The loss that the output carries; else of the next token, where it looks like that; else a random projection.

    Raises:
        TPError: if there is no tensor of floats.
    """
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(loss, Tensor):
        return loss
    values = [
        t
        for t in tree_flatten(dict(output) if isinstance(output, Mapping) else output)[0]
        if isinstance(t, Tensor) and t.is_floating_point()
    ]
    if not values:
        raise TPError(
            f"The model returns a {type(output).__name__} without a tensor of floats. Return a loss_fn as the third value."
        )
    value = values[0]
    tokens = next((t for t in tree_flatten(inputs)[0] if isinstance(t, Tensor) and t.dtype == torch.int64 and t.ndim == 2), None)
    if (
        tokens is not None
        and value.ndim == 3
        and value.shape[:2] == tokens.shape
        and (tokens.is_meta or int(tokens.max()) < value.shape[2])
    ):
        return nn.functional.cross_entropy(value.flatten(0, 1)[:-1], tokens.flatten()[1:])
    noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(0)).to(value.device, value.dtype)
    return (value * noise).sum() / math.sqrt(max(1, value.numel()))


def resized(inputs: Any, batch: int | None, seq: int | None) -> Any:
    """The inputs with another batch (dim 0 of all) and sequence (dim 1 of tokens, and every further dim of masks that is as long).

    Raises:
        TPError: for a sequence length of inputs without tokens.
    """
    tensors = [t for t in tree_flatten(inputs)[0] if isinstance(t, Tensor) and t.ndim]
    tokens = next((t for t in tensors if t.ndim >= 2 and not t.is_floating_point()), None)
    if seq is not None and tokens is None:
        raise TPError(
            "`seq`: the inputs have no tokens (integers of two dims), so there is no length to change. Give inputs of that length."
        )
    length = tokens.shape[1] if tokens is not None else None
    size = (tokens if tokens is not None else tensors[0]).shape[0] if tensors else 0

    def change(t: Tensor) -> Tensor:
        whole = list(t.shape)
        if t.ndim and batch is not None and t.shape[0] == size:
            whole[0] = batch
        for dim in range(1, t.ndim):
            if (
                seq is not None
                and t.shape[dim] == length
                and (dim == 1 or t.ndim == 4)
                and not (t.is_floating_point() and t.ndim < 4)
            ):
                whole[dim] = seq
        if whole == list(t.shape):
            return t
        if t.is_meta:
            return torch.empty(whole, dtype=t.dtype, device="meta")
        times = [-(-new // old) for new, old in zip(whole, t.shape)]
        return t.repeat(times)[tuple(slice(n) for n in whole)].contiguous()

    return tree_map_only(Tensor, change, inputs)


def check_size(name: str, value: Any) -> None:
    """Refuse what is no number of something.

    Raises:
        TPError: with the value.
    """
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise TPError(f"`{name}={value!r}`: give a whole number, 1 or more.")


def loss_of(loss_fn: Callable[..., Tensor] | None) -> LossOf:
    """(model, inputs) -> the loss."""
    import inspect

    fn: Callable[..., Tensor] = loss_fn or default_loss
    try:
        wants = [p for p in inspect.signature(fn).parameters.values() if p.default is p.empty and p.kind in (0, 1)]
        two = len(wants) > 1
    except (TypeError, ValueError):
        two = False

    def loss(model: nn.Module, inputs: Any) -> Tensor:
        output = call_with(model, inputs)
        try:
            found = fn(output, inputs) if two else fn(output)
        except TPError:
            raise
        except Exception as error:
            raise TPError(
                f"`loss_fn` ended with {type(error).__name__}: {' '.join(str(error).split())}. It is called with what the model returns "
                f"(a {type(output).__name__}), on the meta device."
            ) from error
        if not isinstance(found, Tensor) or found.numel() != 1:
            what = f"a tensor of shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
            raise TPError(f"`loss_fn` returned {what}; it has to be a scalar, such as `.mean()` of it.")
        return found.reshape(())

    return loss


def _shapes(inputs: Any) -> Any:
    return tuple((tuple(t.shape), t.dtype) for t in tree_flatten(inputs)[0] if isinstance(t, Tensor))


def counted(inputs: Any) -> tuple[int, int, str]:
    """(samples, tokens, "tokens") of the inputs; (samples, samples, "samples") where there are no tokens."""
    tensors = [t for t in tree_flatten(inputs)[0] if isinstance(t, Tensor) and t.ndim]
    tokens = next((t for t in tensors if t.ndim == 2 and not t.is_floating_point() and t.dtype != torch.bool), None)
    if tokens is not None:
        return tokens.shape[0], tokens.numel(), "tokens"
    samples = tensors[0].shape[0] if tensors else 1
    return samples, samples, "samples"
