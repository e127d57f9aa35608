"""The option `--device` of the tests: on `cuda`, they run on GPUs, and on pretended ones where there are none.

Tests of tests/cuda/ run then, and `Trainer(accelerator="cpu")` of all others trains on GPUs. To be imported before torch, which asks once whether
there is CUDA: the command line is read before pytest has.
"""

from __future__ import annotations

import os
import shlex
import sys
from itertools import pairwise
from pathlib import Path

sys.path.append(str(Path(__file__).parent / "cuda" / "pretend"))

import pretend_cuda

CHOSEN = "LIGHTNING_TP_TEST_DEVICE"  # environment variable: for processes in which the tests of this one run
PRETENDED = 8  # GPUs, unless the environment says how many


def _asked_for() -> str:
    words = [*shlex.split(os.environ.get("PYTEST_ADDOPTS", "")), *sys.argv[1:]]
    found = [after for word, after in pairwise(words) if word == "--device"]
    found += [word.partition("=")[2] for word in words if word.startswith("--device=")]
    return found[-1] if found else os.environ.get(CHOSEN, "cpu")


def _take_gpus() -> str | None:
    """Have GPUs in this process and those that it starts; say why not where there can be none."""
    os.environ[CHOSEN] = "cuda"
    if pretend_cuda.torch_is_for_gpus():
        import torch

        if not torch.cuda.is_available():
            return "this build of torch is for GPUs, and finds none; pretended ones need its build for the CPU"
        pretend_cuda.hand_on()
    elif reason := pretend_cuda.what_is_missing():
        return reason
    else:
        pretend_cuda.install(int(os.environ.get(pretend_cuda.DEVICES) or PRETENDED), forkable=True)
    if os.environ.get(pretend_cuda.GPU_TRAINERS) != "0":
        pretend_cuda.cpu_trainers_take_gpus()
    return None


DEVICE = _asked_for()
WHY_NO_GPUS = _take_gpus() if DEVICE == "cuda" else "runs with `pytest --device cuda`"
ON = "cpu" if WHY_NO_GPUS else "cuda"  # where a `Trainer(accelerator="cpu")` trains
