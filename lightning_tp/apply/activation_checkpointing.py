"""Activation checkpointing: what a module's forward keeps for the backward pass, and what is run again there.

| kind | kept | run again | collectives again, per block (with sequence parallelism / without) |
|---|---|---|---|
| `"block"` | the input of each block | all but the last row-wise product | 2 all-gathers, 1 reduce-scatter / 1 all-reduce |
| `"selective"` | also column-wise products, attention, sums over ranks | what is cheap, 1 product | 2 all-gathers / none |
| a predicate | the inputs of the modules that it chooses | these modules | those inside them, less a last sum |

"selective" does what torchtitan's does: torch's selective checkpointing, operator by operator. A row-wise product is not kept but what it adds
up to over the ranks: the product has the whole width and length on each rank, its sum is a shard. What is gathered is not kept for the same
reason. Products of two activations (attention that is written out) are run again, as Megatron-LM does it. It looks at each operator from Python,
which costs some ten microseconds: for models whose operators take longer than that. A backward pass over it can't be repeated (`retain_graph`).

State dict keys stay as they are, since no module is wrapped. Dropout is replayed (see `dropout.py`).
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache, partial
from typing import Any, Literal, TypeAlias
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from lightning_tp.core.comm.axis import SEQUENCE_DIM, Axis
from lightning_tp.core.comm.collectives import all_reduce, reduce_scatter
from lightning_tp.core.comm.transitions import outside
from lightning_tp.core.modules.swap_class import swap_class
from lightning_tp.core.ops.intercept import run_checkpointed
from lightning_tp.errors import TPError

ActivationCheckpointing: TypeAlias = Literal["block", "selective"] | Callable[[str, nn.Module], bool]


def check_activation_checkpointing(how: Any) -> None:
    """Refuse what is no kind of activation checkpointing.

    Example:
        >>> check_activation_checkpointing("all")
        Traceback (most recent call last):
        ...
        lightning_tp.errors.TPError: `activation_checkpointing='all'`: there are 'block', 'selective', a function (name, module) -> bool, and None.
    """
    if how not in (None, "block", "selective") and not callable(how):
        raise TPError(
            f"`activation_checkpointing={how!r}`: there are 'block', 'selective', a function (name, module) -> bool, and None."
        )


def modules_to_checkpoint(model: nn.Module, blocks: Iterable[nn.Module], how: ActivationCheckpointing) -> list[nn.Module]:
    """The modules that are run again.

    Raises:
        TPError: if there are none, or a predicate chooses what has no forward.
    """
    if not callable(how):
        if found := list(blocks):
            return found
        raise TPError(
            f"`activation_checkpointing={how!r}`: {type(model).__name__} has no repeated blocks (children of one container that are alike). Say "
            "what is run again by a function: `activation_checkpointing=lambda name, module: isinstance(module, Layer)`."
        )
    named = [(name, m) for name, m in model.named_modules() if m is not model and how(name, m)]
    for name, module in named:
        if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            raise TPError(
                f"`activation_checkpointing`: `{name}` is a {type(module).__name__}, which is never called. Choose what it holds."
            )
    if not named:
        raise TPError(
            "`activation_checkpointing`: the function chose no module. It is called with the name and the module of each, such as "
            f"{', '.join(f'{n!r}' for n, _ in list(model.named_modules())[1:4])}."
        )
    return [m for _, m in named]


def checkpoint_modules(modules: Iterable[nn.Module], axis: Axis, how: ActivationCheckpointing) -> None:
    """Let these modules keep for the backward what `how` says, and run again there."""
    for module in modules:
        swap_class(module, _Checkpointed, _axis_of_block=axis, _selective=how == "selective")


class _Checkpointed(nn.Module):
    _axis_of_block: Axis
    _selective: bool

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if is_compiling():  # of code around it, see `compiled.py`: that would have to be in one piece
            return outside(self._call_impl, *args, **kwargs)
        return self._call_impl(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return super().forward(*args, **kwargs)
        run = partial(run_checkpointed, self, super().forward)
        if any(hasattr(a, "get_seq_length") for a in (*args, *kwargs.values())):
            run = partial(_with_caches, run, [])
        axis = self._axis_of_block
        contexts = partial(_contexts, axis, axis.seq_len, self._selective)
        return checkpoint(run, *args, use_reentrant=False, context_fn=contexts, **kwargs)


def _contexts(axis: Axis, seq_len: int | None, selective: bool) -> tuple[Any, Any]:
    if not selective:
        return contextlib.nullcontext(), _as_then(axis, seq_len)
    first, again = create_selective_checkpoint_contexts(partial(_policy, axis))
    return _both(_keeping(axis), first), _both(_as_then(axis, seq_len), _keeping(axis), again)


@contextlib.contextmanager
def _as_then(axis: Axis, seq_len: int | None) -> Iterator[None]:
    """The length of the sequence at the time of the forward, while it is run again."""
    now, axis.seq_len = axis.seq_len, seq_len
    try:
        yield
    finally:
        axis.seq_len = now


@contextlib.contextmanager
def _both(*contexts: Any) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield


# ------------------------------------------------------------------------------------------------------------ selective

_axes: WeakValueDictionary[int, Axis] = WeakValueDictionary()
_library = torch.library.Library("lightning_tp", "DEF")
_library.define("sum_over_ranks(Tensor x, int axis, bool scatter) -> Tensor")


def _sum_over_ranks(x: Tensor, axis: int, scatter: bool) -> Tensor:
    over = _axes[axis]
    if scatter:
        return reduce_scatter(x, SEQUENCE_DIM, over)
    return all_reduce(x.clone(memory_format=torch.contiguous_format), over)


_library.impl("sum_over_ranks", _sum_over_ranks, "CompositeExplicitAutograd")


@contextlib.contextmanager
def _keeping(axis: Axis) -> Iterator[None]:
    """Sums over ranks are one operator with one result, which can be kept: torch's own write in place."""
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
def _kept() -> frozenset[Any]:
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


_PRODUCTS = frozenset([torch.ops.aten.mm.default, torch.ops.aten.addmm.default])


def _policy(axis: Axis, context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    if op in _kept() or (op in _PRODUCTS and not axis.summing):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


# ------------------------------------------------------------------------------------------------- key and value caches


def _with_caches(run: Callable[..., Any], before: list[tuple[Any, Any]], *args: Any, **kwargs: Any) -> Any:
    """The first time as it is, then with the key/value caches among the arguments as they were before the first time.

    A decoder of Hugging Face with `use_cache=True` appends to them in each block: run again, it would find its own keys there.
    """
    if not before:
        before.append((_as_it_is(args), _as_it_is(kwargs)))
    else:
        args, kwargs = _as_it_is(before[0][0]), _as_it_is(before[0][1])
    return run(*args, **kwargs)


def _as_it_is(x: Any) -> Any:
    """A copy of the containers and caches in it, of the same tensors."""
    if isinstance(x, dict):
        return {k: _as_it_is(v) for k, v in x.items()}
    if type(x) in (list, tuple):
        return type(x)(_as_it_is(v) for v in x)
    if hasattr(x, "get_seq_length"):
        twin = copy.copy(x)
        twin.__dict__.update(_as_it_is(x.__dict__))
        return twin
    return x
