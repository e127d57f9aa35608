"""The only file that names versions, or private parts of torch."""

from __future__ import annotations

import atexit
import ctypes
import errno
import functools
import os
import socket
import stat
import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from importlib import metadata
from typing import Any, Literal

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors as flatten  # noqa: F401
from torch._utils import _unflatten_dense_tensors as unflatten  # noqa: F401
from torch.amp.grad_scaler import OptState
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Placement, _StridedShard
from torch.nn.modules.module import _IncompatibleKeys as incompatible_keys  # noqa: F401


def version_of(package: str) -> str | None:
    """The version that is installed; None for one that is not, such as this package run from its sources."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def queue_after_backward(callback: Callable[[], None]) -> None:
    """Call back once the backward pass that is running now is done, after what FSDP2 has queued before."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)


def backward_kind(parameter: torch.Tensor) -> Literal["backward", "grad"] | None:
    """What the backward pass that is running now is of: a `backward` that adds to this parameter's `.grad`, a `torch.autograd.grad` that gives
    its gradient back, or neither."""
    with torch.enable_grad():
        node: Any = parameter.view_as(parameter).grad_fn.next_functions[0][0]  # type: ignore[union-attr]
    try:
        return "backward" if torch._C._will_engine_execute_node(node) else None
    except RuntimeError as error:  # "A leaf node was passed to .. but we are currently running autograd.grad()"
        return "grad" if "autograd.grad()" in str(error) else None


def apply_of(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """`function.apply` without the wrapper that torch puts around it for its functional transforms: half of a small call's cost."""
    direct = super(torch.autograd.Function, function).apply  # type: ignore[misc]

    def apply(*args: Any) -> Any:
        return function.apply(*args) if torch._C._are_functorch_transforms_active() else direct(*args)

    return apply


# a `__torch_function__` that dispatches nothing: that of `nn.Parameter`
no_torch_function: Any = torch._C._disabled_torch_function_impl


def local_tensor(tensor: Tensor) -> Tensor:
    """What this rank holds, without a copy and without autograd: of FSDP2's DTensor its shard, of a plain tensor itself."""
    if isinstance(tensor, DTensor):
        return tensor._local_tensor
    if type(tensor).__torch_function__ is no_torch_function or not hasattr(tensor, "_tp_shard"):
        return tensor
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.detach()


def gather_rows(row: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
    """(n,) of each rank of the group -> (ranks, n)."""
    every = row.new_empty((group.size(), *row.shape))
    group._allgather_base(every.view(-1), row).wait()
    return every


def non_finite_check_and_unscale_(grads: list[Tensor], found_inf: Tensor, inv_scale: Tensor) -> None:
    """Multiply these by `inv_scale` in place, and write 1 into `found_inf` if one of them is not finite."""
    torch._amp_foreach_non_finite_check_and_unscale_(grads, found_inf, inv_scale)


def remember_dtypes(unit: Any) -> None:
    """Let a unit of FSDP2 whose parameters are all frozen at its first forward know in what they are reduced when they are thawed.

    It looks at parameters that require gradients, once; `toggle_optimizer` and fine-tuning freeze whole blocks for a while.
    """
    state = unit._get_fsdp_state()
    for group in getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]:
        if group is not None:
            group._init_mp_dtypes = _WithFrozen(group)


class _WithFrozen:
    def __init__(self, group: Any) -> None:
        self.group, self.own = group, group._init_mp_dtypes

    def __call__(self) -> None:
        group = self.group
        self.own()
        if group._orig_dtype is None and group.fsdp_params:
            group._orig_dtype, group._reduce_dtype = group.fsdp_params[0].orig_dtype, group.fsdp_params[0].reduce_dtype


def strided_shard(dim: int, split_factor: int) -> Placement:
    """The placement of an axis that cuts what a later axis has cut already (FSDP2 over a column-wise weight)."""
    return _StridedShard(dim, split_factor=split_factor)


def dtensor_of_pieces(
    pieces: list[Tensor],
    offsets: list[tuple[int, ...]],
    mesh: DeviceMesh,
    placements: tuple[Placement, ...],
    shape: torch.Size,
) -> DTensor:
    """A DTensor whose local value is several boxes of the global tensor, each at its offset; for distributed checkpoint."""
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
    from torch.distributed.tensor._shards_wrapper import LocalShardsWrapper

    meta = TensorMeta(shape, _strides(shape), pieces[0].dtype)
    return DTensor(LocalShardsWrapper(pieces, offsets), DTensorSpec(mesh, placements, tensor_meta=meta), requires_grad=False)


def _strides(shape: Iterable[int]) -> tuple[int, ...]:
    return torch.empty(tuple(shape), device="meta").stride()


def is_in_pieces(tensor: DTensor) -> bool:
    """Whether this was made by `dtensor_of_pieces`."""
    return hasattr(tensor._local_tensor, "local_shards")


def pieces_of_dtensor(tensor: DTensor) -> list[tuple[tuple[int, ...], Tensor]]:
    """(offset, box) of what this rank holds of a DTensor."""
    local: Any = tensor._local_tensor
    if is_in_pieces(tensor):
        return [(tuple(o), t) for o, t in zip(local.local_offsets(), local.local_shards(), strict=True)]
    chunk = tensor.__create_chunk_list__()[0]
    return [(tuple(chunk.offsets), local)]


def copy_dtensor(tensor: DTensor, copy: Callable[[Tensor, str], Tensor]) -> DTensor:
    """The same DTensor of copies: `copy` gets each tensor that this rank holds of it, and a name for that."""
    from torch.distributed.tensor._shards_wrapper import LocalShardsWrapper

    local: Any = tensor._local_tensor
    if is_in_pieces(tensor):
        pieces = [copy(piece, str(i)) for i, piece in enumerate(local.local_shards())]
        offsets = [tuple(offset) for offset in local.local_offsets()]
        return DTensor(LocalShardsWrapper(pieces, offsets), tensor._spec, requires_grad=False)
    return DTensor(copy(local, ""), tensor._spec, requires_grad=False)


# What torch pickles into the `.metadata` of a distributed checkpoint, by module and name; and what makes a dtype, a layout.
METADATA_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", "device"},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"},
    "pathlib._local": {"PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"},
}


