"""Optimizer states by parameter name, as DTensors over the 2D mesh or as full tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_tp.errors import TPError
from lightning_tp.shards.shard import ParamShard, like
from lightning_tp.shards.view import local_view


@local_view()
def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return an optimizer's state by parameter name, tensors of a parameter's local shape as DTensors over the 2D mesh.

    Tensors of another shape (Adafactor's row and column statistics, of this rank's shard only) are left as they are.
    """
    names: dict[int, str] = {id(p): p._tp_shard.name for g in optimizer.param_groups for p in g["params"]}
    state: dict[str, Any] = {}
    for p, values in optimizer.state.items():
        shard: ParamShard = p._tp_shard  # type: ignore[attr-defined]
        state[shard.name] = {
            k: shard.to_dtensor(v) if isinstance(v, Tensor) and v.shape == p.shape and v.ndim else v for k, v in values.items()
        }
    groups = [
        {**{k: v for k, v in g.items() if k != "params"}, "params": [names[id(p)] for p in g["params"]]}
        for g in optimizer.param_groups
    ]
    return {"state": state, "param_groups": groups}


@local_view()
def full_optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return what `optimizer_state` does with full tensors on the CPU, as one process would have them. A collective."""
    state = optimizer_state(optimizer)
    shards = {p._tp_shard.name: (p, p._tp_shard) for g in optimizer.param_groups for p in g["params"]}
    for name, values in state["state"].items():
        p, shard = shards[name]
        own = optimizer.state[p]
        for k, v in values.items():
            if isinstance(v, DTensor):
                values[k] = shard.gather(own[k]).cpu()
            elif isinstance(v, Tensor):
                values[k] = v.detach().cpu().clone()  # a count of steps: a copy, for the optimizer counts on
    return state


@local_view()
def load_optimizer_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Load what `optimizer_state` returned; also full tensors, and the state of the same optimizer in one process.

    Parameters with numbers instead of names are those of this optimizer in the order of its groups, as torch has it. States of parameters
    that this optimizer does not have are ignored.

    Args:
        optimizer: of the parameters of a split model.
        state: with the keys "state" and "param_groups".

    Raises:
        TPError: if it is the state of another optimizer.
    """
    check_kind(optimizer, state["param_groups"])
    plain = optimizer.state_dict()
    index = {
        p._tp_shard.name: i
        for g, ids in zip(optimizer.param_groups, plain["param_groups"], strict=True)
        for p, i in zip(g["params"], ids["params"], strict=True)
    }
    parameters = {p._tp_shard.name: p for g in optimizer.param_groups for p in g["params"]}
    theirs = [name for g in state["param_groups"] for name in g["params"]]
    numbered = dict(zip(theirs, parameters, strict=False)) if all(isinstance(i, int) for i in theirs) else {}
    if numbered and len(theirs) != len(parameters):
        raise TPError(
            f"The checkpoint's optimizer has {len(theirs)} parameters, by number, and this {type(optimizer).__name__} has {len(parameters)}. "
            "Resume with the optimizer and the model that were saved."
        )
    values: dict[int, Any] = {}
    for key, of in state["state"].items():
        name = numbered.get(key, key)  # an optimizer that knew no names: one process, DDP, FSDPStrategy
        if name not in parameters:
            continue
        p = parameters[name]
        shard: ParamShard = p._tp_shard
        values[index[name]] = {k: _local_state(p, shard, v, f"{name}.{k}") for k, v in of.items()}
    groups = [
        {**{k: v for k, v in g.items() if k != "params"}, "params": own["params"]}
        for g, own in zip(state["param_groups"], plain["param_groups"], strict=True)
    ]
    optimizer.load_state_dict({"state": values, "param_groups": groups})


def check_kind(optimizer: torch.optim.Optimizer, groups: Sequence[Mapping[str, Any]]) -> None:
    """Refuse the parameter groups of another optimizer: torch would take them, and fail in the first step, or not at all.

    Raises:
        TPError: if there are more or fewer, or if they have other settings.
    """
    own = optimizer.param_groups
    what = f"this {type(optimizer).__name__}"
    if len(groups) != len(own):
        raise TPError(
            f"The checkpoint's optimizer has {len(groups)} group(s) of parameters, and {what} has {len(own)}. Let "
            "`configure_optimizers` make the groups that were there when it was saved; those that a `BaseFinetuning` callback had added come back "
            "by themselves, if the Trainer has the callback."
        )
    for group in groups:
        lacks = [name for name in optimizer.defaults if name not in group]
        other = [name for name in group if name not in optimizer.defaults and name not in _OF_GROUPS]
        if lacks and other:  # one alone may be another version of torch
            raise TPError(
                f"The checkpoint's optimizer is of another kind than {what}: it has `{other[0]}`, and no `{lacks[0]}`. Resume with the optimizer "
                "that was saved, or start from its weights alone (`load_from_checkpoint`)."
            )


_OF_GROUPS = {"params", "param_names", "initial_lr", "max_lr", "min_lr", "swa_lr", "base_momentum", "max_momentum"}  # of schedulers


def _local_state(p: Tensor, shard: ParamShard, value: Any, where: str) -> Any:
    if not isinstance(value, Tensor) or value.ndim == 0 or tuple(value.shape) != shard.shape:
        return value
    return like(p, shard.to_local(value, where))
