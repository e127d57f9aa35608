"""Where in the code a torch call comes from."""

from __future__ import annotations

from functools import lru_cache
from itertools import islice
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from torch import nn

MODULE_CALL: CodeType = nn.Module._call_impl.__code__


_TORCH = str(torch.__path__[0])


_HERE = str(Path(__file__).parents[2])


def call_site(frame: FrameType | None, ends: frozenset[CodeType] = frozenset({MODULE_CALL})) -> tuple[Any, ...]:
    """The chain of (function, instruction) from a call of a torch function up to the forward of the module that runs.

    Two calls from one helper that come from different places are told apart. A function that calls itself counts once: a class whose
    `__init_subclass__` wraps `forward` has one wrapper more in each subclass, as the styles and FSDP2 make them.
    """
    chain: list[tuple[str, str]] = []
    while frame is not None:
        code = frame.f_code
        if code in ends:
            break
        if not _is_inner(code):
            here = code.co_name, _position(code, frame.f_lasti)
            if not chain or chain[-1] != here:
                chain.append(here)
        frame = frame.f_back
    return tuple(chain)


@lru_cache(maxsize=16384)
def _position(code: CodeType, instruction: int) -> str:
    """Where in its function an instruction stands in the source: Python replaces instructions by others as it runs them."""
    positions = getattr(code, "co_positions", None)  # Python 3.11 on
    found = next(islice(positions(), instruction // 2, None)) if positions is not None else ()
    if not found or None in found:
        return str(instruction)
    line, end_line, column, end_column = found
    return f"{line - code.co_firstlineno}:{column}-{end_line - code.co_firstlineno}:{end_column}"


@lru_cache(maxsize=4096)
def _is_inner(code: CodeType) -> bool:
    """Frames of torch's and of this package's machinery, which are not the same when a plan is made and when it runs."""
    file = code.co_filename
    if file.startswith(_TORCH):
        return "/nn/modules/" not in file or file.endswith("/module.py")
    return file.startswith(_HERE) and not file.endswith("/core/ops/attention.py")
