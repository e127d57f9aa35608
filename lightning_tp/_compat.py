"""Private parts of torch, and differences between versions: the only file of this package that names them.

Comments say which private name each function wraps, and what would stop working if that went away. All of them were checked with
torch 2.11 and 2.13 (`tests/test__compat.py`); where the two differ, the function says how.
"""

from __future__ import annotations

import atexit
import functools
import math
import os
import socket
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from importlib import metadata
from typing import Any, Literal

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors as flatten  # noqa: F401
from torch._utils import _unflatten_dense_tensors as unflatten  # noqa: F401
from torch.amp.grad_scaler import OptState
from torch.distributed.checkpoint._fsspec_filesystem import FileSystem as FsspecFiles  # noqa: F401
from torch.distributed.checkpoint.utils import _create_file_view as view_of_file  # noqa: F401
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Placement, _StridedShard
from torch.nn.modules.module import _IncompatibleKeys as incompatible_keys  # noqa: F401


def version_of(package: str) -> str | None:
    """Return the version of a package that is installed; None for one that is not, such as this one when run from its sources."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def patched(owner: Any, name: str, value: Any) -> Callable[[], None]:
    """Set an attribute of an object, and return a function that undoes it."""
    had = name in vars(owner)
    before = vars(owner).get(name)
    setattr(owner, name, value)

    def undo() -> None:
        if had:
            setattr(owner, name, before)
        else:
            delattr(owner, name)

    return undo


# ---- aliases: what each is, and what it is for
graph_is_retained = torch._C._autograd._get_current_graph_task_keep_graph  # then cross entropy can't write in place
sequence_number = torch._C._autograd._get_sequence_nr  # of autograd's next node: traces match forward and backward by it
without_torch_function = torch._C.DisableTorchFunction  # neither modes nor tensors see calls: for what is no code of the model
without_torch_function_subclass = torch._C.DisableTorchFunctionSubclass  # tensors don't, modes do; torch documents it for this use
without_torch_dispatch = torch._C._DisableTorchDispatch  # neither modes nor tensors see operators: a playback inside a recording
without_dispatch_modes = torch.utils._python_dispatch._disable_current_modes  # tensors see operators, modes don't
negative_view = torch._neg_view  # a view with the negative bit set (`Tensor.is_neg`), as `.imag` of a conjugated tensor is
wrapper_tensor: Any = Tensor._make_wrapper_subclass  # a tensor of a subclass without memory; torch's notes on extending it use it
non_finite_check_and_unscale_ = torch._amp_foreach_non_finite_check_and_unscale_  # as `GradScaler` calls it
flash_attention_on_meta: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # saves what all devices' do
call_impl: Any = torch.nn.Module._call_impl  # `Module.__call__` without what `Module.compile` puts in front: hooks and `forward`


def num_writes(tensor: Tensor) -> int:
    """Return how often a tensor was written in place, which autograd counts (`Tensor._version`)."""
    return tensor._version


# private: `Variable._execution_engine.queue_callback`. Without it partial gradients would not be summed at the end of a backward pass.
def queue_after_backward(callback: Callable[[], None]) -> None:
    """Call back at the end of the backward pass that is running now, after what FSDP2 has queued before."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)


# private: `torch._C._will_engine_execute_node`, and the words of its error. Without it `autograd.grad` would return partial sums.
def backward_kind(parameter: torch.Tensor) -> Literal["backward", "grad"] | None:
    """Tell what is running now: a `backward` that adds to this parameter's `.grad`, a `torch.autograd.grad` that returns it, or neither."""
    with torch.enable_grad():
        node: Any = parameter.view_as(parameter).grad_fn.next_functions[0][0]  # type: ignore[union-attr]
    try:
        return "backward" if torch._C._will_engine_execute_node(node) else None
    except RuntimeError as error:  # "A leaf node was passed to .. but we are currently running autograd.grad()"
        return "grad" if "autograd.grad()" in str(error) else None


