"""FSDP2 over the data-parallel axis: which modules are units, in what precision, and when they are resharded."""

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
    model: nn.Module, blocks: list[nn.Module], dp_mesh: DeviceMesh, *, precision: MixedPrecisionPolicy | None = None
) -> None:
    """Shard every parameter over the data-parallel axis: each block is a unit, the root has the rest (embedding, norm, head).

    Blocks are resharded after their forward and all-gathered again in the backward; the root's own parameters stay gathered, since the
    backward begins with them. A block that shares a parameter with a module outside of it is no unit.
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
    """Return the blocks that are FSDP units of their own: their parameters are used nowhere else."""
    uses = _num_uses(model)
    return [block for block in blocks if all(uses[i] == n for i, n in _num_uses(block).items())]


def _num_uses(module: nn.Module) -> Counter[int]:
    return Counter(id(p) for m in module.modules() for p in own_parameters(m).values() if p is not None)
