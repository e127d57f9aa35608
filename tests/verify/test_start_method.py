"""Whether ranks are forked or spawned, and what is said where neither can do the work."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_tp.core.forked import NoChild
from lightning_tp.errors import TPError
from lightning_tp.testing import run_ranks
from lightning_tp.verify import start_method
from lightning_tp.verify.rank_process import RankFailure
from lightning_tp.verify.start_method import default_start_method, pickled, refuse_broken_fork


def importable(x: Any = None) -> Any:
    return x


CALLS: dict[str, Any] = {
    "a function": (importable, (torch.ones(2),), {}),
    "a lambda": (lambda: None, (), {}),
    "a lambda as an argument": (importable, (lambda: None,), {}),
}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Say what this process has done, on a machine with GPUs or without."""

    def be(*, gpus: int, used: bool = False, backward: bool = False) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: used)

        def in_child(work: Any) -> None:
            assert gpus, "nobody has to ask a child"
            if backward:
                raise NoChild("Unable to handle autograd's threading in combination with fork-based multiprocessing.")

        monkeypatch.setattr(start_method, "in_child", in_child)

    return be


@pytest.mark.parametrize("what", CALLS)
def test_how_ranks_start(what: str, machine: Any) -> None:
    call, local = CALLS[what], what != "a function"
    for done in (dict(gpus=0), dict(gpus=0, backward=True), dict(gpus=2)):
        machine(**done)
        assert default_start_method(call, "gloo") == default_start_method(call, "nccl") == "fork"
    for done, word in ((dict(gpus=2, used=True), "CUDA"), (dict(gpus=2, backward=True), "backward pass")):
        machine(**done)
        assert default_start_method(call, "gloo") == ("fork" if local else "spawn")
        if local:
            with pytest.raises(
                TPError, match=f"{word}.*nor spawned: `fn` can't be imported. Pass a function that other processes can import"
            ):
                default_start_method(call, "cpu:gloo,cuda:nccl")
        else:
            assert default_start_method(call, "nccl") == "spawn"


def test_functions_of_a_prompt_are_not_importable(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import __main__

    machine(gpus=2, used=True)
    monkeypatch.setattr(importable, "__module__", "__main__")
    monkeypatch.setattr(__main__, "importable", importable, raising=False)
    monkeypatch.setattr(__main__, "__file__", "script.py", raising=False)
    assert default_start_method((importable, (), {}), "gloo") == "spawn"
    monkeypatch.delattr(__main__, "__file__")
    assert default_start_method((importable, (), {}), "gloo") == "fork"


def test_what_a_fork_leaves_out_is_one_error() -> None:
    def cuda() -> None:
        raise RuntimeError(
            "Cannot re-initialize CUDA in forked subprocess. To use CUDA with multiprocessing, you must use the 'spawn' start method"
        )

    with pytest.raises(
        TPError, match=r"would use CUDA, and this process has used it before\. Pass a function that other processes can import"
    ):
        run_ranks(cuda, 2)
    refuse_broken_fork([RankFailure("ValueError", "boom", "")])
    text = "Unable to handle autograd's threading in combination with fork-based multiprocessing. See .."
    with pytest.raises(TPError, match="would run a backward pass, and this process has run one before"):
        refuse_broken_fork([RankFailure("ValueError", "boom", ""), RankFailure("RuntimeError", text, "")])


def test_what_does_not_pickle_can_not_be_spawned() -> None:
    assert pickled(CALLS["a function"])
    for what in ("a lambda", "a lambda as an argument"):
        with pytest.raises(
            TPError, match=r"spawned ranks can't be given `fn` and its arguments: .*Or run the ranks before anything else"
        ):
            run_ranks(CALLS[what][0], 2, *CALLS[what][1], start_method="spawn")
