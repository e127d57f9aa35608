"""Find the user's own line in a stack or a traceback, and report where each rank was when a collective timed out.

All of it is read from the stack of a thread, so that it costs nothing while training runs.
"""

from __future__ import annotations

import contextlib
import itertools
import linecache
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.pytorch import Callback

SHOWN = 8  # ranks of which a report has a line
_CALL = re.compile(
    r"\b_?(all_?reduce|all_?gather\w*|reduce_?scatter\w*|broadcast\w*|barrier|all_?to_?all\w*|scatter|gather|recv|send|wait)\b",
)
_DISTRIBUTED = str(Path(dist.__file__).parent) + os.sep
_TORCH = str(Path(dist.__file__).parent.parent) + os.sep
_THIS_PACKAGE = str(Path(__file__).parents[2]) + os.sep
_OTHERS = (_THIS_PACKAGE, _TORCH, str(Path(pl.__file__).parent.parent) + os.sep, str(Path(os.__file__).parent) + os.sep, "<")


def outwards(frame: FrameType | None) -> Iterator[FrameType]:
    """Yield the frames of a stack, the innermost first."""
    while frame is not None:
        yield frame
        frame = frame.f_back


def user_frame(frames: list[FrameType]) -> FrameType | None:
    """Find the innermost frame that is not in torch, Lightning, this package or Python itself; else the innermost one."""
    return next((f for f in frames if not f.f_code.co_filename.startswith(_OTHERS)), frames[0] if frames else None)


def raised_at(trace: TracebackType | None) -> str:
    """Name the file and the line of the user's code at which an exception was raised, as ` (at file:line)`; empty if there is none."""
    place = ""
    while trace is not None:
        if not trace.tb_frame.f_code.co_filename.startswith(_OTHERS):
            place = f" (at {trace.tb_frame.f_code.co_filename}:{trace.tb_lineno})"
        trace = trace.tb_next
    return place


@dataclass(frozen=True)
class Position:
    """Where a rank is: what a report says of it."""

    collective: str | None  # that it waits in
    line: str  # the innermost one of the user's code
    module: str | None = None  # whose forward runs; or the callback
    step: int | None = None  # `trainer.global_step`


def position_of(frame: FrameType | None, trainer: Any, *, but: Callback) -> Position:
    """Read the position of a rank from the innermost frame of its main thread; `but` is the callback that asks."""
    frames = list(outwards(frame))
    module, step = None, None
    with contextlib.suppress(Exception):  # in whatever state the run is, the rest is worth reporting
        step = trainer.global_step
        names = {id(m): name for name, m in trainer.lightning_module.named_modules()}
        modules = [names.get(id(f.f_locals.get("self"))) for f in frames if f.f_code.co_name == "forward"]
        selves = [f.f_locals.get("self") for f in frames]
        callbacks = [type(x).__name__ for x in selves if isinstance(x, Callback) and x is not but]
        module = next((name for name in (*modules, *callbacks) if name), None)
    return Position(_collective(frames), _line(user_frame(frames)), module, step)


def hang_report(positions: Mapping[int, Position | None], waited: int, timeout: timedelta | None) -> str:
    """Report a collective of the rank `waited` that timed out: which one, which ranks did not join it, and where each of them was.

    A rank that does not respond has the position None.
    """
    mine = positions[waited]
    assert mine is not None
    absent = [rank for rank, at in positions.items() if rank != waited and (at is None or at.collective is None)]
    joined = {rank: (at.collective, at.line) for rank, at in positions.items() if at is not None and at.collective is not None}
    elsewhere = [rank for rank, call in joined.items() if rank != waited and call != (mine.collective, mine.line)]
    if absent:
        what = f"{_ranks(absent)} did not join it"
    elif elsewhere:
        what = f"{_ranks(elsewhere)} {'was' if len(elsewhere) == 1 else 'were'} in another collective"
    else:
        what = "all ranks were in one at the same line: one of them may have called it once more than the others"
    after = "" if timeout is None else f" after {timeout.total_seconds():g} s"
    lines = [f"Collective mismatch: rank {waited} timed out{after} in {mine.collective or 'a collective'} while {what}."]
    shown = sorted({waited, *absent, *elsewhere} if absent or elsewhere else positions)[:SHOWN]
    lines += [f"  rank {rank} {_described(positions[rank])}" for rank in shown]
    lines += ["  .."] if len(positions) > SHOWN else []
    lines.append(
        "Every rank of a group has to call each collective: don't read split logits, log with `sync_dist`, save or gather inside an "
        "`if rank == ..`. If a rank is only slow, raise `TPStrategy(timeout=..)`."
    )
    return "\n".join(lines)


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _described(at: Position | None) -> str:
    if at is None:
        return "does not respond: its process is stopped, or gone"
    state = f"waits in {at.collective}" if at.collective else "is in no collective"
    module = f", in `{at.module}`" if at.module else ""
    step = f", step {at.step}" if at.step is not None else ""
    return f"{state}{module}{step}, at {at.line}"


def _collective(frames: list[FrameType]) -> str | None:
    """The collective in which the innermost of these frames is, by its name in `torch.distributed` or by the call in its source line."""
    inner = list(itertools.takewhile(lambda f: f.f_code.co_filename.startswith((_TORCH, _THIS_PACKAGE)), frames))
    for frame in inner[::-1]:  # the outermost that has a name
        if frame.f_code.co_filename.startswith(_DISTRIBUTED) and _CALL.fullmatch(frame.f_code.co_name):
            return frame.f_code.co_name
    for frame in frames[:3]:
        if call := _CALL.search(_source_line(frame)):
            return call[1]
    return None


def _line(frame: FrameType | None) -> str:
    if frame is None:
        return "an unknown line"
    return f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}: `{_source_line(frame)[:120]}`"


def _source_line(frame: FrameType) -> str:
    return linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
