"""Activation checkpointing: what is saved of a module's forward for the backward pass, and what is recomputed there.

| kind | saved | recomputed | collectives recomputed per block (with sequence parallelism / without) |
|---|---|---|---|
| `"block"` | the input of each block | all but the last row-parallel matmul | 2 all-gathers, 1 reduce-scatter / 1 all-reduce |
| `"selective"` | also column-parallel matmuls, attention, sums over ranks | what is cheap, 1 matmul | 2 all-gathers / none |
| a predicate | the inputs of the modules that it chooses | these modules | those inside them, less a last sum |

"selective" does what torchtitan's does: torch's selective checkpointing, operator by operator. Of a row-parallel matmul the sum over ranks is saved
and not the partial sum, which has the full width and length on each rank; the sum is a shard. What is all-gathered is not saved for the same reason.
Matmuls of two activations (attention in plain operations) are recomputed, as in Megatron-LM. It intercepts each operator in Python, which costs some
ten microseconds: for models whose operators take longer than that. A backward pass over it can't be repeated (`retain_graph`).

State dict keys stay as they are, since no module is wrapped. Dropout is replayed (see `core/ops/rng.py`), on a GPU whatever arguments a module is
called with; so "selective" recomputes an attention kernel that drops out.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from functools import lru_cache, partial
from typing import Any, Literal, TypeAlias
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from lightning_tp._compat import call_impl, position_of_argument
from lightning_tp.core.comm.axis import SEQUENCE_DIM, Axis
from lightning_tp.core.comm.collectives import all_reduce, reduce_scatter
from lightning_tp.core.comm.transitions import outside
from lightning_tp.core.modules.swap_class import swap_class
from lightning_tp.core.ops.intercept import run_checkpointed
from lightning_tp.core.ops.rng import DeviceState
from lightning_tp.errors import TPError

ActivationCheckpointing: TypeAlias = Literal["block", "selective"] | Callable[[str, nn.Module], bool]


def check_activation_checkpointing(how: Any) -> None:
    """Refuse a value of the option `activation_checkpointing` that is none.

    Example:
        >>> check_activation_checkpointing("all")
        Traceback (most recent call last):
        ...
        lightning_tp.errors.TPError: `activation_checkpointing='all'`: use 'block', 'selective', a function (name, module) -> bool, or None.
    """
    if how not in (None, "block", "selective") and not callable(how):
        raise TPError(f"`activation_checkpointing={how!r}`: use 'block', 'selective', a function (name, module) -> bool, or None.")


def modules_to_checkpoint(model: nn.Module, blocks: Iterable[nn.Module], how: ActivationCheckpointing) -> list[nn.Module]:
    """Return the modules that are recomputed.

    Raises:
        TPError: if there are none, or a predicate chooses a module without a forward.
    """
    if not callable(how):
        if found := list(blocks):
            return found
        raise TPError(
            f"`activation_checkpointing={how!r}`: {type(model).__name__} has no repeated blocks (children of one container with the same class "
            "and shapes). Choose modules by a function: `activation_checkpointing=lambda name, module: isinstance(module, Layer)`."
        )
    named = [(name, m) for name, m in model.named_modules() if m is not model and how(name, m)]
    for name, module in named:
        if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            raise TPError(
                f"`activation_checkpointing`: `{name}` is a {type(module).__name__}, which is never called. Choose the modules in it."
            )
    if not named:
        raise TPError(
            "`activation_checkpointing`: the function chose no module. It is called with the name and the module of each, such as "
            f"{', '.join(f'{n!r}' for n, _ in list(model.named_modules())[1:4])}."
        )
    return [m for _, m in named]


def checkpoint_modules(modules: Iterable[nn.Module], axis: Axis, how: ActivationCheckpointing) -> None:
    """Save of these modules' forward what `how` says, and recompute the rest in the backward pass."""
    for module in modules:
        swap_class(module, _Checkpointed, _axis_of_block=axis, _selective=how == "selective")


