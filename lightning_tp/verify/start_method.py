"""How `run_ranks` starts its ranks: by fork where that leaves them able to do everything, else by spawn where the function allows it.

A forked process can't use CUDA if its parent has, and can't run a backward pass if its parent has run one on a machine with GPUs: autograd's
threads for them are not there. A spawned one can, but has to import the function.
"""

from __future__ import annotations

import io
import pickle
import sys
from collections.abc import Iterable
from typing import Literal

import torch

from lightning_tp.core.forked import NoChild, in_child
from lightning_tp.errors import TPError
from lightning_tp.verify.rank_process import Call, RankFailure

Method = Literal["fork", "spawn"]

_WAY_OUT = (
    "Pass a function that other processes can import, with arguments that pickle (defined at the top of a module, no lambda and no closure): its "
    "ranks are spawned. Or run the ranks before anything else, or in a process of their own."
)
_BROKEN = {  # what torch says in a forked process
    "forked subprocess": "it would use CUDA, and this process has used it before",
    "fork-based multiprocessing": "it would run a backward pass, and this process has run one before, on a machine with GPUs",
}


def default_start_method(call: Call, backend: str) -> Method:
    """Choose how ranks start that make this call.

    Raises:
        TPError: where neither does: ranks that use GPUs can't be forked from this process, and the function can't be imported.
    """
    if sys.platform != "linux":
        return "spawn"
    why = _broken_by_fork()
    if why is None:
        return "fork"
    if _is_importable(call):
        return "spawn"
    if "nccl" in backend:
        raise TPError(
            f"`run_ranks(backend={backend!r})`: a rank can't be forked, since {why}, nor spawned: `fn` can't be imported. {_WAY_OUT}"
        )
    return "fork"


def pickled(call: Call) -> bytes:
    """Return a call for a spawned process.

    Raises:
        TPError: if it does not pickle.
    """
    buffer = io.BytesIO()
    try:
        torch.save(call, buffer, pickle_protocol=pickle.HIGHEST_PROTOCOL)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise TPError(f"`run_ranks`: spawned ranks can't be given `fn` and its arguments: {error}. {_WAY_OUT}") from error
    return buffer.getvalue()


def refuse_broken_fork(failures: Iterable[RankFailure]) -> None:
    """Say what to do about ranks that failed because they were forked; nothing for others.

    Raises:
        TPError: with the reason and the way out.
    """
    for failure in failures:
        why = next((why for text, why in _BROKEN.items() if text in failure.message), None)
        if why is not None:
            raise TPError(f"`run_ranks`: a rank was forked from this process and can't do its work: {why}. {_WAY_OUT}")


def _broken_by_fork() -> str | None:
    """Say what a fork of this process could not do; None: it can do everything."""
    if torch.cuda.is_initialized():
        return _BROKEN["forked subprocess"]
    if torch.cuda.device_count():  # else autograd has no threads of its own
        try:
            in_child(_backward)
        except NoChild:
            return _BROKEN["fork-based multiprocessing"]
    return None


def _backward() -> None:
    (2 * torch.ones(1, requires_grad=True)).sum().backward()


def _is_importable(call: Call) -> bool:
    """Return whether a spawned process could be given this call."""
    main = sys.modules.get("__main__")
    try:
        data = pickled(call)
    except TPError:
        return False
    by_main = b"__main__" in data or getattr(call[0], "__module__", None) == "__main__"
    return not by_main or getattr(main, "__file__", None) is not None  # a notebook, a prompt
