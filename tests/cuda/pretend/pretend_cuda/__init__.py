"""A pretended machine with GPUs and NCCL, for a build of torch for the CPU.

`install(devices=4)` gives a process devices of type `cuda` whose memory is the CPU's: each operator runs by its CPU kernel on that memory, and
what torch does around the kernels is torch's own: dispatch, device guards, autograd's threads for devices, generators, autocast, the gradient
scaler, FSDP2, `process_group_backend="nccl"`. So code for CUDA runs, and breaks, as far as it can without the kernels.

    import pretend_cuda

    pretend_cuda.install(devices=4)  # before `import torch`, which asks for CUDA once
    import torch

    torch.ones(3, device="cuda:1") + torch.ones(3)  # RuntimeError: Expected all tensors to be on the same device ..

or, without a change to a script, `PYTHONPATH=tests/cuda/pretend python -m pretend_cuda --devices 4 train.py`; with `--waits`, it says what made the
host wait. Processes that are forked, spawned or launched from there have the same GPUs.

What it shows: tensors on different devices in one operator; a generator of the wrong device; a device that does not exist. Collectives of NCCL that
are given tensors on the CPU, types that NCCL does not know, or memory with gaps. The output of a collective that is read before `wait()`: it is NaN
until then, and new memory is rubbish, not zeros. The random streams of devices. Devices on which a process takes memory: `ext.touched()`. Forks
after a use of CUDA or after a backward pass. Where the host would wait for the device: `HostWaits`, and `torch.cuda.set_sync_debug_mode`. Hangs:
after `ext.set_patience(4000)` the host goes on 4 s after a collective that does not complete, and stands still where it next asks for a value.

What it can't show: time, of anything. Kernels: their rounding, deterministic algorithms, flash attention, fused optimizers, inductor's code. Races
between streams: all streams are one, and in order. The bits that a GPU draws. The caching allocator, CUDA graphs, peer access, NCCL's own errors,
`device_id=` and split communicators. More than one node.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

from pretend_cuda.build import NAME, library, load_before_torch, torch_is_for_gpus, what_is_missing
from pretend_cuda.device import replace_torch_cuda, stay_forkable
from pretend_cuda.imports import Imports
from pretend_cuda.nccl import replace_nccl
from pretend_cuda.trainers import GPU_TRAINERS, cpu_trainers_take_gpus
from pretend_cuda.waits import HostWaits

__all__ = [
    "DEVICES",
    "GPU_TRAINERS",
    "HostWaits",
    "cpu_trainers_take_gpus",
    "hand_on",
    "install",
    "on_import",
    "torch_is_for_gpus",
    "what_is_missing",
]

DEVICES = "PRETEND_CUDA"  # environment variable: how many GPUs
PLACE = str(Path(__file__).resolve().parents[1])  # on the path of processes that are started from here

ext: Any = None  # the extension, once it is installed
_loaded_before_torch = False


def install(devices: int = 2, *, forkable: bool = False) -> Any:
    """Give this process, and those that it starts, so many GPUs. The same again does nothing.

    Args:
        devices: How many.
        forkable: This process has no autograd threads for the GPUs and never says that it has used one, so that ranks may be forked from it: for
            a test runner, whose tests would disturb one another. Its children are like any other process.

    Returns:
        The extension: `touched()`, `bytes()`, `set_patience(ms)`, `set_delay(bool)`.
    """
    global ext
    if ext is not None:
        if forkable:
            stay_forkable()
        return ext
    if "torch" in sys.modules and not _loaded_before_torch:
        raise RuntimeError("torch has been imported already, and found no CUDA. Call `pretend_cuda.install` before `import torch`.")
    if "torch" not in sys.modules:
        Imports.before.pop("torch", None)  # of `on_import`: once is enough
        Imports.after.pop("torch", None)
        _load_before_torch()
    import torch

    spec = importlib.util.spec_from_file_location(NAME, library())
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    made.set_count(devices)
    if not made.hooked():
        raise RuntimeError(
            "torch did not take the hooks of the extension. Is it a build for the CPU, of the version it was compiled for?"
        )
    ext = made
    os.environ[DEVICES] = str(devices)
    hand_on()
    replace_torch_cuda(torch, ext, devices)
    replace_nccl(torch, ext)
    if forkable:
        stay_forkable()
    return ext


def _load_before_torch() -> None:
    global _loaded_before_torch
    load_before_torch()
    _loaded_before_torch = True


def hand_on() -> None:
    """Have this package and its `sitecustomize` on the path of processes that are started from here."""
    path = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
    os.environ["PYTHONPATH"] = os.pathsep.join(path if PLACE in path else [*path, PLACE])


def on_import() -> None:
    """Install when torch is imported, if the environment says how many GPUs there are."""
    devices = int(os.environ.get(DEVICES) or 0)
    if devices and "torch" in sys.modules:
        install(devices)
    elif devices:
        Imports.before["torch"] = _load_before_torch
        Imports.after["torch"] = lambda module: install(devices)
    if os.environ.get(GPU_TRAINERS, "0") != "0":
        cpu_trainers_take_gpus()
