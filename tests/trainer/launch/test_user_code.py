"""The user's own line in a stack and in a traceback."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from lightning_tp.plan.plan import Plan
from lightning_tp.trainer.launch.user_code import outwards, raised_at, source_line, user_frame


class Net(nn.Module):
    def forward(self, look: Any) -> Any:
        return look()  # the user's line


def test_torchs_frames_are_passed_over() -> None:
    frames: list[Any] = []
    code = compile("def inner(probe):\n    return probe()\n", torch.__file__, "exec")
    exec(code, torchs := {})  # type: ignore[var-annotated]
    Net()(lambda: torchs["inner"](lambda: frames.extend(outwards(sys._getframe(1)))))
    assert frames[0].f_code.co_filename == torch.__file__
    found = user_frame(frames)
    assert found is not None and found.f_code.co_filename == __file__ and "torchs" in source_line(found)
    assert user_frame(frames[:1]) is frames[0] and user_frame([]) is None
    assert [f.f_code.co_name for f in frames].index("forward") < [f.f_code.co_name for f in frames].index("_call_impl")


def test_where_an_exception_was_raised() -> None:
    """The innermost line of the user's, though torch or this package has raised it."""
    line = 0
    try:
        line = sys._getframe().f_lineno + 1
        Plan({"a": "no such style"})
    except Exception as error:
        assert raised_at(error.__traceback__) == f" (at {__file__}:{line})"
    assert line and raised_at(None) == ""
