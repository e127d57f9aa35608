"""Find the user's own line in a stack or a traceback, and report where each rank was when a collective timed out.

All of it is read from the stack of a thread, so that it costs nothing while training runs.
"""

from __future__ import annotations

import contextlib
import itertools
import linecache
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.pytorch import Callback

from lightning_tp._compat import collective_counts

SHOWN = 8  # ranks of which a report has a line
_CALL = re.compile(
    r"\b_?(all_?reduce\w*|all_?gather\w*|reduce_?scatter\w*|broadcast\w*|barrier|all_?to_?all\w*|scatter|gather|recv|send|wait)\b",
)
_DISTRIBUTED = str(Path(dist.__file__).parent) + os.sep
_TORCH = str(Path(dist.__file__).parent.parent) + os.sep
_THIS_PACKAGE = str(Path(__file__).parents[2]) + os.sep
_PYTHON = str(Path(os.__file__).parent) + os.sep
_OTHERS = (_THIS_PACKAGE, _TORCH, str(Path(pl.__file__).parent.parent) + os.sep, _PYTHON, "<")


def outwards(frame: FrameType | None) -> Iterator[FrameType]:
    """Yield the frames of a stack, the innermost first."""
    while frame is not None:
        yield frame
        frame = frame.f_back


def user_frame(frames: list[FrameType]) -> FrameType | None:
    """Find the innermost frame that is not in torch, Lightning, this package or Python itself; else the innermost one."""
    return next((f for f in frames if not f.f_code.co_filename.startswith(_OTHERS)), frames[0] if frames else None)


@dataclass(frozen=True)
class Position:
    """Where a rank is: what a report says of it."""

    collective: str | None  # that it waits in
    line: str  # the innermost one of the user's code
    module: str | None = None  # whose forward runs; or the callback
    step: int | None = None  # `trainer.global_step`
    begun: Mapping[str, tuple[int, str]] = field(default_factory=dict)  # see `collective_counts`


def position_of(frame: FrameType | None, trainer: Any) -> Position:
    """Read the position of a rank from the innermost frame of its main thread."""
    frames = list(outwards(frame))
    module, step = None, None
    with contextlib.suppress(Exception):  # in whatever state the run is, the rest is worth reporting
        step = trainer.global_step
        names = {id(m): name for name, m in trainer.lightning_module.named_modules()}
        modules = [names.get(id(f.f_locals.get("self"))) for f in frames if f.f_code.co_name == "forward"]
        selves = [f.f_locals.get("self") for f in frames]
        callbacks = [type(x).__name__ for x in selves if isinstance(x, Callback)]
        module = next((name for name in (*modules, *callbacks) if name), None)
    return Position(_collective(frames), _line(user_frame(frames)), module, step, collective_counts())


def hang_report(positions: Mapping[int, Position | None], waited: int, timeout: timedelta | None) -> str:
    """Report a collective of the rank `waited` that timed out: which one, which ranks did not join it, and where each of them was.

    A rank that does not respond has the position None.
    """
    lag = lag_of(positions, waited)
    blamed, what = _blamed(positions, waited, lag)
    if lag.waits:  # a rank that did not come may be the one that reports
        waited = waited if waited in lag.waits else lag.waits[0]
    mine = positions[waited]
    assert mine is not None
    after = "" if timeout is None else f" after {timeout.total_seconds():g} s"
    group = f" ({lag.group})" if lag.group and blamed == lag.ranks else ""
    lines = [f"Collective mismatch: rank {waited} timed out{after} in {mine.collective or 'a collective'}{group} while {what}."]
    shown = sorted({waited, *blamed} if blamed else positions)[:SHOWN]
    lines += [f"  rank {rank} {_described(positions[rank], lag.begun.get(rank))}" for rank in shown]
    lines += ["  .."] if len(positions) > SHOWN else []
    lines.append(
        "Every rank of a group has to call each collective: don't read split logits, log with `sync_dist`, save or gather inside an "
        "`if rank == ..`. If a rank is only slow, raise `TPStrategy(timeout=..)`."
    )
    return "\n".join(lines)


@dataclass(frozen=True)
class Lag:
    """Which ranks have begun fewer collectives than others of a group that both are in, as far as ranks have answered."""

    ranks: list[int]  # for which others wait, and whose turn it is
    went: bool  # to a collective of another group, where they wait for others
    waits: list[int]  # the ranks that wait for one of these
    group: str | None  # in which the first of them waits
    begun: dict[int, str]  # of this group: how many collectives each rank has begun


