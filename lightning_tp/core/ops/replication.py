"""Tell whether random numbers are for a replicated activation or a shard: compare over ranks, follow noise to the activation it meets."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_tp._compat import gather_rows
from lightning_tp.core.comm.axis import SEQUENCE_DIM, Axis
from lightning_tp.core.ops.random_calls import FunctionCall
from lightning_tp.core.ops.rng import default_generator
from lightning_tp.errors import TPError

SAMPLE, TOLERANCE = 512, 1e-3  # elements of an activation that are compared over ranks; the relative difference that is rounding
MAX_DIMS = 7  # sizes that are compared

CallKey = tuple[str, tuple[Any, ...]]  # the name of a torch function, and the place in the code that calls it


@torch.no_grad()
def shapes_if_sharded(x: Tensor, axis: Axis) -> list[tuple[int, ...]] | None:
    """Compare an activation over the ranks: its shape, and elements at even distances. A collective.

    What is equal by chance (zeros, for example) counts as replicated.

    Returns:
        The shapes on all ranks if it is sharded; None if it is replicated.

    Raises:
        TPError: if torch's default generators are not in the same state on all ranks.
    """
    every = gather_rows(_fingerprint(x.detach()), axis.group)
    sizes, states, samples = every.split([1 + MAX_DIMS, 1, SAMPLE], dim=1)
    if bool((states != states[0]).any()):
        raise TPError(
            f"Random numbers are drawn for an activation of shape {tuple(x.shape)}, but the default generator for {x.device.type} is not in "
            f"the same state on all tp={axis.size} ranks, so a replicated activation would become different on each. The ranks of a "
            "tensor-parallel group have to draw the same numbers: draw nothing on one of them only, and seed no generator with what differs "
            "between them (its own `seed()`, the time, the rank). `torch.seed()` gives all of them one seed."
        )
    difference = (samples - samples[0]).norm(dim=1).max()
    sharded = (difference > TOLERANCE * samples.norm(dim=1).max()) | (sizes != sizes[0]).any()
    return [tuple(int(n) for n in row[1 : 1 + int(row[0])]) for row in sizes.tolist()] if bool(sharded) else None


def _fingerprint(x: Tensor) -> Tensor:
    """(1 + MAX_DIMS + 1 + SAMPLE,) of float64: number of dims, sizes, state of the generator, a sample of the elements."""
    row = torch.zeros(1 + MAX_DIMS + 1 + SAMPLE, dtype=torch.float64, device=x.device)
    num_dims, sizes, state, sample = row.split([1, MAX_DIMS, 1, SAMPLE])
    num_dims[0], state[0] = x.ndim, _generator_state(x.device)
    sizes[: x.ndim] = torch.tensor(x.shape[:MAX_DIMS], dtype=torch.float64, device=x.device)
    flat = x.reshape(-1)
    elements = flat[:: max(1, math.ceil(flat.numel() / SAMPLE))].double()
    sample[: elements.numel()] = elements.nan_to_num(0.0)
    return row


def _generator_state(device: torch.device) -> int:
    """Hash the state of torch's default generator to 48 bits, which float64 holds exactly."""
    state = default_generator(device).get_state().numpy().tobytes()
    return int.from_bytes(hashlib.sha256(state).digest()[:6], "little")


def is_broadcast_over_shards(noise: Sequence[int], activation: Sequence[int], axis: Axis) -> bool:
    """Return whether noise of this shape has one number for all that the ranks hold of the sharded dim: drop path has one for each sample.

    Dim 1 of the local activation is sharded if it has 4 dims (heads) or is a shard of the sequence, else the last one.
    """
    num_tokens = None if axis.seq_len is None else math.ceil(axis.seq_len / axis.size)
    heads = len(activation) == 4
    tokens = len(activation) == 3 and activation[SEQUENCE_DIM] == num_tokens
    dim_from_last = len(activation) - 1 if heads or tokens else 1
    return len(noise) < dim_from_last or noise[-dim_from_last] == 1


@dataclass(frozen=True, eq=False)
class NoiseSource:
    """One call that generated random numbers by itself, and the module whose forward made it (None outside of modules)."""

    module: nn.Module | None
    key: CallKey


class NoiseTracker(dict[int, tuple[Tensor, NoiseSource]]):
    """Noise (`torch.rand`, ..) and where it is from, by id: followed from function to function, until one is given an activation as well."""

    def add(self, noise: Tensor, source: NoiseSource) -> None:
        self[id(noise)] = noise, source  # kept, so that no other tensor gets this id

    def meeting(self, call: FunctionCall, out: Any) -> tuple[Tensor, Tensor, NoiseSource] | None:
        """Return (noise, activation, source of the noise) if this call was given both; its noise is then followed no longer.

        Where it was given noise alone, its result `out` is noise of the same source.
        """
        tensors = call.tensors
        found = next((self[id(t)] for t in tensors if id(t) in self), None)
        if found is None:
            return None
        noise, source = found
        others = (t for t in tensors if id(t) not in self)
        activation = next((t for t in others if t.ndim and t.numel() > 1 and t.is_floating_point()), None)
        if activation is None:
            if isinstance(out, Tensor):
                self.add(out, source)
            return None
        for i in [i for i, entry in self.items() if entry[1] is source]:
            del self[i]
        return noise, activation, source
