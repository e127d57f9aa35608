"""Private parts of torch for process groups, DTensors and FSDP2."""

from __future__ import annotations

import atexit
import functools
import os
import socket
import stat
import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed import AllreduceOptions, ReduceOp, ReduceScatterOptions
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import AllgatherOptions
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from lightning_tp._compat.tensors import no_torch_function


# private: `DTensor._local_tensor`. Its public `to_local` records a node of autograd.
def local_tensor(tensor: Tensor) -> Tensor:
    """Return what this rank holds of a DTensor or a sharded tensor, without a copy and without autograd; a plain tensor as it is."""
    if isinstance(tensor, DTensor):
        return tensor._local_tensor
    if type(tensor).__torch_function__ is no_torch_function or not hasattr(tensor, "_tp_shard"):
        return tensor
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.detach()


# private: `placement_types._StridedShard`. Without it state dicts of both axes could not be described as DTensors.
def strided_shard(dim: int, split_factor: int) -> Placement:
    """Return the placement of a mesh axis that shards what a later axis has sharded already (FSDP2 over a column-parallel weight)."""
    return _StridedShard(dim, split_factor=split_factor)


# private: `DTensorSpec`, `TensorMeta`, `LocalShardsWrapper`. Without them fused weights and shared heads could not be saved as one tensor.
def dtensor_of_pieces(
    pieces: list[Tensor], offsets: list[tuple[int, ...]], mesh: DeviceMesh, placements: tuple[Placement, ...], shape: torch.Size
) -> DTensor:
    """Make a DTensor whose local value is several boxes of the global tensor, each at its offset; for distributed checkpoint."""
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    meta = TensorMeta(shape, torch.empty(shape, device="meta").stride(), pieces[0].dtype)
    return DTensor(_wrapped(pieces, offsets), DTensorSpec(mesh, placements, tensor_meta=meta), requires_grad=False)


def _wrapped(pieces: list[Tensor], offsets: list[tuple[int, ...]]) -> Any:
    """Wrap pieces as torch does, in a tensor that says their dtype and device: torch's says float32 and CPU of all, and so does the DTensor."""
    from torch.distributed.tensor._shards_wrapper import LocalShardsWrapper

    made: Any = LocalShardsWrapper(pieces, offsets)
    dtype, device = pieces[0].dtype, pieces[0].device
    wrapped: Any = Tensor._make_wrapper_subclass(LocalShardsWrapper, made.shape, dtype=dtype, device=device)
    wrapped._local_shards, wrapped._storage_meta = made._local_shards, made._storage_meta
    return wrapped


def is_in_pieces(tensor: DTensor) -> bool:
    """Return whether a DTensor was made by `dtensor_of_pieces`."""
    return hasattr(tensor._local_tensor, "local_shards")


# private: `DTensor.__create_chunk_list__`, by which distributed checkpoint asks. Without it the offsets of uneven shards would be unknown.
def pieces_of_dtensor(tensor: DTensor) -> list[tuple[tuple[int, ...], Tensor]]:
    """Return (offset, box) of what this rank holds of a DTensor."""
    local: Any = tensor._local_tensor
    if is_in_pieces(tensor):
        return [(tuple(o), t) for o, t in zip(local.local_offsets(), local.local_shards(), strict=True)]
    chunk = tensor.__create_chunk_list__()[0]
    return [(tuple(chunk.offsets), local)]


# private: `DTensor._spec`, and those of `dtensor_of_pieces`. Without them a checkpoint could not be saved in the background.
def copy_dtensor(tensor: DTensor, copy: Callable[[Tensor, str], Tensor]) -> DTensor:
    """Return the same DTensor of copies: `copy` gets each tensor that this rank holds of it, and a name for that."""
    local: Any = tensor._local_tensor
    if is_in_pieces(tensor):
        pieces = [copy(piece, str(i)) for i, piece in enumerate(local.local_shards())]
        offsets = [tuple(offset) for offset in local.local_offsets()]
        return DTensor(_wrapped(pieces, offsets), tensor._spec, requires_grad=False)
    return DTensor(copy(local, ""), tensor._spec, requires_grad=False)


# private: `_get_fsdp_state`, `_fsdp_param_group(s)`, their `_init_mp_dtypes`, `_orig_dtype`, `_reduce_dtype`. Without it the backward fails.
def remember_dtypes(unit: Any) -> None:
    """Let an FSDP2 unit whose parameters are all frozen at its first forward know their dtypes when they are unfrozen.

    It looks at parameters that require gradients, once; `toggle_optimizer` and fine-tuning freeze whole blocks for a while.
    """
    state = unit._get_fsdp_state()
    for group in getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]:  # one in torch 2.11
        if group is not None:
            group._init_mp_dtypes = functools.partial(_init_dtypes_of_frozen, group, group._init_mp_dtypes)


