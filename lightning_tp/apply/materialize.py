"""Give a model that was built on the meta device its weights: those that one process would have drawn, shard by shard.

A model built under `init_on_meta` (or the Trainer's `init_module(empty_init=True)`) has its construction recorded (`deferred_init.py`), and gets
exactly what an ordinary construction on the CPU under the same seed gives, on every device: a model that a process builds on its GPU
(`with torch.device("cuda")`, or Lightning's `init_module()` in one process) draws other weights. One that was put on the meta device in
another way is initialized by each module's own `reset_parameters`, one full module at a time, and then sharded: equal for any mesh, but
not what its constructor would have drawn.
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

Values = Iterator[tuple[list[str], Tensor]]  # (all names of a tensor, its full value)
_tapes: list[InitTape] = []


@contextmanager
def init_on_meta() -> Iterator[None]:
    """Build models on the meta device, and record how: `parallelize` then gives them the weights of an ordinary construction on the CPU.

    That is so on GPUs as well, where a construction under `torch.device("cuda")` draws other numbers.

    Example:
        >>> with init_on_meta():
        ...     layer = nn.Linear(2, 3)
        >>> layer.weight.device.type
        'meta'
    """
    with deferred_init() as tape:
        yield
    _tapes.append(tape)


def initial_values(model: nn.Module, known: Collection[str] = ()) -> Values | None:
    """Return the full initial values of a model's tensors on the meta device, one after the other; None if it has none there.

    To be called before the model is sharded; the values are drawn when they are asked for.

    Args:
        model: in full or in part on the meta device.
        known: names of what gets its values from elsewhere (`load_pretrained`), and is left out.

    Raises:
        TPError: if nothing is known about how to initialize some of them.
    """
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    names: dict[int, list[str]] = {}  # by id of a tensor, as tied ones have several
    tensors: dict[int, Tensor] = {}
    for name, t in named:
        if t.is_meta:
            names.setdefault(id(t), []).append(name)
            tensors[id(t)] = t
    if not tensors:
        return None
    tape = next((tape for tape in reversed(_tapes) if all(tape.holds(t) for t in tensors.values())), None)
    if tape is not None:
        return _from_tape(tape, values(model, tape, known))
    unknown = {i: tied for i, tied in names.items() if not any(name in known for name in tied)}
    return _from_reset_parameters(model, unknown)


def _from_tape(tape: InitTape, full_values: Values) -> Values:
    yield from full_values
    _tapes.remove(tape)


def _from_reset_parameters(model: nn.Module, names: dict[int, list[str]]) -> Values:
    owners = [
        (prefix, module)
        for prefix, module in model.named_modules()
        if any(id(t) in names for t in (*own_parameters(module).values(), *own_buffers(module).values()))
    ]
    without = [f"`{p}` ({type(m).__name__})" for p, m in owners if not callable(getattr(m, "reset_parameters", None))]
    if without:
        raise TPError(
            f"{len(without)} modules are on the meta device and can't be initialized: {', '.join(without[:4])} have no `reset_parameters`. "
            "Build the model under `trainer.init_module(empty_init=True)` or `lightning_tp.init_on_meta()`, which record its construction; or "
            "build it on the CPU."
        )
    copies = [(prefix, _shallow_copy(module)) for prefix, module in owners]  # before the modules are sharded
    return _reset(copies, {name: tied for tied in names.values() for name in tied})


def _shallow_copy(module: nn.Module) -> nn.Module:
    """The module with tables of parameters and buffers of its own, which keep their full shapes."""
    twin = copy.copy(module)
    twin.__dict__ = {k: dict(v) if k in ("_parameters", "_buffers") else v for k, v in module.__dict__.items()}
    parameters = own_parameters(twin)
    parameters.update({n: None if p is None else nn.Parameter(p.detach(), p.requires_grad) for n, p in parameters.items()})
    return twin


def _reset(modules: list[tuple[str, nn.Module]], tied: dict[str, list[str]]) -> Values:
    """Initialize one module at a time on the CPU, and let go of it; `tied` has for each name that is wanted all names of its tensor."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(torch.initial_seed())
        for prefix, module in modules:
            tables: tuple[dict[str, Any], ...] = (own_parameters(module), own_buffers(module))
            for table in tables:
                for name, t in table.items():
                    if t is not None and t.is_meta:
                        empty = torch.empty_like(t, device="cpu")
                        table[name] = nn.Parameter(empty, t.requires_grad) if isinstance(t, nn.Parameter) else empty
            module.reset_parameters()  # type: ignore[operator]
            for table in tables:
                for name in list(table):
                    full_name = f"{prefix}.{name}" if prefix else name
                    if full_name in tied:
                        yield tied[full_name], table[name].detach()
                        table[name] = None


@torch.no_grad()
def fill_shards(model: nn.Module, full_values: Values, shards: Mapping[str, ParamShard], device: torch.device) -> None:
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
    for names, full in full_values:
        name = next((n for n in names if n in shards), names[0])
        if name in parameters:
            local_tensor(parameters[name].data).copy_(shards[name].take(full) if name in shards else full)
        for n in names:
            if n in buffers:
                buffers[n].copy_(full)
