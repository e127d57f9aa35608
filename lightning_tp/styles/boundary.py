"""Change the state of activations at the boundary of a module that holds several split layers: an attention, an MLP, a whole model.

The input is all-gathered once, where the module is entered, and not at each of its layers: code in between may read the length of the
sequence from it. torch's counterparts are `PrepareModuleInput` and `PrepareModuleOutput`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor, nn

from lightning_tp.core.comm.axis import Axis
from lightning_tp.core.comm.state import SEQUENCE, WIDTH, I, P, R, State
from lightning_tp.core.comm.transitions import Transition, transition
from lightning_tp.core.modules.swap_class import swap_class
from lightning_tp.errors import TPError
from lightning_tp.styles.base import BindContext, Style, layout
from lightning_tp.styles.split import Split

ANY = (R, I, P, SEQUENCE, WIDTH)


@dataclass(frozen=True)
class PrepareInput(Style):
    """Change the state of a module's input before its forward runs.

    Args:
        arrives: the state in which the caller hands it over. Default: that of the activations between split modules.
        wanted: the state in which the module reads it.
        arg: which argument: its position, or its name. Default: the first floating-point tensor.
        attributes: (name, value) pairs of attributes that the module has on a rank; e.g. how often its key/value heads are repeated, where
            ranks share them.
    """

    name: ClassVar[str] = "prepare_input"
    splits_parameters: ClassVar[bool] = False
    states: ClassVar[dict[str, tuple[State, ...]]] = {"arrives": ANY, "wanted": ANY}
    arrives: State | None = None
    wanted: State = R
    arg: int | str | None = None
    attributes: tuple[tuple[str, int], ...] = ()

    def splits(self, module: nn.Module, where: str, tp: int) -> dict[str, Split]:
        _refuse_without_transition(self.arrives or I, self.wanted, where)
        return {}

    def bind(self, module: nn.Module, site: BindContext) -> None:
        for name, value in self.attributes:
            setattr(module, name, value)
        enter = transition(self.arrives or I, self.wanted)
        if enter is not None:
            if not isinstance(module, _PrepareInput):  # another rule may prepare another argument
                swap_class(module, _PrepareInput, _input_axis=site.axis, _inputs=[])
            module.__dict__["_inputs"].append((self.arg, enter))

    def without_sequence(self) -> Style | None:
        arrives = None if self.arrives in (SEQUENCE, I) else self.arrives
        wanted = I if self.wanted == SEQUENCE else self.wanted
        is_needed = wanted != I or arrives is not None or self.attributes
        return replace(self, arrives=arrives, wanted=wanted) if is_needed else None

    def to_torch(self, module: nn.Module) -> Any:
        import inspect

        from torch.distributed.tensor.parallel import PrepareModuleInput

        arrives, wanted = layout(self.arrives or I), layout(self.wanted)
        local = self.wanted == SEQUENCE  # the stream is plain in between, as what torch's other styles leave
        if isinstance(self.arg, str):
            named: dict[str, Any] = {"input_kwarg_layouts": {self.arg: arrives}, "desired_input_kwarg_layouts": {self.arg: wanted}}
            return PrepareModuleInput(**named, use_local_output=local)
        parameters = inspect.signature(module.forward).parameters.values()
        required = [p for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        at = self.arg or 0
        given, desired = ([None] * max(len(required), at + 1) for _ in range(2))
        given[at], desired[at] = arrives, wanted
        return PrepareModuleInput(input_layouts=tuple(given), desired_input_layouts=tuple(desired), use_local_output=local)


@dataclass(frozen=True)
class PrepareOutput(Style):
    """Change the state of a module's output after its forward ran.

    Args:
        arrives: the state in which the module leaves it.
        wanted: the state in which the caller reads it.
        index: of the output, where the module returns a tuple or list.
    """

    name: ClassVar[str] = "prepare_output"
    splits_parameters: ClassVar[bool] = False
    states: ClassVar[dict[str, tuple[State, ...]]] = {"arrives": ANY, "wanted": ANY}
    arrives: State = SEQUENCE
    wanted: State = I
    index: int = 0

    def splits(self, module: nn.Module, where: str, tp: int) -> dict[str, Split]:
        _refuse_without_transition(self.arrives, self.wanted, where)
        return {}

    def bind(self, module: nn.Module, site: BindContext) -> None:
        leave = transition(self.arrives, self.wanted)
        if leave is not None:
            if not isinstance(module, _PrepareOutput):
                swap_class(module, _PrepareOutput, _output_axis=site.axis, _outputs={})
            module.__dict__["_outputs"][self.index] = leave

    def without_sequence(self) -> Style | None:
        arrives, wanted = (I if state == SEQUENCE else state for state in (self.arrives, self.wanted))
        return None if arrives == wanted else replace(self, arrives=arrives, wanted=wanted)

    def to_torch(self, module: nn.Module) -> Any:
        from torch.distributed.tensor.parallel import PrepareModuleOutput

        return PrepareModuleOutput(output_layouts=layout(self.arrives), desired_output_layouts=layout(self.wanted))


def _refuse_without_transition(arrives: State, wanted: State, where: str) -> None:
    # while the plan is checked: when it is bound, the model is split already
    try:
        transition(arrives, wanted)
    except TPError as e:
        raise TPError(f"`{where}`: {e}") from None


class _PrepareInput(nn.Module):
    _input_axis: Axis  # names of its own: the module may be a split layer, which has `_axis`, `_enter` and `_leave`
    _inputs: list[tuple[int | str | None, Transition]]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        (arg, enter), *more = self._inputs
        if not more and args and (arg == 0 or (arg is None and isinstance(args[0], Tensor) and args[0].is_floating_point())):
            return super().forward(enter(args[0], self._input_axis), *args[1:], **kwargs)  # the usual case
        named: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
        entered: dict[tuple[int, Transition], Tensor] = {}  # one tensor may be several arguments: queries, keys and values
        for arg, enter in self._inputs:
            found = arg
            if arg is None:
                found = next((k for k, v in named.items() if isinstance(v, Tensor) and v.is_floating_point()), None)
            if not isinstance(named.get(found), Tensor):
                raise TPError(
                    f"{type(self).__name__}: the plan prepares "
                    + ("a floating-point tensor" if arg is None else f"the argument {arg!r}")
                    + f" of this module, and it was called with {[k for k in named]}. Name another one with `arg=`."
                )
            x = named[found]
            if (id(x), enter) not in entered:
                entered[id(x), enter] = enter(x, self._input_axis)
            named[found] = entered[id(x), enter]
        return super().forward(*(named[i] for i in range(len(args))), **{k: named[k] for k in kwargs})


class _PrepareOutput(nn.Module):
    _output_axis: Axis
    _outputs: dict[int, Transition]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out, leaving = super().forward(*args, **kwargs), self._outputs
        one = isinstance(out, Tensor)
        if not one and type(out) not in (tuple, list):
            raise TPError(
                f"{type(self).__name__}: the plan prepares its output, a tensor or a tuple, and it is a {type(out).__name__}."
            )
        outs = [out] if one else list(out)
        if not all(i < len(outs) and isinstance(outs[i], Tensor) for i in leaving):
            raise TPError(
                f"{type(self).__name__}: the plan prepares the outputs {list(leaving)}, and they are "
                f"{[type(o).__name__ for o in outs]}. Name another one with `index=`."
            )
        for i, leave in leaving.items():
            outs[i] = leave(outs[i], self._output_axis)
        return outs[0] if one else type(out)(outs)