def _init_dtypes_of_frozen(group: Any, original: Callable[[], None]) -> None:
    original()
    if group._orig_dtype is None and group.fsdp_params:
        group._orig_dtype, group._reduce_dtype = group.fsdp_params[0].orig_dtype, group.fsdp_params[0].reduce_dtype


# Options of collectives that are waited for at once: NCCL then takes the current stream, where it would launch them on one of its own, with an
# event before and one after. Made once, since each would cost as much as a small tensor. Such a collective may return None: it is in its stream.
_SUM, _LARGEST, _GATHER, _SCATTER = AllreduceOptions(), AllreduceOptions(), AllgatherOptions(), ReduceScatterOptions()
_LARGEST.reduceOp = ReduceOp(ReduceOp.MAX)
_SUM.asyncOp = _LARGEST.asyncOp = _GATHER.asyncOp = _SCATTER.asyncOp = False


# private: `ProcessGroup._allgather_base`, `_reduce_scatter_base`. Their public wrappers cost as much as a small collective.
def all_reduce_into(tensor: Tensor, group: Any, *, largest: bool = False) -> None:
    """Sum a tensor over the ranks, in place, on the process group itself, and on the current stream; with `largest`, take the largest."""
    work = group.allreduce([tensor], _LARGEST if largest else _SUM)
    if work is not None:
        work.wait()


def all_gather_into(output: Tensor, input: Tensor, group: Any) -> None:
    """All-gather, likewise."""
    work = group._allgather_base(output, input, _GATHER)
    if work is not None:
        work.wait()


def reduce_scatter_into(output: Tensor, input: Tensor, group: Any) -> None:
    """Reduce-scatter, likewise."""
    work = group._reduce_scatter_base(output, input, _SCATTER)
    if work is not None:
        work.wait()


# private: `ProcessGroup._device_types`. Without it nobody could ask whether a group has a backend for the device of a tensor.
def on_device_of(group: Any, tensor: Tensor) -> Tensor:
    """Return a tensor as a process group can send it: as it is, or a copy on the group's device, where it has no backend for the tensor's own.

    A group of NCCL alone takes no tensor on the CPU. What comes back goes to where it was by `.to(tensor.device)`.
    """
    types = [device.type for device in group._device_types]
    return tensor if not types or tensor.device.type in (*types, "meta") else tensor.to(types[0])


def gather_rows(row: Tensor, group: Any) -> Tensor:
    """All-gather equal shapes into one tensor on the device of `row`: (..) of each rank -> (ranks, ..). `row` has to be contiguous."""
    sent = on_device_of(group, row)
    every = sent.new_empty((group.size(), *sent.shape))
    all_gather_into(every.view(-1), sent.view(-1), group)
    return every.to(row.device)


def full_tensor(tensor: DTensor) -> Tensor:
    """Return the full tensor of a DTensor, on its device, also where that is not the one of its mesh. Differentiable; a collective."""
    of_mesh = tensor.device_mesh.device_type
    if tensor.device.type == of_mesh:
        return DTensor.full_tensor(tensor)
    there: Any = tensor.to(of_mesh)
    return DTensor.full_tensor(there).to(tensor.device)


# private: `torch.testing._internal`. Without it there would be no `fake_world`.
def fake_store() -> Any:
    """Return a store for torch's `fake` backend; importing it registers the backend."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    return FakeStore()


# private: `FakeProcessGroup._create_internal`. Without it there would be no `FakeGroup`.
def fake_process_group(rank: int, size: int) -> Any:
    """Return a group of torch's `fake` backend by itself, without `init_process_group`."""
    from torch._C._distributed_c10d import FakeProcessGroup

    return FakeProcessGroup._create_internal(rank, size)


# private: `_set_pg_timeout`. Without it the groups of a mesh would have torch's default of half an hour, whatever the user asks for.
def limit_waiting(groups: Iterable[torch.distributed.ProcessGroup], timeout: timedelta) -> None:
    """Let the collectives of these groups fail after this time."""
    for group in groups:
        torch.distributed.distributed_c10d._set_pg_timeout(timeout, group)


def _tcp_store() -> tuple[Any, torch.distributed.TCPStore | None]:
    """The default process group's store, and the one over TCP beneath it."""
    store: Any = torch.distributed.distributed_c10d._get_default_store()
    inner = store
    while isinstance(inner, torch.distributed.PrefixStore):
        inner = inner.underlying_store
    return store, inner if isinstance(inner, torch.distributed.TCPStore) else None


