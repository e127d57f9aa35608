"""One kind of error, seen once."""

from __future__ import annotations

import pickle
import signal
import threading
import time

import pytest

import lightning_tp as ltp
from lightning_tp.errors import HEAD_START, SecondaryError, TPError, default_sigterm, raise_on_rank_zero
from lightning_tp.testing import RankError, run_ranks


def test_it_is_a_value_error_that_pickles() -> None:
    """So that `except ValueError` finds it, and that it comes back from another process as it is."""
    assert ltp.TPError is TPError and issubclass(TPError, ValueError)
    again = pickle.loads(pickle.dumps(TPError("`tp=3`: ..")))
    assert type(again) is TPError and str(again) == "`tp=3`: .."


def test_rank_0_shows_it_and_the_others_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    with pytest.raises(TPError, match=r"^here$"), raise_on_rank_zero(rank=0):
        raise TPError("here")
    for rank in (1, 7):
        with pytest.raises(SystemExit) as leaves, raise_on_rank_zero(rank):
            raise TPError("here")
        assert leaves.value.code == 1 and leaves.value.__suppress_context__
    assert waited == [HEAD_START, HEAD_START]  # so that rank 0 can speak before a launcher stops all


def test_what_is_no_mistake_of_the_user_is_shown_by_all() -> None:
    for rank in (0, 1):
        with pytest.raises(RuntimeError, match=r"ours"), raise_on_rank_zero(rank):
            raise RuntimeError("ours")
        with raise_on_rank_zero(rank):
            done = True
        assert done


def test_a_launcher_ends_a_process_that_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning's handler of SIGTERM is off meanwhile, and back afterwards."""
    handler = lambda *args: None  # noqa: E731
    before = signal.signal(signal.SIGTERM, handler)
    try:
        found: list[object] = []
        monkeypatch.setattr(time, "sleep", lambda seconds: found.append(signal.getsignal(signal.SIGTERM)))
        with pytest.raises(SystemExit), raise_on_rank_zero(rank=1):
            raise SecondaryError("another rank failed")
        assert found == [signal.SIG_DFL] and signal.getsignal(signal.SIGTERM) is handler
        with pytest.raises(ZeroDivisionError), default_sigterm():
            1 / 0  # noqa: B018
        assert signal.getsignal(signal.SIGTERM) is handler

        def elsewhere() -> None:
            with default_sigterm():
                found.append(signal.getsignal(signal.SIGTERM))

        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        assert found[1:] == [handler]  # only the main thread may set handlers
    finally:
        signal.signal(signal.SIGTERM, before)


def test_on_real_ranks() -> None:
    def body() -> None:
        import torch.distributed as dist

        with raise_on_rank_zero(dist.get_rank(), head_start=0.2):
            raise TPError("the same on all ranks")

    with pytest.raises(RankError) as error:
        run_ranks(body, 2)
    kinds = {rank: failure.type_name for rank, failure in error.value.errors.items()}
    assert kinds == {0: "TPError", 1: "SystemExit"}
    assert "the same on all ranks" not in error.value.output[1]
