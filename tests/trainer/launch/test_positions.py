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
import torch
import torch.distributed as dist
from torch import nn

from lightning_tp.trainer.launch.positions import Position, hang_report, outwards, position_of, user_frame

LIMIT = timedelta(seconds=60)


def at(collective: str | None, line: str = "train.py:3 in step: `x`") -> Position:
    return Position(collective, line, "layers.0", 7)


def test_ranks_that_did_not_join() -> None:
    report = hang_report({0: at("barrier"), 1: at(None), 2: at(None)}, 0, LIMIT)
    assert report.startswith("Collective mismatch: rank 0 timed out after 60 s in barrier while rank(s) 1, 2 did not come.")
    assert "rank 2 is in no collective, in `layers.0`, step 7, at train.py:3" in report
    report = hang_report({0: at("barrier"), 1: None, 2: at(None)}, 0, LIMIT)
    assert "while rank(s) 1 did not come." in report and "rank 1 does not respond" in report


def test_ranks_in_another_collective() -> None:
    report = hang_report({0: at("gather", "train.py:9 in step: `logits.argmax()`"), 1: at("all_reduce")}, 0, LIMIT)
    assert "while rank(s) 1 went to another one" in report and "logits.argmax()" in report and "waits in all_reduce" in report
    same_call = hang_report({0: at("gather", "train.py:9"), 1: at("gather", "train.py:10")}, 0, LIMIT)
    assert "rank(s) 1 went to another one" in same_call


def test_all_in_one() -> None:
    report = hang_report({0: at("barrier"), 1: at("barrier")}, 0, None)
    assert (
        report.startswith("Collective mismatch: rank 0 timed out in barrier while all ranks had begun it") and "once more" in report
    )


def begun(line: str = "train.py:3 in step: `loss.item()`", **groups: int) -> Position:
    """Where waiting does not stop the host: no stack is in a collective; counts of groups by the ranks in their names."""
    names = {key: f"group `tp` (ranks {', '.join(key.strip('g'))})" for key in groups}
    return Position(None, line, "layers.0", 7, {key: (count, names[key]) for key, count in groups.items()})


def blamed(report: str) -> str:
    return report.partition(" while ")[2].splitlines()[0]


@pytest.mark.parametrize("reports", range(3))
def test_counts_name_who_did_not_come(reports: int) -> None:
    """Whoever reports, also the one that did not come; a rank that looks as if it waited in a collective is none that does."""
    sleeps = Position("wait", "train.py:9 in step: `work.wait()`", None, 7, begun(g012=50).begun)
    report = hang_report({0: begun(g012=57), 1: sleeps, 2: begun(g012=57)}, reports, LIMIT)
    assert blamed(report) == "rank(s) 1 did not come."
    assert f"rank {reports if reports != 1 else 0} timed out after 60 s in a collective (group `tp` (ranks 0, 1, 2))" in report
    assert "rank 1 has begun 50 of 57 collectives there, step 7, at train.py:9" in report


@pytest.mark.parametrize("reports", range(4))
def test_counts_of_several_groups(reports: int) -> None:
    """2 x 2: nobody is late but rank 3, also where ranks 0 and 1 have begun the same, and stand at a value that the others have got."""
    three = begun(g23=43, g13=8, g0123=5)
    chain = {0: begun(g01=45, g02=9, g0123=5), 1: begun(g01=44, g13=9, g0123=5), 2: begun(g23=44, g02=10, g0123=5), 3: three}
    assert blamed(hang_report(chain, reports, LIMIT)) == "rank(s) 3 did not come."
    alike = {0: begun(g01=44, g02=9, g0123=5), 1: begun(g01=44, g13=9, g0123=5), 2: begun(g23=46, g02=10, g0123=5), 3: three}
    assert blamed(hang_report(alike, reports, LIMIT)) == "rank(s) 3 did not come."