def rename_exchange(a: str, b: str) -> bool:
    """Let two names of a file system change places, at one instant; False if the system or the file system can't.

    Raises:
        OSError: for other reasons (one of them is missing).
    """
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    at_fdcwd, exchange = -100, 2
    if renameat2(at_fdcwd, os.fsencode(a), at_fdcwd, os.fsencode(b), exchange) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM):
        return False
    raise OSError(code, os.strerror(code), a, None, b)


def compile_function(function: Callable[..., Any], backend: Callable[..., Any], limit: int) -> Callable[..., Any]:
    """`torch.compile` with this backend, apart from what else is compiled of the same code.

    `limit`: how often one piece of code may be compiled anew (for layers that know their number, say).
    """
    compile: Callable[..., Callable[..., Any]] = torch.compile
    try:
        return compile(function, backend=backend, recompile_limit=limit, isolate_recompiles=True)
    except TypeError:  # older than 2.13
        return compile(function, backend=backend)


def backend_of(name: str) -> Callable[..., Any]:
    """The compiler that `torch.compile(backend=name)` calls.

    Raises:
        ValueError: it names those that there are.
    """
    if name == "inductor":
        from torch._inductor.compile_fx import compile_fx

        return compile_fx
    try:
        backend: Callable[..., Any] = torch._dynamo.lookup_backend(name)
    except torch._dynamo.exc.InvalidBackend:
        raise ValueError(f"there are {', '.join(torch._dynamo.list_backends(None))}") from None
    return backend


def is_compiler_error(error: Exception) -> bool:
    """Whether `torch.compile` could not compile, or raised while it tried to."""
    return isinstance(error, torch._dynamo.exc.TorchDynamoException)


def take_compiled(model: torch.nn.Module) -> dict[str, Any]:
    """Undo what users have compiled inside of a model, in place: wrappers are replaced by what they wrap.

    Returns:
        For the name of each module that was compiled, its backend.
    """
    found: dict[str, Any] = {}
    for prefix, module in list(model.named_modules()):
        for name, child in module._modules.items():
            if isinstance(child, torch._dynamo.OptimizedModule):
                found[f"{prefix}.{name}" if prefix else name] = backend_of_context(child.dynamo_ctx)
                module._modules[name] = child._orig_mod
    for name, module in model.named_modules():
        if module._compiled_call_impl is not None:  # `module.compile()`
            found[name] = "inductor"
            module._compiled_call_impl = None
    return found


