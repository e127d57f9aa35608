"""The problem that `verify` trains on: a model, its inputs and a loss, the same in a single process and on every rank."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_tp.apply.parallelize import PlanLike
from lightning_tp.core.trees import map_tensors, tensors_in
from lightning_tp.errors import TPError

Inputs = Mapping[str, Any] | tuple[Any, ...]


@dataclass(frozen=True)
class Task:
    """The arguments of `verify`, as the processes get them.

    Raises:
        TPError: For sizes below 1.
    """

    model_fn: Callable[[], nn.Module]
    inputs: Inputs | Callable[[], Inputs]
    loss_fn: Callable[..., Tensor]
    tp: int
    dp: int
    plan: PlanLike | None
    steps: int
    rtol: float
    lr: float | None
    sequence_parallel: bool
    loss_parallel: bool
    seed: int

    def __post_init__(self) -> None:
        for name in ("tp", "dp", "steps"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise TPError(f"`verify({name}={value!r})`: pass an integer, 1 or more.")

    def build_model(self) -> nn.Module:
        """Build the model in eval mode, with the same weights in every process.

        Raises:
            TPError: If `model_fn` returns something else, or a model without weights.
        """
        _seed(self.seed)
        model = self.model_fn()
        if not isinstance(model, nn.Module):
            raise TPError(f"`verify`: `model_fn` returned a {type(model).__name__}, not a torch.nn.Module.")
        meta = next((name for name, p in model.named_parameters() if p.is_meta), None)
        if meta is not None:
            raise TPError(
                f"`verify`: `{meta}` is on the meta device. Build a model with weights, such as a smaller one of the same kind."
            )
        return model.eval()

    def batch(self, step: int) -> Inputs:
        """Return the global batch of a step: what forward is called with."""
        _seed(self.seed + 1 + step)
        return as_inputs(self.inputs() if callable(self.inputs) else self.inputs)

    def micro_batch(self, batch: Inputs, dp_rank: int) -> Inputs:
        """Return the rows of one data-parallel rank: its part of every tensor whose dim 0 is that of the batch.

        Raises:
            TPError: If dp does not divide the rows.
        """
        if self.dp == 1:
            return batch
        num_rows = next((len(t) for t in tensors_in(batch) if t.ndim), 0)
        if num_rows == 0 or num_rows % self.dp:
            raise TPError(
                f"`verify`: the inputs have {num_rows} rows (dim 0), which dp={self.dp} does not divide. Pass inputs with "
                f"{self.dp * max(1, num_rows)} rows."
            )
        rows = slice(dp_rank * num_rows // self.dp, (dp_rank + 1) * num_rows // self.dp)
        part: Inputs = map_tensors(lambda t: t[rows] if t.ndim and len(t) == num_rows else t, batch)
        return part


def as_inputs(inputs: Any) -> Inputs:
    """Return inputs as keyword arguments or as a tuple; a single value is a tuple of one.

    Example:
        >>> as_inputs([1, 2]), as_inputs(3), as_inputs({"x": 1})
        ((1, 2), (3,), {'x': 1})
    """
    if isinstance(inputs, Mapping):
        return dict(inputs)
    return tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)


def scalar_loss(model: nn.Module, inputs: Inputs, loss_fn: Callable[..., Tensor]) -> Tensor:
    """Run the model and return its loss: `loss_fn(output)`, or `loss_fn(output, inputs)` if it takes two arguments.

    Raises:
        TPError: If the loss is no scalar.
    """
    output = model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)
    loss = loss_fn(output, inputs) if _takes_two(loss_fn) else loss_fn(output)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise TPError(f"`loss_fn` returned {what}; it has to be a scalar, such as its `.mean()`.")
    return loss.reshape(())


def _takes_two(fn: Callable[..., Any]) -> bool:
    try:
        parameters = inspect.signature(fn).parameters.values()
    except ValueError:
        return False
    required = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty]
    return len(required) == 2


def _seed(seed: int) -> None:
    random.seed(seed)
    torch.manual_seed(seed)
