"""What a style is: how one module's parameters are split, and how the module runs on its shards.

A style is an immutable value with a name and a few options. It answers the same questions always by the same methods: `splits` (which
shard of each parameter does each rank hold, from sizes alone), `bind` (make the module run on its shards, after its parameters were
split), `fill_in` (options that a rule left open, from the rest of the plan), `without_sequence` (the same without sequence
parallelism) and `to_torch` (the same as a `ParallelStyle` of `torch.distributed.tensor.parallel`). No style calls a collective: it
names the state in which a tensor arrives and the one that is wanted, and `core/comm/transitions.py` has the pair of collectives.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from lightning_tp.core.comm.axis import Axis
from lightning_tp.core.comm.state import SEQUENCE, I, P, State
from lightning_tp.errors import TPError
from lightning_tp.styles.split import Split

if TYPE_CHECKING:
    from torch.distributed.tensor.parallel import ParallelStyle


@dataclass(frozen=True)
class BindContext:
    """Where a style is bound: the module's name, the axis, and what holds for the whole model."""

    where: str
    axis: Axis
    loss_parallel: bool = True


class PlanContext(Protocol):
    """What the rest of a plan says about a module; see `plan/complete.py`."""

    @property
    def stream(self) -> State:
        """The state of the activations between split modules: `S(1)` in a sequence-parallel plan, else `I`."""

    def is_inside_boundary(self, where: str) -> bool:
        """Whether a module around this one takes its input to `R`."""

    def is_beside_split_layers(self, where: str) -> bool:
        """Whether column- and row-wise layers stand in the module that holds this one: it may run before, between or after them."""

    def heads(self, where: str) -> tuple[int | None, int | None]:
        """(heads of this linear layer, heads that attend), from the sizes that the module around it stores; (None, None) for an MLP."""


@dataclass(frozen=True)
class Style:
    """Base of all styles: subclass it to split a module in a way of your own, and put an instance in a plan."""

    name: ClassVar[str] = ""
    splits_parameters: ClassVar[bool] = True
    states: ClassVar[dict[str, tuple[State, ...]]] = {}
    """Option -> the states that it may have. They may be given by name: `Rowwise(output="S(1)")`."""

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if not _fits(f.name, value, str(f.type)):
                raise TPError(
                    f"`{self.name}({f.name}={value!r})`: {f.name} is {str(f.type).replace(' | ', ' or ')}, and this is of the type "
                    f"{type(value).__name__}. Write {f.name} as a positive number, without quotation marks, or leave it out."
                )
            if f.name in self.states and value is not None:
                object.__setattr__(self, f.name, self._state(f.name, value))
            elif isinstance(value, (list, tuple)):  # JSON has lists for tuples; a style is hashable
                object.__setattr__(self, f.name, as_tuples(value))

    def _state(self, option: str, value: Any) -> State:
        try:
            state = State.of(value)
        except TPError as error:
            raise TPError(f"`{self.name}({option}={value!r})`: {error}") from None
        if state not in self.states[option]:
            allowed = " or ".join(map(str, self.states[option]))
            raise TPError(f"`{self.name}({option}={state})`: {option} can be {allowed}.")
        return state

    def splits(self, module: nn.Module, where: str, tp: int) -> dict[str, Split]:
        """Return how each parameter below `module` is split, by its name inside the module.

        Raises:
            TPError: if this style can't be used on this module, or its sizes don't fit tp.
        """
        raise NotImplementedError

    def bind(self, module: nn.Module, site: BindContext) -> None:
        """Make the module run on its shards; its parameters are this rank's already."""

    def fill_in(self, where: str, module: nn.Module | None, plan: PlanContext) -> Style:
        """Return this style with every option that its rule left open; by default, the states that are None become that of the stream.

        Args:
            where: the name of the module, or of the parameter.
            module: None for a parameter.
            plan: what the rest of the plan says.
        """
        stream = plan.stream
        left_open = {name: stream for name, allowed in self.states.items() if getattr(self, name) is None and stream in allowed}
        return replace(self, **left_open) if left_open else self

    def without_sequence(self) -> Style | None:
        """Return the style for activations that stay full between split modules; None if nothing is left to do."""
        full: dict[str, Any] = {name: I for name in self.states if getattr(self, name) == SEQUENCE}
        return replace(self, **full) if full else self

    def to_torch(self, module: nn.Module) -> ParallelStyle | None:
        """Return the same as a style for `torch.distributed.tensor.parallel.parallelize_module`; None where it needs none.

        Raises:
            TPError: if torch has no counterpart.
        """
        return None

    def options(self) -> dict[str, Any]:
        """Return the options that differ from the defaults, as plain data."""
        return {f.name: str(v) if isinstance(v, State) else v for f in fields(self) if (v := getattr(self, f.name)) != f.default}

    def __str__(self) -> str:
        shown = {f.name: v for f in fields(self) if (v := getattr(self, f.name)) != f.default and f.name != "ranges"}
        return f"{self.name}({', '.join(f'{k}={v!r}' for k, v in shown.items())})" if shown else self.name


def _fits(option: str, value: Any, annotation: str) -> bool:
    """Whether the value of an option can be right, for an annotation made of `int`, `tuple[int, ...]` and None; True for all others."""
    kinds = set(annotation.replace("tuple[int | None, ...]", "tuple[int, ...]").split(" | "))
    if not kinds <= {"int", "None", "tuple[int, ...]"}:
        return True
    numbers = [n for n in value if n is not None] if isinstance(value, (tuple, list)) and "tuple[int, ...]" in kinds else [value]
    if value is None:
        return "None" in kinds
    least = 1 if option in ("heads", "query_heads", "parts") else -8  # dims may count from the end
    return all(isinstance(n, int) and not isinstance(n, bool) and n >= least for n in numbers) and bool(numbers)


def as_tuples(value: Any) -> Any:
    """Return plain data with tuples in place of lists, as JSON reads them; in the values of a dict, too.

    Example:
        >>> as_tuples({"ranges": [[0, 2], [2, 4]]})
        {'ranges': ((0, 2), (2, 4))}
    """
    if isinstance(value, dict):
        return {k: as_tuples(v) for k, v in value.items()}
    return tuple(as_tuples(v) for v in value) if isinstance(value, (list, tuple)) else value


def layout(state: State) -> Any:
    """Return torch's placement for a state."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    return Partial() if state == P else Replicate() if state.dim is None else Shard(state.dim)


def is_conv1d(module: nn.Module) -> bool:
    """Return whether this is the `Conv1D` of transformers: a linear layer with a transposed weight, (in, out).

    Told by its name and attributes, so that transformers need not be imported.
    """
    weight = getattr(module, "weight", None)
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and isinstance(weight, Tensor) and weight.ndim == 2


def linear_dims(module: nn.Module, where: str, style: str) -> tuple[int, int, torch.Size]:
    """Return (dim of the output features, dim of the input features, shape) of a linear layer's weight.

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


def set_sizes(module: nn.Module, **sizes: int) -> int:
    """Set the sizes that a layer shows (`out_features`, `nf`, ..) to those of its shard; return the full size."""
    before = 0
    for name, size in sizes.items():
        if hasattr(module, name):
            before = int(getattr(module, name))
            setattr(module, name, size)
    return before


class ReplacedForward(nn.Module):
    """Runs the forward that was put on a module itself."""

    _replaced: Callable[..., Any]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._replaced(*args, **kwargs)