def is_compiled_wrapper(module: Any) -> bool:
    """Whether this is what `torch.compile(module)` gives."""
    return isinstance(module, torch._dynamo.OptimizedModule)


def backend_of_context(context: Any) -> Any:
    """What `torch.compile` was told to compile with, from the context that it gives a wrapper."""
    return getattr(torch._dynamo.eval_frame, "innermost_backend", lambda backend: backend)(context.callback)


def function_modes() -> list[Any]:
    """The `TorchFunctionMode`s that are on, the outermost first."""
    if not torch._C._len_torch_function_stack():
        return []
    return list(torch.overrides._get_current_function_mode_stack())


def wrap_total_norm(make: Callable[[Callable[..., Tensor]], Callable[..., Tensor]]) -> None:
    """Let the gradient norm that `torch.nn.utils.clip_grad_norm_` takes be that of `make(torch's own)`; once."""
    from torch.nn import utils
    from torch.nn.utils import clip_grad

    if hasattr(clip_grad._get_total_norm, "_tp_original"):
        return
    wrapped: Any = make(clip_grad._get_total_norm)
    wrapped._tp_original = clip_grad._get_total_norm
    clip_grad._get_total_norm = wrapped  # what clip_grad_norm_ calls, however that was imported
    utils.get_total_norm = wrapped


def let_store_fail(after: timedelta) -> None:
    """Let calls of the process group's store fail where its machine has not taken what was sent for this long: `check` would wait forever."""
    under: Any = torch.distributed.distributed_c10d._get_default_store()
    while isinstance(under, torch.distributed.PrefixStore):
        under = under.underlying_store
    option = getattr(socket, "TCP_USER_TIMEOUT", None)  # Linux
    if option is None or not isinstance(under, torch.distributed.TCPStore):
        return
    for name in os.listdir("/proc/self/fd"):
        descriptor = int(name)
        try:
            if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                continue
            with socket.socket(fileno=os.dup(descriptor)) as connection:
                if connection.getpeername()[1:2] == (under.port,):
                    connection.setsockopt(socket.IPPROTO_TCP, option, int(after.total_seconds() * 1000))
        except (OSError, TypeError):  # closed by now, or not connected
            continue


def clone_store() -> torch.distributed.Store | None:
    """A connection of the caller's own to the store of the process group, for another thread; None if it isn't one over TCP."""
    store: Any = torch.distributed.distributed_c10d._get_default_store()
    under = store
    while isinstance(under, torch.distributed.PrefixStore):
        under = under.underlying_store
    return store.clone() if isinstance(under, torch.distributed.TCPStore) and hasattr(store, "clone") else None


def limit_waiting(groups: Iterable[torch.distributed.ProcessGroup], timeout: timedelta) -> None:
    """Let the collectives of these groups fail after this time: those of a mesh are made with torch's own default of half an hour."""
    for group in groups:
        torch.distributed.distributed_c10d._set_pg_timeout(timeout, group)


@functools.cache
def wait_for_gloo_at_exit() -> None:
    """Leave gloo's threads a moment before Python ends.

    The last of them to let go of a tensor of a collective asks for the interpreter, and if that is gone, brings the process down with
    "terminate called without an active exception". Destroying the process group does not help while anybody refers to it.
    """
    atexit.register(time.sleep, 0.1)


def patched(owner: Any, name: str, value: Any) -> Callable[[], None]:
    """Set an attribute, and hand back what undoes it: Lightning and torchmetrics have no other way in for some things."""
    had = name in vars(owner)
    before = vars(owner).get(name)
    setattr(owner, name, value)

    def undo() -> None:
        if had:
            setattr(owner, name, before)
        else:
            delattr(owner, name)

    return undo


def fake_tensors() -> Any:
    """A context in which new tensors have no memory; `torch.load` then says of each where in the file it lies."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


def offset_in_file(fake: Tensor) -> int | None:
    """At what byte of a file that was loaded under `fake_tensors` the storage of this tensor begins."""
    offset: int | None = getattr(fake.untyped_storage(), "_checkpoint_offset", None)
    return offset


@functools.cache
def _fakes() -> Any:
    return fake_tensors()


def fake_like(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor on the CPU without memory, for `saved_without_data`."""
    with _fakes():
        return torch.empty(shape, dtype=dtype)


def saved_without_data(tree: Any, path: Any) -> None:
    """`torch.save` of tensors without memory: a file with room for their bytes."""
    with torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save(tree, path)


