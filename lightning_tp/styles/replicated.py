"""Modules that every rank holds in full: run on all tokens (`replicate`), or on this rank's shard of the sequence (`sequence`).

Sequence parallelism after Korthikanti et al. 2022 (arXiv 2205.05198); torch's counterpart is `SequenceParallel`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor, nn

from lightning_tp.core.comm.axis import Axis
from lightning_tp.core.comm.state import SEQUENCE, I, R, State
from lightning_tp.core.comm.transitions import Transition, transition
from lightning_tp.core.modules.swap_class import swap_class
from lightning_tp.styles.base import BindContext, PlanContext, Style
from lightning_tp.styles.split import Split


@dataclass(frozen=True)
class Sequence(Style):
    """Run a norm or a dropout on this rank's shard of the sequence, (B, S / tp, d).

    Its parameters are full on every rank; their gradients are partial, and summed.

    Args:
        input: the state in which its input arrives: `S(1)`, or `I` (it is sharded here).
        output: the state in which its output leaves: `S(1)`, or `I` (it is all-gathered here).
    """

    name: ClassVar[str] = "sequence"
    states: ClassVar[dict[str, tuple[State, ...]]] = {"input": (SEQUENCE, I), "output": (SEQUENCE, I)}
    input: State = SEQUENCE
    output: State = SEQUENCE

    def splits(self, module: nn.Module, where: str, tp: int) -> dict[str, Split]:
        return {name: Split(R) for name, _ in module.named_parameters(remove_duplicate=False)}

    def bind(self, module: nn.Module, site: BindContext) -> None:
        enter, leave = transition(self.input, SEQUENCE), transition(SEQUENCE, self.output)
        if enter is not None or leave is not None:
            swap_class(module, _Sequence, _axis=site.axis, _enter=enter, _leave=leave)

    def without_sequence(self) -> Style:
        return Replicate(state=I)

    def to_torch(self, module: nn.Module) -> Any:
        from torch.distributed.tensor.parallel import SequenceParallel

        return SequenceParallel()


@dataclass(frozen=True)
class Replicate(Style):
    """Keep a module, or a parameter, in full on every rank.

    Args:
        state: `I` if it works on full activations that all ranks have, so that its gradient is equal on all of them; `R` if it works on
            sharded ones (a norm on the heads of q and k, a router in front of split experts), so that its gradient is partial, and is
            summed. Default: `R` inside a module whose input is taken to `R`; beside column- and row-wise layers it is found in the
            first backward pass, by comparing its gradients over the ranks; `I` elsewhere.
    """

    name: ClassVar[str] = "replicate"
    states: ClassVar[dict[str, tuple[State, ...]]] = {"state": (I, R)}
    state: State | None = None

    def splits(self, module: nn.Module, where: str, tp: int) -> dict[str, Split]:
        return {name: Split(self.state) for name, _ in module.named_parameters(remove_duplicate=False)}

    def fill_in(self, where: str, module: nn.Module | None, plan: PlanContext) -> Style:
        if self.state is not None:
            return self
        if plan.is_inside_boundary(where):
            return replace(self, state=R)
        return self if plan.is_beside_split_layers(where) else replace(self, state=I)


class _Sequence(nn.Module):
    _axis: Axis
    _enter: Transition | None
    _leave: Transition | None

    def forward(self, x: Tensor) -> Tensor:
        if self._enter is not None:
            x = self._enter(x, self._axis)
        y = super().forward(x)
        return y if self._leave is None else self._leave(y, self._axis)
