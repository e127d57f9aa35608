"""`run_ranks` with real gloo groups, `fake_world`, the fixtures, the comparison: what other tests stand on."""

import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lightning_tp.errors import TPError
from lightning_tp.testing import RankError, assert_trees_close, fake_world, randomize_, run_ranks
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


class Unpicklable(Exception):
    def __init__(self, a: int, b: int) -> None:
        super().__init__(f"{a} is not {b}")


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
    weight = torch.randn(64, 64, requires_grad=True)
    (weight @ weight).sum().backward()  # a fork must not inherit a stuck autograd engine or thread pool

    def gradient() -> torch.Tensor:
        weight.grad = None
        (weight @ weight).sum().backward()
        assert weight.grad is not None
        return weight.grad

    for grad in run_ranks(gradient, 2):
        torch.testing.assert_close(grad, weight.grad)
    assert run_ranks(lambda: dist.get_world_size(), 2) == [2, 2]


def test_environment_is_that_of_torchrun() -> None:
    names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "OMP_NUM_THREADS"]

    def fn() -> tuple[list[str], bool, int, str]:
        elastic = dist.is_torchelastic_launched()
        return [os.environ[name] for name in names], elastic, torch.get_num_threads(), os.environ["MASTER_PORT"]

    before = dict(os.environ)
    results = run_ranks(fn, 2)
    assert dict(os.environ) == before
    assert [r[0] for r in results] == [
        ["0", "0", "2", "2", "0", "127.0.0.1", "1"],
        ["1", "1", "2", "2", "0", "127.0.0.1", "1"],
    ]
    assert all(r[1:3] == (True, 1) for r in results)
    assert results[0][3] == results[1][3]


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
    assert text.startswith("Traceback") and "in fn" in text and "_report" not in text
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


def test_exception_that_does_not_pickle() -> None:
    def fn() -> None:
        raise Unpicklable(1, 2)

    with pytest.raises(RankError, match="1 is not 2") as info:
        run_ranks(fn, 2)
    assert info.value.errors[info.value.rank].type_name == "Unpicklable"
    assert info.value.__cause__ is None


def test_result_that_does_not_pickle() -> None:
    with pytest.raises(RankError, match=r"rank \d returned a function that does not pickle"):
        run_ranks(lambda: lambda: None, 1)


def test_tp_error_keeps_its_type() -> None:
    def fn() -> None:
        raise TPError("`tp=3` does not divide 4")

    with pytest.raises(RankError, match="does not divide") as info:
        run_ranks(fn, 2)
    assert isinstance(info.value.__cause__, TPError)


@pytest.mark.parametrize("code", [None, 0])
def test_exit_with_code_zero_is_no_failure(code: int | None) -> None:
    assert run_ranks(lambda: sys.exit(code), 1) == [None]


@pytest.mark.parametrize("code", [3, "no more"])
def test_exit_with_another_code_is_one(code: int | str) -> None:
    with pytest.raises(RankError, match=str(code)) as info:
        run_ranks(lambda: sys.exit(code), 1)
    assert info.value.errors[0].type_name == "SystemExit"


def test_death_without_a_word() -> None:
    def crash() -> None:
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGSEGV)
        sum_of_ranks(torch.zeros(1))

    with pytest.raises(RankError, match="killed by SIGSEGV") as info:
        run_ranks(crash, 2)
    assert info.value.rank == 1
    assert "in crash" in info.value.errors[1].traceback

    with pytest.raises(RankError, match="ended with code 7 and without a result"):
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


# --- output


def test_output_is_captured_from_all_sources() -> None:
    def fn() -> str:
        print(f"print {dist.get_rank()}")
        print("stderr", file=sys.stderr)
        os.write(1, b"descriptor\n")
        logging.getLogger("lightning_tp.test").warning("logged")
        return "result"

    handler = logging.StreamHandler()  # holds the parent's stderr, which is pytest's
    logger = logging.getLogger("lightning_tp.test")
    logger.addHandler(handler)
    try:
        results = run_ranks(fn, 2, return_output=True)
    finally:
        logger.removeHandler(handler)
    for rank, (result, output) in enumerate(results):
        assert result == "result"
        assert output.splitlines() == [f"print {rank}", "stderr", "descriptor", "logged"]


# --- misuse


def test_fork_inside_a_process_group_is_refused(gloo: dist.ProcessGroup) -> None:
    with pytest.raises(TPError, match="cannot fork 2 ranks"):
        run_ranks(dist.get_rank, 2)


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


# --- one process


def test_fake_world_pretends_and_cleans_up() -> None:
    with pytest.raises(RuntimeError, match="from the body"), fake_world(1024, rank=7):
        assert (dist.get_world_size(), dist.get_rank()) == (1024, 7)
        dist.all_reduce(torch.ones(2))
        raise RuntimeError("from the body")
    assert not dist.is_initialized()
    with fake_world(2):
        assert dist.get_world_size() == 2
        with pytest.raises(TPError, match="this process has a process group of 2 ranks"), fake_world(4):
            pass
    with pytest.raises(TPError, match="has ranks 0 to 1"), fake_world(2, rank=2):
        pass


