"""Stop all ranks within seconds once one has failed, died or hung, and report on one screen which one it was.

A thread of each process looks once a second, over the store of the process group, whether some rank has failed, or was asked to end
(`requested_end.py`), and whether the process of its neighbour on this machine is alive. The main thread is never touched: where it is is read
from its stack, and how far it is from what its process groups have counted, only once something has gone wrong. So it costs a training step nothing.

Not covered: a node that is lost as a whole (its launcher, or torch's own timeouts, end the others), and ranks that were never started (joining
the process group has its own timeout).
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import json
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_tp._compat import clone_store, let_store_fail
from lightning_tp.core.threads import start_thread
from lightning_tp.errors import HEAD_START, SecondaryError, TPError, default_sigterm
from lightning_tp.trainer.launch.positions import Position, hang_report, outwards, position_of
from lightning_tp.trainer.launch.requested_end import NEWS, RequestedEnd
from lightning_tp.trainer.patches.replaced import replaced

PERIOD = 1.0  # seconds between two looks
STILL = 3.0  # seconds for which the main thread may stand still after another rank has failed
MOVING = 30.0  # seconds until the process ends though its main thread moves
STORE_TIMEOUT = 60.0  # seconds that the store may take to answer: it is out of reach then
POSITIONS_TIMEOUT = 2.5  # seconds in which ranks have to report where they are

_TIMEOUT = re.compile(r"timed? ?out", re.IGNORECASE)
_BROKEN_COLLECTIVE = re.compile(
    r"gloo|nccl|connection (closed|reset|refused)|broken pipe|timed? ?out|tcpstore|peer|abort", re.IGNORECASE
)
DIED = "died without an error message; was it killed, or did it run out of memory?"
_runs = itertools.count()  # every rank makes the same runs, in one order


@dataclass(frozen=True)
class Failure:
    """How a rank failed."""

    rank: int
    kind: str  # the class of its exception; "died" for a process that is gone
    text: str  # what its exception says
    hang: bool = False  # a collective timed out on it


LAUNCHER_DIED = Failure(0, "died", f"its process, or the launcher that holds the store, {DIED}")


class Watchdog:
    """Watch the other ranks during one run of a Trainer, and tell them if this one fails.

    It is none of the Trainer's callbacks, which user code may count. It sees what a stage raises, and the strategy hands it what is raised before.

    `num_local` ranks run on this machine, this one is its `local_rank`; `timeout` is that of collectives.
    """

    def __init__(self, trainer: pl.Trainer, local_rank: int, num_local: int, timeout: timedelta | None) -> None:
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.trainer = trainer
        self.timeout = timeout
        self.still: Any = None  # the stack of the main thread,
        self.since = 0.0  # and since when it is the same
        self.shown = 0  # how often all ranks were asked where they are,
        self.told: Any = None  # and the stack of the last answer
        self.watches_timeout = timeout is not None and dist.get_backend() != "gloo"  # NCCL ends the process, and raises nothing
        self.main_thread = threading.main_thread()
        self.raised = False
        self.first: Failure | None = None  # the first failure of the run, once the thread has seen it
        self.over = threading.Event()
        self.neighbour = self.rank + 1 if local_rank + 1 < num_local else self.rank - local_rank
        self.pids: dict[int, int] = {}  # of the neighbour, and of rank 0; 0 if it is on another machine
        self.thread: threading.Thread | None = None
        self.patch = contextlib.ExitStack()
        run = next(_runs)
        connections = [clone_store(), clone_store()] if self.world > 1 else [None]
        if any(c is None for c in connections):
            return
        let_store_fail(timedelta(seconds=STORE_TIMEOUT))
        self.store, self.threads_store = (dist.PrefixStore(f"lightning_tp_{run}", c) for c in connections)  # type: ignore[arg-type]
        self.requested = RequestedEnd(trainer, self.rank, self.world, self.store, timeout)
        self.store.set(f"who/{self.rank}", f"{_machine()} {os.getpid()}")
        self.thread = start_thread(self._watch, "lightning_tp watchdog", daemon=True)
        atexit.register(self._join)
        self.patch.enter_context(replaced(trainer, "_run_stage", self._observed))
        self.patch.enter_context(self.requested.signals_noted())
        trainer.strategy.on_exception = self.notice  # type: ignore[method-assign]
        self.patch.callback(vars(trainer.strategy).pop, "on_exception", None)

    def before_batch(self) -> None:
        """Let a batch begin that is not one of training: see `RequestedEnd`."""
        if self.thread is not None:
            self.requested.before_batch()

    def stop(self, failed: bool) -> None:
        """End the watch: the run is over on this rank. Rank 0, with which the store ends, waits a moment for the others."""
        if self.thread is None:
            return
        failed = failed and not self.requested.agreed
        self.patch.close()
        if not failed and not self.raised:
            with contextlib.suppress(RuntimeError):
                self.requested.finish()
                self.store.set(NEWS, "")
                self.store.set(f"done/{self.rank}", "")
                if self.rank == 0:
                    self._end_together()
        elif self.rank == 0:  # the others can still read which rank failed
            with contextlib.suppress(RuntimeError):
                self.store.wait([f"where/{rank}" for rank in range(1, self.world)], timedelta(seconds=2.5 * PERIOD))
        self._join()

    def _end_together(self) -> None:
        """Wait until the others are done; if one of them has failed at the very end, this run has failed."""
        others = [f"done/{rank}" for rank in range(1, self.world)]
        until = time.monotonic() + 2.5 * PERIOD
        while time.monotonic() < until and not self.store.check(others):
            if self.store.check(["failed"]):
                self._leave(_read(self.store))
            time.sleep(PERIOD / 50)

    def _join(self) -> None:
        """End the thread before Python ends: one that wakes up inside the store after that brings the process down."""
        self.over.set()
        if self.thread is not None and self.thread is not threading.current_thread():
            self.thread.join(timeout=10 * PERIOD)  # it may wait for an answer of the store, on a busy machine
            if self.thread.is_alive():
                return  # once more when Python ends
        atexit.unregister(self._join)

    # -------------------------------------------------------------------------------------------- this rank has failed

    def _observed(self, run_stage: Callable[[], Any]) -> Any:
        try:
            result = run_stage()
            if self.trainer.state.fn == TrainerFn.FITTING:
                self.requested.after_fit()
            return result
        except BaseException as exception:
            self.notice(exception)
            raise

    def notice(self, exception: BaseException) -> None:
        """Tell the others, before any other callback sees the exception; one that only follows from another rank's end is not shown."""
        if self.raised or (self.requested.agreed and isinstance(exception, SIGTERMException)):
            return
        self.raised = True
        broken = isinstance(exception, RuntimeError) and bool(_BROKEN_COLLECTIVE.search(str(exception)))
        follows = broken or isinstance(exception, SecondaryError)
        if follows and self.first is not None and self.first.rank != self.rank:  # known, and the store may be gone by now
            self._leave(self.first)
        hang = broken and bool(_TIMEOUT.search(str(exception)))
        if self._rank_0_is_stopped():
            if hang:
                raise TPError(self._report_of_rank_0(_innermost(exception))) from None
            return
        try:
            first, report = self._published(exception, follows, hang)
        except RuntimeError:  # the store is gone, and rank 0 with it
            if not isinstance(exception, (RuntimeError, SecondaryError)):
                return  # this rank's own mistake: it is shown
            first, report, follows = self.first or LAUNCHER_DIED, None, True
        if report is not None:
            self._join()
            raise TPError(report) from None
        if first.rank == self.rank:
            return
        if follows:
            self._leave(first)
        if first.text and first.text in str(exception):
            _shorten(exception, self.rank, first.rank)

    def _published(self, exception: BaseException, follows: bool, hang: bool) -> tuple[Failure, str | None]:
        """(the first failure of all ranks, the report of the hang, if this rank's collective timed out first); RuntimeError without the store."""
        self.store.set(f"raised/{self.rank}", "")
        self.store.set(f"where/{self.rank}", self._where(_innermost(exception)))
        if follows and not hang:  # whoever ended the connection may be about to report it, or its neighbour to find it
            until = time.monotonic() + POSITIONS_TIMEOUT
            while time.monotonic() < until and not self.store.check(["failed"]):
                time.sleep(PERIOD / 10)
        first = _publish(self.store, Failure(self.rank, type(exception).__name__, str(exception)[:2000], hang))
        return first, self._hang_report(self.store) if hang and first.rank == self.rank else None

    def _leave(self, first: Failure) -> None:
        self.over.set()
        self._report(first)
        with default_sigterm():
            time.sleep(HEAD_START)  # the first one shows its error, and its launcher ends the others
        self._join()
        raise SystemExit(1) from None

    def _report(self, first: Failure) -> None:
        how = first.text if first.kind == "died" else f"it failed with {first.kind}"
        how = "a collective timed out there (see its report)" if first.hang else how
        _print_error(f"[rank {self.rank}] stops because of rank {first.rank}: {how}\n")

    # ------------------------------------------------------------------------------------- once a second, in its thread

    def _watch(self) -> None:
        try:
            self._look_until_the_run_is_over()
        finally:
            self.requested.release()

    def _look_until_the_run_is_over(self) -> None:
        rank_0_is_done = False
        while not self.over.wait(PERIOD / 10 if self.requested.is_open or self._unknown() else PERIOD):
            if self.watches_timeout:
                self._look_whether_it_stands_still()
            self.requested.stopped = [0] if self._rank_0_is_stopped() else []
            if self.requested.stopped:
                continue
            try:
                self._find_pids()
                news = self.requested.is_noted or self.threads_store.check([NEWS])
                if news:
                    self.requested.look(self.threads_store)
                    self._show_position()
                first = self._failure_of_another(news)
                if first is None:
                    rank_0_is_done = rank_0_is_done or (news and self.threads_store.check(["done/0"]))
                    continue
            except RuntimeError:
                if rank_0_is_done or self.over.is_set():
                    return
                first = LAUNCHER_DIED
            self._end_after(first)
            return

    def _failure_of_another(self, news: bool) -> Failure | None:
        """The first failure that some rank has published, or that the neighbour's process shows by being gone."""
        if news and self.threads_store.check(["failed"]):
            return _read(self.threads_store)
        if self._neighbour_has_ended() and not self.threads_store.check([f"done/{self.neighbour}"]):
            return _publish(
                self.threads_store, Failure(self.neighbour, "died", f"its process ({self.pids[self.neighbour]}) {DIED}")
            )
        return None

    def _neighbour_has_ended(self) -> bool:
        pid = self.pids.get(self.neighbour) if self.neighbour != self.rank else None
        return has_ended(pid) if pid else False

    def _rank_0_is_stopped(self) -> bool:
        """Whether rank 0 is a stopped process of this machine: the store is often its, and would never answer."""
        pid = self.pids.get(0) if self.rank else None
        return state_of(pid) in ("T", "t") if pid else False

    def _unknown(self) -> set[int]:
        """The ranks whose processes are looked at, and not known yet."""
        return {self.neighbour, 0} - {self.rank, *self.pids}

    def _find_pids(self) -> None:
        for rank in self._unknown():
            if self.threads_store.check([who := f"who/{rank}"]):
                machine, pid = self.threads_store.get(who).decode().rsplit(" ", 1)
                self.pids[rank] = int(pid) if machine == _machine() else 0

    def _end_after(self, first: Failure) -> None:
        """Publish where this rank is, leave it time to end by itself, else end its process."""
        began = time.monotonic()
        self.first = first
        with contextlib.suppress(RuntimeError):
            if not self.threads_store.check([f"where/{self.rank}"]):
                self.threads_store.set(f"where/{self.rank}", self._where(self._frame()))
        if first.rank == self.rank or self.raised:
            return self._end_if_it_hangs(began, first)
        patience = HEAD_START if first.hang else STILL  # gloo takes seconds to close after a timeout: the report comes first
        still, since = _stack(self._frame()), began
        while not self.over.wait(PERIOD / 4):
            if self.raised:
                return self._end_if_it_hangs(began, first)
            stack, now = _stack(self._frame()), time.monotonic()
            if stack != still:
                still, since = stack, now
            if now - since > patience or now - began > MOVING:
                self._report(first)
                os._exit(1)
        return None

    def _end_if_it_hangs(self, began: float, first: Failure) -> None:
        """This rank has raised; if it then hangs, in a callback that waits for ranks that are gone, show the error and end the process."""
        while not self.over.wait(PERIOD):
            if time.monotonic() - began < 2 * HEAD_START:
                continue
            with contextlib.suppress(RuntimeError):
                if self.threads_store.check([f"raised/{rank}" for rank in range(self.world)]):
                    return  # all have: what they do on an exception, they can do together
            if first.rank == self.rank:
                frame = self._frame()
                stack = "".join(traceback.format_stack(frame)[-8:]) if frame is not None else ""
                _print_error(f"[rank {self.rank}] failed with {first.kind}: {first.text}\nIt hangs while handling it:\n{stack}")
            os._exit(1)

    def _look_whether_it_stands_still(self) -> None:
        """Report a hang shortly before the timeout, at which NCCL ends the process without an exception."""
        assert self.timeout is not None
        limit = self.timeout.total_seconds()
        stack, now = _stack(self._frame()), time.monotonic()
        if stack != self.still:
            self.still, self.since = stack, now
        elif stack != self.told and now - self.since > limit - max(5.0, 0.05 * limit):
            if self._rank_0_is_stopped():
                self.told = stack
                _print_error(self._report_of_rank_0(self._frame()) + "\n")
                return
            with contextlib.suppress(RuntimeError):
                asked = self.shown
                self.threads_store.set(NEWS, "")
                self.threads_store.set(f"show/{asked}", "")  # each rank is asked where it is, also one that does not stand still
                self._show_position()
                if self.threads_store.compare_set(f"reported/{asked}", "", str(self.rank)) == str(self.rank).encode():
                    _print_error(self._hang_report(self.threads_store, f"shown/{asked}") + "\n")

    def _show_position(self) -> None:
        """Publish where this rank is, if some rank has asked for it; who is asked where it stands does not ask in turn."""
        if self.threads_store.check([f"show/{self.shown}"]):
            frame = self._frame()
            self.threads_store.set(f"shown/{self.shown}/{self.rank}", self._where(frame))
            self.shown, self.told = self.shown + 1, _stack(frame)

    def _frame(self) -> FrameType | None:
        return sys._current_frames().get(self.main_thread.ident or 0)

    def _where(self, frame: FrameType | None) -> str:
        return json.dumps(asdict(position_of(frame, self.trainer)))

    def _report_of_rank_0(self, frame: FrameType | None) -> str:
        mine = position_of(frame, self.trainer)
        return hang_report({0: None, self.rank: mine}, self.rank, self.timeout)

    def _hang_report(self, store: dist.Store, at: str = "where") -> str:
        keys = [f"{at}/{rank}" for rank in range(self.world)]
        with contextlib.suppress(RuntimeError):  # not all respond
            store.wait(keys, timedelta(seconds=POSITIONS_TIMEOUT))
        positions = {r: Position(**json.loads(store.get(key))) if store.check([key]) else None for r, key in enumerate(keys)}
        return hang_report(positions, self.rank, self.timeout)


