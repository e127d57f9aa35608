"""Call a loss function that a user has passed."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor

from lightning_tp.errors import TPError


def loss_from(loss_fn: Callable[..., Tensor], output: Any, inputs: Any) -> Tensor:
    """Return the loss of a model's output, a tensor without dimensions: `loss_fn(output)`, or `loss_fn(output, inputs)` if it takes two arguments.

    Raises:
        TPError: if it returns something else than one number.

    Example:
        >>> import torch
        >>> loss_from(lambda output, inputs: (output - inputs).square().mean(), torch.ones(2), torch.zeros(2))
        tensor(1.)
    """
    loss = loss_fn(output, inputs) if _takes_two(loss_fn) else loss_fn(output)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise TPError(f"`loss_fn` returned {what}, but has to return a scalar. Reduce it, for example by `.mean()`.")
    return loss.reshape(())


def _takes_two(loss_fn: Callable[..., Any]) -> bool:
    """Whether two positional arguments are required."""
    try:
        parameters = inspect.signature(loss_fn).parameters.values()
    except (TypeError, ValueError):  # builtins have no signature
        return False
    return sum(p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters) > 1