def sequence_number() -> int:
    """The number that the next node of autograd's graph gets."""
    return torch._C._autograd._get_sequence_nr()


def sequence_number_of_backward() -> int | None:
    """The number of the node whose backward runs now; None outside of a backward pass."""
    node = torch._C._current_autograd_node()
    return None if node is None else int(node._sequence_nr())


def backward_under_modes(loss: Tensor) -> None:
    """`loss.backward()`; code that is run again for it sees the `TorchFunctionMode`s that are on, as in the forward."""
    engine: Any = torch.autograd.graph._engine_run_backward
    engine((loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True)


def fake_store() -> Any:
    """A store that torch's `fake` backend takes; importing it registers the backend."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    return FakeStore()


def fake_process_group(rank: int, size: int) -> Any:
    """A group of torch's `fake` backend by itself, without `init_process_group`."""
    from torch._C._distributed_c10d import FakeProcessGroup

    return FakeProcessGroup._create_internal(rank, size)


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


def all_gather_into(output: Tensor, input: Tensor, group: Any) -> None:
    """All-gather on the process group itself: the wrapper of `torch.distributed` costs as much as a small collective."""
    group._allgather_base(output, input).wait()


def reduce_scatter_into(output: Tensor, input: Tensor, group: Any) -> None:
    """Reduce-scatter on the process group itself, as `all_gather_into`."""
    group._reduce_scatter_base(output, input).wait()


def scaler_settings(scaler: torch.amp.GradScaler) -> dict[str, Any]:
    """The arguments with which a gradient scaler was made."""
    return {
        "device": scaler._device,
        "init_scale": scaler._init_scale,
        "growth_factor": scaler._growth_factor,
        "backoff_factor": scaler._backoff_factor,
        "growth_interval": scaler._growth_interval,
        "enabled": scaler._enabled,
    }


def is_unscaled(scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> bool:
    """Whether the gradients of an optimizer were unscaled since the last backward pass."""
    return scaler._per_optimizer_states[id(optimizer)]["stage"] is not OptState.READY


def loaders_to_run(trainer: Any) -> Any:
    """The loader, or loaders, that a Trainer is about to use. Lightning has no public name for it, and `cli` and `trainer` need it."""
    return trainer._active_loop._data_source.dataloader()


def storage_key(tensor: Tensor) -> int:
    """Return a number of a tensor's storage: equal for tensors that share memory. It may be used again once the storage is gone."""
    return tensor.untyped_storage()._cdata


def is_in_place(operator: Any) -> bool:
    """Return whether an operator of `torch.ops` writes into one of its arguments."""
    return bool(operator._schema.is_mutable)


def without_dispatch_modes() -> Any:
    """Enter a context in which no `TorchDispatchMode` sees what is called."""
    return torch.utils._python_dispatch._disable_current_modes()


def without_torch_function() -> Any:
    """Enter a context in which `__torch_function__` of tensor subclasses is not called."""
    return torch._C.DisableTorchFunction()


# flash attention as it runs without a device: it saves for the backward what the kernels of all devices save
flash_attention_on_meta: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def own_parameters(module: torch.nn.Module) -> dict[str, torch.nn.Parameter | None]:
    """Return the parameters that stand at a module itself, by attribute; what is put there takes their place."""
    return module._parameters


def own_buffers(module: torch.nn.Module) -> dict[str, Tensor | None]:
    """Return the buffers that stand at a module itself, by attribute; what is put there takes their place."""
    return module._buffers


def is_persistent(module: torch.nn.Module, buffer: str) -> bool:
    """Return whether a module's own buffer is part of its state dict."""
    return buffer not in module._non_persistent_buffers_set


foreach_mul_ = torch._foreach_mul_
foreach_norm = torch._foreach_norm
foreach_copy_ = torch._foreach_copy_
# what calling a module runs, with its hooks, without the code that `module.compile()` has made
call_module = torch.nn.Module._call_impl
# replace all tensors of a module and of those in it by what a function returns for each
apply_to_tensors = torch.nn.Module._apply


def keep_foreach(*classes: Any) -> None:
    """Let optimizers choose their foreach and fused variants for parameters of these classes, as for `nn.Parameter`."""
    from torch.optim.optimizer import _foreach_supported_types

    for cls in classes:
        if cls not in _foreach_supported_types:
            _foreach_supported_types.append(cls)


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