def _read(store: dist.Store) -> Failure:
    return Failure(**json.loads(store.get("failed")))


def _publish(store: dist.Store, failure: Failure) -> Failure:
    """Publish a failure, unless another one was first; the first."""
    store.set(NEWS, "")
    return Failure(**json.loads(store.compare_set("failed", "", json.dumps(asdict(failure)))))


def _shorten(exception: BaseException, rank: int, first: int) -> None:
    """If this exception ends the process, print one line of it: another rank shows the same."""
    own = sys.excepthook

    def hook(kind: type[BaseException], value: BaseException, trace: TracebackType | None) -> None:
        if value is not exception:
            own(kind, value, trace)
            return
        _print_error(f"[rank {rank}] {kind.__name__}, the same as on rank {first}\n")
        with default_sigterm():
            time.sleep(HEAD_START / 5)  # the first one shows its error before its launcher sees that this one has ended

    sys.excepthook = hook


def _print_error(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()


def _machine() -> str:
    """A name that two processes share if each can see the other's process id."""
    with contextlib.suppress(OSError):
        return f"{socket.gethostname()}/{os.readlink('/proc/self/ns/pid')}"
    return socket.gethostname()


def has_ended(pid: int) -> bool:
    """Whether a process of this machine has ended, or is a zombie; False where there is no /proc."""
    return state_of(pid) in ("Z", "X", "gone")


def state_of(pid: int) -> str:
    """The letter that /proc has for the state of a process; "gone" if there is none, and "" if it can't be known."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "gone" if os.path.isdir("/proc/self") else ""
    except OSError:
        return ""


def _innermost(exception: BaseException) -> FrameType | None:
    """The frame that raised it."""
    frames = [frame for frame, _ in traceback.walk_tb(exception.__traceback__)]
    return frames[-1] if frames else None


def _stack(frame: FrameType | None) -> list[tuple[int, int]]:
    return [(id(f.f_code), f.f_lasti) for f in outwards(frame)]
