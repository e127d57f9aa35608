"""The position of a training loader in its pass, so that a run resumes with the next batch, in the same order.

A loader that has `state_dict` and `load_state_dict` (torchdata's `StatefulDataLoader`) knows its position. That of any other loader is: the
random states and seeds with which the pass began (its order and its workers' seeds were drawn from them), and how many batches were read. To
resume, the pass begins again from these states, that many batches are read and skipped, and the random states are put back: the next batch is
what it would have been.

Not covered: random numbers of workers that outlive a pass (`persistent_workers=True`), and a stream that is a different one each time it is
read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DistributedSampler

from lightning_tp.core.ops.rng import local_state, set_local_state
from lightning_tp.data.reader import LoaderProxy, has_state

Position = dict[str, Any]


class ResumableLoader(LoaderProxy):
    """A loader that passes for the one it wraps, and counts how far that was read.

    Args:
        loader: Any iterable; on a mesh, one that `share_loader` made.
        resume: The position at which the first pass begins.
        finished: The position is the end of a pass: only the loader's own generators and seeds are restored.
        then: Called once the position is reached, before the next batch is read.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> loader = ResumableLoader(DataLoader(range(100), shuffle=True))
        >>> batches = iter(loader)
        >>> _ = next(batches), next(batches)
        >>> resumed = iter(ResumableLoader(DataLoader(range(100), shuffle=True), resume=loader.position()))
        >>> next(resumed) == next(batches)
        tensor([True])
    """

    def __init__(
        self,
        loader: Any,
        *,
        resume: Mapping[str, Any] | None = None,
        finished: bool = False,
        then: Callable[[], None] | None = None,
    ) -> None:
        super().__init__(loader)
        self._resume, self._then = (None if finished else resume), then
        self._begun: dict[str, Any] | None = None  # random states when the pass began
        self._first: dict[str, Any] | None = None  # random states when its first batch was asked for
        self._read = 0  # batches of this pass
        self._has_state = has_state(loader)
        if resume is None:
            return
        for sampler, seed in zip(_seeded_samplers(loader), resume.get("seeds", [])):
            sampler.seed = seed
        if finished:
            _set_generator_states(loader, resume.get("generators", []))
        if "loader" in resume and self._has_state:
            loader.load_state_dict(resume["loader"])

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        resume, self._resume = self._resume, None
        rewinds = resume is not None and "begun" in resume and not self._has_state
        before = local_state() if rewinds else None
        if resume is not None and rewinds:
            _set_generator_states(self.loader, resume["begun"]["generators"])
            set_local_state(resume["begun"])
        self._begun, self._first = {**local_state(), "generators": _generator_states(self.loader)}, None
        self._read = 0
        iterator = iter(self.loader)
        if before is not None:
            set_local_state(before)
        return self._pass(iterator, resume, rewinds)

    def _pass(self, iterator: Iterator[Any], resume: Mapping[str, Any] | None, rewinds: bool) -> Iterator[Any]:
        if resume is not None and self._has_state:
            self._read = resume.get("read", 0)
        elif resume is not None:
            before = local_state()
            if rewinds:
                set_local_state(resume.get("first") or resume["begun"])
            self._first = local_state()
            for _ in islice(iterator, resume["read"]):
                self._read += 1
            set_local_state(before)
        if resume is not None and self._then is not None:
            self._then()
        if self._first is None:
            self._first = local_state()
        for batch in iterator:
            self._read += 1
            yield batch

    def position(self, prefetched: int = 0) -> Position:
        """Return the position of this rank, as plain data and tensors; `prefetched` batches were read and not yet used."""
        found: Position = {"read": self._read - prefetched, "generators": _generator_states(self.loader)}
        found["seeds"] = [sampler.seed for sampler in _seeded_samplers(self.loader)]
        if self._has_state:
            found["loader"] = self.loader.state_dict()
        elif self._begun is not None:
            found.update(begun=self._begun, first=self._first)
        return found

    # By these two methods Lightning recognises a loader that can resume in the middle of a pass, and does not warn.

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the wrapped loader, if it has one."""
        return self.loader.state_dict() if self._has_state else {}

    def load_state_dict(self, state: Any) -> None:
        """Load a state into the wrapped loader, if it has one."""
        if self._has_state and state:
            self.loader.load_state_dict(state)


def _generators(loader: Any) -> list[torch.Generator]:
    """Return the generators that a loader and its parts hold, each once."""
    batches = getattr(loader, "batch_sampler", None)
    parts = [loader, getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None), getattr(loader, "dataset", None)]
    found = [getattr(part, "generator", None) for part in parts if part is not None]
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())


def _generator_states(loader: Any) -> list[torch.Tensor]:
    return [g.get_state() for g in _generators(loader)]


def _set_generator_states(loader: Any, states: list[torch.Tensor]) -> None:
    generators = _generators(loader)
    if len(generators) == len(states):
        for generator, state in zip(generators, states):
            generator.set_state(state)


def _seeded_samplers(loader: Any) -> list[Any]:
    """Return the samplers that shuffle by a seed and the epoch's number; Lightning seeds them from `PL_GLOBAL_SEED`."""
    sampler = getattr(loader, "sampler", None)
    return [sampler] if isinstance(sampler, DistributedSampler) else []