def test_gloo_fixture(gloo: dist.ProcessGroup) -> None:
    total = torch.ones(2)
    dist.all_reduce(total)
    torch.testing.assert_close(total, torch.ones(2))
    assert gloo.size() == 1


def test_run_if_names_what_is_missing() -> None:
    mark = run_if(min_gpus=1000).mark
    assert mark.args == (True,) and "GPUs>=1000" in mark.kwargs["reason"]
    assert run_if(min_torch="2.0").mark.args == (False,)


LEAKY = {
    "process group": "dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)",
    "environment variables: LEAKED": "os.environ['LEAKED'] = '1'",
    "threads running: leaked": "threading.Thread(target=lambda: time.sleep(4), name='leaked').start()",
}


@pytest.mark.parametrize("complaint", LEAKY)
def test_fixtures_fail_a_test_that_leaks(pytester: pytest.Pytester, complaint: str) -> None:
    pytester.makeconftest('pytest_plugins = ["lightning_tp.testing.fixtures"]')
    pytester.makepyfile(
        f"""
        import os, threading, time, torch, torch.distributed as dist

        def test_leaks():
            torch.set_default_dtype(torch.float64)
            torch.manual_seed(1)
            {LEAKY[complaint]}

        def test_next():
            assert torch.get_default_dtype() == torch.float32 and torch.initial_seed() != 1
            assert "LEAKED" not in os.environ and not dist.is_initialized()
        """
    )
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider", "-q")
    for thread in threading.enumerate():
        if thread.name == "leaked":
            thread.join()
    result.assert_outcomes(passed=2, errors=1)
    result.stdout.fnmatch_lines([f"*{complaint}*"])


# --- comparison


def test_close_trees_return_the_largest_error() -> None:
    ref = {"a": torch.tensor([1.0, -2.0]), "b": torch.tensor([4.0]), "empty": torch.empty(0), "int": torch.tensor([3])}
    got = {name: value.clone() for name, value in ref.items()}
    got["b"] += 4e-6
    error = assert_trees_close(got, ref)
    assert 0.9e-6 < error < 1.3e-6
    assert assert_trees_close({}, {}) == 0.0


def test_worst_names_come_first() -> None:
    ref = {name: torch.full((2,), 2.0) for name in "abc"}
    got = {"a": ref["a"] * 1.001, "b": ref["b"] * 2, "c": ref["c"] + torch.tensor([0.0, 0.1])}
    with pytest.raises(AssertionError) as info:
        assert_trees_close(got, ref, name="gradients")
    head, *lines = str(info.value).splitlines()
    assert head == "gradients: 3 of 3 differ by more than rtol=1e-05, the worst first"
    assert [line.split()[0] for line in lines] == ["b", "c", "a"]
    assert lines[0].endswith("got is 2 x ref") and "got is" not in lines[1]


def test_missing_extra_shapes_and_nan() -> None:
    ref = {"gone": torch.ones(1), "shape": torch.ones(2), "nan": torch.ones(2), "inf": torch.tensor([-torch.inf, 1.0])}
    got = {"new": torch.ones(1), "shape": torch.ones(3), "nan": torch.full((2,), torch.nan), "inf": ref["inf"]}
    with pytest.raises(AssertionError) as info:
        assert_trees_close(got, ref)
    text = str(info.value)
    assert "2 of 3 differ" in text
    assert "missing (only in ref): gone" in text and "extra (only in got): new" in text
    assert "shape (3,), but ref has (2,)" in text


def test_floor_forgives_noise_where_the_reference_is_zero() -> None:
    ref = {"weight": torch.ones(2), "key_bias": torch.zeros(2)}
    got = {"weight": torch.ones(2), "key_bias": torch.full((2,), 1e-8)}
    assert_trees_close(got, ref)
    with pytest.raises(AssertionError, match="key_bias"):
        assert_trees_close(got, ref, floor=0.0)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(256, 512)
        self.embed = nn.Embedding(512, 256)
        self.norm = nn.LayerNorm(256)
        self.conv = nn.Conv2d(8, 512, 4)
        self.head.weight = self.embed.weight
        self.register_buffer("steps", torch.zeros(3))


def test_randomize_scales() -> None:
    net = randomize_(Net(), seed=3)
    assert net.head.weight is net.embed.weight
    assert net.embed.weight.std().item() == pytest.approx(0.3, rel=0.05)
    assert net.head.bias.std().item() == pytest.approx(0.1, rel=0.2)
    assert net.norm.weight.mean().item() == pytest.approx(1, rel=0.05)
    assert net.norm.weight.std().item() == pytest.approx(0.1, rel=0.2)
    assert net.conv.weight.std().item() == pytest.approx(128**-0.5, rel=0.05)
    assert not net.steps.any()


def test_randomize_depends_on_seed_and_name_alone() -> None:
    one, two, other = randomize_(Net(), seed=3), randomize_(Net().double(), seed=3), randomize_(Net(), seed=4)
    assert_trees_close(two.state_dict(), one.state_dict(), rtol=0.0)
    with pytest.raises(AssertionError):
        assert_trees_close(other.state_dict(), one.state_dict())
    with pytest.raises(TPError, match=r"`weight` is on meta"):
        randomize_(nn.Linear(2, 2, device="meta"))
