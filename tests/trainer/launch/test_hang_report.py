"""What a report of a hang says, and where it finds a rank to be."""

from __future__ import annotations

import sys
import threading
import time
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch.distributed as dist
from torch import nn

from lightning_tp.trainer.launch.hang_report import Position, hang_report, position_of

LIMIT = timedelta(seconds=60)


def at(collective: str | None, line: str = "train.py:3 in step: `x`") -> Position:
    return Position(collective, line, "layers.0", 7)


def test_ranks_that_did_not_join() -> None:
    report = hang_report({0: at("barrier"), 1: None, 2: at(None)}, 0, LIMIT)
    assert report.startswith("Collective mismatch: rank 0 timed out after 60 s in barrier while ranks 1, 2 did not join it.")
    assert "rank 1 does not respond" in report and "rank 2 is in no collective, in `layers.0`, step 7, at train.py:3" in report


def test_ranks_in_another_collective() -> None:
    report = hang_report({0: at("gather", "train.py:9 in step: `logits.argmax()`"), 1: at("all_reduce")}, 0, LIMIT)
    assert "while rank 1 was in another collective" in report and "logits.argmax()" in report and "waits in all_reduce" in report
    same_call = hang_report({0: at("gather", "train.py:9"), 1: at("gather", "train.py:10")}, 0, LIMIT)
    assert "rank 1 was in another collective" in same_call


def test_all_in_one() -> None:
    report = hang_report({0: at("barrier"), 1: at("barrier")}, 0, None)
    assert (
        report.startswith("Collective mismatch: rank 0 timed out in barrier while all ranks were in one") and "once more" in report
    )


def test_a_large_world_fits_on_a_screen() -> None:
    report = hang_report({rank: at(None) for rank in range(64)} | {0: at("barrier")}, 0, LIMIT)
    assert len(report.splitlines()) < 15 and "\n  ..\n" in report


class Waits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.go, self.ready = threading.Event(), threading.Event()

    def forward(self) -> None:
        self.ready.set()
        self.go.wait(20)


class Net(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Waits()


class Asks(L.Callback):
    pass


class Callback(L.Callback):
    def on_train_start(self, waits: Any, *args: Any) -> None:
        waits()


@pytest.mark.parametrize("in_callback", [False, True])
def test_the_position_of_a_thread(in_callback: bool) -> None:
    """The user's line, the module whose forward runs, else the callback, and the step."""
    net = Net()
    target = (lambda: Callback().on_train_start(net.inner.go.wait)) if in_callback else net.inner
    thread = threading.Thread(target=target)
    thread.start()
    if in_callback:
        time.sleep(0.3)
    else:
        assert net.inner.ready.wait(10)
        time.sleep(0.1)
    trainer = SimpleNamespace(global_step=5, lightning_module=net)
    found = position_of(sys._current_frames()[thread.ident or 0], trainer, but=Asks())
    net.inner.go.set()
    thread.join()
    assert found.step == 5 and found.module == ("Callback" if in_callback else "inner")
    assert f"{__file__}:" in found.line and ("waits()" if in_callback else "self.go.wait(20)") in found.line


def test_without_a_run_the_line_is_left() -> None:
    found = position_of(sys._getframe(), None, but=Asks())
    assert (found.module, found.step) == (None, None) and "position_of(sys._getframe()" in found.line
    assert position_of(None, None, but=Asks()).line == "an unknown line"


def test_the_collective_is_that_of_torch() -> None:
    """By the name of the outermost function in torch.distributed that is one; of others, by the call in the line."""
    code = "def all_reduce(probe):\n    broadcast(probe)\ndef broadcast(probe):\n    probe()\n"
    torchs: dict[str, Any] = {}
    exec(compile(code, dist.__file__, "exec"), torchs)
    found = []
    torchs["all_reduce"](lambda: found.append(position_of(sys._getframe(1), None, but=Asks()).collective))
    assert found == ["all_reduce"]
    group = SimpleNamespace(_allgather_base=lambda: found.append(position_of(sys._getframe(1), None, but=Asks()).collective))
    group._allgather_base()
    assert found[1] == "allgather_base"
