"""`torch.cuda`, as far as Python has it: devices, streams, memory and random numbers of the pretended GPUs."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import types
from typing import Any

MEMORY = 80 * 2**30  # bytes that each pretended GPU says it has

ext: Any = None  # the extension, once it is installed


def _index(device: Any = None) -> int:
    if isinstance(device, int):
        return device if device >= 0 else ext.current_device()
    if device is None:
        return ext.current_device()
    import torch

    index = torch.device(device).index
    return ext.current_device() if index is None else index


class _OnDevice:
    """`torch.cuda.device`."""

    def __init__(self, device: Any) -> None:
        self.index = -1 if device is None else _index(device)

    def __enter__(self) -> None:
        self.before = ext.current_device()
        if self.index >= 0:
            ext.set_device(self.index)

    def __exit__(self, *error: object) -> None:
        ext.set_device(self.before)


class Event:
    """An event that has happened already; times between two are meaningless."""

    def __init__(self, *args: Any, **options: Any) -> None: ...

    def record(self, stream: Any = None) -> None: ...

    def wait(self, stream: Any = None) -> None: ...

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        ext.host_waits("event.synchronize", "Event.synchronize")

    def elapsed_time(self, other: Any) -> float:
        return 1.0


def _stream_class(torch: Any) -> Any:
    class Stream(torch.Stream):
        """A stream on which everything is done at once."""

        def __new__(cls, device: Any = None, priority: int = 0, **known: Any) -> Any:
            if known:
                return super().__new__(
                    cls, stream_id=known["stream_id"], device_index=known["device_index"], device_type=known["device_type"]
                )
            return super().__new__(cls, torch.device("cuda", _index(device)))

        def wait_stream(self, stream: Any) -> None: ...

        def wait_event(self, event: Any) -> None: ...

        def record_event(self, event: Any = None) -> Any:
            return event or Event()

        def synchronize(self) -> None:
            ext.touch(self.device_index)
            ext.host_waits("stream.synchronize", "Stream.synchronize")

        def query(self) -> bool:
            return True

        @property
        def cuda_stream(self) -> int:
            return 0

    return Stream


# of this process: whether it has used a GPU; whether the one it was forked from had, so that CUDA is broken in here; see `install`
_state = {"used": False, "forked": False, "forkable": False}


def _after_fork() -> None:
    if _state["forkable"]:
        sys.modules["torch"]._C._set_multithreading_enabled(True)
    _state.update(forked=_state["used"] and not _state["forkable"], used=False, forkable=False)


def stay_forkable() -> None:
    """Start no autograd threads for GPUs in this process, and never say that it has used one."""
    _state["forkable"] = True
    ext.stay_forkable()
    sys.modules["torch"]._C._set_multithreading_enabled(False)  # of autograd: it runs in the thread that asks


def replace_torch_cuda(torch: Any, extension: Any, devices: int) -> None:
    """Let `torch.cuda` say and do what it does with so many GPUs."""
    global ext
    ext = extension
    _replace_start(torch, devices)
    _replace_current_device(torch)
    _replace_streams(torch)
    _replace_memory(torch)
    _replace_random(torch, devices)
    _replace_questions(torch)
    _replace_storages(torch)


def _replace_start(torch: Any, devices: int) -> None:
    cuda, raw, state = torch.cuda, torch._C, _state

    def lazy_init() -> None:
        if state["forked"]:
            raise RuntimeError(
                "Cannot re-initialize CUDA in forked subprocess. To use CUDA with multiprocessing, you must use the 'spawn' start method"
                " (pretended)"
            )
        if not state["used"]:
            state["used"] = cuda._initialized = True
            for call in list(cuda._queued_calls):
                with contextlib.suppress(Exception):
                    call[0]()
            cuda._queued_calls.clear()

    os.register_at_fork(after_in_child=_after_fork)
    cuda._lazy_init = cuda.init = lazy_init
    cuda.is_initialized = lambda: state["used"] and not state["forkable"]
    cuda._is_in_bad_fork = raw._cuda_isInBadFork = lambda: state["forked"]
    cuda.is_available = cuda._is_compiled = lambda: True
    cuda.device_count = cuda._device_count_nvml = raw._cuda_getDeviceCount = lambda: devices
    properties = types.SimpleNamespace(
        **dict(name="Pretended GPU", major=9, minor=0, total_memory=MEMORY, multi_processor_count=132, is_integrated=0),
        **dict(warp_size=32, max_threads_per_multi_processor=2048, regs_per_multiprocessor=65536, gcnArchName="", uuid="pretended"),
        **dict(L2_cache_size=50 * 2**20, shared_memory_per_block=49152),
    )
    cuda.get_device_properties = lambda device=None: properties
    cuda.get_device_name = lambda device=None: properties.name
    cuda.get_device_capability = lambda device=None: (9, 0)
    cuda.is_bf16_supported = lambda *args, **options: True


def _replace_current_device(torch: Any) -> None:
    cuda, raw = torch.cuda, torch._C

    def current_device() -> int:
        cuda._lazy_init()
        return ext.current_device()

    def set_device(device: Any) -> None:
        if (i := _index(device)) >= 0:
            cuda._lazy_init()
            ext.set_device(i)

    def exchange(i: int) -> int:
        before = ext.current_device()
        if i >= 0:
            ext.set_device(i)
        return before

    cuda.current_device, cuda.set_device = current_device, set_device
    raw._cuda_setDevice, raw._cuda_getDevice = ext.set_device, ext.current_device
    raw._cuda_exchangeDevice = raw._cuda_maybeExchangeDevice = exchange
    cuda._exchange_device = lambda i: exchange(i)
    cuda._maybe_exchange_device = lambda i: exchange(i)
    cuda.device = cuda._DeviceGuard = _OnDevice


def _replace_streams(torch: Any) -> None:
    cuda, raw = torch.cuda, torch._C

    def synchronize(device: Any = None) -> None:
        ext.touch(_index(device))
        ext.host_waits("device.synchronize", "torch.cuda.synchronize")

    cuda.synchronize = synchronize
    cuda.Stream = cuda.ExternalStream = cuda.streams.Stream = stream_class = _stream_class(torch)
    cuda.Event = cuda.streams.Event = Event
    cuda.current_stream = cuda.default_stream = lambda device=None: stream_class(_index(device))
    cuda.set_stream = lambda stream: None
    cuda.stream = lambda stream: contextlib.nullcontext()
    raw._cuda_getCurrentStream = raw._cuda_getDefaultStream = lambda i: (0, i if i >= 0 else ext.current_device(), 1)
    raw._cuda_setStream = lambda **options: None
    raw._cuda_getCurrentRawStream = lambda i: 0
    raw._cuda_isCurrentStreamCapturing = lambda: False
    raw._cuda_synchronize = lambda: ext.host_waits("device.synchronize", "_cuda_synchronize")
    modes = {"default": 0, "warn": 1, "error": 2}
    sync_mode = [0]

    def set_sync_debug_mode(mode: Any) -> None:
        sync_mode[0] = modes.get(mode, mode)
        ext.set_sync_mode(sync_mode[0])

    cuda.set_sync_debug_mode, cuda.get_sync_debug_mode = set_sync_debug_mode, lambda: sync_mode[0]


def _replace_memory(torch: Any) -> None:
    """Count the bytes of this process on all its devices together."""

    def used(device: Any = None) -> int:
        return ext.bytes()[0]

    def peak(device: Any = None) -> int:
        return ext.bytes()[1]

    memory = {
        "memory_allocated": used,
        "max_memory_allocated": peak,
        "memory_reserved": peak,
        "max_memory_reserved": peak,
        "reset_peak_memory_stats": lambda device=None: ext.reset_peak(),
        "reset_max_memory_allocated": lambda device=None: ext.reset_peak(),
        "memory_stats": lambda device=None: {
            "allocated_bytes.all.current": used(),
            "allocated_bytes.all.peak": peak(),
            "num_alloc_retries": 0,
        },
        "memory_summary": lambda *args, **options: "pretended",
        "mem_get_info": lambda device=None: (MEMORY - used(), MEMORY),
        "empty_cache": lambda: None,
        "ipc_collect": lambda: None,
    }
    for name, f in memory.items():
        setattr(torch.cuda, name, f)
        setattr(torch.cuda.memory, name, f)
    torch._C._cuda_clearCublasWorkspaces = lambda: None


def _replace_random(torch: Any, devices: int) -> None:
    cuda = torch.cuda
    cuda.default_generators = generators = tuple(ext.generator(i) for i in range(devices))

    def get_rng_state(device: Any = "cuda") -> Any:
        cuda._lazy_init()
        return generators[_index(device)].get_state()

    def manual_seed_all(seed: int) -> None:
        if not cuda._is_in_bad_fork():
            for g in generators:
                g.manual_seed(int(seed))

    random = {
        "manual_seed": lambda seed: generators[ext.current_device()].manual_seed(int(seed)) and None,
        "manual_seed_all": manual_seed_all,
        "initial_seed": lambda: generators[ext.current_device()].initial_seed(),
        "seed": lambda: generators[ext.current_device()].seed(),
        "seed_all": lambda: [g.seed() for g in generators] and None,
        "get_rng_state": get_rng_state,
        "set_rng_state": lambda new_state, device="cuda": generators[_index(device)].set_state(new_state.clone()) and None,
        "get_rng_state_all": lambda: [g.get_state() for g in generators],
        "set_rng_state_all": lambda states: [g.set_state(s) for g, s in zip(generators, states)] and None,
    }
    for name, f in random.items():
        setattr(cuda, name, f)
        setattr(cuda.random, name, f)
    cuda._get_rng_state_offset = lambda device="cuda": generators[_index(device)].get_offset()
    cuda._set_rng_state_offset = lambda offset, device="cuda": generators[_index(device)].set_offset(offset)


def _replace_questions(torch: Any) -> None:
    """Answer those who ask whether there is CUDA at all."""
    torch.backends.cuda.is_built = lambda: True
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    importlib.import_module("torch.amp.grad_scaler")
    if hasattr(torch.amp.grad_scaler, "amp_definitely_not_available"):
        torch.amp.grad_scaler.amp_definitely_not_available = lambda: False
    torch.accelerator.is_available = lambda: True
    torch.accelerator.current_accelerator = lambda check_available=False: torch.device("cuda")


def _replace_storages(torch: Any) -> None:
    own_resize = torch.UntypedStorage.resize_

    def resize_(self: Any, size: int) -> Any:
        if self.device.type != "cuda":
            return own_resize(self, size)
        ext.resize_storage(torch.empty(0, dtype=torch.uint8, device=self.device).set_(self), int(size))
        return self

    def new(cls: Any, *args: Any, **options: Any) -> Any:
        device = options.get("device")
        if device is not None and torch.device(device).type == "cuda":
            return torch.empty(int(args[0]) if args else 0, dtype=torch.uint8, device=device).untyped_storage()
        return torch._C.StorageBase.__new__(cls, *args, **options)

    torch.UntypedStorage.resize_ = resize_
    torch.UntypedStorage.__new__ = staticmethod(new)
