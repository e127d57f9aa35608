"""A rank of `run_ranks`: its environment, its output, and what becomes of results and errors."""

from __future__ import annotations

import logging
import os
import sys

import pytest
import torch
import torch.distributed as dist

from lightning_tp.testing import RankError, run_ranks


class Unpicklable(Exception):
    def __init__(self, a: int, b: int) -> None:
        super().__init__(f"{a} is not {b}")


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


@pytest.mark.parametrize("code", [None, 0])
def test_exit_with_code_zero_is_no_failure(code: int | None) -> None:
    assert run_ranks(lambda: sys.exit(code), 1) == [None]


@pytest.mark.parametrize("code", [3, "no more"])
def test_exit_with_another_code_is_one(code: int | str) -> None:
    with pytest.raises(RankError, match=str(code)) as info:
        run_ranks(lambda: sys.exit(code), 1)
    assert info.value.errors[0].type_name == "SystemExit"


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
