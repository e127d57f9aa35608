"""Run two blocks of each kind, and put empty tensors instead of the outputs of all others, so that a step costs the same for any number of blocks.

Blocks are of a kind if they have the same code, shapes and settings, and inputs of the same shapes. The second of a kind represents the others:
its input was made by a block of the same kind, as theirs are. Each call of a block is a segment of the step of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.utils._pytree import tree_flatten, tree_unflatten

from lightning_tp._compat import patched
from lightning_tp.estimate.trace.step_trace import Tape

RUN = 2  # blocks of each kind


class SegmentRecorder(Protocol):
    """Records the step, segment by segment."""

    tapes: list[Tape]
    in_backward: bool

    def open_segment(self, block: str, representative: str | None = None) -> None:
        """Begin a segment of the pass that runs."""

    def close_segment(self) -> None:
        """End the segment that is open."""

    def empty(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Make a tensor that is counted."""


class _TensorKind(NamedTuple):
    shape: torch.Size
    dtype: torch.dtype
    requires_grad: bool


@dataclass
class _Kind:
    """Calls of blocks with the same code and inputs."""

    ran: list[str] = field(default_factory=list)  # names of the blocks that ran
    # of the second one, flattened: a tensor's kind, the index of the input that is handed on, or a value that is no tensor
    outputs: list[Any] = field(default_factory=list)
    spec: Any = None  # of the outputs' tree


class _Input(NamedTuple):
    place: int


class RepeatedBlocks:
    """Decides for each call of a block whether it runs, and opens its segment; blocks of one of the `kinds` can represent each other."""

    def __init__(self, recorder: SegmentRecorder, blocks: Mapping[str, nn.Module], kinds: Mapping[str, Any]) -> None:
        self.recorder = recorder
        self.blocks, self.kinds = blocks, kinds
        self.followed: dict[str, str] = {}  # block -> the block that ran instead of it
        self._seen: dict[Any, _Kind] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Intercept the calls of all blocks."""
        undo = [patched(block, "forward", self._intercepted(name, block.forward)) for name, block in self.blocks.items()]
        try:
            yield
        finally:
            for restore in undo:
                restore()

    def _intercepted(self, name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        recorder = self.recorder

        def run(*args: Any, **kwargs: Any) -> Any:
            if recorder.in_backward:  # recomputed
                return forward(*args, **kwargs)
            inputs, spec = tree_flatten((args, kwargs))
            kind = self._seen.setdefault((self.kinds[name], spec, tuple(map(_described, inputs))), _Kind())
            runs = name in kind.ran or len(kind.ran) < RUN
            self.followed[name] = name if runs else kind.ran[RUN - 1]
            self._end_gap(name)
            recorder.open_segment(name, None if runs else kind.ran[RUN - 1])
            out = self._run(name, kind, inputs, forward, args, kwargs) if runs else self._stand_in(kind, inputs)
            recorder.close_segment()
            recorder.open_segment("")
            self._watch_backward(name, tree_flatten(out)[0])
            return out

        return run

    def _run(self, name: str, kind: _Kind, inputs: list[Any], forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        kind.ran.append(name)
        out = forward(*args, **kwargs)
        if len(kind.ran) == RUN:
            outputs, kind.spec = tree_flatten(out)
            kind.outputs = [_output(t, inputs) for t in outputs]
        return out

    def _stand_in(self, kind: _Kind, inputs: list[Any]) -> Any:
        """Return outputs like those of the representative."""
        sources = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
        wanted = tuple(o for o in kind.outputs if isinstance(o, _TensorKind))
        made = iter(_StandIn.apply(self.recorder, wanted, *sources))
        outputs = [
            inputs[o.place] if isinstance(o, _Input) else next(made) if isinstance(o, _TensorKind) else o for o in kind.outputs
        ]
        return tree_unflatten(outputs, kind.spec)

    def _end_gap(self, name: str) -> None:
        """Give what ran since the block before to that block; behind one that did not run, mark it as counted already."""
        self.recorder.close_segment()
        tapes = self.recorder.tapes
        if len(tapes) < 2:
            return
        block, gap = tapes[-2:]
        if gap.block or not block.block or block.block.rpartition(".")[0] != name.rpartition(".")[0]:
            return
        if block.representative is None:
            tapes.pop()
            block.events.extend(gap.events)
        else:
            tapes[-1] = replace(gap, duplicate=True)

    def _watch_backward(self, name: str, outputs: list[Any]) -> None:
        """Open the block's segment of the backward when a gradient reaches its output."""
        recorder = self.recorder

        def begin(grad: Tensor) -> None:
            if not (recorder.tapes[-1].phase == "backward" and recorder.tapes[-1].block == name):
                ran = self.followed[name]
                recorder.close_segment()
                recorder.open_segment(name, None if ran == name else ran)

        first = next((t for t in outputs if isinstance(t, Tensor) and t.requires_grad and not t.is_leaf), None)
        if first is not None:
            first.register_hook(begin)


class _StandIn(Function):
    """Tensors like the outputs of a block, made from its inputs; with a gradient for each of these."""

    @staticmethod
    def forward(ctx: Any, recorder: SegmentRecorder, wanted: tuple[_TensorKind, ...], *sources: Tensor) -> tuple[Tensor, ...]:
        ctx.kinds = [(s.shape, s.dtype) for s in sources]
        ctx.recorder = recorder
        outputs = tuple(recorder.empty(kind.shape, kind.dtype) for kind in wanted)
        ctx.mark_non_differentiable(*(t for t, kind in zip(outputs, wanted) if not kind.requires_grad))
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        return (None, None, *(ctx.recorder.empty(shape, dtype) for shape, dtype in ctx.kinds))


def _described(x: Any) -> Any:
    """What code can see of an input, to compare."""
    if isinstance(x, Tensor):
        return _TensorKind(x.shape, x.dtype, x.requires_grad)
    return x if isinstance(x, (int, float, str, bool, type(None))) else type(x)


def _output(x: Any, inputs: list[Any]) -> Any:
    place = next((i for i, t in enumerate(inputs) if t is x), None)
    return _Input(place) if place is not None else _described(x) if isinstance(x, Tensor) else x
