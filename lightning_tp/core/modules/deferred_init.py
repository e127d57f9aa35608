"""Build a model without memory, and later draw the very weights that one process would have drawn.

Inside `deferred_init()` new tensors are on the meta device, and an `InitTape` records each aten operation that makes or changes one:
`empty`, `normal_`, `arange`, `mul_`, `copy_`, casts. `values(model, tape)` runs them again on the CPU with the random numbers of an ordinary
construction, yields each parameter and buffer as soon as it is complete, and frees the rest at its last use. So a rank that keeps its shard
of each value never holds the full model, and the weights are bitwise those of `torch.manual_seed(seed); Model()`, for any mesh. Three facts:

- *Dead values still draw.* Weights that `model.apply(init)` draws again are dead where they were first drawn. What does not draw is then
  skipped; what draws runs on scratch memory, so that the random stream stays in step.
- *A generator shows a token while the tape records.* After each draw it is given a seed that names the draw. So a state that code saves and
  sets later (`fork_rng`) is known as "after draw k", any other as a real one (`manual_seed`).
- *Some initializers of torch.nn.init skip meta tensors* (`trunc_normal_`, `orthogonal_`): those calls are recorded as a whole.

Random state: the context and the playback both leave the generators as they found them, a `generator=` argument too. After a complete
playback `tape.rng_state` is the state in which an ordinary construction leaves the default one.

Stays real, at its ordinary memory: what is made with `device="cpu"` or by calls that `torch.device("meta")` does not reach
(`torch.Tensor(2, 3)`, `torch.normal`, `torch.from_numpy`). Where such a tensor meets a meta tensor, the tape keeps a copy. Code that reads
values (`.item()`, `if tensor:`) works, by a playback for that one value: fine for a schedule, slow for weights. Not supported: results whose
*shape* depends on values (`nonzero`, `x[mask]`), Python lists in an index, `sparse_` with a generator, sparse tensors, lazy modules, draws on
other devices than the CPU, meta tensors that modules hide in tuples or in objects of their own.

After torchdistX's `deferred_init`; rests on `TorchDispatchMode`, `TorchFunctionMode` and `torch.device("meta")`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_tp.core.modules.tape import InitTape, is_meta
from lightning_tp.errors import TPError

_LITERALS = {torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor}  # copy data where no mode can see it
_READS = {Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.cpu, Tensor.__array__, Tensor.__bool__, Tensor.__int__}
_READS |= {Tensor.__float__, Tensor.__complex__, Tensor.__index__}


class _NotOperators(TorchFunctionMode):
    """Handle what the tape does not see as aten operators: literals, reads of values, initializers that skip meta tensors."""

    def __init__(self, tape: InitTape) -> None:
        super().__init__()
        self._tape = tape

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        on_meta = bool(args) and is_meta(args[0])
        literal = func in _LITERALS and (not on_meta or func is Tensor.new_tensor)
        if literal and torch.device(kwargs.get("device") or "meta").type == "meta":
            value = func(*args, **{**kwargs, "device": "cpu"})
            # Without values there is nothing to defer. (transformers leaves out its initialization if `torch.tensor([]).device` is meta.)
            return value.detach().to("meta").requires_grad_(value.requires_grad) if value.numel() else value
        if on_meta and func in _READS:
            _, value = next(self._tape.replay(args[:1]))
            return func(value, *args[1:], **kwargs)
        if on_meta and func == Tensor.is_meta.__get__:  # type: ignore[attr-defined]
            frame = sys._getframe(1)
            if frame.f_globals is vars(nn.init):  # it will do nothing: record its whole call
                code, given = frame.f_code, frame.f_locals
                call = FunctionType(code, frame.f_globals)
                bound = {name: given[name] for name in code.co_varnames[: code.co_argcount]}
                self._tape.record(call, (), bound, draws=True, changes=args, overwrites=True)
        return func(*args, **kwargs)


_recording = False


@contextmanager
def deferred_init() -> Iterator[InitTape]:
    """Build a model on the meta device, and record how its values come about.

    Raises:
        TPError: inside another `deferred_init()`, or where the model needs values that a meta tensor does not have.

    Example:
        >>> with deferred_init() as tape:
        ...     model = nn.Linear(2, 3)
        >>> [(names, tuple(value.shape)) for names, value in values(model, tape)]
        [(['weight'], (3, 2)), (['bias'], (3,))]
    """
    global _recording
    if _recording:
        raise TPError("`deferred_init()` inside another one: build the whole model inside the outer one.")
    tape, _recording = InitTape(), True
    try:
        with torch.device("meta"), _NotOperators(tape), tape:
            yield tape
    except RuntimeError as error:
        if not re.search("(?<![a-z])meta(?![a-z])", str(error).lower()):
            raise
        raise TPError(
            f"the model reads values of a tensor on the meta device, which has none: {error} Create that tensor with"
            ' `device="cpu"`, or build the model without `deferred_init()` (`empty_init=False`).'
        ) from error
    finally:
        _recording = False
        tape.close()


def values(model: nn.Module, tape: InitTape, skip: Collection[str] = ()) -> Iterator[tuple[list[str], Tensor]]:
    """Yield (names, full value) for each parameter and buffer of a model that is on the meta device, one by one.

    Tied weights come once, with all their names. The value belongs to the caller, who keeps a shard or all of it; nobody else holds it. Meta
    tensors that modules keep as plain attributes, also in a list or dict (a table of angles, a metric's states), are not yielded but replaced
    by their values here, as they come.

    Args:
        model: built inside `deferred_init()`, in full or in part.
        tape: what that context gave.
        skip: names that are left out; what is drawn for them alone is not drawn.

    Raises:
        TPError: if a tensor on the meta device was not made inside the context.

    Example:
        >>> with deferred_init() as tape:
        ...     model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
        >>> shards = {name: value.chunk(2)[0].clone() for names, value in values(model, tape) for name in names}
        >>> shards["0.weight"].shape
        torch.Size([2, 4])
    """
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    named = [(name, tensor) for name, tensor in named if tensor.is_meta]
    attributes = _attributes(model, {id(tensor) for _, tensor in named})
    skipped = {id(tensor) for name, tensor in named if name in skip}
    named = [(name, tensor) for name, tensor in named if id(tensor) not in skipped]
    every = named + [(name, container[key]) for name, container, key in attributes]
    if unknown := [f"`{name}`" for name, tensor in every if not tape.holds(tensor)]:
        more = f" and {len(unknown) - 10} more" if len(unknown) > 10 else ""
        raise TPError(
            f"{', '.join(unknown[:10])}{more}: on the meta device, but not made inside this `deferred_init()`, so the values are unknown."
            " Build the whole model inside the context, or give them values before this call."
        )

    replay = tape.replay([tensor for _, tensor in every], to_the_end=not skip)

    def stream() -> Iterator[tuple[list[str], Tensor]]:
        for positions, value in replay:
            for _, container, key in (attributes[p - len(named)] for p in positions if p >= len(named)):
                container[key] = value.detach().requires_grad_(container[key].requires_grad)
            if names := [named[p][0] for p in positions if p < len(named)]:
                yield names, value
            del value  # not to be held while the next one is drawn

    return stream()


def _attributes(model: nn.Module, registered: set[int]) -> list[tuple[str, Any, Any]]:
    """(name, container, key) of the meta tensors that modules keep elsewhere than in parameters and buffers."""
    found: list[tuple[str, Any, Any]] = []
    for prefix, module in model.named_modules():
        for attribute, container in [("", vars(module)), *vars(module).items()]:
            if not isinstance(container, (dict, list)) or attribute in ("_parameters", "_buffers", "_modules"):
                continue
            for key, value in container.items() if isinstance(container, dict) else enumerate(container):
                if is_meta(value) and id(value) not in registered:
                    found.append((".".join(filter(None, (prefix, attribute, str(key)))), container, key))
    return found
