"""FSDP2 over the data-parallel axis: which modules are units, in what precision, when shards are let go again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from lightning_tp._compat import own_parameters, remember_dtypes

if TYPE_CHECKING:
    from torch.distributed.fsdp import MixedPrecisionPolicy


def apply_fsdp(
    model: nn.Module,
    blocks: list[nn.Module],
    dp_mesh: DeviceMesh,
    *,
    precision: MixedPrecisionPolicy | None = None,
) -> None:
    """Shard every parameter over the data-parallel axis: one unit a block, the root holds the rest (embedding, norm, head).

    Blocks are let go after their forward and gathered again in the backward (`reshard_after_forward`); the root's own
    parameters stay, since the backward begins with them. A block that shares a parameter with something outside is no unit.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = precision or MixedPrecisionPolicy()
    scalars = {p for p in model.parameters() if not p.ndim}  # FSDP2 shards dim 0; `PartialGradients` averages their gradients
    for block in own_units(model, blocks):
        fully_shard(block, mesh=dp_mesh, mp_policy=policy, reshard_after_forward=True, ignored_params=scalars)
        remember_dtypes(block)
    fully_shard(model, mesh=dp_mesh, mp_policy=policy, ignored_params=scalars)
    remember_dtypes(model)


def own_units(model: nn.Module, blocks: Iterable[nn.Module]) -> list[nn.Module]:
    """Those of the blocks that are units by themselves: their parameters are used nowhere else."""
    uses = _uses(model)
    return [block for block in blocks if all(uses[i] == n for i, n in _uses(block).items())]


def _uses(module: nn.Module) -> Counter[int]:
    return Counter(id(p) for m in module.modules() for p in own_parameters(m).values() if p is not None)
