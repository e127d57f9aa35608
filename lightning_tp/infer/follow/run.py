"""Run a model under the tracer, and its loss."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_tp.infer.follow.tracer import FeatureTrace, FeatureTracer, _untraced


def leaves(out: Any, depth: int = 4) -> list[Tensor]:
    """The tensors in what a model returns: in lists, dicts and dataclasses."""
    if isinstance(out, Tensor):
        return [out]
    if depth == 0:
        return []
    if isinstance(out, dict):
        inner = list(out.values())
    elif isinstance(out, (list, tuple)):
        inner = list(out)
    elif is_dataclass(out) and not isinstance(out, type):
        inner = [getattr(out, f.name, None) for f in fields(out)]
    else:  # such as a cache of keys and values, which goes back into the model
        return []
    return [t for i in inner for t in leaves(i, depth - 1)]


class _Losses(torch.overrides.TorchFunctionMode):
    """The cross entropy takes logits that are split by the class: a sink for features, not a place where they meet."""

    def __init__(self, tracer: FeatureTracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.cross_entropy:
            logits = args[0] if args else kwargs["input"]
            shadow = self.tracer.shadow(logits)
            if shadow.label is not None:
                with _untraced():
                    plain = logits.detach()
                    self.tracer.trace.logits.append(shadow.label)
                rest = {**kwargs, **({} if args else {"input": plain})}
                return func(plain, *args[1:], **rest) if args else func(**rest)
        return func(*args, **kwargs)


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
) -> tuple[FeatureTrace, Any, FeatureTracer]:
    """One forward of the model, `call(model, inputs)`, traced.

    Args:
        recorder: `recorder(tracer)` makes a mode that sees the calls of torch functions.
        tracer_of: makes the tracer, of the model, `whole` and `shared`; default `FeatureTracer`.
        during: `during(tracer)` is a context that the forward runs in.
    """
    tracer = (tracer_of or FeatureTracer)(model, whole, shared)
    if tracer.on_meta:
        inputs = tracer.onto_meta(inputs)
        tracer._know_buffers(model)
    names = {id(m): n for n, m in model.named_modules()}
    handles = [
        torch.nn.modules.module.register_module_forward_pre_hook(
            lambda m, _: tracer.stack.append(names.get(id(m), tracer.stack[-1]))
        ),
        torch.nn.modules.module.register_module_forward_hook(lambda m, _, o: (tracer.stack.pop(), None)[1], always_call=True),
    ]
    try:
        outer = nullcontext() if during is None else during(tracer)
        with outer, torch.no_grad(), _Losses(tracer) if recorder is None else recorder(tracer), tracer:
            out = call(model, inputs)
    finally:
        for h in handles:
            h.remove()
    return tracer.trace, out, tracer
