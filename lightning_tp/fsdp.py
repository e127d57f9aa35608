"""FSDP2 over the data-parallel axis: which modules are units, in what precision, when shards are let go again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from lightning_tp._compat import remember_dtypes

if TYPE_CHECKING:
    from torch.distributed.fsdp import MixedPrecisionPolicy


def find_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The repeated blocks of a model: children of one container that have the same class and the same parameter shapes.

    The outermost such containers count: the experts inside a block are not blocks. A block that has two names (`self.backbone =
    self.model.layers`) is one, by the first.

    Example:
        >>> from torch import nn
        >>> [name for name, _ in find_blocks(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.ReLU()))]
        ['0', '1']
    """
    first: dict[nn.Module, str] = {}
    for name, block in _blocks(model, ""):
        first.setdefault(block, name)
    return [(name, block) for block, name in first.items()]


def _blocks(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    kinds: dict[tuple[object, ...], list[str]] = {}
    if isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
        for name, child in module.named_children():
            shapes = tuple((n, tuple(p.shape)) for n, p in child.named_parameters())
            if shapes:
                kinds.setdefault((type(child), shapes), []).append(name)
    repeated = {name for names in kinds.values() if len(names) > 1 for name in names}
    for name, child in module.named_children():
        where = f"{prefix}.{name}" if prefix else name
        if name in repeated:
            yield where, child
        else:
            yield from _blocks(child, where)


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
    for block in own_units(model, blocks):
        fully_shard(block, mesh=dp_mesh, mp_policy=policy, reshard_after_forward=True)
        remember_dtypes(block)
    fully_shard(model, mesh=dp_mesh, mp_policy=policy)
    remember_dtypes(model)


def own_units(model: nn.Module, blocks: Iterable[nn.Module]) -> list[nn.Module]:
    """Those of the blocks that are units by themselves: their parameters are used nowhere else."""
    uses = _uses(model)
    return [block for block in blocks if all(uses[i] == n for i, n in _uses(block).items())]


def _uses(module: nn.Module) -> Counter[int]:
    return Counter(id(p) for m in module.modules() for p in m._parameters.values() if p is not None)
