"""What a style is: how one module's parameters are split, and how the module runs on its shards.

A style is an immutable value with a name and a few options. It answers three questions, always by the same three methods:
`splits` (which part of each parameter does each rank hold, decided from sizes alone), `bind` (make the module run on its
shards, after its parameters were split) and `to_torch` (the same thing as a `ParallelStyle` of
`torch.distributed.tensor.parallel`). No style calls a collective: it names what arrives and what is wanted, and `comm.py` has
the pair that does it.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_tp.core.comm.axis import Axis
from lightning_tp.errors import TPError
from lightning_tp.styles.split import Split

if TYPE_CHECKING:
    from torch.distributed.tensor.parallel import ParallelStyle


@dataclass(frozen=True)
class BindContext:
    """Where a style is bound: the module's name, the axis, and what the plan says of the whole model."""

    where: str
    axis: Axis
    loss_parallel: bool = True


@dataclass(frozen=True)
class Style:
    """Base of all styles: subclass it to split a module in a way of your own, and put an instance in a plan."""

    name: ClassVar[str] = ""
    splits_parameters: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for f in fields(self):  # JSON has lists for tuples; a style is hashable
            if isinstance(value := getattr(self, f.name), (list, tuple)):
                object.__setattr__(self, f.name, as_tuples(value))

    def splits(self, module: nn.Module, where: str, tp: int) -> dict[str, Split]:
        """How each parameter below `module` is split, by its name inside the module.

        Raises:
            TPError: if this style can't be used on this module, or its sizes don't fit tp.
        """
        raise NotImplementedError

    def bind(self, module: nn.Module, site: BindContext) -> None:
        """Make the module run on its shards; its parameters are this rank's already."""

    def to_torch(self, module: nn.Module) -> ParallelStyle | None:
        """The same as a style for `torch.distributed.tensor.parallel.parallelize_module`; None where it needs none."""
        return None

    def options(self) -> dict[str, Any]:
        """What differs from the defaults, as plain data."""
        return {f.name: v for f in fields(self) if (v := getattr(self, f.name)) != f.default}

    def __str__(self) -> str:
        options = ", ".join(f"{k}={v!r}" for k, v in self.options().items() if k != "ranges")
        return f"{self.name}({options})" if options else self.name


def as_tuples(value: Any) -> Any:
    """Return plain data with tuples in place of lists, as JSON reads them; in the values of a dict, too.

    Example:
        >>> as_tuples({"ranges": [[0, 2], [2, 4]]})
        {'ranges': ((0, 2), (2, 4))}
    """
    if isinstance(value, dict):
        return {k: as_tuples(v) for k, v in value.items()}
    return tuple(as_tuples(v) for v in value) if isinstance(value, (list, tuple)) else value


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is the linear layer of transformers that has its weight transposed, (in, out); told by its name, for it is not imported."""
    weight = getattr(module, "weight", None)
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and isinstance(weight, Tensor) and weight.ndim == 2


def linear_dims(module: nn.Module, where: str, style: str) -> tuple[int, int, torch.Size]:
    """(dim of the output features, dim of the input features, shape) of a linear layer's weight.

    `nn.Linear` has (out, in), the `Conv1D` of transformers (in, out).

    Raises:
        TPError: if the module is no linear layer.
    """
    if isinstance(module, nn.Linear):
        return 0, 1, module.weight.shape
    if is_conv1d(module):
        weight: Any = module.weight
        return 1, 0, weight.shape
    raise TPError(
        f"`{where}`: the style `{style}` splits a linear layer, and this is a {type(module).__name__}. Use `replicate` for it, "
        "name the linear layers inside it, or write a style of your own (a subclass of lightning_tp.styles.Style)."
    )


def check_state(style: Style, option: str, allowed: tuple[str, ...], where: str) -> None:
    """Refuse a state that this style has no transition for; None is left to the plan.

    Raises:
        TPError: it names the states that there are.
    """
    state = getattr(style, option)
    if state is not None and state not in allowed:
        raise TPError(f"`{where}`: `{style.name}` has no `{option}={state!r}`. There is {' or '.join(map(repr, allowed))}.")


def set_sizes(module: nn.Module, **sizes: int) -> int:
    """Let the sizes that a layer shows (`out_features`, `nf`, ..) be those of the shard that it now holds; returns the size before."""
    before = 0
    for name, size in sizes.items():
        if hasattr(module, name):
            before = int(getattr(module, name))
            setattr(module, name, size)
    return before
