"""`torch.compile` of a split model: each repeated block by itself, after its styles and before FSDP2, as torchtitan does it.

A block is compiled in pieces. What stands between them runs as it would without `torch.compile`:

| what | why |
|---|---|
| the collectives of `comm.py` | all ranks make them in the order of the program; a compiler may move what is inside of a graph |
| modules whose calls are changed (`styles/calls/rewritten_calls.py`) | a call is known by its call site, which compiled code does not have |
| modules that draw random numbers for shards (`dropout.py`) | the same, and they have a stream of their own |
| training steps that are observed for random numbers (the 1st, 2nd, 3rd, 5th, ..) | every call is looked at |
| split logits (`logits.py`) | they are no plain tensors |

Alike blocks share the compiled code. Where the compiler fails, that piece runs as it is, on this rank alone if need be, with one line of
warning: no collective is made twice or left out. Where torch can't even make the pieces and has run some of a block by then, it is an error.

What users have compiled themselves (`torch.compile(model)`, `model.compile()`, `torch.compile(LitModule())`) is taken back before the model is
split, and compiled in this way with the same backend.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch.distributed as dist
from torch import nn

from lightning_tp._compat import backend_of, compile_function, function_modes, is_compiler_error, take_compiled
from lightning_tp.core.comm import transitions
from lightning_tp.core.modules.swap_class import swap_class
from lightning_tp.core.ops.random_numbers import RandomCallPolicy
from lightning_tp.errors import TPError
from lightning_tp.styles.calls.rewritten_calls import changes_calls

Compile = bool | str | Callable[..., Any]


def check_compile(how: Any) -> None:
    """Refuse a backend that there is not.

    Raises:
        TPError: it names those that there are.
    """
    if isinstance(how, bool) or (callable(how) and not isinstance(how, type)):
        return
    try:
        backend_of(str(how))
    except ValueError as error:
        raise TPError(f"`compile={how!r}`: {error}; True is 'inductor', and a function like a backend is one.") from None


class BlockCompiler:
    """How the blocks of one model are compiled.

    Args:
        backend: the name of one of `torch.compile`'s, or a function like one.
        limit: how often one piece of code may be compiled anew.
    """

    def __init__(self, backend: str | Callable[..., Any], limit: int) -> None:
        self.inner = backend_of(backend) if isinstance(backend, str) else backend
        self.limit = limit
        self.draws: RandomCallPolicy | None = None
        self.failed = False
        self.off = False
        self._compiled: dict[Callable[..., Any], Callable[..., Any]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> BlockCompiler:
        memo[id(self)] = twin = BlockCompiler(self.inner, self.limit)
        twin.draws = copy.deepcopy(self.draws, memo)
        return twin

    def compiled(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """The compiled function of a class of blocks; it is not bound to a module, so that modules can be copied."""
        if forward not in self._compiled:
            self._compiled[forward] = compile_function(forward, self.backend, self.limit)
        return self._compiled[forward]

    def backend(self, graph: Any, inputs: Any) -> Any:
        """What dynamo calls with each piece: where the compiler fails, the piece as it is."""
        if not self.failed:
            try:
                return self.inner(graph, inputs)
            except Exception as error:  # whatever a compiler raises
                self.fail(error)
        return graph.forward

    def fail(self, error: Exception) -> None:
        """Say once that this is not compiled, and why."""
        if not self.failed:
            said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
            where = f" (rank {dist.get_rank()})" if dist.is_initialized() else ""
            warnings.warn(f"`compile`: goes on without{where}: {type(error).__name__}: {said}"[:400], stacklevel=2)
        self.failed = True

    def is_looked_into(self) -> bool:
        """Whether something looks at every call now, which it could not in compiled code."""
        draws = self.draws
        if draws is not None and (draws.on or draws.running):
            return True
        return any(changes_calls(mode) for mode in function_modes())


def compile_blocks(blocks: Iterable[nn.Module], how: Compile) -> BlockCompiler:
    """Let each of these compile itself when it first runs; state dict keys stay as they are."""
    blocks = list(blocks)
    if not blocks:
        warnings.warn("`compile`: there are no repeated blocks to compile; the model runs as it is.", stacklevel=2)
    of = BlockCompiler("inductor" if how is True else how, limit=max(8, len(blocks) + 4))  # type: ignore[arg-type]
    for block in blocks:
        swap_class(block, _Compiled, _compiling=of)
    return of


class _Compiled(nn.Module):
    _compiling: BlockCompiler

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        of = self._compiling
        if of.off or "_sites" in self.__dict__ or of.is_looked_into():
            return super().forward(*args, **kwargs)
        before = transitions.graph_breaks
        try:
            return of.compiled(super().forward.__func__)(self, *args, **kwargs)  # type: ignore[attr-defined]
        except Exception as error:
            if not is_compiler_error(error):
                raise
            if transitions.graph_breaks != before:
                raise TPError(
                    f"`compile`: failed in the middle of a block, when some of its collectives had been made: {type(error).__name__}: {error}. "
                    "Leave `compile` out for this model."
                ) from error
            of.fail(error)
            of.off = True
        return super().forward(*args, **kwargs)


def unwrap_compiled(model: nn.Module) -> Any:
    """Undo what users have compiled in a model; says so once. Before a plan is made.

    Returns:
        The backend of what was compiled, or None.
    """
    found = take_compiled(model)
    if not found:
        return None
    name, backend = next(iter(found.items()))
    if not dist.is_initialized() or dist.get_rank() == 0:
        warnings.warn(
            f"`{name or 'the model'}` was compiled as a whole, and a split model is compiled block by block: done so, as by `compile=True`.",
            stacklevel=2,
        )
    return backend
