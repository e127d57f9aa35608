"""Give a model that was built on the meta device its weights: those that one process would have drawn, shard by shard.

A model built under `init_on_meta` (or the Trainer's `init_module(empty_init=True)`) has its construction on a tape
(`deferred.py`), and is filled with exactly what an ordinary construction under the same seed gives. One that was put on the
meta device in another way is initialized by each module's own `reset_parameters`, one module at a time, whole, and cut: equal
for any mesh, but not what its constructor would have drawn.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_tp._compat import apply_to_tensors, local_tensor, own_buffers, own_parameters
from lightning_tp.core.modules.deferred_init import deferred_init, values
from lightning_tp.core.modules.tape import InitTape
from lightning_tp.errors import TPError
from lightning_tp.shards.shard import ParamShard

Values = Iterator[tuple[list[str], Tensor]]
_tapes: list[InitTape] = []


@contextmanager
def init_on_meta() -> Iterator[None]:
    """Build models on the meta device, and remember how: `parallelize` then gives them the weights of an ordinary construction.

    Example:
        >>> with init_on_meta():
        ...     layer = nn.Linear(2, 3)
        >>> layer.weight.device.type
        'meta'
    """
    with deferred_init() as tape:
        yield
    _tapes.append(tape)


def source_of(model: nn.Module, known: Collection[str] = ()) -> Values | None:
    """The whole values of what `model` has on the meta device, one after the other; None if it has nothing there.

    To be called before the model is split; the values are drawn when they are asked for.

    Args:
        model: perhaps on the meta device.
        known: names of what gets its values from elsewhere (`load_pretrained`), and is left out.

    Raises:
        TPError: if nothing is known about how to draw some of them.
    """
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    names: dict[int, list[str]] = {}
    tensors: dict[int, Tensor] = {}
    for name, t in named:
        if t.is_meta:
            names.setdefault(id(t), []).append(name)
            tensors[id(t)] = t
    if not tensors:
        return None
    tape = next((tape for tape in reversed(_tapes) if all(tape.holds(t) for t in tensors.values())), None)
    for i in [i for i, of in names.items() if any(n in known for n in of)]:
        del names[i], tensors[i]
    if tape is not None:
        return _from_tape(tape, values(model, tape, known))
    return _from_reset_parameters(model, tensors, names)


def _from_tape(tape: InitTape, whole: Values) -> Values:
    yield from whole
    _tapes.remove(tape)


def _from_reset_parameters(model: nn.Module, tensors: dict[int, Tensor], names: dict[int, list[str]]) -> Values:
    owners = [
        (prefix, module)
        for prefix, module in model.named_modules()
        if any(id(t) in tensors for t in (*own_parameters(module).values(), *own_buffers(module).values()))
    ]
    without = [f"`{p}` ({type(m).__name__})" for p, m in owners if not callable(getattr(m, "reset_parameters", None))]
    if without:
        raise TPError(
            f"{len(without)} modules are on the meta device and can't be initialized there: {', '.join(without[:4])} have no "
            "`reset_parameters`. Build the model under `trainer.init_module(empty_init=True)` or `lightning_tp.init_on_meta()`, which "
            "remember how it was built; or build it on the CPU."
        )
    whole = [(prefix, _on_cpu(module)) for prefix, module in owners]  # before the split changes the modules
    return _reset(whole, names, {n: i for i, of in names.items() for n in of})


def _on_cpu(module: nn.Module) -> nn.Module:
    """The module with tensors of its own, to be given memory later."""
    twin = copy.copy(module)
    twin.__dict__ = {k: dict(v) if k in ("_parameters", "_buffers") else v for k, v in module.__dict__.items()}
    return twin


def _reset(whole: list[tuple[str, nn.Module]], names: dict[int, list[str]], ids: dict[str, int]) -> Values:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch.initial_seed())
        for prefix, twin in whole:
            tables: tuple[dict[str, Any], ...] = (own_parameters(twin), own_buffers(twin))
            for of in tables:
                for name, t in of.items():
                    if t is not None and t.is_meta:
                        empty = torch.empty_like(t, device="cpu")
                        of[name] = nn.Parameter(empty, t.requires_grad) if isinstance(t, nn.Parameter) else empty
            twin.reset_parameters()  # type: ignore[operator]
            for of in tables:
                for name in list(of):
                    full = f"{prefix}.{name}" if prefix else name
                    if full in ids:  # not what is known from elsewhere
                        yield names[ids[full]], of[name].detach()
                        of[name] = None


@torch.no_grad()
def fill(model: nn.Module, whole_values: Values, shards: Mapping[str, ParamShard], device: torch.device) -> None:
    """Give every tensor on the meta device memory on `device`, and this rank's shard of its value."""
    tied: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        tied.setdefault(id(p), []).append(name)
    apply_to_tensors(model, lambda t: torch.empty_like(t, device=device) if t.device.type == "meta" else t.to(device))
    for first, *others in tied.values():  # which `_apply` has replaced one by one
        for name in others:
            owner, _, leaf = name.rpartition(".")
            own_parameters(model.get_submodule(owner))[leaf] = model.get_parameter(first)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    buffers = dict(model.named_buffers(remove_duplicate=False))
    for names, whole in whole_values:
        name = next((n for n in names if n in shards), names[0])
        if name in parameters:
            local = shards[name].take(whole) if name in shards else whole
            local_tensor(parameters[name].data).copy_(local)
        for n in names:
            if n in buffers:
                buffers[n].copy_(whole)
