"""`torch.compile` of a split model: each repeated block by itself, after its styles are bound and before FSDP2, as torchtitan does it.

A block is compiled in pieces. What stands between them runs uncompiled:

| what | why |
|---|---|
| the collectives of `core/comm` | all ranks call them in the order of the program; a compiler may reorder what is inside of a graph |
| modules whose calls are changed (`styles/calls`) | a call is known by its place in the code, which compiled code has not |
| modules that draw random numbers for shards (`core/ops/random_numbers.py`) | the same, and they have a random stream of their own |
| training steps that are observed for random numbers (the 1st, 2nd, 3rd, 5th, ..) | every call is intercepted |
| vocab-parallel logits (`core/ops/split_logits.py`) | they are no plain tensors |

Blocks of the same code share the compiled code. Where the compiler fails, that piece runs uncompiled, if need be on this rank alone, with one
warning: no collective is called twice or left out. Where torch can't even make the pieces, after some of a block has run, it is an error.

What users have compiled themselves (`torch.compile(model)`, `model.compile()`, `torch.compile(LitModule())`, a `training_step`) is unwrapped
before the model is split, and compiled in this way with the same backend.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch.distributed as dist
from torch import nn

from lightning_tp._compat import backend_of, compile_function, function_modes, is_compiler_error, take_compiled
from lightning_tp.core.comm import transitions
from lightning_tp.core.modules.swap_class import swap_class
from lightning_tp.core.ops.intercept import is_intercepting
from lightning_tp.errors import TPError
from lightning_tp.styles.calls.rewritten_calls import changes_calls

Compile = bool | str | Callable[..., Any]


def check_compile(how: Any) -> None:
    """Refuse a value of the option `compile` that is no backend.

    Raises:
        TPError: names the backends there are.
    """
    if isinstance(how, bool) or (callable(how) and not isinstance(how, type)):
        return
    try:
        backend_of(str(how))
    except ValueError as error:
        raise TPError(
            f"`compile={how!r}`: unknown backend. Use True for 'inductor', the name of a backend ({error}), or a function that is one."
        ) from None


class BlockCompiler:
    """Compiles the blocks of one model.

    Args:
        backend: the name of one of `torch.compile`'s, or a function that is one.
        limit: how often one piece of code may be recompiled.
    """

    def __init__(self, backend: str | Callable[..., Any], limit: int) -> None:
        self.inner_backend = backend_of(backend) if isinstance(backend, str) else backend
        self.limit = limit
        self.failed = False  # new pieces run uncompiled
        self.off = False  # all blocks run uncompiled
        self._compiled: dict[Callable[..., Any], Callable[..., Any]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> BlockCompiler:
        memo[id(self)] = twin = BlockCompiler(self.inner_backend, self.limit)
        return twin

    def compiled(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Return the compiled function of a class of blocks; it is not bound to a module, so that modules can be copied."""
        if forward not in self._compiled:
            self._compiled[forward] = compile_function(forward, self.backend, self.limit)
        return self._compiled[forward]

    def backend(self, graph: Any, inputs: Any) -> Any:
        """Compile one piece, as dynamo asks for it; where the compiler fails, return the piece as it is."""
        if not self.failed:
            try:
                return self.inner_backend(graph, inputs)
            except Exception as error:  # whatever a compiler raises
                self.warn_once(error)
        return graph.forward

    def warn_once(self, error: Exception) -> None:
        """Warn that this model runs uncompiled from now on, and why."""
        if not self.failed:
            reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
            where = f" on rank {dist.get_rank()}" if dist.is_initialized() else ""
            warnings.warn(f"`compile`: failed, runs uncompiled{where}: {type(error).__name__}: {reason}"[:400], stacklevel=2)
        self.failed = True


def compile_blocks(blocks: Iterable[nn.Module], how: Compile) -> BlockCompiler:
    """Compile each of these modules when it first runs; state dict keys stay as they are."""
    blocks = list(blocks)
    if not blocks:
        warnings.warn("`compile`: the model has no repeated blocks to compile, and runs uncompiled.", stacklevel=2)
    compiler = BlockCompiler("inductor" if how is True else how, limit=max(8, len(blocks) + 4))  # type: ignore[arg-type]
    for block in blocks:
        swap_class(block, _Compiled, _compiler=compiler)
    return compiler


class _Compiled(nn.Module):
    _compiler: BlockCompiler

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        compiler = self._compiler
        if compiler.off or _calls_are_intercepted():
            return super().forward(*args, **kwargs)
        before = transitions.graph_breaks
        try:
            return compiler.compiled(super().forward.__func__)(self, *args, **kwargs)  # type: ignore[attr-defined]
        except Exception as error:
            if not is_compiler_error(error):
                raise
            if transitions.graph_breaks != before:
                raise TPError(
                    f"`compile`: failed in the middle of a block, after some of its collectives: {type(error).__name__}: {error}. "
                    "Leave `compile` out for this model."
                ) from error
            compiler.warn_once(error)
            compiler.off = True
        return super().forward(*args, **kwargs)


def _calls_are_intercepted() -> bool:
    """Whether something sees every call now, which it could not in compiled code."""
    return is_intercepting() or any(changes_calls(mode) for mode in function_modes())


def unwrap_compiled(model: nn.Module) -> Any:
    """Undo what users have compiled in a model, before a plan is made; warn once that blocks are compiled instead.

    Returns:
        The backend of what was compiled, or None.
    """
    found = take_compiled(model)
    if not found:
        return None
    name, backend = next(iter(found.items()))
    if not dist.is_initialized() or dist.get_rank() == 0:
        warnings.warn(
            f"`{name or 'the model'}` was compiled as a whole, but a split model is compiled block by block: doing that, as with `compile=True`.",
            stacklevel=2,
        )
    return backend
