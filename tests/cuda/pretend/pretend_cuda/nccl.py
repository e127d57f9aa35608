"""NCCL, as far as Python has it: process groups of the backend "nccl" are those of the extension, over gloo."""

from __future__ import annotations

import types
from typing import Any


def replace_nccl(torch: Any, ext: Any) -> None:
    """Give `torch.distributed` the backend "nccl"."""
    import torch.distributed as dist

    if not dist.is_available():
        return
    from torch.distributed import distributed_c10d as c10d

    gloo = c10d.ProcessGroupGloo

    class Options:
        def __init__(self, *args: Any, **options: Any) -> None:
            self._timeout = c10d.default_pg_nccl_timeout or c10d.default_pg_timeout
            self.is_high_priority_stream = False
            self.config = types.SimpleNamespace()
            self.global_ranks_in_group: list[int] = []
            self.group_name = ""

    class Kind(type):
        def __instancecheck__(cls, x: Any) -> bool:
            try:
                return isinstance(x, torch._C._distributed_c10d.Backend) and x.name() == "nccl"
            except Exception:
                return False

    class ProcessGroupNCCL(metaclass=Kind):
        def __new__(cls, store: Any, rank: int, size: int, options: Any = None, *args: Any) -> Any:
            timeout = getattr(options, "_timeout", None) or c10d.default_pg_timeout
            return ext.make_nccl(gloo(store, rank, size, timeout), timeout)

    ProcessGroupNCCL.Options = Options  # type: ignore[attr-defined]
    c10d._NCCL_AVAILABLE = True
    c10d.is_nccl_available = dist.is_nccl_available = lambda: True
    c10d.ProcessGroupNCCL = dist.ProcessGroupNCCL = ProcessGroupNCCL
    if c10d.default_pg_nccl_timeout is None:
        c10d.default_pg_nccl_timeout = c10d.default_pg_timeout
    c10d._get_split_source = lambda group: None
    torch._C._nccl_version, torch._C._nccl_version_suffix = lambda: 22803, lambda: b""
    torch._C._distributed_c10d.Backend._set_default_timeout = lambda self, timeout: None
    own_init = c10d.init_process_group

    def init_process_group(*args: Any, **options: Any) -> Any:  # without `device_id`: there is no communicator to split
        options.pop("device_id", None)
        return own_init(*args, **options)

    c10d.init_process_group = dist.init_process_group = init_process_group
