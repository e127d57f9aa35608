"""A signal to one rank, or to all, ends all of them behind one batch, with nothing to wait for in a step without one."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor
from torch.utils.data import DataLoader

import lightning_tp as ltp
from lightning_tp.errors import TPError
from lightning_tp.testing import run_ranks
from lightning_tp.trainer.launch.requested_end import END, REQUEUE, RequestedEnd
from tests.checkpoint.runs import Net, data, trainer

NEVER = 10**9


def fake_trainer() -> Any:
    return SimpleNamespace(_signal_connector=SimpleNamespace(received_sigterm=False))


class Rank(threading.Thread):
    """A rank that begins batches at its own pace, beside the thread that looks at the store."""

    def __init__(self, rank: int, world: int, store: Any, batches: int, asks_at: int, seed: int) -> None:
        super().__init__()
        self.end = RequestedEnd(fake_trainer(), rank, world, store, timedelta(seconds=20))
        self.store, self.batches, self.asks_at, self.draw = store, batches, asks_at, random.Random(seed)
        self.over = threading.Event()
        self.ended: int | None = None
        self.looker = threading.Thread(target=self.look)

    def look(self) -> None:
        while not self.over.wait(self.draw.uniform(0, 0.01)):
            self.end.look(self.store)

    def run(self) -> None:
        self.looker.start()
        for batch in range(self.batches):
            self.end.before_batch()
            if self.end.agreed:
                self.ended = batch
                break
            if batch == self.asks_at:
                self.end._noted.append(END)
            time.sleep(self.draw.uniform(0, 0.002))
        self.end.finish()
        time.sleep(0.05)
        self.over.set()
        self.looker.join()


@pytest.mark.parametrize("trial", range(12))
def test_ranks_that_run_apart_end_before_one_batch(trial: int) -> None:
    """However far one is ahead of the others, as hosts of GPUs are; and nobody ends, or waits, if it is too late for one of them."""
    draw = random.Random(trial)
    store, world, batches = dist.HashStore(), 4, 60
    askers = draw.choice([{1}, {0, 1, 2, 3}, {3}, {2}])
    ranks = [
        Rank(r, world, store, batches, draw.randrange(batches) if r in askers else NEVER, trial * 10 + r) for r in range(world)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(30)
        assert not rank.is_alive()
    assert len({rank.ended for rank in ranks}) == 1, [rank.ended for rank in ranks]


def test_one_thing_after_another() -> None:
    """A checkpoint for the queue, and then the end; one that two ranks ask for is saved once."""
    store = dist.HashStore()
    done: list[tuple[int, str]] = []
    ends = [RequestedEnd(fake_trainer(), r, 2, store, timedelta(seconds=5)) for r in range(2)]

    def both() -> None:
        for _ in range(2):
            for end in ends:
                end.look(store)
        for end in ends:
            end.before_batch()

    for rank, end in enumerate(ends):
        end._do = lambda what, rank=rank, end=end: (done.append((rank, what)), end._noted.clear())  # type: ignore[method-assign, assignment, misc, func-returns-value]
        end._noted.append(REQUEUE)
    both()
    assert done == [(0, REQUEUE), (1, REQUEUE)]
    both()
    ends[1]._noted.append(END)
    ends[1].look(store)
    assert ends[1].is_open and not ends[0].is_open and ends[1].is_noted
    both()
    assert done[2:] == [(0, END), (1, END)]


def test_a_rank_that_does_not_answer_is_named() -> None:
    store = dist.HashStore()
    end = RequestedEnd(fake_trainer(), 0, 3, store, timedelta(seconds=0.2))
    end._noted.append(END)
    end.look(store)
    with pytest.raises(TPError, match=r"rank\(s\) 1, 2 did not answer in 0.2 s"):
        end.before_batch()
    end.stopped, end.store = [0], None  # type: ignore[assignment]  # a store that would not answer
    with pytest.raises(TPError, match=r"rank\(s\) 0 did not answer in 0.2 s"):
        end.before_batch()
    end.release()  # the thread that looks has ended: nobody waits
    end.before_batch()
    assert not end.agreed


class Signals(L.Callback):
    """Sends this rank a signal at a place, and notes what callbacks see."""

    def __init__(self, *, at: int, ranks: tuple[int, ...], place: str = "step") -> None:
        self.at, self.ranks, self.place, self.seen = at, ranks, place, []  # type: ignore[var-annotated]

    def send(self, trainer: Any, place: str, step: int) -> None:
        if place == self.place and step == self.at and trainer.global_rank in self.ranks and not trainer.sanity_checking:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, i: int) -> None:
        time.sleep(0.05)
        self.send(trainer, "step", trainer.global_step)

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        self.seen.append(trainer.received_sigterm)

    def on_validation_batch_start(self, trainer: Any, module: Any, batch: Any, i: int, *args: Any) -> None:
        time.sleep(0.1)
        self.send(trainer, "validation", i)

    def on_validation_batch_end(self, trainer: Any, *args: Any) -> None:
        self.seen.append(trainer.received_sigterm)

    def on_train_end(self, trainer: Any, module: Any) -> None:
        self.send(trainer, "end", self.at)
        time.sleep(3)  # the others hear of it


def ends(folder: Path, signals: Signals, *more: Any, validates: bool = False, **options: Any) -> Any:
    """(the step and the batch at which the fit ended on this rank, what callbacks saw of the signal)."""
    run = trainer(signals, *more, default_root_dir=folder, **{"max_epochs": -1, "enable_checkpointing": bool(more), **options})
    module = Net()
    with pytest.raises(SIGTERMException) as raised:
        run.fit(module, data(), DataLoader(ltp.RandomTokens(160, 8, 11), batch_size=2) if validates else None)
    assert raised.value.code is None and run.received_sigterm
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    return run.global_step, run.fit_loop.epoch_loop.batch_progress.total.completed, signals.seen


@pytest.mark.parametrize("ranks", [(0,), (1,), (0, 1)], ids=str)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_sigterm_ends_all_at_one_step(ranks: tuple[int, ...], accumulate: int, tmp_path: Path) -> None:
    """To one rank or to all; callbacks see it during the last batch; a checkpoint that is saved then is complete."""

    def body() -> Any:
        found = ends(
            tmp_path, Signals(at=3, ranks=ranks), OnExceptionCheckpoint(tmp_path, "stopped"), accumulate_grad_batches=accumulate
        )
        again = trainer(max_steps=found[0] + 2, max_epochs=-1, default_root_dir=tmp_path, enable_checkpointing=False)
        again.fit(Net(), data(), ckpt_path=tmp_path / "stopped.ckpt")
        return found, again.global_step

    (one, resumed), (other, _) = run_ranks(body, 2, init=False)
    assert one == other and one[0] >= 3
    assert one[2][-1] is True and not any(one[2][:-1])
    assert resumed == one[0] + 2


def test_sigterm_on_a_mesh(tmp_path: Path) -> None:
    found = run_ranks(lambda: ends(tmp_path, Signals(at=2, ranks=(3,)), tp=2), 4, init=False)
    assert len({x[:2] for x in found}) == 1


def test_sigterm_in_validation(tmp_path: Path) -> None:
    """The run ends in the middle of it, where it would in one process."""
    signals = {"validates": True, "val_check_interval": 1, "num_sanity_val_steps": 0}
    body = lambda: ends(tmp_path, Signals(at=1, ranks=(1,), place="validation"), **signals)  # noqa: E731
    one, other = run_ranks(body, 2, init=False)
    assert one == other and one[2][-1] is True


def test_sigterm_behind_the_last_step(tmp_path: Path) -> None:
    body = lambda: ends(tmp_path, Signals(at=0, ranks=(1,), place="end"), max_steps=2)[0]  # noqa: E731
    assert run_ranks(body, 2, init=False) == [2, 2]


def test_slurms_signal_saves_between_two_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The handler of Lightning saves, a collective: on all ranks before one batch, though the signal reaches one of them."""

    class Requeues(L.Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, i: int) -> None:
            time.sleep(0.2)
            if trainer.global_step == 2 and trainer.global_rank == 1:
                trainer._signal_connector._slurm_sigusr_handler_fn(signal.SIGUSR1, None)  # as the system calls it

    saved: list[int] = []

    def handler(self: Any, signum: int, frame: Any) -> None:
        saved.append(self.trainer.global_step)
        self.trainer.save_checkpoint(tmp_path / "hpc_ckpt_1.ckpt")

    monkeypatch.setattr(_SignalConnector, "_slurm_sigusr_handler_fn", lambda self, signum, _: handler(self, signum, _))

    def body() -> Any:
        whole = trainer(Requeues(), max_steps=14, max_epochs=-1, default_root_dir=tmp_path, enable_checkpointing=False)
        module = Net()
        whole.fit(module, data())
        again, resumed = trainer(max_steps=14, max_epochs=-1, default_root_dir=tmp_path, enable_checkpointing=False), Net()
        again.fit(resumed, data(), ckpt_path=tmp_path / "hpc_ckpt_1.ckpt")
        one, two = ltp.full_state_dict(module), ltp.full_state_dict(resumed)
        return saved, all(torch.equal(t, two[name]) for name, t in one.items())

    found = run_ranks(body, 2, init=False)
    assert found[0] == found[1] and len(found[0][0]) == 1 and found[0][0][0] > 2 and found[0][1]


def test_a_step_asks_nobody(tmp_path: Path) -> None:
    """Lightning's broadcast over all ranks in each micro-batch is gone."""

    def body() -> int:
        before, calls = dist.broadcast, []

        def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            calls.append(tensor)
            return before(tensor, *args, **kwargs)

        class Watches(L.Callback):
            def on_train_start(self, *args: Any) -> None:
                torch.distributed.broadcast = counted

            def on_train_end(self, *args: Any) -> None:
                torch.distributed.broadcast = before

        run = trainer(Watches(), max_steps=3, accumulate_grad_batches=2, default_root_dir=tmp_path, enable_checkpointing=False)
        run.fit(Net(), data())
        return len(calls)

    assert run_ranks(body, 2, init=False) == [0, 0]
