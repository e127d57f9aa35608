"""Private parts of torch for modules, optimizers and the compiler, and of what is built on them."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import OptState
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


call_impl: Any = torch.nn.Module._call_impl  # `Module.__call__` without what `Module.compile` puts in front: hooks and `forward`


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


# private: `_group_tensors_by_device_and_dtype`. Without it plain tensors and DTensors could not be in one optimizer, or clipped together.
def wrap_grouping(make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace the function by which optimizers and clipping group tensors for functions of lists by `make(torch's own)`, once."""
    from torch.nn.utils import clip_grad
    from torch.optim import optimizer

    for place in (optimizer, clip_grad):
        own: Any = place._group_tensors_by_device_and_dtype
        if not hasattr(own, "_tp_original"):
            wrapped: Any = make(own)
            wrapped._tp_original = own
            place._group_tensors_by_device_and_dtype = wrapped  # type: ignore[attr-defined]


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


def own_parameters(module: torch.nn.Module) -> dict[str, torch.nn.Parameter | None]:
    """Return the parameters that stand at a module itself, by attribute; what is put there takes their place."""
    return module._parameters


def own_buffers(module: torch.nn.Module) -> dict[str, Tensor | None]:
    """Return the buffers that stand at a module itself, by attribute; what is put there takes their place."""
    return module._buffers


def is_persistent(module: torch.nn.Module, buffer: str) -> bool:
    """Return whether a module's own buffer is part of its state dict."""
    return buffer not in module._non_persistent_buffers_set


# replace all tensors of a module and of those in it by what a function returns for each
apply_to_tensors = torch.nn.Module._apply


def ignored_by_transformers(model: torch.nn.Module) -> list[str]:
    """Return the patterns of names that transformers passes over in a checkpoint, for the models of it that are inside `model`."""
    patterns = (getattr(m, "_keys_to_ignore_on_load_unexpected", None) or () for m in model.modules())
    return [*(pattern for each in patterns for pattern in each), r"rotary_emb\.inv_freq"]


def keep_foreach(*classes: Any) -> None:
    """Let optimizers choose their foreach and fused variants for parameters of these classes, as for `nn.Parameter`."""
    from torch.optim.optimizer import _foreach_supported_types

    for cls in classes:
        if cls not in _foreach_supported_types:
            _foreach_supported_types.append(cls)


@contextmanager
def without_global_optimizer_hooks() -> Iterator[None]:
    """Step optimizers without the hooks that were registered for all of them."""
    from torch.optim import optimizer

    tables: tuple[Any, ...] = (optimizer._global_optimizer_pre_hooks, optimizer._global_optimizer_post_hooks)
    kept = [dict(table) for table in tables]
    for table in tables:
        table.clear()
    try:
        yield
    finally:
        for table, hooks in zip(tables, kept, strict=True):
            table.update(hooks)


# private: `torch.utils.checkpoint._checkpoint_without_reentrant_generator`. Without it code that a user checkpoints is recomputed on full sizes.
@functools.cache
def wrap_recomputed(wrap: Callable[[Callable[..., Any], Any], Callable[..., Any]]) -> None:
    """Have `torch.utils.checkpoint.checkpoint` recompute `wrap(function, frame)`, where `frame` is that of the call of `checkpoint`."""
    module: Any = torch.utils.checkpoint
    generator, apply = module._checkpoint_without_reentrant_generator, module.CheckpointFunction.apply

    def without_reentry(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return generator(wrap(function, sys._getframe(1)), *args, **kwargs)

    def with_reentry(function: Callable[..., Any], *args: Any) -> Any:
        return apply(wrap(function, sys._getframe(1)), *args)

    module._checkpoint_without_reentrant_generator = without_reentry
    module.CheckpointFunction.apply = with_reentry


# private: `torch.autograd.function._SingleLevelFunction`, the base class whose `apply` `Function.apply` calls; code may have bound the latter before.
def intercept_functions(handler: Callable[[Any, Callable[..., Any], Any, Any], Any]) -> Callable[[], None]:
    """Have `handler(cls, apply, args, frame)` called for each `autograd.Function` but torch's and this package's; return what undoes it."""
    base: Any = torch.autograd.function._SingleLevelFunction

    def apply(cls: Any, *args: Any) -> Any:
        direct = super(base, cls).apply
        if cls.__module__.partition(".")[0] in ("torch", "lightning_tp"):
            return direct(*args)
        return handler(cls, direct, args, sys._getframe(1))

    return patched(base, "apply", classmethod(apply))
