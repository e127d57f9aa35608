"""Pytest fixtures that fail a test which leaves something behind, and marks for tests that need a GPU.

Load them in the `conftest.py` at the top of your tests:

    pytest_plugins = ["lightning_tp.testing.fixtures"]

The autouse fixtures then guard every test: no process group, environment variable or thread is left, and torch's random
state and global flags are as before. `gloo` gives a test a process group of one rank; `run_ranks` gives more.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lightning_tp.testing.ranks import fake_world as fake_world

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


def run_if(*, min_gpus: int = 0, **needs: Any) -> pytest.MarkDecorator:
    """Mark a test to be skipped unless this machine has what it needs; the twin of a CPU test that runs on GPUs.

    Args:
        min_gpus: Number of CUDA devices.
        **needs: Lightning's own conditions, such as `min_torch="2.12"`, `bf16_cuda=True`, `dynamo=True`,
            `skip_windows=True`, `linux_only=True`.

    Example:
        @run_if(min_gpus=2)
        def test_all_reduce_cuda():
            run_ranks(check_all_reduce, 2, "cuda", backend="nccl")
    """
    from lightning.fabric.utilities.testing._runif import _runif_reasons  # what Lightning's own RunIf is made of

    reasons, _ = _runif_reasons(min_cuda_gpus=min_gpus, **needs)
    return pytest.mark.skipif(bool(reasons), reason=f"needs {', '.join(reasons)}")
