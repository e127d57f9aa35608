"""State dicts and gradients of a split model: as DTensors over the 2D mesh, or as full tensors.

While training, parameters are plain local tensors (under FSDP2 its DTensors over the data-parallel axis). Here they become DTensors
for `state_dict()`, or full tensors for an export, from what the plan says of each parameter.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_tp._compat import full_tensor, is_persistent, local_tensor, own_buffers, own_parameters
from lightning_tp.shards.parameter import SHARDED, shard_like
from lightning_tp.shards.view import local_view


@local_view()
def full_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict that the unsplit model would have: name -> full tensor on the CPU, on every rank. A collective.

    Names, shapes and layout are the unsplit model's own: fused weights in one piece, shared key/value heads once, no padding.

    Args:
        model: that `parallelize` was applied to, or any other.

    Example:
        >>> from torch import nn
        >>> {name: tuple(t.shape) for name, t in full_state_dict(nn.Linear(2, 3)).items()}
        {'weight': (3, 2), 'bias': (3,)}
    """
    reshard(model)
    done: dict[int, Tensor] = {}
    full: dict[str, Tensor] = {}
    tensors = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    names = persistent(model)
    for name in names:
        t = tensors[name]
        if id(t) not in done:
            done[id(t)] = _full(t, t).cpu()
        full[name] = done[id(t)]
    return full


@local_view()
def full_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Return the gradients that the unsplit model would have: name -> full tensor on the CPU, on every rank. A collective.

    Averaged over the data-parallel axis (the mean of the ranks' losses), as FSDP2 does it. Parameters without a gradient are left
    out; tied ones are there under each of their names.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> layer(torch.ones(1, 2)).sum().backward()
        >>> full_gradients(layer)
        {'weight': tensor([[1., 1.]])}
    """
    reshard(model)
    done: dict[int, Tensor] = {}
    full: dict[str, Tensor] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        if p.grad is None:
            continue
        if id(p) not in done:
            done[id(p)] = _full(p, p.grad).cpu()
        full[name] = done[id(p)]
    return full


def reshard(model: nn.Module) -> None:
    """Make FSDP2 put back its shards, where a forward without a backward has left unsharded parameters."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _full(of: Tensor, value: Tensor) -> Tensor:
    """The full tensor of `value`, which is sharded as the parameter or buffer `of` is."""
    shard = getattr(of, "_tp_shard", None)
    if shard is not None:
        full: Tensor = shard.gather(value)
        return full
    value = value.detach()
    return full_tensor(value) if isinstance(value, DTensor) else value.clone()


def persistent(model: nn.Module) -> list[str]:
    """Return the names that `model.state_dict()` has, without building it: hooks would turn it into DTensors."""
    names = []
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, p in own_parameters(module).items():
            if p is not None:
                names.append(f"{prefix}.{name}" if prefix else name)
        for name, b in own_buffers(module).items():
            if b is not None and is_persistent(module, name):
                names.append(f"{prefix}.{name}" if prefix else name)
    return names


def attach_state_dict(model: nn.Module) -> None:
    """Make `model.state_dict()` return DTensors over the 2D mesh, and `load_state_dict` take these or full tensors.

    The state dict of a module inside of the model holds full tensors.
    """
    model.register_state_dict_post_hook(_state_dict_as_dtensors)
    model.register_load_state_dict_pre_hook(_load_locals)
    for module in model.modules():
        if module is not model:
            module.register_state_dict_post_hook(_state_dict_in_full)


def _state_dict_in_full(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Make the state dict of a part of the model hold full tensors, on the CPU: what `save_pretrained` or `torch.save` writes."""
    if prefix:
        return  # it is asked for by the module around it
    full: dict[int, Tensor] = {}
    for name, p in module.named_parameters(remove_duplicate=False):
        value = state.get(name)
        if isinstance(value, SHARDED) and value is not p:  # with `keep_vars` it is the parameter itself
            if id(p) not in full:
                full[id(p)] = value.full_tensor().cpu()
            state[name] = full[id(p)]


@local_view()
def _state_dict_as_dtensors(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for name, p in module.named_parameters(remove_duplicate=False):
        shard = getattr(p, "_tp_shard", None)
        if shard is not None and prefix + name in state:
            state[prefix + name] = shard.to_dtensor(state[prefix + name])


@local_view()
def _load_locals(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    reshard(module)
    for name, p in module.named_parameters(remove_duplicate=False):
        shard = getattr(p, "_tp_shard", None)
        if shard is None or not isinstance(value := state.get(prefix + name), Tensor):
            continue
        local = shard.to_local(value, prefix + name)
        with torch.no_grad():  # at once: whoever collects them first holds all shards twice
            local_tensor(p).copy_(local)
        del local  # before the next one is made
        state[prefix + name] = shard_like(p.detach(), shard)
