"""`run_ranks` with real gloo groups: results, failures, hangs, and nothing left behind."""

import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lightning_tp.errors import TPError
from lightning_tp.testing import RankError, run_ranks
from lightning_tp.testing.fixtures import run_if
from lightning_tp.verify.run_ranks import _innermost

# --- functions that ranks run; at module level where spawn must find them


def sum_of_ranks(x: torch.Tensor) -> torch.Tensor:
    total = x + dist.get_rank()
    dist.all_reduce(total)
    return total


def sum_of_ranks_cuda() -> torch.Tensor:
    return sum_of_ranks(torch.zeros(3, device="cuda"))


def stand_still() -> None:
    time.sleep(600)


def runs(pid: int) -> bool:
    """Whether the process is there and no zombie: one whose parent ended is reaped by the system, when it likes."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


# --- results


@pytest.mark.parametrize("world", [1, 2, 4])
def test_all_reduce(world: int) -> None:
    results = run_ranks(sum_of_ranks, world, torch.ones(3))
    expected = torch.full((3,), float(world + sum(range(world))))
    assert len(results) == world
    for result in results:
        torch.testing.assert_close(result, expected)


def test_all_reduce_spawn() -> None:
    results = run_ranks(sum_of_ranks, 2, torch.ones(3), start_method="spawn")
    torch.testing.assert_close(results[1], torch.full((3,), 3.0))


@run_if(min_gpus=2)
def test_all_reduce_cuda() -> None:
    results = run_ranks(sum_of_ranks_cuda, 2, backend="nccl")
    torch.testing.assert_close(results[1], torch.ones(3))  # and it arrives on the CPU


def test_results_are_in_rank_order_and_may_be_nested() -> None:
    def fn(scale: int, *, offset: int) -> dict[str, Any]:
        rank = dist.get_rank()
        return {"rank": rank, "pair": (torch.full((2,), scale * rank), scale * rank + offset)}

    results = run_ranks(fn, 3, 10, offset=1)
    assert [r["rank"] for r in results] == [0, 1, 2]
    assert [r["pair"][1] for r in results] == [1, 11, 21]
    torch.testing.assert_close(results[2]["pair"][0], torch.tensor([20, 20]))


def test_lambda_and_autograd_after_autograd_in_the_parent() -> None:
    def parent() -> None:
        weight = torch.randn(64, 64, requires_grad=True)
        (weight @ weight).sum().backward()  # a fork must not inherit a stuck autograd engine or thread pool

        def gradient() -> torch.Tensor:
            weight.grad = None
            (weight @ weight).sum().backward()
            assert weight.grad is not None
            return weight.grad

        if torch.cuda.device_count():  # then the engine has threads, and a rank would not have them
            with pytest.raises(TPError, match="it would run a backward pass, and this process has run one before"):
                run_ranks(gradient, 2)
        else:
            for grad in run_ranks(gradient, 2):
                torch.testing.assert_close(grad, weight.grad)
        assert run_ranks(lambda: dist.get_world_size(), 2) == [2, 2]

    run_ranks(parent, 1, init=False)


def test_init_false_leaves_the_group_to_the_function() -> None:
    def fn() -> tuple[bool, float]:
        before = dist.is_initialized()
        dist.init_process_group("gloo", init_method="env://")
        return before, sum_of_ranks(torch.zeros(1)).item()

    assert run_ranks(fn, 2, init=False) == [(False, 1.0), (False, 1.0)]


def test_a_trainer_inside_launches_nothing() -> None:
    def fn() -> tuple[str, int, int, float]:
        import lightning as L
        from lightning.pytorch.demos.boring_classes import BoringModel

        trainer = L.Trainer(
            accelerator="cpu",
            devices=2,
            strategy="ddp",
            max_steps=2,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        model = BoringModel()
        trainer.fit(model)
        environment = type(trainer.strategy.cluster_environment).__name__
        return environment, trainer.global_rank, trainer.world_size, model.layer.weight.sum().item()

    (env0, rank0, world0, sum0), (env1, rank1, world1, sum1) = run_ranks(fn, 2, init=False)
    assert (env0, env1) == ("TorchElasticEnvironment", "TorchElasticEnvironment")
    assert (rank0, rank1, world0, world1) == (0, 1, 2, 2)
    assert sum0 == sum1


def test_many_short_runs() -> None:
    for _ in range(10):
        assert run_ranks(dist.get_rank, 2) == [0, 1]


# --- failures


def test_error_in_one_rank_names_it() -> None:
    def fn() -> None:
        if dist.get_rank() == 1:
            print("about to fail")
            raise ValueError("boom 42")
        sum_of_ranks(torch.zeros(1))

    start = time.monotonic()
    with pytest.raises(RankError, match="boom 42") as info:
        run_ranks(fn, 2)
    assert time.monotonic() - start < 20  # rank 0 hears of a closed connection, or is killed after 5 s
    assert info.value.rank == 1
    type_name, message, text = info.value.errors[1]
    assert (type_name, message) == ("ValueError", "boom 42")
    assert text.startswith("Traceback") and "in fn" in text and "_run_function" not in text
    assert isinstance(info.value.__cause__, ValueError)
    assert "about to fail" in info.value.output[1]
    assert "about to fail" in str(info.value)


def test_first_failure_in_time_is_raised() -> None:
    def fn() -> None:
        time.sleep(0.5 * (3 - dist.get_rank()))
        raise KeyError(dist.get_rank())

    with pytest.raises(RankError) as info:
        run_ranks(fn, 3)
    assert info.value.rank == 2
    assert set(info.value.errors) == {0, 1, 2}


def test_others_are_killed_after_a_failure() -> None:
    def fn() -> None:
        if dist.get_rank() == 0:
            raise ValueError("boom")
        stand_still()

    start = time.monotonic()
    with pytest.raises(RankError, match="boom") as info:
        run_ranks(fn, 2)
    assert 4 < time.monotonic() - start < 15
    assert info.value.rank == 0
    assert info.value.errors[1].type_name == "Killed"
    assert "in stand_still" in info.value.errors[1].message


def test_hang_names_the_ranks_and_where() -> None:
    def fn() -> None:
        if dist.get_rank() != 1:
            stand_still()

    start = time.monotonic()
    with pytest.raises(RankError, match=r"rank\(s\) 0, 2 of 3 did not finish within 2 s") as info:
        run_ranks(fn, 3, timeout=2)
    assert time.monotonic() - start < 10
    assert info.value.rank == 0
    assert set(info.value.errors) == {0, 2}
    assert "in stand_still" in str(info.value)
    assert "stand_still" in info.value.errors[2].traceback


def test_hang_in_a_collective_is_found() -> None:
    def fn() -> None:
        if dist.get_rank() == 0:
            sum_of_ranks(torch.zeros(1))
        else:
            stand_still()

    with pytest.raises(RankError) as info:
        run_ranks(fn, 2, timeout=2)
    assert "in sum_of_ranks" in info.value.errors[0].message
    assert "in stand_still" in info.value.errors[1].message


def test_tp_error_keeps_its_type() -> None:
    def fn() -> None:
        raise TPError("`tp=3` does not divide 4")

    with pytest.raises(RankError, match="does not divide") as info:
        run_ranks(fn, 2)
    assert isinstance(info.value.__cause__, TPError)


def test_death_without_a_word() -> None:
    def crash() -> None:
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGSEGV)
        sum_of_ranks(torch.zeros(1))

    with pytest.raises(RankError, match="killed by SIGSEGV") as info:
        run_ranks(crash, 2)
    assert info.value.rank == 1
    assert "in crash" in info.value.errors[1].traceback

    with pytest.raises(RankError, match="exited with code 7 and without a result"):
        run_ranks(lambda: os._exit(7), 1)


def test_nothing_is_left_running() -> None:
    def fn() -> tuple[int, int]:
        process = multiprocessing.get_context("fork").Process(target=stand_still)
        process.start()
        return os.getpid(), process.pid or 0

    before = set(multiprocessing.active_children())
    pids = run_ranks(fn, 2)
    assert set(multiprocessing.active_children()) == before
    for pid, grandchild in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)  # also finds a zombie
        deadline = time.monotonic() + 5  # SIGKILL takes a moment
        while runs(grandchild) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not runs(grandchild)


# --- misuse


def test_fork_inside_a_process_group_is_refused(gloo: dist.ProcessGroup) -> None:
    with pytest.raises(TPError, match="cannot fork 2 ranks"):
        run_ranks(dist.get_rank, 2, start_method="fork")


def test_world_of_zero_is_refused() -> None:
    with pytest.raises(TPError, match="world=0"):
        run_ranks(dist.get_rank, 0)


def test_innermost_frame_skips_torch() -> None:
    stack = (
        'Thread 0x1 (most recent call first):\n  File "/a/other.py", line 1 in loop\n\n'
        "Current thread 0x2 (most recent call first):\n"
        '  File "/site-packages/torch/distributed/c10d.py", line 9 in wait\n  File "/a/mine.py", line 7 in step\n'
    )
    assert _innermost(stack) == "/a/mine.py:7 in step"
    assert _innermost("") == ""