# private: `torch._C._are_functorch_transforms_active`, and that `Function.apply` calls the `apply` of its base class. Only speed depends on it.
def apply_of(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """Return `function.apply` without the wrapper for functional transforms: half of the cost of a small call."""
    direct = super(torch.autograd.Function, function).apply  # type: ignore[misc]

    def apply(*args: Any) -> Any:
        return function.apply(*args) if torch._C._are_functorch_transforms_active() else direct(*args)

    return apply


# private: `torch._C._current_autograd_node`. As `sequence_number`.
def sequence_number_of_backward() -> int | None:
    """Return the number of the node whose backward is running now; None outside of a backward pass."""
    node = torch._C._current_autograd_node()
    return None if node is None else int(node._sequence_nr())


# private: `torch.autograd.graph._engine_run_backward`. Without it a trace would miss recomputed calls: `backward` itself goes by all modes.
def backward_under_modes(loss: Tensor) -> None:
    """Call `loss.backward()` so that recomputed code sees the `TorchFunctionMode`s that are on, as in the forward."""
    engine: Any = torch.autograd.graph._engine_run_backward
    engine((loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True)


# private: `torch._C._len_torch_function_stack`, `_get_current_function_mode_stack`. Without it compiled blocks would go by these modes.
def function_modes() -> list[Any]:
    """Return the `TorchFunctionMode`s that are on, the outermost first."""
    if not torch._C._len_torch_function_stack():
        return []
    return list(torch.overrides._get_current_function_mode_stack())


def is_in_place(operator: Any) -> bool:
    """Return whether an operator of `torch.ops` writes into one of its arguments."""
    return bool(operator._schema.is_mutable)


# private: `OpOverload._schema`. Without it in-place operators could not be told from others.
@functools.cache
def written_arguments(operator: Any) -> list[tuple[int, str]]:
    """Return (position, name) of the arguments that an operator of `torch.ops` writes to."""
    arguments = list(enumerate(operator._schema.arguments))
    if operator.namespace == "c10d" and operator.overloadpacket.__name__.endswith("_"):
        return [(i, a.name) for i, a in arguments[:1]]  # collectives, whose schemas don't say
    return [(i, a.name) for i, a in arguments if a.alias_info is not None and a.alias_info.is_write]


# private: `UntypedStorage._cdata`. `data_ptr` would not do: on the meta device it is 0.
def storage_key(tensor: Tensor | torch.UntypedStorage) -> int:
    """Return a number of a storage: equal for tensors that share memory. It may be used again once the storage is gone."""
    return (tensor.untyped_storage() if isinstance(tensor, Tensor) else tensor)._cdata


# private: `torch.ops.aten._scaled_dot_product_attention_math`. Without it exact dropout would have to compute them itself.
def math_attention_weights(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, *, scale: float | None, enable_gqa: bool
) -> Tensor:
    """Return the attention weights (.., L, S) of the math kernel of `F.scaled_dot_product_attention`, before dropout."""
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(mask.logical_not(), -math.inf)
    _, weights = torch.ops.aten._scaled_dot_product_attention_math(
        query, key, value, mask, 0.0, is_causal, None, scale=scale, enable_gqa=enable_gqa
    )
    return weights


# private: `DTensor._local_tensor`. Its public `to_local` records a node of autograd.
def local_tensor(tensor: Tensor) -> Tensor:
    """Return what this rank holds of a DTensor, without a copy and without autograd; a plain tensor as it is."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


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
    from torch.distributed.tensor._shards_wrapper import LocalShardsWrapper

    meta = TensorMeta(shape, torch.empty(shape, device="meta").stride(), pieces[0].dtype)
    return DTensor(LocalShardsWrapper(pieces, offsets), DTensorSpec(mesh, placements, tensor_meta=meta), requires_grad=False)


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
    from torch.distributed.tensor._shards_wrapper import LocalShardsWrapper

    local: Any = tensor._local_tensor
    if is_in_pieces(tensor):
        pieces = [copy(piece, str(i)) for i, piece in enumerate(local.local_shards())]
        offsets = [tuple(offset) for offset in local.local_offsets()]
        return DTensor(LocalShardsWrapper(pieces, offsets), tensor._spec, requires_grad=False)
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


# private: the fields of `GradScaler`. Without them a scaler could not be replaced by one that is told of all ranks' infinities.
def scaler_settings(scaler: torch.amp.GradScaler) -> dict[str, Any]:
    """Return the arguments with which a gradient scaler was made."""
    names = ("device", "init_scale", "growth_factor", "backoff_factor", "growth_interval", "enabled")
    return {name: getattr(scaler, f"_{name}") for name in names}


# private: `GradScaler._per_optimizer_states`. Without it gradients would be clipped before they are unscaled.
def is_unscaled(scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> bool:
    """Return whether the gradients of an optimizer were unscaled since the last backward pass."""
    return scaler._per_optimizer_states[id(optimizer)]["stage"] is not OptState.READY


# private: `clip_grad._get_total_norm`. Without it gradients would be clipped by the norm of this rank's shards.
def wrap_total_norm(make: Callable[[Callable[..., Tensor]], Callable[..., Tensor]]) -> None:
    """Replace the gradient norm that `torch.nn.utils.clip_grad_norm_` takes by `make(torch's own)`, once."""
    from torch.nn import utils
    from torch.nn.utils import clip_grad

    if hasattr(clip_grad._get_total_norm, "_tp_original"):
        return
    wrapped: Any = make(clip_grad._get_total_norm)
    wrapped._tp_original = clip_grad._get_total_norm
    clip_grad._get_total_norm = wrapped  # what clip_grad_norm_ calls, however that was imported
    utils.get_total_norm = wrapped


# private: `ProcessGroup._allgather_base`, `_reduce_scatter_base`. Their public wrappers cost as much as a small collective.
def all_gather_into(output: Tensor, input: Tensor, group: Any) -> None:
    """All-gather on the process group itself."""
    group._allgather_base(output, input).wait()


def reduce_scatter_into(output: Tensor, input: Tensor, group: Any) -> None:
    """Reduce-scatter on the process group itself."""
    group._reduce_scatter_base(output, input).wait()


def gather_rows(row: Tensor, group: Any) -> Tensor:
    """All-gather equal shapes into one tensor: (..) of each rank -> (ranks, ..). `row` has to be contiguous."""
    every = row.new_empty((group.size(), *row.shape))
    all_gather_into(every.view(-1), row.view(-1), group)
    return every


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


def compile_function(function: Callable[..., Any], backend: Callable[..., Any], limit: int) -> Callable[..., Any]:
    """Call `torch.compile` with this backend, apart from what else is compiled of the same code.

    `limit` (not with torch 2.11) says how often one piece of code may be recompiled, for layers that know their number, say.
    """
    compile: Callable[..., Callable[..., Any]] = torch.compile
    try:
        return compile(function, backend=backend, recompile_limit=limit, isolate_recompiles=True)
    except TypeError:
        return compile(function, backend=backend)


# private: `torch._inductor.compile_fx`, `torch._dynamo.lookup_backend`. Without them a failing compiler could not be left out piece by piece.
def backend_of(name: str) -> Callable[..., Any]:
    """Return the compiler that `torch.compile(backend=name)` calls; for an unknown name raise a ValueError with those that there are."""
    if name == "inductor":
        from torch._inductor.compile_fx import compile_fx

        return compile_fx
    try:
        backend: Callable[..., Any] = torch._dynamo.lookup_backend(name)
    except torch._dynamo.exc.InvalidBackend:
        raise ValueError(f"there are {', '.join(torch._dynamo.list_backends(None))}") from None
    return backend


# private: `torch._dynamo.exc.TorchDynamoException`. Without it a block that can't be compiled would be an error.
def is_compiler_error(error: Exception) -> bool:
    """Return whether `torch.compile` could not compile, or raised while it tried to."""
    return isinstance(error, torch._dynamo.exc.TorchDynamoException)


# private: `OptimizedModule` and its `_orig_mod` and `dynamo_ctx`, `Module._compiled_call_impl`. Without them such a model could not be split.
def take_compiled(model: torch.nn.Module) -> dict[str, Any]:
    """Undo what users have compiled inside of a model, in place, and return the backend of each module that was, by name."""
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


# private: `torch._dynamo.eval_frame.innermost_backend`. Without it blocks would be compiled with another backend than the user's.
def backend_of_context(context: Any) -> Any:
    """Return the backend that `torch.compile` was given, from the context that its wrapper keeps."""
    return torch._dynamo.eval_frame.innermost_backend(context.callback)


def loaders_to_run(trainer: Any) -> Any:
    """Return the loader, or loaders, that a Trainer is about to use. Lightning has no public name for it, and `cli` and `trainer` need it."""
    return trainer._active_loop._data_source.dataloader()


# What torch pickles into the `.metadata` of a distributed checkpoint, by module and name; and what makes a dtype, a layout.
METADATA_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", "device"},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"},
    "pathlib._local": {"PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"},
}  # fmt: skip


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
# replace all tensors of a module and of those in it by what a function returns for each
apply_to_tensors = torch.nn.Module._apply


def ignored_by_transformers(model: torch.nn.Module) -> list[str]:
    """Return the patterns of names that transformers passes over in a checkpoint, for the models of it that are inside `model`."""
    patterns = (getattr(m, "_keys_to_ignore_on_load_unexpected", None) or () for m in model.modules())
    return [*(pattern for each in patterns for pattern in each), r"rotary_emb\.inv_freq"]


class LateTensor:
    """Pickled by `torch.save` as a contiguous tensor on the CPU, whose bytes are read when they are written.

    `torch.save` writes the storages one after the other, and calls `cpu()` of those that are on another device; this one's is on the meta device,
    and its `cpu` reads.

    Args:
        shape: of the tensor.
        dtype: of the tensor.
        read: returns the tensor; called once a save.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, read: Callable[[], Tensor]) -> None:
        self.shape, self.dtype, self.read = shape, dtype, read

    def __reduce_ex__(self, protocol: Any) -> Any:
        untyped: Any = torch.UntypedStorage(torch.Size(self.shape).numel() * self.dtype.itemsize, device="meta")
        untyped.cpu = self._storage
        rebuild, (storage, offset, _, _, *rest) = torch.empty(0, dtype=self.dtype).__reduce_ex__(protocol)
        if not isinstance(storage, torch.UntypedStorage):
            untyped = torch.storage.TypedStorage(wrap_storage=untyped, dtype=self.dtype, _internal=True)
        untyped._fake_device = "cpu"  # where it is loaded to
        return rebuild, (untyped, offset, tuple(self.shape), torch.empty(self.shape, device="meta").stride(), *rest)

    def _storage(self) -> torch.UntypedStorage:
        value = self.read()
        if value.untyped_storage().nbytes() != value.nbytes:  # a view: what is around it in memory is not written
            value = value.clone()
        return value.untyped_storage()


@contextmanager
def unobserved() -> Iterator[None]:
    """Run operations without the `TorchFunctionMode`s and the `TorchDispatchMode`s that are on."""
    with without_torch_function(), without_dispatch_modes():
        yield


enable_function_modes = torch._C._EnableTorchFunction  # again, where function modes are off: inside of one of them
# operators of aten that have no public function, or another one
read_scalar: Any = torch.ops.aten._local_scalar_dense.default  # `x.item()`
grouped_mm: Any = torch.ops.aten._grouped_mm.default
softmax_operators: tuple[Any, ...] = tuple(
    getattr(torch.ops.aten, name).default for name in ("_softmax", "_log_softmax", "_safe_softmax")
)
