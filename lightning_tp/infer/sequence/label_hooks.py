"""Hooks on the modules of a traced run that put labels on tensors; what they do is not seen as something that the model does."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from lightning_tp._compat import unobserved
from lightning_tp.infer.follow.tracer import FeatureTracer, TensorFacts
from lightning_tp.infer.sequence.sequence_plan import Arg, Region


class LabelHooks:
    """Hooks for one run. While a region runs, the tensors by which a stream arrives have another label."""

    def __init__(self, model: nn.Module, tracer: FeatureTracer) -> None:
        self.model, self.tracer = model, tracer
        self.entered: list[
            tuple[Region, list[tuple[Tensor, TensorFacts]]]
        ] = []  # regions that run, and what is known of their inputs
        self._handles: list[Any] = []

    def hook(self, name: str, enter: Callable[..., None] | None, leave: Callable[..., None] | None) -> None:
        """Call `enter(module, args, kwargs)` before a module runs, and `leave(module, args, out)` after."""
        module = self.model.get_submodule(name)
        if enter is not None:
            self._handles.append(module.register_forward_pre_hook(partial(_quietly, enter), with_kwargs=True))
        if leave is not None:
            self._handles.append(module.register_forward_hook(partial(_quietly, leave)))

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def relabel(self, t: Tensor, label: Tensor | None) -> None:
        """Give a tensor another label."""
        self.tracer.put(t, TensorFacts(label, None, self.tracer.shadow(t).grad))

    def enter_region(self, region: Region, stream: list[Tensor], label_of: Callable[[Tensor], Tensor | None]) -> None:
        """Give the tensors of a stream the labels that code in a region is to see."""
        tensors = {id(t): t for t in stream}.values()
        self.entered.append((region, [(t, self.tracer.shadow(t)) for t in tensors]))
        for t in tensors:
            self.relabel(t, label_of(t))

    def leave_region(self) -> None:
        """Give them their own labels again."""
        for t, facts in self.entered.pop()[1]:
            self.tracer.put(t, facts)


def _quietly(hook: Callable[..., None], *args: Any) -> None:
    with unobserved():
        hook(*args)


def tensor_args(args: Any, kwargs: Any) -> list[tuple[Arg, Tensor]]:
    """Return (argument, tensor) of what a module is given, without what is in containers."""
    pairs: list[tuple[Arg, Any]] = [*enumerate(args), *kwargs.items()]
    return [(k, t) for k, t in pairs if isinstance(t, Tensor)]


def first_tensor(out: Any) -> Tensor | None:
    """Return the output that may be the stream: the only one, or the first of several."""
    if isinstance(out, (tuple, list)) and out:
        out = out[0]
    return out if isinstance(out, Tensor) else None