@pytest.mark.parametrize("reports", range(4))
def test_counts_name_who_went_to_another_group(reports: int) -> None:
    """All wait, in a circle: rank 1 alone in the group of all, whether it is less far in sum or not."""
    positions = {
        0: begun(g01=42, g02=9, g0123=5),
        1: begun(g01=41, g13=8, g0123=6),
        2: begun(g23=44, g02=9, g0123=5),
        3: begun(g23=44, g13=9, g0123=5),
    }
    assert blamed(hang_report(positions, reports, LIMIT)) == "rank(s) 1 went to another one."
    positions[1] = begun(g01=41, g13=9, g0123=6)
    positions[2], positions[3] = begun(g23=43, g02=10, g0123=5), begun(g23=43, g13=10, g0123=5)
    positions[0] = begun(g01=42, g02=9, g0123=5)
    assert blamed(hang_report(positions, reports, LIMIT)) == "rank(s) 1 went to another one."
    assert "went to another one" in hang_report({0: begun(g01=4, g10=1), 1: begun(g01=3, g10=2)}, 0, LIMIT)


def test_equal_counts_blame_nobody() -> None:
    """All have begun the same collectives, and stand where they need a value: of other shapes, or lost in the network."""
    report = hang_report({0: begun(g01=4), 1: begun("other.py:1", g01=4)}, 1, LIMIT)
    assert "did not come" not in report and "went to" not in report and "all ranks had begun it" in report


def test_who_waits_in_pythons_own_code_is_in_no_collective() -> None:
    """A lock, a queue, an event: their lines have `wait` in them."""
    event = threading.Event()
    thread = threading.Thread(target=lambda: event.wait(20))
    thread.start()
    time.sleep(0.2)
    found = position_of(sys._current_frames()[thread.ident or 0], None)
    event.set()
    thread.join()
    assert found.collective is None


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
    found = position_of(sys._current_frames()[thread.ident or 0], trainer)
    net.inner.go.set()
    thread.join()
    assert found.step == 5 and found.module == ("Callback" if in_callback else "inner")
    assert f"{__file__}:" in found.line and ("waits()" if in_callback else "self.go.wait(20)") in found.line


def test_without_a_run_the_line_is_left() -> None:
    found = position_of(sys._getframe(), None)
    assert (found.module, found.step) == (None, None) and "position_of(sys._getframe()" in found.line
    assert position_of(None, None).line == "an unknown line"


def test_the_collective_is_that_of_torch() -> None:
    """By the name of the outermost function in torch.distributed that is one; of others, by the call in the line."""
    code = "def all_reduce(probe):\n    broadcast(probe)\ndef broadcast(probe):\n    probe()\n"
    torchs: dict[str, Any] = {}
    exec(compile(code, dist.__file__, "exec"), torchs)
    found = []
    torchs["all_reduce"](lambda: found.append(position_of(sys._getframe(1), None).collective))
    assert found == ["all_reduce"]
    group = SimpleNamespace(_allgather_base=lambda: found.append(position_of(sys._getframe(1), None).collective))
    group._allgather_base()
    assert found[1] == "allgather_base"


class Calls(nn.Module):
    def forward(self, look: Any) -> Any:
        return look()  # the user's line


def test_torchs_frames_are_passed_over() -> None:
    frames: list[Any] = []
    code = compile("def inner(probe):\n    return probe()\n", torch.__file__, "exec")
    exec(code, torchs := {})  # type: ignore[var-annotated]
    Calls()(lambda: torchs["inner"](lambda: frames.extend(outwards(sys._getframe(1)))))
    assert frames[0].f_code.co_filename == torch.__file__
    found = user_frame(frames)
    assert found is not None and found.f_code.co_filename == __file__ and found.f_code.co_name == "<lambda>"
    assert user_frame(frames[:1]) is frames[0] and user_frame([]) is None
    assert [f.f_code.co_name for f in frames].index("forward") < [f.f_code.co_name for f in frames].index("_call_impl")
