"""Run a model, and its loss, under the tracer."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_tp._compat import unobserved
from lightning_tp.infer.follow import convolutions, moves, products  # noqa: F401  they register the rules of the tracer
from lightning_tp.infer.follow.gradients import gradients_apart
from lightning_tp.infer.follow.meta import Values
from lightning_tp.infer.follow.trace import FeatureTrace
from lightning_tp.infer.follow.tracer import FeatureTracer


def run(
    model: nn.Module,
    call: Callable[[nn.Module, Any], Any],
    inputs: Any,
    whole: set[tuple[str, int]],
    shared: dict[tuple[str, int], Tensor],
    recorder: Any = None,
    *,
    tracer_of: Any = None,
    during: Any = None,
) -> tuple[FeatureTrace, Any, Any]:
    """Trace one forward of the model, `call(model, inputs)`; whether gradients are enabled is as around it.

    Args:
        model: whose parameters are the weights that are followed.
        call: runs it.
        inputs: of the call; taken to the meta device if the model is there.
        whole: this and the next: as of `FeatureTracer`.
        shared: likewise.
        recorder: `recorder(tracer)` makes a mode that sees the calls of torch functions.
        tracer_of: makes the tracer, of the model, `whole` and `shared`; default `FeatureTracer`.
        during: `during(tracer)` is a context in which the forward runs.

    Returns:
        What was found, the output of the call, and the tracer.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
        >>> trace, _, _ = run(model, lambda m, x: m(x), torch.zeros(2, 4), set(), {})
        >>> [(use.name, use.kind) for use in trace.uses]
        [('0.weight', 'out'), ('2.weight', 'in')]
    """
    tracer: Values = (tracer_of or FeatureTracer)(model, whole, shared)
    if tracer.on_meta:
        inputs = tracer.onto_meta(inputs)
    names = {id(m): n for n, m in model.named_modules()}
    handles = [
        torch.nn.modules.module.register_module_forward_pre_hook(
            lambda m, _: tracer.stack.append(names.get(id(m), tracer.stack[-1]))
        ),
        torch.nn.modules.module.register_module_forward_hook(lambda m, _, o: (tracer.stack.pop(), None)[1], always_call=True),
    ]
    try:
        outer = nullcontext() if during is None else during(tracer)
        with outer, gradients_apart(model, tracer), _CrossEntropy(tracer) if recorder is None else recorder(tracer), tracer:
            out = call(model, inputs)
    finally:
        for h in handles:
            h.remove()
    return tracer.trace, out, tracer


class _CrossEntropy(torch.overrides.TorchFunctionMode):
    """Note the logits of each cross entropy."""

    def __init__(self, tracer: Values) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.nn.functional.cross_entropy:
            return func(*args, **(kwargs or {}))
        return cross_entropy(self.tracer, args, kwargs or {}, self.tracer.trace.logits)


def cross_entropy(tracer: Values, args: Any, kwargs: Any, logits: list[Tensor] | None = None) -> Any:
    """Run a cross entropy on logits that may be sharded by class: features end there, are not joined, and are added to `logits`."""
    given = args[0] if args else kwargs["input"]
    label = tracer.shadow(given).label
    if label is not None:
        with unobserved():
            plain = given.detach()  # of which nothing is known
        args, kwargs = ((plain, *args[1:]), kwargs) if args else (args, {**kwargs, "input": plain})
        if logits is not None:
            logits.append(label)
    return torch.nn.functional.cross_entropy(*args, **kwargs)


def leaves(out: Any, depth: int = 4) -> list[Tensor]:
    """Return the tensors in the output of a model: in lists, dicts and dataclasses; not those in a cache, which goes back into the model."""
    if isinstance(out, Tensor):
        return [out]
    if is_dataclass(out) and not isinstance(out, (dict, type)):
        out = [getattr(out, f.name, None) for f in fields(out)]
    if not depth or not isinstance(out, (dict, list, tuple)):
        return []
    return [t for i in (out.values() if isinstance(out, dict) else out) for t in leaves(i, depth - 1)]
