"""Modules that stay whole: on every token of every rank (`replicate`), or each rank on its own tokens (`sequence`).

Sequence parallelism after Korthikanti et al. 2022 (arXiv 2205.05198); torch's counterpart is `SequenceParallel`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from lightning_tp.core.comm.axis import Axis, State
from lightning_tp.core.comm.transitions import Transition, transition
from lightning_tp.core.modules.swap_class import swap_class
from lightning_tp.styles.base import BindContext, Style, check_state
from lightning_tp.styles.split import Split


@dataclass(frozen=True)
class Sequence(Style):
    """Run a norm or a dropout on this rank's tokens: (B, S / tp, d). Its parameters are whole; their gradients are summed.

    Args:
        input: what arrives: "sequence", or "replicate" (this rank's tokens are cut out).
        output: what leaves: "sequence", or "replicate" (the tokens are gathered).
    """

    name: ClassVar[str] = "sequence"
    input: State = "sequence"
    output: State = "sequence"

    def splits(self, module: nn.Module, where: str, tp: int) -> dict[str, Split]:
        check_state(self, "input", ("sequence", "replicate"), where)
        check_state(self, "output", ("sequence", "replicate"), where)
        return {name: Split(sum_over=tp) for name, _ in module.named_parameters(remove_duplicate=False)}

    def bind(self, module: nn.Module, site: BindContext) -> None:
        enter, leave = transition(self.input, "sequence"), transition("sequence", self.output)
        if enter is not None or leave is not None:
            swap_class(module, _Sequence, _axis=site.axis, _enter=enter, _leave=leave)

    def to_torch(self, module: nn.Module) -> Any:
        from torch.distributed.tensor.parallel import SequenceParallel

        return SequenceParallel()


@dataclass(frozen=True)
class Replicate(Style):
    """Keep a module, or a parameter, whole on every rank.

    Args:
        partial_grad: whether it works on activations of which each rank has a share (a norm on the heads of q and k, a
            router in front of split experts), so that its gradient is a sum over ranks. None: it does if it lies inside a
            module whose input is gathered for split layers.
    """

    name: ClassVar[str] = "replicate"
    partial_grad: bool | None = None

    def splits(self, module: nn.Module, where: str, tp: int) -> dict[str, Split]:
        split = Split(sum_over=tp if self.partial_grad else 1)
        return {name: split for name, _ in module.named_parameters(remove_duplicate=False)}


class _Sequence(nn.Module):
    _axis: Axis
    _enter: Transition | None
    _leave: Transition | None

    def forward(self, x: Tensor) -> Tensor:
        if self._enter is not None:
            x = self._enter(x, self._axis)
        y = super().forward(x)
        return y if self._leave is None else self._leave(y, self._axis)
