"""Let all ranks do what a signal asks for (to end, or to save and be queued again) at one step, without a collective.

A signal arrives at one rank, or at all of them, wherever each is: a handler that communicates would meet others in a collective of the step. So it
only leaves a note. Batches are counted as they begin, alike on all ranks. The thread of the watchdog passes the note on over the store, and each
rank's answers with the number of batches that have begun there; until all have answered, no rank begins another one. The largest of these
numbers is the batch before which all of them do what was asked for. A step without a signal takes a lock, and waits for nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_tp.errors import TPError
from lightning_tp.trainer.patches import private
from lightning_tp.trainer.patches.replaced import is_usable, patch_of, replaced

END, REQUEUE = "end", "requeue"  # what can be asked for
NEWS = "news"  # the key that says that there is more in the store than a run without events leaves there
OVER = "over"  # the answer of a rank whose run is over: nothing is done then


class RequestedEnd:
    """What the signals of one run ask for, and the batch before which it is done.

    Args:
        trainer: whose run it is.
        rank, world: this process, and how many there are.
        store: the main thread's connection to the store; the watchdog's thread has another one.
        timeout: how long a rank waits for the answers of the others, as for a collective.
    """

    def __init__(self, trainer: pl.Trainer, rank: int, world: int, store: dist.Store, timeout: timedelta | None) -> None:
        self.trainer, self.rank, self.world, self.store, self.timeout = trainer, rank, world, store, timeout
        self.agreed = False  # all ranks end, each by Lightning's `SIGTERMException`
        self.stopped: list[int] = []  # ranks that the watchdog finds stopped, and the store with them: it is not asked
        self._noted: list[str] = []  # by the handlers of this process; a list, since a handler must take no lock
        self._lock = threading.Lock()
        self._begun = 0  # batches
        self._round = 0  # how often something was asked for before
        self._asked: str | None = None  # what all ranks are asked for in this round
        self._answered = threading.Event()  # by all, or nobody waits for it any more
        self._batch: int | None = None  # before which it is done; None: never
        self._over = False  # no batch follows in which something could be done

    @contextmanager
    def signals_noted(self) -> Iterator[None]:
        """While this lasts, handlers of signals leave a note where those of Lightning communicate, and training batches act on it."""
        connector, loop = private.signal_connector_of(self.trainer), self.trainer.fit_loop.epoch_loop
        patches: list[tuple[Any, str, Any]] = [
            (loop, "_broadcast_sigterm_tensor", self._before_training_batch),
            (connector, "_sigterm_notifier_fn", lambda own, *args: self._noted.append(END)),
            (connector, "_slurm_sigusr_handler_fn", lambda own, *args: self._noted.append(REQUEUE)),
        ]
        with ExitStack() as stack:
            if all([is_usable(patch_of(owner, name)) for owner, name, _ in patches]):  # a note that no batch acts on would be lost
                for patch in patches:
                    stack.enter_context(replaced(*patch))
            yield

    # ----------------------------------------------------------------------------------------------- in the main thread

    def _before_training_batch(self, own: Any) -> None:
        if self.agreed:  # Lightning lets a run go on after the last batch of a sanity check
            raise SIGTERMException
        self.before_batch()

    def before_batch(self) -> None:
        """Begin a batch, the same one on all ranks; before it, do what they were asked for, if its time has come.

        A run that is asked to end does so after this batch, as Lightning ends it in one process: callbacks see `trainer.received_sigterm`.

        Raises:
            TPError: if a rank does not answer.
        """
        with self._lock:
            if self._asked is None:
                self._begun += 1
                return
        if not self._answered.wait(None if self.timeout is None else self.timeout.total_seconds()):
            raise TPError(self._nobody_answered())
        with self._lock:
            asked, due = self._asked, self._batch == self._begun
            if due or self._batch is None:
                self._over = self._over or self._batch is None
                self._asked = self._batch = None
                self._answered.clear()
                self._round += 1
            self._begun += 1
        if due and asked is not None:
            self._do(asked)

    def after_fit(self) -> None:
        """End a `fit` that all ranks were asked to end behind its last batch."""
        self.before_batch()
        if self.agreed:
            raise SIGTERMException

    def _do(self, what: str) -> None:
        while what in self._noted:
            self._noted.remove(what)
        if what == END:
            self.agreed = True
            private.set_received_sigterm(self.trainer)
        else:
            private.save_and_requeue(self.trainer)

    def _nobody_answered(self) -> str:
        silent = self.stopped or [rank for rank in range(self.world) if not self.store.check([f"request/{self._round}/{rank}"])]
        waited = "" if self.timeout is None else f" in {self.timeout.total_seconds():g} s"
        return (
            f"A signal asked this run to end, and rank(s) {', '.join(map(str, silent))} did not answer{waited}: stopped, or cut off from the others. "
            "End all processes of the run; if they were only slow, raise `TPStrategy(timeout=..)`."
        )

    def finish(self) -> None:
        """Let the others know that the run is over on this rank, so that they wait for no answer."""
        with self._lock:
            self._over = True
            answered = self._asked is not None
        if not answered:
            self.store.compare_set(f"request/{self._round}/{self.rank}", "", OVER)

    # ------------------------------------------------------------------------------------------ in the watchdog's thread

    @property
    def is_noted(self) -> bool:
        """Whether this process has received a signal."""
        return bool(self._noted)

    @property
    def is_open(self) -> bool:
        """Whether there is something that not all ranks have answered."""
        return self._asked is not None and not self._answered.is_set()

    def look(self, store: dist.Store) -> None:
        """Pass on what this process was asked for, answer what others were asked for, and see whether all have answered."""
        if self._answered.is_set() or self.agreed or (self._over and self._asked is None):
            return
        key = f"request/{self._round}"
        if self._asked is None:
            if self._noted:
                store.set(NEWS, "")
                asked = store.compare_set(key, "", self._noted[0]).decode()
            elif store.check([key]):
                asked = store.get(key).decode()
            else:
                return
            with self._lock:
                self._asked = asked
                answer = OVER if self._over else str(self._begun)
            store.compare_set(f"{key}/{self.rank}", "", answer)
        keys = [f"{key}/{rank}" for rank in range(self.world)]
        if store.check(keys):
            answers = [answer.decode() for answer in store.multi_get(keys)]
            with self._lock:
                self._batch = None if OVER in answers else max(map(int, answers))
                self._answered.set()

    def release(self) -> None:
        """Let a main thread that waits for answers go on: nobody looks for them any more."""
        self._answered.set()
