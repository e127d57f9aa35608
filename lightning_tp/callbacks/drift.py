"""Do ranks still hold the same where they have to? Checksums of what is replicated, compared every few steps.

Compared are, over the ranks that hold the same elements: parameters (norms, biases behind row-wise layers, key/value heads that ranks share;
over the data-parallel axis what FSDP2 does not shard), what the optimizer keeps of them, buffers inside a tensor-parallel group (over the
data-parallel axis they may differ, as those of a BatchNorm do), and the random state of the device inside a group.
A checksum is the sum of a tensor's bits as integers: ranks that compute the same hold the same bits.

Left out: shards that only one rank has, fused weights of which only some rows are shared, and Python's and NumPy's random states.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from typing_extensions import override

from lightning_tp._compat import local_tensor
from lightning_tp.callbacks.shards import find_mesh
from lightning_tp.errors import TPError, raise_on_rank_zero

RNG = "the random state"
_NONE = torch.iinfo(torch.int64).min  # of a rank that does not hold it
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_SHOWN = 5


@dataclass(frozen=True)
class Copies:
    """One thing that several ranks hold: its name, which rank holds which copy of it, and how to read it here."""

    name: str
    owner: str  # the module, or the parameter of which an optimizer keeps this
    holders: tuple[tuple[int, ...], ...]  # groups of ranks that hold the same
    parameter: Tensor | None = None
    of_optimizer: bool = False


class DriftWatch(L.Callback):
    """Compare, every few steps, what the ranks hold twice, and stop at the first module that has drifted.

    One all-reduce of some integers for each check; without a mesh (another strategy), or with one rank, there is nothing to compare.
    A check of 65 norms of width 4096 with AdamW's moments took 7 ms on two gloo ranks of a busy machine; in between nothing runs.

    Args:
        every_n_steps: optimizer steps between two checks.
        on_drift: "raise" stops training, "warn" says it once for each name and goes on.
        ignore: patterns of names (`*`) of parameters and buffers that may differ.

    Raises:
        TPError: names the first that drifted, the step and the ranks; seen on rank 0.

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(accelerator="cpu", devices=1, callbacks=[DriftWatch()], logger=False, barebones=True)
    """

    def __init__(
        self, every_n_steps: int = 100, *, on_drift: Literal["raise", "warn"] = "raise", ignore: Sequence[str] = ()
    ) -> None:
        if every_n_steps < 1:
            raise TPError(f"`DriftWatch(every_n_steps={every_n_steps})`: give a number of steps, 1 or more.")
        if on_drift not in ("raise", "warn"):
            raise TPError(f"`DriftWatch(on_drift={on_drift!r})`: there are 'raise' and 'warn'.")
        self.every_n_steps = every_n_steps
        self.on_drift = on_drift
        self.ignore = (ignore,) if isinstance(ignore, str) else tuple(ignore)
        self._copies: list[Copies] = []
        self._checked = 0  # the step of the last check
        self._said: set[str] = set()

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        mesh = find_mesh(trainer)
        every = replicated(pl_module, mesh) if mesh is not None and mesh.size() > 1 else []
        self._copies = [c for c in every if not any(fnmatchcase(c.owner, pattern) for pattern in self.ignore)]
        self._checked = trainer.global_step

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step == self._checked or step % self.every_n_steps or not self._copies:
            return
        self._checked = step
        states: dict[Tensor, dict[str, Any]] = {}
        for optimizer in trainer.optimizers:
            states.update(optimizer.state)
        buffers = dict(pl_module.named_buffers())  # read anew: some code replaces them
        sums = checksums(self._copies, states, buffers, trainer.strategy.root_device)
        drifted = compare(self._copies, sums)
        if not drifted:
            return
        message = drift_message(drifted, self._copies, sums, step)
        if self.on_drift == "raise":
            with raise_on_rank_zero(trainer.global_rank):
                raise TPError(message)
        if new := {c.name for c in drifted} - self._said:
            self._said |= new
            rank_zero_warn(message)


def replicated(module: nn.Module, mesh: DeviceMesh) -> list[Copies]:
    """What several ranks of the mesh hold of this module, in the order of its modules; the same list on every rank."""
    ranks = mesh.mesh  # (dp, tp)
    rows = tuple(tuple(row) for row in ranks.tolist())
    inside_groups = tuple(row for row in rows if len(row) > 1)
    copies = [Copies(RNG, RNG, inside_groups)] if inside_groups else []
    for name, p in module.named_parameters():
        shard = getattr(p, "_tp_shard", None)
        if shard is None:
            continue
        split = shard.split
        same: dict[Any, list[int]] = {}
        for dp_rank, row in enumerate(rows):
            for tp_rank, rank in enumerate(row):
                held = None if split.dim is None else split.ranges[tp_rank]
                same.setdefault((held, dp_rank if shard.fsdp else None), []).append(rank)
        holders = tuple(tuple(group) for group in same.values() if len(group) > 1)
        if holders and shard.local_shape == tuple(local_tensor(p).shape):
            copies.append(Copies(f"`{name}`", name, holders, p))
            copies.append(Copies(f"the optimizer's state of `{name}`", name, holders, p, of_optimizer=True))
    if inside_groups:
        copies += [Copies(f"the buffer `{name}`", name, inside_groups, b) for name, b in module.named_buffers() if b.numel()]
    return copies


def checksums(
    copies: list[Copies], states: dict[Tensor, dict[str, Any]], buffers: dict[str, Tensor], device: torch.device
) -> Tensor:
    """(copies,) of int64: the sum of the bits of each."""
    sums = []
    for c in copies:
        if c.parameter is None:
            state = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
            sums.append(torch.tensor(zlib.crc32(state.numpy().tobytes()), device=device))
        elif c.of_optimizer:
            tensors = [t for t in states.get(c.parameter, {}).values() if isinstance(t, Tensor) and t.dim() and t.numel()]
            sums.append(sum((_bits(t, device) for t in tensors), torch.zeros((), dtype=torch.int64, device=device)))
        else:
            sums.append(_bits(c.parameter if isinstance(c.parameter, nn.Parameter) else buffers.get(c.owner, c.parameter), device))
    return torch.stack(sums)


def compare(copies: list[Copies], sums: Tensor) -> list[Copies]:
    """Those that are not equal on all their holders; one all-reduce over all ranks, which all find the same."""
    rank = dist.get_rank()
    places = [(i, rank in group) for i, c in enumerate(copies) for group in c.holders]
    index = torch.tensor([i for i, _ in places], device=sums.device)
    here = torch.tensor([mine for _, mine in places], device=sums.device)
    mine = sums[index]
    both = torch.stack([mine, -mine]).masked_fill_(~here, _NONE)  # (2, groups): largest, and minus the smallest
    dist.all_reduce(both, dist.ReduceOp.MAX)
    bad = set(index[both[0] != -both[1]].tolist())
    return [c for i, c in enumerate(copies) if i in bad]


def drift_message(drifted: list[Copies], copies: list[Copies], sums: Tensor, step: int) -> str:
    """What drifted first, when, and on which ranks; a collective."""
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, sums.tolist())
    first = next((c for c in drifted if c.parameter is not None), drifted[0])
    ranks = _strays(first, [row[copies.index(first)] for row in every])
    others = [c.name for c in drifted if c is not first]
    more = f" So do {len(others)} more: {', '.join(others[:_SHOWN])}{', ..' if len(others) > _SHOWN else ''}." if others else ""
    why = (
        "Ranks drew random numbers a different number of times: look for code that draws on some ranks only."
        if first.parameter is None
        else "Look for code that changes it on some ranks only (`if rank == ..`), a gradient that is not summed (`print(plan)` says which are), or "
        "activations that differ where they should be whole; `lightning-tp verify` compares the gradients with one process."
    )
    return (
        f"Ranks that should hold the same do not, at step {step}: {first.name} differs {ranks}.{more} {why} "
        f"`DriftWatch(ignore=[..])` leaves out what may differ."
    )


def _strays(first: Copies, sums: list[int]) -> str:
    """Which ranks hold something else than most of their group."""
    told = []
    for group in first.holders:
        by_sum: dict[int, list[int]] = {}
        for rank in group:
            by_sum.setdefault(sums[rank], []).append(rank)
        if len(by_sum) > 1:
            parts = sorted(by_sum.values(), key=lambda ranks: (-len(ranks), ranks))
            told.append(" and ".join(f"rank(s) {', '.join(map(str, ranks))}" for ranks in parts[::-1][:4]))
    return "between " + "; and between ".join(told)


def _bits(tensor: Tensor, device: torch.device) -> Tensor:
    """() of int64: the sum of a tensor's bits as integers of its width."""
    held = local_tensor(tensor).detach()
    if held.is_complex():
        held = torch.view_as_real(held)
    return held.contiguous().view(_INTEGERS[held.element_size()]).sum(dtype=torch.int64).to(device)
