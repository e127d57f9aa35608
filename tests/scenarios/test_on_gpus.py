"""A part of the tests of GPUs in each run, on pretended ones; all of them run with `pytest --device cuda`. And the script for one real GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.device import pretend_cuda

ROOT = Path(__file__).parents[2]
CHOSEN = (
    *(
        f"test_training.py::test_losses_of_one_process[{precision}-{mesh}]"
        for precision in ("bf16-mixed", "16-mixed")
        for mesh in ("(1, 2)", "(2, 2)")
    ),
    *(f"test_training.py::test_saved_and_resumed[{form}-(1, 2)]" for form in ("folder", "folder, beside training", "file")),
    "test_training.py::test_verified_beside_autocast[bf16-mixed]",
    "test_waits.py::test_a_steady_step_waits_nowhere[recomputed]",
    "test_random_numbers.py::test_blocks_that_run_again_drop_the_same[independent-whole activations]",
    "test_random_numbers.py::test_fits_draw_what_one_process_draws[{}-nothing]",
    "test_random_numbers.py::test_resumed_on_another_mesh[(1, 2)-(1, 1)-folder]",
    "test_collectives.py::test_one_file_wherever_shards_lie[on the host]",
    "test_collectives.py::test_draws_on_the_host_are_those_of_one_process[multinomial-in the step-independent]",
    "test_own_gpu.py::test_a_fit_that_saves_and_one_that_resumes[a folder, beside training-(1, 2)]",
)

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there are GPUs: all of tests/cuda/ runs on them")


def without_gpus() -> dict[str, str]:
    """The environment of a run from outside; skip where there can be no pretended GPUs."""
    if reason := pretend_cuda.what_is_missing():
        pytest.skip(reason)
    return {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "PRETEND_CUDA"))}


@pytest.mark.timeout(900)  # the first run of a machine compiles the device
def test_a_part_of_the_tests_of_gpus() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "--device", "cuda", "-p", "no:cacheprovider", "--durations=5"]
    command += [f"tests/cuda/{test}" for test in CHOSEN]
    done = subprocess.run(command, cwd=ROOT, env=without_gpus(), capture_output=True, text=True, timeout=880)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert f"{len(CHOSEN)} passed" in done.stdout, done.stdout[-2000:]


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "sections",
    [
        "waits",
        pytest.param("env,losses,dispatch,kernels,memory,attention,compiled", marks=pytest.mark.slow),
        pytest.param("ranks_parity,nccl_of_one,ranks_random,ranks_rest", marks=pytest.mark.slow),
    ],
)
def test_the_script_for_one_gpu(sections: str) -> None:
    command = [sys.executable, "benchmarks/gpu.py", "--pretend", "--slow", "6", "--only", sections]
    done = subprocess.run(command, cwd=ROOT, env=without_gpus(), capture_output=True, text=True, timeout=880)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["section"] for line in lines] == [*sections.split(","), "all"], done.stderr[-2000:]
    assert done.returncode == 0, done.stdout[-4000:]


def test_every_section_of_the_script_is_tried() -> None:
    done = subprocess.run([sys.executable, "benchmarks/gpu.py", "--list"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    tried = {name for mark in test_the_script_for_one_gpu.pytestmark if mark.name == "parametrize" for name in _names(mark.args[1])}  # type: ignore[attr-defined]
    assert tried == {line.split()[0] for line in done.stdout.splitlines()}


def _names(values: list[object]) -> list[str]:
    return [name for value in values for name in str(getattr(value, "values", [value])[0]).split(",")]
