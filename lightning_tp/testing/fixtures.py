"""Pytest fixtures that fail a test which leaves something behind, and marks for tests that need a GPU.

Load them in the top-level `conftest.py` of your tests:

    pytest_plugins = ["lightning_tp.testing.fixtures"]

The autouse fixtures then guard every test: it may leave no process group, environment variable, thread, process or file in the working
directory, and torch's random state and global flags are restored. `gloo` gives a test a process group of one rank; `run_ranks` gives more.
A test marked `run_if(standalone=True)` runs only with `LTP_RUN_STANDALONE_TESTS=1`, and then no others run.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

# Variables that libraries set themselves, in tests that do nothing wrong.
ALLOWED_ENVIRONMENT = {
    *("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "RANK", "WORLD_SIZE"),  # a Trainer's environment
    *("PL_GLOBAL_SEED", "PL_SEED_WORKERS"),  # seed_everything
    *("CUBLAS_WORKSPACE_CONFIG", "CUDA_DEVICE_ORDER", "CUDA_MODULE_LOADING", "TORCH_NCCL_ASYNC_ERROR_HANDLING"),  # torch
    *("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "KMP_DUPLICATE_LIB_OK", "KMP_INIT_AT_FORK"),  # torch.compile
    "TOKENIZERS_PARALLELISM",  # Hugging Face tokenizers after a fork
}

HELPERS = (b"resource_tracker", b"forkserver", b"compile_worker")  # processes that Python and torch.compile keep until the end

# What a test may change freely: random states, default dtype, gradients, precision of matmuls.
GLOBAL_STATE: tuple[tuple[Callable[[], Any], Callable[[Any], Any]], ...] = (
    (torch.get_rng_state, torch.set_rng_state),
    (random.getstate, random.setstate),
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
)


@pytest.fixture(autouse=True)
def no_process_group_left() -> Iterator[None]:
    """Close a process group that the test left open, and fail the test."""
    before = dist.is_initialized()
    yield
    if dist.is_initialized() and not before:
        world = dist.get_world_size()
        dist.destroy_process_group()
        pytest.fail(f"the test left a process group of {world} ranks; close it, or use the `gloo` fixture or `fake_world`")


@pytest.fixture(autouse=True)
def environment_restored() -> Iterator[None]:
    """Restore environment variables, and fail the test if it changed one outside `ALLOWED_ENVIRONMENT`."""
    before = dict(os.environ)
    yield
    changed = {name for name, _ in before.items() ^ os.environ.items()}
    changed = {name for name in changed if not name.startswith("PYTEST_")}  # which change with the phase of the test
    for name in changed:
        os.environ.pop(name, None)
    os.environ.update({name: before[name] for name in changed & before.keys()})
    if leaked := sorted(changed - ALLOWED_ENVIRONMENT):
        pytest.fail(f"the test changed environment variables: {', '.join(leaked)}; use `monkeypatch.setenv`")


@pytest.fixture(autouse=True)
def no_threads_left() -> Iterator[None]:
    """Fail a test that leaves a thread running which keeps Python from exiting."""
    before = set(threading.enumerate())
    yield
    deadline = time.monotonic() + 2
    left = [thread for thread in threading.enumerate() if thread not in before and not thread.daemon]
    for thread in left:
        thread.join(max(0.0, deadline - time.monotonic()))
    if names := [thread.name for thread in left if thread.is_alive()]:
        pytest.fail(f"the test left threads running: {', '.join(names)}; join them, or make them daemons")


@pytest.fixture(autouse=True)
def no_processes_left() -> Iterator[None]:
    """Kill processes that the test left running, and fail the test."""
    before = set(_children())
    yield
    deadline = time.monotonic() + 2
    while (left := {pid: name for pid, name in _children().items() if pid not in before}) and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    if left:
        pytest.fail(f"the test left processes running: {', '.join(f'{name} ({pid})' for pid, name in left.items())}; wait for them")


def _children() -> dict[int, str]:
    """Return pid -> name of the running children of this process; none where there is no /proc."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:  # it has none: no need to look at all processes of the machine
        return {}
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            head, _, rest = stat.read_text().rpartition(")")
            state, parent = rest.split()[:2]
            if int(parent) != os.getpid() or state in "ZX":
                continue
            command = (stat.parent / "cmdline").read_bytes()
            if not any(helper in command for helper in HELPERS):
                found[int(stat.parent.name)] = head.partition("(")[2]
        except OSError:  # it has ended meanwhile
            continue
    return found