# private: `_get_default_store`. Without it the watchdog could not tell which rank a collective waits for.
def clone_store() -> torch.distributed.Store | None:
    """Return another connection to the store of the process group, for another thread; None if it isn't one over TCP."""
    store, tcp_store = _tcp_store()
    return store.clone() if tcp_store is not None and hasattr(store, "clone") else None


# private: as `clone_store`, and that the store's socket is found among the process's own. Without it the watchdog would hang as well.
def let_store_fail(after: timedelta) -> None:
    """Let calls of the process group's store fail if its machine has not acknowledged for this long; `check` would wait forever. Linux only."""
    _, store = _tcp_store()
    option = getattr(socket, "TCP_USER_TIMEOUT", None)
    if option is None or store is None:
        return
    for name in os.listdir("/proc/self/fd"):
        descriptor = int(name)
        try:
            if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                continue
            with socket.socket(fileno=os.dup(descriptor)) as connection:
                if connection.getpeername()[1:2] == (store.port,):
                    connection.setsockopt(socket.IPPROTO_TCP, option, int(after.total_seconds() * 1000))
        except (OSError, TypeError):  # closed by now, or not connected
            continue


@functools.cache
def wait_for_gloo_at_exit() -> None:
    """Give gloo's threads a moment before Python exits.

    The last to release a tensor of a collective needs the interpreter; if that is gone, the process dies with "terminate called without an
    active exception". Destroying the process group does not help while anything refers to it.
    """
    atexit.register(time.sleep, 0.1)


# private: `distributed_c10d._world`, `ProcessGroup._get_sequence_number_for_group`. Without them a hang would name ranks by their stacks alone.
def collective_counts() -> dict[str, tuple[int, str]]:
    """Return how many collectives this process has begun on each of its groups, and what the group is called.

    The key is the same on all ranks of a group. The groups count themselves, so this costs a step nothing; any thread may ask.
    """
    found = {}
    group: Any
    for group, name in list(torch.distributed.distributed_c10d._world.pg_names.items()):
        try:
            ranks = torch.distributed.get_process_group_ranks(group)
            count = group._get_sequence_number_for_group()
        except (RuntimeError, ValueError):  # a backend that does not count, or a group that ends at this moment
            continue
        shown = ", ".join(map(str, ranks[:8])) + (", .." if len(ranks) > 8 else "")
        found[f"{name}/{ranks[0]}"] = (count, f"group `{group.group_desc}` (ranks {shown})")
    return found


def all_gather_within(output: Tensor, input: Tensor, group: Any, timeout: timedelta) -> bool:
    """All-gather into `output`; return False if not all ranks take part within `timeout`."""
    work = group._allgather_base(output, input)
    try:
        work.wait(timeout)
    except RuntimeError as error:
        if "timed out" not in str(error).lower() and "timeout" not in str(error).lower():
            raise
        return False
    return True


def fsdp_parameters(model: torch.nn.Module) -> list[Any]:
    """Return FSDP2's records of the parameters of a model: each has a `sharded_param`, and from its first all-gather on an `_unsharded_param`."""
    from torch.distributed.fsdp import FSDPModule

    states = dict.fromkeys(m._get_fsdp_state() for m in model.modules() if isinstance(m, FSDPModule))
    of_states = (getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group] for state in states)
    groups = [group for found in of_states for group in found if group is not None]
    return [parameter for group in groups for parameter in group.fsdp_params]


def unsharded_parameter(parameter: Any) -> torch.nn.Parameter | None:
    """Return the parameter that FSDP2 puts in place of a sharded one in a forward; None before its first all-gather."""
    return getattr(parameter, "_unsharded_param", None)


def is_resharded(unit: Any) -> bool:
    """Return whether a unit of FSDP2 holds its shards: its forward has not begun, or its backward is over."""
    state = unit._get_fsdp_state()
    return any(g is not None and g.is_sharded for g in (getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]))


def call_in_forward(unit: Any, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function as if it were the forward of a unit of FSDP2: what `register_fsdp_forward_method` does for a method."""
    state = unit._get_fsdp_state()
    args, kwargs = state._pre_forward(unit, args, kwargs)
    return state._post_forward(unit, args, function(*args, **kwargs))


def initialize_fsdp(root: Any) -> None:
    """Make a module the root of FSDP2 before the first forward, which may be that of a unit inside."""
    root._get_fsdp_state()._lazy_init()


def is_fsdp_hook(hook: Any) -> bool:
    """Return whether a hook of a module's forward is one of FSDP2's."""
    hook = getattr(hook, "func", hook)
    return type(getattr(hook, "__self__", None)).__name__ == "FSDPState"
