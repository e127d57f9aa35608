"""Find the user's own line in a stack or a traceback: the innermost one that is not in torch, Lightning, this package or Python itself."""

from __future__ import annotations

import linecache
import os
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, TracebackType

import lightning.pytorch as pl
import torch.distributed as dist

TORCH = str(Path(dist.__file__).parent.parent) + os.sep
THIS_PACKAGE = str(Path(__file__).parents[2]) + os.sep
_OTHERS = (THIS_PACKAGE, TORCH, str(Path(pl.__file__).parent.parent) + os.sep, str(Path(os.__file__).parent) + os.sep, "<")


def outwards(frame: FrameType | None) -> Iterator[FrameType]:
    """Yield the frames of a stack, the innermost first."""
    while frame is not None:
        yield frame
        frame = frame.f_back


def user_frame(frames: list[FrameType]) -> FrameType | None:
    """Find the innermost frame of the user's code; else the innermost one."""
    return next((f for f in frames if not f.f_code.co_filename.startswith(_OTHERS)), frames[0] if frames else None)


def source_line(frame: FrameType) -> str:
    """Read the source line at which a frame stands."""
    return linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()


def raised_at(trace: TracebackType | None) -> str:
    """Name the file and the line of the user's code at which an exception was raised, as ` (at file:line)`; empty if there is none.

    Example:
        >>> raised_at(None)
        ''
    """
    lines = []
    while trace is not None:
        if not trace.tb_frame.f_code.co_filename.startswith(_OTHERS):
            lines.append(f" (at {trace.tb_frame.f_code.co_filename}:{trace.tb_lineno})")
        trace = trace.tb_next
    return lines[-1] if lines else ""
