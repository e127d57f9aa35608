"""Where a training loader stands in its pass, so that a run goes on with the batch after the last one, in the same order.

A loader that has `state_dict` and `load_state_dict` (torchdata's `StatefulDataLoader`) says it itself. Of any other one the position is: the
random states and seeds with which the pass began (its order, and its workers' seeds, were drawn from them), and how many batches were
read. Going on, the pass begins again from these states, that many batches are read and left out, and the random states of the
checkpoint are put back: the next batch is what it would have been.

Not covered: random numbers of workers that outlive a pass (`persistent_workers=True`), and a stream that is another one each time it is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import DistributedSampler

from lightning_tp.core.ops.rng import local_state, set_local_state

Position = dict[str, Any]


class ResumableLoader:
    """A loader that is seen through, and knows how far it was read.

    Args:
        loader: any iterable; on a mesh, one that `share_loader` made.
        resume: the position to go on from in the first pass.
        finished: the position is of a pass that was over: only the loader's own generators go on from it.
        then: called once the position is reached, before the next batch is read.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> loader = ResumableLoader(DataLoader(range(100), shuffle=True))
        >>> batches = iter(loader)
        >>> _ = next(batches), next(batches)
        >>> again = iter(ResumableLoader(DataLoader(range(100), shuffle=True), resume=loader.position()))
        >>> next(again) == next(batches)
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
        self.positioned = loader
        self._resume, self._then = (None if finished else resume), then
        self._begun: dict[str, Any] | None = None  # random states when the pass began
        self._first: dict[str, Any] | None = None  # and when its first batch was asked for
        self._read = 0
        self._has_state = hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")
        if resume is None:
            return
        for sampler, seed in zip(_seeded(loader), resume.get("seeds", [])):
            sampler.seed = seed
        if finished:
            _set_generators(loader, resume.get("generators", []))
        if "loader" in resume and self._has_state:
            loader.load_state_dict(resume["loader"])

    def __getattr__(self, name: str) -> Any:
        if name == "positioned":
            raise AttributeError(name)
        return getattr(self.positioned, name)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        found: type = self.positioned.__class__
        return found

    def __len__(self) -> int:
        return len(self.positioned)

    def __iter__(self) -> Iterator[Any]:
        resume, self._resume = self._resume, None
        again = resume is not None and "begun" in resume and not self._has_state
        before = local_state() if again else None
        if resume is not None and again:
            _set_generators(self.positioned, resume["begun"]["generators"])
            set_local_state(resume["begun"])
        self._begun, self._first = {**local_state(), "generators": _generators(self.positioned)}, None
        self._read = 0
        iterator = iter(self.positioned)
        if before is not None:
            set_local_state(before)
        return self._pass(iterator, resume, again)

    def _pass(self, iterator: Iterator[Any], resume: Mapping[str, Any] | None, again: bool) -> Iterator[Any]:
        if resume is not None and self._has_state:
            self._read = resume.get("read", 0)
        elif resume is not None:
            before = local_state()
            if again:
                set_local_state(resume.get("first") or resume["begun"])
            self._first = local_state()
            while self._read < resume["read"] and next(iterator, _END) is not _END:
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
        """Of this rank: plain data and tensors.

        Args:
            prefetched: batches that were read, and are not used yet.
        """
        found: Position = {"read": self._read - prefetched, "generators": _generators(self.positioned)}
        found["seeds"] = [sampler.seed for sampler in _seeded(self.positioned)]
        if self._has_state:
            found["loader"] = self.positioned.state_dict()
        elif self._begun is not None:
            found.update(begun=self._begun, first=self._first)
        return found

    # what Lightning takes for a loader whose place can be saved, and a reason not to warn

    def state_dict(self) -> dict[str, Any]:
        """The loader's own state, if it has one."""
        return self.positioned.state_dict() if self._has_state else {}

    def load_state_dict(self, state: Any) -> None:
        """Into the loader."""
        if self._has_state and state:
            self.positioned.load_state_dict(state)


_END = object()


def _sources(loader: Any) -> list[torch.Generator]:
    """The generators of a loader's own, each once."""
    sampler = getattr(loader, "sampler", None)
    batches = getattr(loader, "batch_sampler", None)
    of: list[Any] = [loader, sampler, batches, getattr(batches, "sampler", None), getattr(loader, "dataset", None)]
    found = [getattr(x, "generator", None) for x in of if x is not None]
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())


def _seeded(loader: Any) -> list[Any]:
    """Samplers that draw an epoch's order from a seed and its number (`DistributedSampler`): Lightning makes the seed of the environment's."""
    sampler = getattr(loader, "sampler", None)
    return [sampler] if isinstance(sampler, DistributedSampler) else []


def _generators(loader: Any) -> list[torch.Tensor]:
    return [g.get_state() for g in _sources(loader)]


def _set_generators(loader: Any, states: list[torch.Tensor]) -> None:
    sources = _sources(loader)
    if len(sources) == len(states):
        for generator, state in zip(sources, states):
            generator.set_state(state)