@pytest.fixture(autouse=True)
def no_files_left() -> Iterator[None]:
    """Fail a test that leaves a file or folder in the working directory, as a Trainer's default logger does."""
    here = Path.cwd()
    before = set(os.listdir(here))
    yield
    left = sorted(name for name in set(os.listdir(here)) - before if not name.startswith((".", "__pycache__")))
    if left:
        pytest.fail(f"the test left {', '.join(left)} in {here}; use `tmp_path`, and `Trainer(default_root_dir=tmp_path)`")


@pytest.fixture(autouse=True)
def torch_state_restored() -> Iterator[None]:
    """Restore what a test may change freely: `GLOBAL_STATE`, the number of threads, and determinism."""
    before = [(set_state, get_state()) for get_state, set_state in GLOBAL_STATE]
    threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    yield
    for set_state, state in before:
        set_state(state)
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn


@pytest.fixture
def gloo() -> Iterator[dist.ProcessGroup]:
    """Open a gloo process group of this process alone, and close it after the test."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert dist.group.WORLD is not None
        yield dist.group.WORLD
    finally:
        if dist.is_initialized():  # the test may have closed it
            dist.destroy_process_group()


STANDALONE = "LTP_RUN_STANDALONE_TESTS"


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With `LTP_RUN_STANDALONE_TESTS=1`, keep only the tests marked `run_if(standalone=True)`."""
    if os.environ.get(STANDALONE) != "1":
        return
    standalone = [item for item in items if any(mark.kwargs.get("standalone") for mark in item.iter_markers("skipif"))]
    config.hook.pytest_deselected(items=[item for item in items if item not in standalone])
    items[:] = standalone


def run_if(
    *, min_gpus: int = 0, min_torch: str = "", bf16_cuda: bool = False, linux_only: bool = False, standalone: bool = False
) -> pytest.MarkDecorator:
    """Mark a test to be skipped unless this machine has what it needs, such as the GPU version of a test on the CPU.

    Args:
        min_gpus: The number of CUDA devices.
        min_torch: The oldest version of torch.
        bf16_cuda: A CUDA device that supports bfloat16.
        linux_only: Linux.
        standalone: The test has to be alone in its process, such as one in which a Trainer starts the other ranks by running the command
            line again. Run these one by one: `LTP_RUN_STANDALONE_TESTS=1 pytest path::test`.

    Example:
        @run_if(min_gpus=2)
        def test_all_reduce_cuda():
            run_ranks(check_all_reduce, 2, "cuda", backend="nccl")
    """
    is_missing = {
        f"{min_gpus} GPUs": torch.cuda.device_count() < min_gpus,
        f"torch>={min_torch} (installed: {torch.__version__})": bool(min_torch) and torch.__version__ < min_torch,
        "bfloat16 on CUDA": bf16_cuda and not (torch.cuda.is_available() and torch.cuda.is_bf16_supported()),
        "Linux": linux_only and sys.platform != "linux",
        f"{STANDALONE}=1": standalone and os.environ.get(STANDALONE) != "1",
    }
    reason = f"needs {', '.join(need for need, missing in is_missing.items() if missing)}"
    marks = {"standalone": True} if standalone else {}  # which `pytest_collection_modifyitems` looks for
    return pytest.mark.skipif(any(is_missing.values()), reason=reason, **marks)
