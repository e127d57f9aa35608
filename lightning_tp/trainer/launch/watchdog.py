"""One rank fails, dies or does not come: the others stop within seconds, and one screen says who it was.

A thread of each process looks once a second, over the store of the process group, whether some rank has failed, and whether the
process of its neighbour on this machine still is. What the main thread does meanwhile is never touched: where it stands is read from its
stack, and only once something has gone wrong. So this costs a training step nothing.

Left out: a node that is lost as a whole (its launcher or torch's own timeouts end the others), and ranks that nobody started
yet: joining the process group has its own timeout.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import json
import linecache
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.pytorch import Callback
from typing_extensions import override

from lightning_tp._compat import clone_store, let_store_fail, patched
from lightning_tp.errors import HEAD_START, SecondaryError, TPError, default_sigterm

PERIOD = 1.0  # seconds between two looks
GRACE = 3.0  # seconds that the main thread may stand still after another rank has failed
ALWAYS = 30.0  # seconds until it is ended though it moves
ANSWER = 60.0  # seconds that the store may take: it is out of reach then
ANSWERS = 2.5  # seconds that ranks have to say where they are

_TIMEOUT = re.compile(r"timed? ?out", re.IGNORECASE)
_OF_A_COLLECTIVE = re.compile(
    r"gloo|nccl|connection (closed|reset|refused)|broken pipe|timed? ?out|tcpstore|peer|abort", re.IGNORECASE
)
_CALL = re.compile(
    r"\b_?(all_?reduce|all_?gather\w*|reduce_?scatter\w*|broadcast\w*|barrier|all_?to_?all\w*|scatter|gather|recv|send|wait)\b",
)
_HERE = str(Path(__file__).parents[2]) + os.sep
_TORCH = str(Path(dist.__file__).parent.parent) + os.sep
_DISTRIBUTED = str(Path(dist.__file__).parent) + os.sep
_LIGHTNING = str(Path(pl.__file__).parent.parent) + os.sep
_STDLIB = str(Path(os.__file__).parent) + os.sep
_runs = itertools.count()  # every rank makes the same runs, in one order


class Watchdog(Callback):
    """Watches the other ranks during one run of a Trainer, and tells them of this one's end. First of its callbacks, for that long.

    Args:
        trainer: whose run it is; the process group is there.
        local_rank: this rank's place among those of its machine.
        num_local: how many these are.
        timeout: of collectives.
    """

    def __init__(self, trainer: pl.Trainer, local_rank: int, num_local: int, timeout: timedelta | None) -> None:
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self._trainer = trainer
        self._timeout = timeout
        self._own_clock = timeout is not None and dist.get_backend() != "gloo"  # NCCL ends the process, and does not raise
        self._main = threading.main_thread()
        self._raised = False
        self._first: dict[str, Any] | None = None  # the failure of another rank, once the thread has seen it
        self._over = threading.Event()
        self._neighbour = self.rank + 1 if local_rank + 1 < num_local else self.rank - local_rank
        self._pid: int | None = None  # the neighbour's
        self._thread: threading.Thread | None = None
        run = next(_runs)
        connections = [clone_store(), clone_store()] if self.world > 1 else [None]
        if any(c is None for c in connections):
            return
        let_store_fail(timedelta(seconds=ANSWER))
        self._store, self._threads_store = (dist.PrefixStore(f"lightning_tp_{run}", c) for c in connections)  # type: ignore[arg-type]
        self._store.set(f"who/{self.rank}", f"{_machine()} {os.getpid()}")
        self._thread = threading.Thread(target=self._look, name="lightning_tp watch", daemon=True)
        self._thread.start()
        atexit.register(self._join)
        trainer.callbacks.insert(0, self)  # type: ignore[attr-defined]
        self._undo = patched(trainer, "_run_stage", self._stage)  # processes that were forked or spawned have no `on_exception`

    def stop(self, failed: bool) -> None:
        """The run is over on this rank. Rank 0, with whom the store ends, waits a moment for the others."""
        if self._thread is None:
            return
        if self in self._trainer.callbacks:  # type: ignore[attr-defined]
            self._trainer.callbacks.remove(self)  # type: ignore[attr-defined]
            self._undo()
        if not failed and not self._raised:
            with contextlib.suppress(RuntimeError):
                self._store.set(f"done/{self.rank}", "")
                if self.rank == 0:
                    self._end_together()
        elif self.rank == 0:  # let them read whose failure it was
            with contextlib.suppress(RuntimeError):
                self._store.wait([f"where/{rank}" for rank in range(1, self.world)], timedelta(seconds=2.5 * PERIOD))
        self._join()

    def _end_together(self) -> None:
        """Until the others are done, or one of them has failed at the very end: then this run has failed."""
        others = [f"done/{rank}" for rank in range(1, self.world)]
        until = time.monotonic() + 2.5 * PERIOD
        while time.monotonic() < until and not self._store.check(others):
            if self._store.check(["failed"]):
                self._leave(json.loads(self._store.get("failed")))
            time.sleep(PERIOD / 50)

    def _join(self) -> None:
        """End the thread before Python ends: one that then wakes up inside the store brings the process down."""
        self._over.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout=10 * PERIOD)  # it may wait for an answer of the store, on a machine that is busy
            if self._thread.is_alive():
                return  # once more when Python ends
        atexit.unregister(self._join)

    # -------------------------------------------------------------------------------------------- this rank has failed

    def _stage(self) -> Any:
        try:
            return type(self._trainer)._run_stage(self._trainer)
        except BaseException as exception:
            self.on_exception(self._trainer, self._trainer.lightning_module, exception)
            raise

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Tell the others, before any other callback sees the exception; a mere consequence of another rank's end is not shown."""
        if self._raised:
            return
        self._raised = True
        broken = isinstance(exception, RuntimeError) and bool(_OF_A_COLLECTIVE.search(str(exception)))
        follows = broken or isinstance(exception, SecondaryError)
        if follows and self._first is not None and self._first["rank"] != self.rank:  # known, and the store may be gone by now
            self._leave(self._first)
        try:
            self._store.set(f"raised/{self.rank}", "")
            self._store.set(f"where/{self.rank}", json.dumps(self._where(_last_frame(exception.__traceback__))))
            hang = broken and bool(_TIMEOUT.search(str(exception)))
            if follows and not hang:
                self._wait_for_a_reason()
            mine = {"rank": self.rank, "hang": hang, "type": type(exception).__name__, "text": str(exception)[:2000]}
            first = json.loads(self._store.compare_set("failed", "", json.dumps(mine)))
            hanging = self._hang_report() if hang and first["rank"] == self.rank else None
        except RuntimeError:  # the store is gone, and rank 0 with it
            if not isinstance(exception, (RuntimeError, SecondaryError)):
                return  # this rank's own mistake: it is shown
            first, follows, hanging = self._first or _gone(), True, None
        if hanging is not None:
            self._join()
            raise TPError(hanging) from None
        if first["rank"] == self.rank:
            return
        if follows:
            self._leave(first)
        if first["text"] and first["text"] in str(exception):
            _show_once(exception, self.rank, first["rank"])

    def _wait_for_a_reason(self) -> None:
        """A connection broke: whoever ended it may still be about to say so, or its neighbour to find it."""
        until = time.monotonic() + ANSWERS
        while time.monotonic() < until and not self._store.check(["failed"]):
            time.sleep(PERIOD / 10)

    def _leave(self, first: dict[str, Any]) -> None:
        self._over.set()
        self._say(first)
        with default_sigterm():
            time.sleep(HEAD_START)  # the first one speaks, and its launcher ends the others
        self._join()
        raise SystemExit(1) from None

    def _say(self, first: dict[str, Any]) -> None:
        why = "a collective timed out (see there)" if first.get("hang") else f"it failed with {first['type']}"
        if first["type"] == "ended":
            why = first["text"]
        sys.stderr.write(f"[rank {self.rank}] stops because of rank {first['rank']}: {why}\n")
        sys.stderr.flush()

    # ------------------------------------------------------------------------------------- once a second, in its thread

    def _look(self) -> None:
        still, since = None, time.monotonic()
        rank_0_is_done = False
        while not self._over.wait(PERIOD):
            if self._own_clock and self._timeout is not None:
                stack = _stack(self._frame())
                if stack != still:
                    still, since = stack, time.monotonic()
                elif time.monotonic() - since > self._timeout.total_seconds() - max(5.0, 0.05 * self._timeout.total_seconds()):
                    self._own_clock = False
                    self._tell_of_a_hang()
            try:
                if self._threads_store.check(["failed"]):
                    first = json.loads(self._threads_store.get("failed"))
                elif self._neighbour_has_ended() and not self._threads_store.check([f"done/{self._neighbour}"]):
                    text = f"its process ({self._pid}) has ended without a word; was it killed, or was memory short?"
                    mine = {"rank": self._neighbour, "hang": False, "type": "ended", "text": text}
                    first = json.loads(self._threads_store.compare_set("failed", "", json.dumps(mine)))
                else:
                    rank_0_is_done = rank_0_is_done or self._threads_store.check(["done/0"])
                    continue
            except RuntimeError:
                if rank_0_is_done or self._over.is_set():
                    return
                first = _gone()
            self._see_off(first)
            return

    def _neighbour_has_ended(self) -> bool:
        if self._neighbour == self.rank:
            return False
        if self._pid is None:
            if not self._threads_store.check([f"who/{self._neighbour}"]):
                return False
            machine, pid = self._threads_store.get(f"who/{self._neighbour}").decode().rsplit(" ", 1)
            self._pid = int(pid) if machine == _machine() else 0
        return bool(self._pid) and _has_ended(self._pid)

    def _see_off(self, first: dict[str, Any]) -> None:
        """Some rank has failed: say where this one is, leave it time to end by itself, else end it."""
        began = time.monotonic()
        self._first = first
        with contextlib.suppress(RuntimeError):
            if not self._threads_store.check([f"where/{self.rank}"]):
                self._threads_store.set(f"where/{self.rank}", json.dumps(self._where(self._frame())))
        if first["rank"] == self.rank or self._raised:
            return self._see_off_oneself(began, first)
        still, since = _stack(self._frame()), began
        while not self._over.wait(PERIOD / 4):
            if self._raised:
                return self._see_off_oneself(began, first)
            stack, now = _stack(self._frame()), time.monotonic()
            if stack != still:
                still, since = stack, now
            if now - since > GRACE or now - began > ALWAYS:
                self._say(first)
                os._exit(1)
        return None

    def _see_off_oneself(self, began: float, first: dict[str, Any]) -> None:
        """This rank has raised; if it hangs on its way out, in a callback that waits for ranks that are gone, show the error and end."""
        while not self._over.wait(PERIOD):
            if time.monotonic() - began < 2 * HEAD_START:
                continue
            with contextlib.suppress(RuntimeError):
                if self._threads_store.check([f"raised/{rank}" for rank in range(self.world)]):
                    return  # all have: what they do on an exception, they can do together
            if first["rank"] == self.rank:
                frame = self._frame()
                stack = "".join(traceback.format_stack(frame)[-8:]) if frame is not None else ""
                sys.stderr.write(
                    f"[rank {self.rank}] failed with {first['type']}: {first['text']}\nIt hangs in what it does on an exception:\n{stack}"
                )
                sys.stderr.flush()
            os._exit(1)

    # -------------------------------------------------------------------------------------------------- where ranks are

    def _tell_of_a_hang(self) -> None:
        """Where the backend ends the process at its timeout without an exception (NCCL): say on this screen what is known before."""
        with contextlib.suppress(RuntimeError):
            self._threads_store.set(f"where/{self.rank}", json.dumps(self._where(self._frame())))
            time.sleep(ANSWERS)
            if self._threads_store.compare_set("told", "", str(self.rank)) == str(self.rank).encode():
                sys.stderr.write(self._hang_report(self._threads_store) + "\n")
                sys.stderr.flush()

    def _frame(self) -> FrameType | None:
        return sys._current_frames().get(self._main.ident or 0)

    def _where(self, frame: FrameType | None) -> dict[str, Any]:
        """The collective (None: in none), the user's line, the module and the step at which a thread stands."""
        frames = list(_outwards(frame))
        user = next((f for f in frames if _is_users(f.f_code.co_filename)), frames[0] if frames else None)
        found: dict[str, Any] = {"collective": _collective(frames), "line": _line(user), "module": None}
        with contextlib.suppress(Exception):  # whatever state the run is in
            root: Any = self._trainer.lightning_module
            found["step"] = self._trainer.global_step
            names = {id(module): name for name, module in root.named_modules()}
            at = [names.get(id(f.f_locals.get("self"))) for f in frames if f.f_code.co_name == "forward"]
            found["module"] = next((name for name in at if name), None)
            at_callback = [f.f_locals["self"] for f in frames if isinstance(f.f_locals.get("self"), Callback)]
            at_callback = [callback for callback in at_callback if callback is not self]
            if found["module"] is None and at_callback:
                found["module"] = type(at_callback[0]).__name__
        return found

    def _hang_report(self, store: dist.Store | None = None) -> str:
        store = store or self._store
        keys = [f"where/{rank}" for rank in range(self.world)]
        with contextlib.suppress(RuntimeError):  # not all answer
            store.wait(keys, timedelta(seconds=ANSWERS))
        where = {r: json.loads(store.get(key)) if store.check([key]) else None for r, key in enumerate(keys)}
        return hang_report(where, self.rank, self._timeout)


