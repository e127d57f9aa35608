"""Between a rank's plain parameters and the world outside: whole tensors, and DTensors over the 2D mesh.

While training there are plain local tensors (FSDP2's own DTensors over the data-parallel axis) only. Here, and nowhere else,
they become DTensors for a state dict, or whole tensors for an export, from what the plan says of each parameter.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_tp._compat import local_tensor


def full_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict that the unsplit model would have: name -> whole tensor on the CPU, on every rank. A collective.

    Names, shapes and layout are the unsplit model's own: fused weights in one piece, shared key/value heads once, no padding.

    Example:
        >>> from torch import nn
        >>> {name: tuple(t.shape) for name, t in full_state_dict(nn.Linear(2, 3)).items()}
        {'weight': (3, 2), 'bias': (3,)}
    """
    reshard(model)
    done: dict[int, Tensor] = {}
    whole: dict[str, Tensor] = {}
    tensors = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    names = persistent(model)
    for name in names:
        t = tensors[name]
        if id(t) not in done:
            done[id(t)] = _whole(t, t).cpu()
        whole[name] = done[id(t)]
    return whole


def full_gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradients that the unsplit model would have: name -> whole tensor on the CPU, on every rank. A collective.

    Averaged over the data-parallel axis (the mean of the ranks' losses), as FSDP2 does it. Parameters without a gradient are left
    out; tied ones are there under each of their names.
    """
    reshard(model)
    done: dict[int, Tensor] = {}
    whole: dict[str, Tensor] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        if p.grad is None:
            continue
        if id(p) not in done:
            done[id(p)] = _whole(p, p.grad).cpu()
        whole[name] = done[id(p)]
    return whole


def reshard(model: nn.Module) -> None:
    """Have FSDP2 put its shards back where a forward without a backward has left whole parameters, which nobody knows here."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _whole(of: Tensor, value: Tensor) -> Tensor:
    """The whole of `value`, which lies as the parameter or buffer `of` does."""
    shard = getattr(of, "_tp_shard", None)
    if shard is not None:
        whole: Tensor = shard.gather(value)
        return whole
    value = value.detach()
    return value.full_tensor() if isinstance(value, DTensor) else value.clone()


def persistent(model: nn.Module) -> list[str]:
    """The names that `model.state_dict()` has, without building it (hooks would turn it into DTensors)."""
    names = []
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, p in module._parameters.items():
            if p is not None:
                names.append(f"{prefix}.{name}" if prefix else name)
        for name, b in module._buffers.items():
            if b is not None and name not in module._non_persistent_buffers_set:
                names.append(f"{prefix}.{name}" if prefix else name)
    return names


def attach_state_dict(model: nn.Module) -> None:
    """Let `model.state_dict()` show DTensors over the 2D mesh, and `load_state_dict` take these or whole tensors."""
    model.register_state_dict_post_hook(_state_dict_as_dtensors)
    model.register_load_state_dict_pre_hook(_load_locals)


def _state_dict_as_dtensors(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for name, p in module.named_parameters(remove_duplicate=False):
        shard = getattr(p, "_tp_shard", None)
        if shard is not None and prefix + name in state:
            state[prefix + name] = shard.to_dtensor(state[prefix + name])


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
        state[prefix + name] = p.detach()
