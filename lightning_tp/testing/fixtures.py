"""Pytest fixtures that fail a test which leaves something behind, and marks for tests that need a GPU.

Load them in the `conftest.py` at the top of your tests:

    pytest_plugins = ["lightning_tp.testing.fixtures"]

The autouse fixtures then guard every test: no process group, environment variable, thread, process or file in the working directory is
left, and torch's random state and global flags are as before. `gloo` gives a test a process group of one rank; `run_ranks` gives more.
A test marked `run_if(standalone=True)` runs only where `LTP_RUN_STANDALONE_TESTS=1`, and then no others do.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lightning_tp.core.comm.fake_world import fake_world as fake_world

# Variables that Lightning, torch and pytest set in passing, also in a test that does nothing wrong.
ALLOWED_ENVIRONMENT = frozenset(
    {
        "CUBLAS_WORKSPACE_CONFIG",  # deterministic algorithms
        "CUDA_DEVICE_ORDER",
        "CUDA_MODULE_LOADING",
        "LOCAL_RANK",  # a Trainer's environment, as the next five
        "MASTER_ADDR",
        "MASTER_PORT",
        "NODE_RANK",
        "RANK",
        "WORLD_SIZE",
        "PL_GLOBAL_SEED",  # seed_everything, as the next
        "PL_SEED_WORKERS",
        "KMP_DUPLICATE_LIB_OK",  # OpenMP, when torch.compile loads it, as the next
        "KMP_INIT_AT_FORK",
        "TOKENIZERS_PARALLELISM",  # Hugging Face tokenizers after a fork
        "TORCHINDUCTOR_CACHE_DIR",  # torch.compile, as the next two
        "TRITON_CACHE_DIR",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING",
    }
)


@pytest.fixture(autouse=True)
def no_process_group_left() -> Iterator[None]:
    """Close a process group that the test opened, and fail the test for leaving it."""
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
    after = dict(os.environ)
    changed = {
        name
        for name in before.keys() | after.keys()
        if before.get(name) != after.get(name) and not name.startswith("PYTEST_")  # pytest's own move with the test's phase
    }
    for name in changed:
        os.environ.pop(name, None)
        if name in before:
            os.environ[name] = before[name]
    if leaked := sorted(changed - ALLOWED_ENVIRONMENT):
        pytest.fail(f"the test changed environment variables: {', '.join(leaked)}; use `monkeypatch.setenv`")


@pytest.fixture(autouse=True)
def no_threads_left() -> Iterator[None]:
    """Fail a test that leaves a thread which would keep Python from ending."""
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
    """Kill processes that the test started and left, and fail it for them."""
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
    """pid -> name of the processes that this one started and that run; none where there is no /proc."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            head, _, rest = stat.read_text().rpartition(")")
        except OSError:
            continue
        state, parent = rest.split()[:2]
        name = head.partition("(")[2]
        if int(parent) == os.getpid() and state not in "ZX" and not _is_a_helper(stat.parent):
            found[int(stat.parent.name)] = name
    return found


def _is_a_helper(process: Path) -> bool:
    """Python's own, which it keeps until it ends: the resource tracker and the fork server; torch.compile's workers."""
    try:
        command = (process / "cmdline").read_bytes()
    except OSError:
        return True
    return any(word in command for word in (b"resource_tracker", b"forkserver", b"compile_worker"))


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
    """Restore what a test may change freely: random states, default dtype, threads, determinism, precision."""
    rng, python_rng = torch.get_rng_state(), random.getstate()
    dtype, grad, threads = torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    precision = torch.get_float32_matmul_precision()
    yield
    torch.set_rng_state(rng)
    random.setstate(python_rng)
    torch.set_default_dtype(dtype)
    torch.set_grad_enabled(grad)
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn
    torch.set_float32_matmul_precision(precision)


@pytest.fixture
def gloo() -> Iterator[dist.ProcessGroup]:
    """A gloo process group of this process alone, closed after the test.

    Example:
        def test_mesh(gloo):
            mesh = init_device_mesh("cpu", (1, 1))
    """
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
    """With `LTP_RUN_STANDALONE_TESTS=1`, keep the tests marked `run_if(standalone=True)` only."""
    if os.environ.get(STANDALONE) != "1":
        return
    kept = [item for item in items if any(mark.kwargs.get("standalone") for mark in item.iter_markers("skipif"))]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def run_if(*, min_gpus: int = 0, standalone: bool = False, **needs: Any) -> pytest.MarkDecorator:
    """Mark a test to be skipped unless this machine has what it needs; the twin of a CPU test that runs on GPUs.

    Args:
        min_gpus: Number of CUDA devices.
        standalone: The test has to be alone in its process, as one in which a Trainer starts the other ranks by running the command
            line again. Run these one by one: `LTP_RUN_STANDALONE_TESTS=1 pytest path::test`.
        **needs: Lightning's own conditions, such as `min_torch="2.12"`, `bf16_cuda=True`, `dynamo=True`,
            `skip_windows=True`, `linux_only=True`.

    Example:
        @run_if(min_gpus=2)
        def test_all_reduce_cuda():
            run_ranks(check_all_reduce, 2, "cuda", backend="nccl")
    """
    from lightning.fabric.utilities.testing._runif import _runif_reasons  # what Lightning's own RunIf is made of

    reasons, _ = _runif_reasons(min_cuda_gpus=min_gpus, **needs)
    if standalone and os.environ.get(STANDALONE) != "1":
        reasons.append(f"{STANDALONE}=1")
    if standalone:
        return pytest.mark.skipif(bool(reasons), reason=f"needs {', '.join(reasons)}", standalone=True)  # type: ignore[call-arg]
    return pytest.mark.skipif(bool(reasons), reason=f"needs {', '.join(reasons)}")