def hang_report(where: dict[int, Any], waited: int, timeout: timedelta | None) -> str:
    """What a collective that timed out tells: what it was, which ranks did not come, and where each of them is.

    Args:
        where: rank -> its collective (None outside of one), line, module and step; None for a rank that does not answer.
        waited: the rank whose collective timed out.
        timeout: after which it did.
    """
    mine = where[waited]
    absent = [rank for rank, at in where.items() if rank != waited and (at is None or at["collective"] is None)]
    elsewhere = [
        rank
        for rank, at in where.items()
        if at is not None and at["collective"] is not None and (at["collective"], at["line"]) != (mine["collective"], mine["line"])
    ]
    after = "" if timeout is None else f" for {timeout.total_seconds():g} s"
    name = mine["collective"] or "a collective"
    if absent:
        what = f"rank(s) {', '.join(map(str, absent))} did not come"
    elif elsewhere:
        what = f"rank(s) {', '.join(map(str, elsewhere))} went to another one"
    else:
        what = "all ranks came to one at the same place: one of them may have come to it one time more than the others"
    lines = [f"Rank {waited} waited in {name}{after}: {what}."]
    shown = sorted({waited, *absent, *elsewhere})[:8] if absent or elsewhere else sorted(where)[:8]
    for rank in shown:
        at = where[rank]
        if at is None:
            lines.append(f"  rank {rank} does not answer: its process is stopped, or gone")
            continue
        state = f"waits in {at['collective']}" if at["collective"] else "is in no collective"
        module = f", in `{at['module']}`" if at.get("module") else ""
        step = f", step {at['step']}" if at.get("step") is not None else ""
        lines.append(f"  rank {rank} {state}{module}{step}, at {at['line']}")
    if len(where) > 8:
        lines.append("  ..")
    lines.append(
        "All ranks of a group have to come to each collective: don't read split logits, log with `sync_dist`, save or gather inside an "
        "`if rank == ..`. If a rank is only slow, give `TPStrategy(timeout=..)` more."
    )
    return "\n".join(lines)