def lag_of(positions: Mapping[int, Position | None], waited: int) -> Lag:
    """Find who lags, from how many collectives each rank has begun on each group.

    Stacks don't tell: where waiting does not stop the host (NCCL), a rank goes on after a collective to which others don't come. All ranks run one
    program, so their sums over all groups say how far they are; among those for which others wait that are further, it is the last one's turn.
    """
    counts, names = _counts(positions)
    total = {rank: sum(of.get(rank, 0) for of in counts.values()) for rank in positions}
    waits_for: dict[int, set[int]] = {rank: set() for rank in positions}
    for of in counts.values():
        for rank, count in of.items():
            waits_for[rank] |= {q for q, other in of.items() if other < count}
    late = {q for rank, others in waits_for.items() for q in others if total[q] <= total[rank]}
    late = {q for q in late if total[q] == min(total[other] for other in late)}
    came_nowhere = sorted(q for q in late if not waits_for[q])
    ranks = came_nowhere or _astray(counts, late, waited)
    waits = sorted(rank for rank, others in waits_for.items() if rank not in ranks and others & set(ranks))
    first = waited if waited in waits else next(iter(waits), waited)
    key = next((k for k, of in counts.items() if any(of.get(q, of.get(first, 0)) < of.get(first, 0) for q in ranks)), "")
    return Lag(ranks, not came_nowhere, waits, names.get(key), _progress(counts.get(key, {})))


def _counts(positions: Mapping[int, Position | None]) -> tuple[dict[str, dict[int, int]], dict[str, str]]:
    """(group -> rank -> how many collectives it has begun there, group -> what it is called)."""
    counts: dict[str, dict[int, int]] = defaultdict(dict)
    names: dict[str, str] = {}
    for rank, at in positions.items():
        for key, (count, name) in (at.begun if at is not None else {}).items():
            counts[key][rank], names[key] = count, name
    return counts, names


def _progress(counts: Mapping[int, int]) -> dict[int, str]:
    return {rank: f"has begun {count} of {max(counts.values())} collectives there" for rank, count in counts.items()}


def _astray(counts: Mapping[str, Mapping[int, int]], late: Set[int], waited: int) -> list[int]:
    """Of ranks for which others wait, and they for others: the fewest that wait alone in a group; of two alike, not the one that reports."""
    share: dict[int, float] = {}
    for of in counts.values():
        for rank, count in of.items():
            if rank in late and any(other < count for other in of.values()):
                share[rank] = min(share.get(rank, 1.0), sum(other >= count for other in of.values()) / len(of))
    least = sorted(rank for rank, part in share.items() if part == min(share.values()))
    return [rank for rank in least if rank != waited] or least


def _blamed(positions: Mapping[int, Position | None], waited: int, lag: Lag) -> tuple[list[int], str]:
    """(the ranks because of which others wait, what to say of them)."""
    silent = [rank for rank, at in positions.items() if at is None]
    if silent or lag.ranks:
        went = lag.went and not silent
        return silent or lag.ranks, f"{_ranks(silent or lag.ranks)} {'went to another one' if went else 'did not come'}"
    mine = positions[waited]
    assert mine is not None
    joined = {rank: at for rank, at in positions.items() if at is not None and (at.collective is not None or at.begun)}
    absent = [rank for rank in positions if rank != waited and rank not in joined]
    if absent:
        return absent, f"{_ranks(absent)} did not come"
    known = {rank: (at.collective, at.line) for rank, at in joined.items() if at.collective is not None}
    elsewhere = [
        rank for rank, call in known.items() if rank != waited and mine.collective and call != (mine.collective, mine.line)
    ]
    if elsewhere:
        return elsewhere, f"{_ranks(elsewhere)} went to another one"
    return [], "all ranks had begun it: one of them may have called it once more than the others, or with another shape"


def _ranks(ranks: list[int]) -> str:
    return f"rank(s) {', '.join(map(str, ranks))}"


def _described(at: Position | None, begun: str | None) -> str:
    if at is None:
        return "does not respond: its process is stopped, or gone"
    state = begun or (f"waits in {at.collective}" if at.collective else "is in no collective")
    module = f", in `{at.module}`" if at.module else ""
    step = f", step {at.step}" if at.step is not None else ""
    return f"{state}{module}{step}, at {at.line}"


def _collective(frames: list[FrameType]) -> str | None:
    """The collective in which the innermost of these frames is, by its name in `torch.distributed` or by the call in its source line."""
    inner = list(itertools.takewhile(lambda f: f.f_code.co_filename.startswith((_TORCH, _THIS_PACKAGE)), frames))
    for frame in inner[::-1]:  # the outermost that has a name
        if frame.f_code.co_filename.startswith(_DISTRIBUTED) and _CALL.fullmatch(frame.f_code.co_name):
            return frame.f_code.co_name
    found: str | None = None
    for frame in itertools.takewhile(
        lambda f: not _is_pythons(f), frames[:3]
    ):  # who waits for a lock or a queue is in no collective
        call = _CALL.search(_source_line(frame))
        if call is not None and found in (None, "wait"):  # what is waited for, rather than that
            found = call[1].removesuffix("_into")
    return found


def _is_pythons(frame: FrameType) -> bool:
    file = frame.f_code.co_filename
    return file.startswith(_PYTHON) and "-packages" + os.sep not in file


def _line(frame: FrameType | None) -> str:
    if frame is None:
        return "an unknown line"
    return f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}: `{_source_line(frame)[:120]}`"


def _source_line(frame: FrameType) -> str:
    return linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
