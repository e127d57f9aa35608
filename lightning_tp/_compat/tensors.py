"""Private parts of torch for tensors, operators, autograd and modes."""

from __future__ import annotations

import functools
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors as flatten  # noqa: F401
from torch._utils import _unflatten_dense_tensors as unflatten  # noqa: F401

from lightning_tp._compat.modules import patched

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


# private: `OpOverload._schema`. Without it activation checkpointing would have to know where each attention kernel takes its dropout.
@functools.cache
def position_of_argument(operator: Any, name: str) -> int | None:
    """Return the position of the argument of an operator of `torch.ops` that has this name; None if it has none."""
    return next((i for i, argument in enumerate(operator._schema.arguments) if argument.name == name), None)


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


# private: `FakeWork`, and the schema of an operator. Without it collectives of a step that is run on one rank would wait for the others.
def done_with(func: Any, result: Any) -> Any:
    """Return what an operator of `c10d` returns when it is done, `result` first where it returns tensors."""
    from torch._C._distributed_c10d import FakeWork, Work

    work = Work.boxed(FakeWork())
    return {0: None, 1: work, 2: (result, work)}[len(func._schema.returns)]


foreach_mul_ = torch._foreach_mul_


foreach_norm = torch._foreach_norm


foreach_copy_ = torch._foreach_copy_


# private: `_engine_run_backward`, what all of torch.autograd ends in. Without it a step that takes gradients itself could not be followed.
@contextmanager
def backward_by(run: Callable[..., Any]) -> Iterator[None]:
    """Let `run(own, ...)` compute each gradient of this process, where `own` is what does it, until this exits."""
    own = torch.autograd._engine_run_backward
    undo = patched(torch.autograd, "_engine_run_backward", lambda *args, **kwargs: run(own, *args, **kwargs))
    try:
        yield
    finally:
        undo()


# private: the tables of process groups. Without it a collective in a step that runs on one rank would wait for the others.
@contextmanager
def process_groups_aside() -> Iterator[None]:
    """Run without the process groups that there are; others may be made, and are gone on exit."""
    world = torch.distributed.distributed_c10d._world
    tables: list[Any] = [
        world.pg_map,
        world.pg_names,
        world.pg_group_ranks,
        world.pg_backend_config,
        world.tags_to_pg,
        world.pg_to_tag,
    ]
    contents, default = [dict(table) for table in tables], world.default_pg

    def fill(new: list[dict[Any, Any]], group: Any) -> None:
        for table, content in zip(tables, new, strict=True):
            table.clear()
            table.update(content)
        world.default_pg = group

    fill([{} for _ in tables], None)
    try:
        yield
    finally:
        fill(contents, default)


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


# a `__torch_function__` that dispatches nothing: that of `nn.Parameter`
graph_task: Callable[[], int] = torch._C._current_graph_task_id  # of the backward pass that runs; -1: none does


no_torch_function: Any = torch._C._disabled_torch_function_impl


# where torch's functions and methods are defined, beside its public modules
NATIVE_FUNCTIONS: tuple[Any, ...] = (torch._C.TensorBase, torch._C._nn, torch._C._VariableFunctions)


# private: `Tensor._base`. Without it a write into a slice would not be seen in the tensor that it is a slice of.
def base_of(view: Tensor) -> Tensor | None:
    """Return the tensor that this one is a view of; None for one that is no view."""
    return view._base


def take_hooks_of(tensor: Any) -> tuple[Any, Any]:
    """Take away the hooks on a tensor's gradient, and return the dicts in which their handles look for them: (tensor, post-accumulate) or None."""
    gradient, accumulated = tensor._backward_hooks, tensor._post_accumulate_grad_hooks
    if gradient or accumulated:
        tensor._backward_hooks, tensor._post_accumulate_grad_hooks = None, OrderedDict()  # None would leave the latter in place
    return gradient, accumulated
