"""Name the place in the code of a module that calls a torch function, the same in every run of it."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import lru_cache
from itertools import islice
from pathlib import Path
from types import CodeType, FrameType, TracebackType
from typing import Any, TypeAlias

import torch

from lightning_tp._compat import call_impl

CallSite: TypeAlias = "tuple[tuple[str, str], ...]"  # (function, instruction), from the call up to the forward of the module

MODULE_CALL: CodeType = call_impl.__code__
MODEL_CODE: set[str] = set()  # files of this package that count as code of a model; they add themselves

_TORCH = str(torch.__path__[0]) + os.sep  # with it, torchvision beside torch is another folder
_PACKAGE = str(Path(__file__).parents[2]) + os.sep
_PYTHON = str(Path(os.__file__).parent) + os.sep
_LIGHTNING = os.path.join(os.path.dirname(_TORCH.rstrip(os.sep)), "lightning", "")


def call_site(frame: FrameType | None, ends: frozenset[CodeType] = frozenset({MODULE_CALL})) -> CallSite:
    """Return the chain of (function, instruction) from a frame that calls a torch function up to the forward of the module that runs.

    Two calls in one helper that is called from different places are told apart. A function that calls itself counts once: a class whose
    `__init_subclass__` wraps `forward` has one more wrapper in each subclass, such as styles and FSDP2 make them. `ends` is the code that calls
    the forward of a module, or that of `resumed`.
    """
    chain: list[tuple[str, str]] = []
    while frame is not None:
        code = frame.f_code
        if code in ends:
            break
        if code is _RESUMED:
            return (*chain, *frame.f_locals["site"])
        if not _is_machinery(code.co_filename):
            here = code.co_name, _position(code, frame.f_lasti)
            if not chain or chain[-1] != here:
                chain.append(here)
        frame = frame.f_back
    return tuple(chain)


def users_line(frame: FrameType | None) -> str:
    """Return "file:line" of the innermost frame whose code belongs neither to torch nor to Lightning nor to this package."""
    inner = (_TORCH, _PACKAGE, _LIGHTNING)
    while frame is not None and frame.f_code.co_filename.startswith(inner):
        frame = frame.f_back
    return "?" if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno}"


def raised_at(trace: TracebackType | None) -> str:
    """Name the file and the line of the user's code at which an exception was raised, as ` (at file:line)`; empty if there is none."""
    place = ""
    while trace is not None:
        if not trace.tb_frame.f_code.co_filename.startswith((_TORCH, _PACKAGE, _LIGHTNING, _PYTHON, "<")):
            place = f" (at {trace.tb_frame.f_code.co_filename}:{trace.tb_lineno})"
        trace = trace.tb_next
    return place


def end_of(frame: FrameType | None, ends: frozenset[CodeType]) -> CodeType | None:
    """Return the code at which the call site of a frame ends."""
    while frame is not None and frame.f_code not in ends and frame.f_code is not _RESUMED:
        frame = frame.f_back
    return None if frame is None else frame.f_code


def resumed(function: Callable[..., Any], site: CallSite, around: Callable[[], AbstractContextManager[Any]]) -> Callable[..., Any]:
    """Return a function whose calls are at the call sites that they would have if it were called at `site`, whoever calls it: a backward pass."""

    def resume(*args: Any, **kwargs: Any) -> Any:
        site  # noqa: B018  for `call_site`
        with around():
            return function(*args, **kwargs)

    return resume


_RESUMED = next(c for c in resumed.__code__.co_consts if isinstance(c, CodeType))


@lru_cache(maxsize=16384)
def _position(code: CodeType, instruction: int) -> str:
    """Where in the source of its function an instruction stands: Python replaces instructions by others as it runs them."""
    positions = getattr(code, "co_positions", None)  # Python 3.11 on
    found = next(islice(positions(), instruction // 2, None)) if positions is not None else ()
    if not found or None in found:
        return str(instruction)
    line, end_line, column, end_column = found
    return f"{line - code.co_firstlineno}:{column}-{end_line - code.co_firstlineno}:{end_column}"


@lru_cache(maxsize=4096)
def _is_machinery(file: str) -> bool:
    """Whether this file has code of torch or of this package around a model, which is not the same when a plan is made and when it runs."""
    if file.startswith(_TORCH):
        return "/nn/modules/" not in file or file.endswith("/module.py")
    return file.startswith(_PACKAGE) and file not in MODEL_CODE
