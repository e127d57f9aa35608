"""Work in a forked child: what comes back, and what stays as it was."""

from __future__ import annotations

import os
import queue
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_tp.core import forked
from lightning_tp.core.forked import NoChild, in_child
from lightning_tp.errors import TPError


def test_a_result_comes_back_and_nothing_else(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    numbers, state, path = iter([1, 2, 3]), (random.getstate(), torch.get_rng_state().sum()), tmp_path / "log.txt"
    path.write_text("before\n")

    def work() -> Any:
        print("said")
        os.write(2, b"also")
        with open(path, "a") as file:
            file.write("within\n")
        (tmp_path / "new.txt").write_text("new")
        random.random(), torch.rand(3)
        return next(numbers), path.read_text(), (tmp_path / "new.txt").read_text()

    assert in_child(work) == (1, "before\nwithin\n", "new")
    assert next(numbers) == 1 and path.read_text() == "before\n" and not (tmp_path / "new.txt").exists()
    assert (random.getstate(), torch.get_rng_state().sum()) == state
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("mode", ["w", "a", "r+"])
def test_files_that_are_open_and_saved_tensors_stay(tmp_path: Path, mode: str) -> None:
    path, saved = tmp_path / "log.txt", tmp_path / "x.pt"
    path.write_text("before\n")
    torch.save(torch.zeros(2), saved)
    with open(path, mode) as log:
        log.write("own\n")
        log.flush()
        at = log.tell()

        def work() -> Any:
            print("within", file=log, flush=True)
            os.write(log.fileno(), b"also")
            torch.save(torch.ones(2), str(saved))
            return log.tell(), torch.load(open(saved, "rb")).tolist()

        assert in_child(work) == (at + len("within\nalso"), [1, 1])
        assert log.tell() == at
        log.write("after\n")
    assert path.read_text() == {"w": "own\nafter\n", "a": "before\nown\nafter\n", "r+": "own\nafter\n"}[mode]
    assert torch.load(saved).tolist() == [0, 0]


def test_errors_keep_their_class_and_text() -> None:
    class Odd(Exception):
        def __init__(self, a: int, b: int) -> None:
            super().__init__(f"{a} and {b}")

    def fail(error: Exception) -> Any:
        raise error

    for error in (TPError("use tp=2"), KeyError("name"), OSError(2, "gone")):
        with pytest.raises(type(error)) as info:
            in_child(lambda error=error: fail(error))  # type: ignore[misc]
        assert str(info.value) == str(error)
    with pytest.raises(RuntimeError, match=r"^Odd: 1 and 2$"):  # can't be sent
        in_child(lambda: fail(Odd(1, 2)))


def test_work_that_a_child_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forked, "QUIET", 1.0)
    monkeypatch.setattr(forked, "POLL", 0.2)
    with pytest.raises(NoChild, match="ended with status"):
        in_child(lambda: queue.Queue().get())  # filled by a thread that is not there
    with pytest.raises(NoChild, match="ended with status"):
        in_child(lambda: os.kill(os.getpid(), signal.SIGKILL))

    def needs_cuda() -> None:
        raise RuntimeError("Cannot re-initialize CUDA in forked subprocess. To use CUDA with multiprocessing, ...")

    with pytest.raises(NoChild, match="re-initialize CUDA"):
        in_child(needs_cuda)
    monkeypatch.setattr(forked.sys, "platform", "win32")
    with pytest.raises(NoChild, match="does not fork"):
        in_child(lambda: 1)
