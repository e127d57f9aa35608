"""Find the bytes of FSDP2's units on a rank: what each holds, all-gathers and reduce-scatters."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_tp.estimate.rank.rank_model import RankModel
from lightning_tp.estimate.rank.settings import Precision


@dataclass(frozen=True)
class Unit:
    """A unit of FSDP2 on a rank, in bytes.

    Args:
        gathered: its all-gathered parameters (shards of the tensor-parallel axis), in the dtype in which modules read them.
        reduced: its gradients, in the dtype in which they are reduce-scattered.
        gradients: of its shard, as held after the reduce-scatter.
    """

    gathered: int
    reduced: int
    gradients: int


def units_of(model: RankModel, precision: Precision, dp: int) -> dict[str, Unit]:
    """Return FSDP2's units by name; "" is the root's."""
    trained = {p.name for p in model.trained}
    found = {}
    for name in model.units:
        params = [p for p in model.params if p.unit == name]
        with_gradient = [p for p in params if p.name in trained]
        found[name] = Unit(
            sum(p.numel * dp * (precision.gathered or p.dtype).itemsize for p in params),
            sum(p.numel * dp * (precision.reduced or precision.gathered or p.dtype).itemsize for p in with_gradient),
            sum(p.bytes for p in with_gradient),
        )
    return found
