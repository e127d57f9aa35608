"""Describe where each rank was when a collective timed out: its collective, its line of the user's code, its module and its step.

All of it is read from the stack of a thread, so that it costs nothing while training runs.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Callback

from lightning_tp.trainer.launch.user_code import THIS_PACKAGE, TORCH, outwards, source_line, user_frame

SHOWN = 8  # ranks of which a report has a line
_CALL = re.compile(
    r"\b_?(all_?reduce|all_?gather\w*|reduce_?scatter\w*|broadcast\w*|barrier|all_?to_?all\w*|scatter|gather|recv|send|wait)\b",
)
_DISTRIBUTED = str(Path(dist.__file__).parent) + os.sep


@dataclass(frozen=True)
class Position:
    """Where a rank is.

    Args:
        collective: The collective that it waits in; None outside of one.
        line: The innermost line of the user's code.
        module: The module whose forward runs, or the callback.
        step: `trainer.global_step`.
    """

    collective: str | None
    line: str
    module: str | None = None
    step: int | None = None


def position_of(frame: FrameType | None, trainer: Any, *, but: Callback) -> Position:
    """Read the position of a rank from the stack of its main thread.

    Args:
        frame: The innermost frame.
        trainer: The Trainer that runs there, whatever its state.
        but: A callback that is not meant, the one that asks.
    """
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
    """Report a collective that timed out: which one, which ranks did not join it, and where each of them was.

    Args:
        positions: Rank -> its position; None for a rank that does not respond.
        waited: The rank whose collective timed out.
        timeout: After which it did.

    Example:
        >>> here, there = Position("all_reduce", "train.py:7"), Position("barrier", "train.py:9")
        >>> print(hang_report({0: there, 1: here}, 1, timedelta(seconds=20)).splitlines()[0])
        Collective mismatch: rank 1 timed out after 20 s in all_reduce while rank 0 was in another collective.
    """
    mine = positions[waited]
    assert mine is not None
    others = {rank: at for rank, at in positions.items() if rank != waited}
    absent = [rank for rank, at in others.items() if at is None or at.collective is None]
    elsewhere = [
        rank for rank, at in others.items() if at and at.collective and (at.collective, at.line) != (mine.collective, mine.line)
    ]
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
    inner = list(itertools.takewhile(lambda f: f.f_code.co_filename.startswith((TORCH, THIS_PACKAGE)), frames))
    for frame in inner[::-1]:  # the outermost that has a name
        if frame.f_code.co_filename.startswith(_DISTRIBUTED) and _CALL.fullmatch(frame.f_code.co_name):
            return frame.f_code.co_name
    for frame in frames[:3]:
        if call := _CALL.search(source_line(frame)):
            return call[1]
    return None


def _line(frame: FrameType | None) -> str:
    if frame is None:
        return "an unknown line"
    return f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}: `{source_line(frame)[:120]}`"