class _Checkpointed(nn.Module):
    _axis_of_block: Axis
    _selective: bool

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if is_compiling():  # of code around it: that would have to be in one piece
            return outside(call_impl, self, *args, **kwargs)
        return call_impl(self, *args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return super().forward(*args, **kwargs)
        run = partial(run_checkpointed, self, super().forward)
        if any(_is_cache(a) for a in (*args, *kwargs.values())):
            run = partial(_run_with_caches, run, [])
        axis = self._axis_of_block
        contexts = partial(_contexts, axis, axis.seq_len, self._selective)
        return checkpoint(run, *args, use_reentrant=False, context_fn=contexts, **kwargs)


def _contexts(axis: Axis, seq_len: int | None, selective: bool) -> tuple[Any, Any]:
    """The contexts of the forward, which begins now, and of its recomputation."""
    device = DeviceState()
    if not selective:
        return contextlib.nullcontext(), _Repeatable(lambda: _nested(device.again(), _with_seq_len(axis, seq_len)))
    forward, recomputation = create_selective_checkpoint_contexts(partial(_policy, axis))
    return _nested(_sums_as_operators(axis), forward), _nested(
        device.again(), _with_seq_len(axis, seq_len), _sums_as_operators(axis), recomputation
    )


class _Repeatable:
    """A context that is made anew each time it is entered: a backward pass that is repeated recomputes again."""

    def __init__(self, make: Callable[[], AbstractContextManager[None]]) -> None:
        self.make = make
        self.entered: list[AbstractContextManager[None]] = []

    def __enter__(self) -> None:
        context = self.make()
        context.__enter__()
        self.entered.append(context)

    def __exit__(self, *error: Any) -> bool | None:
        return self.entered.pop().__exit__(*error)


@contextlib.contextmanager
def _with_seq_len(axis: Axis, seq_len: int | None) -> Iterator[None]:
    """Set the length of the sequence to that of the forward."""
    before, axis.seq_len = axis.seq_len, seq_len
    try:
        yield
    finally:
        axis.seq_len = before


@contextlib.contextmanager
def _nested(*contexts: Any) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield


# ------------------------------------------------------------------------------------------------------------ selective

_axes: WeakValueDictionary[int, Axis] = WeakValueDictionary()
_library = torch.library.Library("lightning_tp", "DEF")
_library.define("sum_over_ranks(Tensor x, int axis, bool scatter) -> Tensor")


def _sum_over_ranks(x: Tensor, axis: int, scatter: bool) -> Tensor:
    if scatter:
        return reduce_scatter(x, SEQUENCE_DIM, _axes[axis])
    return all_reduce(x.clone(memory_format=torch.contiguous_format), _axes[axis])


_library.impl("sum_over_ranks", _sum_over_ranks, "CompositeExplicitAutograd")


@contextlib.contextmanager
def _sums_as_operators(axis: Axis) -> Iterator[None]:
    """Make each sum over ranks one operator with one result, which can be saved: torch's own collectives write in place."""
    _axes[id(axis)] = axis
    before, axis.sum, axis.summing = axis.sum, partial(_sum_by_operator, id(axis)), False
    try:
        yield
    finally:
        axis.sum = before


def _sum_by_operator(axis: int, x: Tensor, scatter: bool) -> Tensor:
    out: Tensor = torch.ops.lightning_tp.sum_over_ranks(x, axis, scatter)
    return out


@lru_cache(maxsize=1)
def _expensive_operators() -> frozenset[Any]:
    aten = torch.ops.aten
    names = (
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_fused_attention_overrideable",
    )
    attention = [getattr(aten, name).default for name in names if hasattr(aten, name)]
    return frozenset([torch.ops.lightning_tp.sum_over_ranks.default, *attention])


def _drops_out(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether an attention kernel draws random numbers: if it is not run again, later draws of the block are other ones."""
    position = position_of_argument(op, "dropout_p")
    return position is not None and bool(kwargs.get("dropout_p", args[position] if len(args) > position else 0.0))


_MATMULS = frozenset([torch.ops.aten.mm.default, torch.ops.aten.addmm.default])


def _policy(axis: Axis, context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    if op in _expensive_operators() or (op in _MATMULS and not axis.summing):
        return CheckpointPolicy.PREFER_RECOMPUTE if _drops_out(op, args, kwargs) else CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


# ------------------------------------------------------------------------------------------------- key and value caches


def _is_cache(x: Any) -> bool:
    return hasattr(x, "get_seq_length")


def _run_with_caches(run: Callable[..., Any], first_arguments: list[tuple[Any, Any]], *args: Any, **kwargs: Any) -> Any:
    """Run a forward, and recompute it with the key/value caches among its arguments as they were before.

    A Hugging Face decoder with `use_cache=True` appends to them in each block: recomputed, it would find its own keys there.
    """
    if not first_arguments:
        first_arguments.append((_copy_of_caches(args), _copy_of_caches(kwargs)))
    else:
        args, kwargs = _copy_of_caches(first_arguments[0][0]), _copy_of_caches(first_arguments[0][1])
    return run(*args, **kwargs)


def _copy_of_caches(x: Any) -> Any:
    """Copy the containers and caches in arguments; tensors stay the same."""
    if isinstance(x, dict):
        return {k: _copy_of_caches(v) for k, v in x.items()}
    if type(x) in (list, tuple):
        return type(x)(_copy_of_caches(v) for v in x)
    if _is_cache(x):
        twin = copy.copy(x)
        twin.__dict__.update(_copy_of_caches(x.__dict__))
        return twin
    return x