def _show_once(exception: BaseException, rank: int, first: int) -> None:
    """If this exception ends the process, one line is printed of it: another rank shows what it says."""
    before = sys.excepthook

    def hook(kind: type[BaseException], value: BaseException, trace: TracebackType | None) -> None:
        if value is not exception:
            before(kind, value, trace)
            return
        sys.stderr.write(f"[rank {rank}] {kind.__name__}, the same as on rank {first}\n")
        sys.stderr.flush()
        with default_sigterm():
            time.sleep(HEAD_START / 5)  # the first one speaks before its launcher sees that this one has ended

    sys.excepthook = hook


def _gone() -> dict[str, Any]:
    text = "its process, or the launcher with the store, has ended without a word; was it killed, or was memory short?"
    return {"rank": 0, "hang": False, "type": "ended", "text": text}


def _machine() -> str:
    """A name that two processes share if one can look at the other."""
    with contextlib.suppress(OSError):
        return f"{socket.gethostname()}/{os.readlink('/proc/self/ns/pid')}"
    return socket.gethostname()


def _has_ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return os.path.isdir("/proc/self")
    except OSError:
        return False


def _outwards(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _stack(frame: FrameType | None) -> list[tuple[int, int]]:
    return [(id(f.f_code), f.f_lasti) for f in _outwards(frame)]


def _last_frame(trace: TracebackType | None) -> FrameType | None:
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace.tb_frame if trace is not None else None


def _is_users(path: str) -> bool:
    return not path.startswith((_HERE, _TORCH, _LIGHTNING, _STDLIB, "<"))


def _collective(frames: list[FrameType]) -> str | None:
    """The collective in which the innermost of these frames is, by its name in `torch.distributed` or the call that is made there."""
    inner = list(itertools.takewhile(lambda f: f.f_code.co_filename.startswith((_TORCH, _HERE)), frames))
    for frame in inner[::-1]:  # the outermost that has a name
        if frame.f_code.co_filename.startswith(_DISTRIBUTED) and _CALL.fullmatch(frame.f_code.co_name):
            return frame.f_code.co_name
    for frame in frames[:3]:
        if call := _CALL.search(_source(frame)):
            return call[1]
    return None


def _source(frame: FrameType) -> str:
    return linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()


def _line(frame: FrameType | None) -> str:
    if frame is None:
        return "an unknown line"
    return f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}: `{_source(frame)[:120]}`"
