"""Follow one step of a model on the meta device: what is alive at any time, what is computed, what is sent. One block of a kind is followed.

The model runs forward and backward with the shapes of one rank. A `TorchDispatchMode` sees every operation: it counts the bytes of the
storages that are
alive, by the module that made them, and writes down products, the bytes that other kernels read and write, and collectives.

A step falls into pieces: from where a block begins to where the next one does, forward and backward, and what lies before, between and
after. Of blocks
of a kind (same class, shapes, settings and inputs) the first two run; in the place of each further one stands an empty tensor, and its
pieces are those of the
second one, which has what a block in the middle has: an input that its predecessor has made. So the cost does not depend on how many there are.

Not seen: code that compiles, custom CUDA kernels without a meta implementation, and what allocators round up.
"""

from __future__ import annotations

import sys
import weakref
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.utils._pytree import tree_flatten, tree_unflatten

from lightning_tp._compat import sequence_number, sequence_number_of_backward
from lightning_tp.core.comm.axis import Axis
from lightning_tp.core.comm.fake_world import FakeGroup
from lightning_tp.core.ops.split_logits import SplitLogits
from lightning_tp.errors import TPError
from lightning_tp.estimate.trace.device_kernels import attention_flops
from lightning_tp.estimate.trace.steps import ForwardEvent, ForwardLog
from lightning_tp.infer.follow.meta import Values

Phase = Literal["forward", "recompute", "backward"]
EMPTY = frozenset({"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "empty_permuted"})
AS_MANY = 2  # blocks of a kind that run


class Op(NamedTuple):
    """A kernel, or some that are equal.

    Args:
        kind: "product", "attention", or "other" (bound by memory).
        name: of the operator.
        module: whose forward, or the backward of whose forward, it is.
        phase: "forward", "recompute" or "backward".
        flops: of one; multiply-adds count two. Causal attention counts in full.
        work: the part of `flops` that has to be done (half, for causal attention).
        bytes: read and written by one.
        shape: (batch, m, n, k) of a product; () otherwise.
        dtype: of its operands.
    """

    kind: str
    name: str
    module: str
    phase: Phase
    flops: int
    work: int
    bytes: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class Sent(NamedTuple):
    """A collective on the tensor-parallel axis, as a rank calls it.

    Args:
        kind: "all-reduce", "all-gather" or "reduce-scatter".
        bytes: of the whole tensor: what is summed, or what all shards are together.
        module: around which it happens.
        phase: as for `Op`.
    """

    kind: str
    bytes: int
    module: str
    phase: Phase


Label = tuple[str, str]  # (module, "kept" | "backward" | "gradient")
Levels = dict[Label, int]
Event = tuple[str, Any] | tuple[str, Any, int]  # ("op" | "fused", Op), ("sent", Sent), ("bytes", Label, change), ("end", None)


@dataclass
class Segment:
    """A stretch of the step.

    Args:
        block: that it is about; "" for what lies outside of blocks.
        phase: "forward" or "backward".
        like: the block that was followed for this one; None if it was followed itself.
        start, peak, end: bytes alive, by who made them: at its start, when they are most, and at its end (gradients of the block included).
        freed: bytes of the block's parameter gradients, which FSDP2 takes away at the end.
        again: it lies behind a block that was not followed, and is part of what is counted for that already.
        ops: how often each kernel runs.
        fused: the same with kernels between products run together, as a compiler does it.
        sent: how often each collective runs.
        tape: all that these were counted from, in order: bytes that begin (above 0) or end to be alive, kernels, collectives,
            and where `end` was.
    """

    block: str
    phase: Literal["forward", "backward"]
    like: str | None = None
    start: Levels = field(default_factory=dict)
    peak: Levels = field(default_factory=dict)
    end: Levels = field(default_factory=dict)
    freed: int = 0
    again: bool = False
    ops: Counter[Op] = field(default_factory=Counter)
    fused: Counter[Op] = field(default_factory=Counter)
    sent: Counter[Sent] = field(default_factory=Counter)
    tape: list[Event] = field(default_factory=list, repr=False)

    def kernel(self, op: Op) -> None:
        """One that runs alone, if nothing is compiled."""
        self.ops[op] += 1
        self.tape.append(("op", op))

    def compiled(self, op: Op) -> None:
        """One as a compiler makes it."""
        self.fused[op] += 1
        self.tape.append(("fused", op))

    def collective(self, sent: Sent) -> None:
        """One that is called."""
        self.sent[sent] += 1
        self.tape.append(("sent", sent))


@dataclass
class StepTrace:
    """What one step showed.

    Args:
        pieces: in their order; those of blocks that were not followed name the one that stands for them.
        followed: block -> the block that was followed for it (itself, if it was).
        gradients: bytes of each parameter's gradient, by name.
        steps: the modules of the forward in the order in which they ran.
        let_go: bytes that ended to be alive with the forward, by who made them: weights that autocast has cast and nothing has saved.
    """

    pieces: list[Segment]
    followed: dict[str, str]
    gradients: dict[str, int]
    steps: tuple[ForwardEvent, ...] = ()
    let_go: Levels = field(default_factory=dict)

    def of(self, piece: Segment) -> Segment:
        """The piece that was followed for this one."""
        return piece if piece.like is None else self._followed[piece.like, piece.phase]

    @cached_property
    def _followed(self) -> dict[tuple[str, str], Segment]:
        found: dict[tuple[str, str], Segment] = {}
        for p in self.pieces:
            if p.like is None:
                found.setdefault((p.block, p.phase), p)
        return found


def alone(rank: int, size: int) -> Axis:
    """The tensor-parallel axis as this rank sees it, with nobody else there."""
    group = FakeGroup(rank, size)
    return Axis(group)


class OpRecorder(Values):
    """Sees every operation of a step.

    Args:
        model: on the meta device, with the shards of one rank.
        blocks: name -> module.
        kinds: name -> what blocks have in common for which one can stand.
        group: of the tensor-parallel axis.
    """

    def __init__(self, model: nn.Module, blocks: Mapping[str, nn.Module], kinds: Mapping[str, Any], group: FakeGroup) -> None:
        super().__init__(model)
        self.model = model
        self.blocks, self.kinds = blocks, kinds
        self.piece = Segment("", "forward")
        self.pieces = [self.piece]
        self.followed: dict[str, str] = {}
        self.in_backward = False
        self.failed: str | None = None  # the module whose forward raised, the innermost
        self.walk = ForwardLog()
        self.levels: Levels = {}
        self.total = self.most = 0
        self.alive: dict[int, tuple[Any, Label, int]] = {}
        self.uncounted = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
        self.places: list[tuple[int, str]] = [(0, "")]  # from which sequence number on nodes belong to which module
        self.gradients: dict[str, int] = {}
        self.numbers: dict[int, int] = {}  # of storages that are alive; an address is used again, a number is not
        self.born = 0
        self._fresh: set[int] = set()  # storages written since the last product
        self._read: dict[int, int] = {}
        self._written: dict[int, int] = {}
        self._run = ("", "forward")
        self._seen: dict[Any, list[str]] = {}
        self._made: dict[Any, Any] = {}  # what the second block of a kind gave
        self._names_of: dict[str, list[nn.Parameter]] = {
            name: [p for p in block.parameters() if p.requires_grad] for name, block in blocks.items()
        }
        self.run_again: Callable[[], None] = lambda: None  # called when something has been run again
        group.note = self.note_sent

    # ------------------------------------------------------------------------------------------------------- places

    @contextmanager
    def following(self) -> Iterator[None]:
        """While the model runs."""
        names = {id(m): n for n, m in self.model.named_modules()}
        register = nn.modules.module
        handles: list[Any] = [
            register.register_module_forward_pre_hook(lambda m, x: self._enter(names.get(id(m)), x)),
            register.register_module_forward_hook(lambda m, _, o: self._leave(names.get(id(m)), o), always_call=True),
        ]
        for name, p in self.model.named_parameters():
            if p.requires_grad:
                handles.append(p.register_post_accumulate_grad_hook(lambda p, n=name: self._has_gradient(n, p)))
        kept = [(block, block.__dict__.get("forward")) for block in self.blocks.values()]
        for name, block in self.blocks.items():
            block.__dict__["forward"] = self._block(name, block.forward)
        try:
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()
            for block, forward in kept:
                if forward is None:
                    del block.__dict__["forward"]
                else:
                    block.__dict__["forward"] = forward
            self._close()
            for finalizer, _, _ in self.alive.values():
                finalizer.detach()

    def _enter(self, name: str | None, inputs: Any) -> None:
        self.stack.append(self.stack[-1] if name is None else name)
        if not self.in_backward:
            self.places.append((sequence_number(), self.stack[-1]))
            if name is not None:
                self.walk.enter(name, inputs)

    def _leave(self, name: str | None, output: Any) -> None:
        if name is not None and not self.in_backward:
            self.walk.leave(name, output)
        if self.failed is None and sys.exc_info()[1] is not None:
            self.failed = self.stack[-1]
        self.stack.pop()
        if self.in_backward and len(self.stack) == 1:
            self.run_again()
        if not self.in_backward:
            self.places.append((sequence_number(), self.stack[-1]))

    def begin_backward(self) -> None:
        """The loss is there."""
        self._close()
        self.in_backward = True
        self._open(Segment("", "backward"))

    @property
    def where(self) -> tuple[str, Phase]:
        """(module, phase) of what runs now."""
        if not self.in_backward:
            return self.stack[-1], "forward"
        if len(self.stack) > 1:
            return self.stack[-1], "recompute"
        number = sequence_number_of_backward()
        if number is None or number > self.places[-1][0]:
            return "", "backward"
        return self.places[bisect_right(self.places, number, key=lambda p: p[0]) - 1][1], "backward"

    def _close(self) -> None:
        self._end_run()
        self.piece.end = dict(self.levels)
        self.piece.tape.append(("end", None))
        if self.piece.phase == "backward" and self.piece.block:
            before = self.total
            for p in self._names_of[self.piece.block]:
                p.grad = None
            self.piece.freed = before - self.total

    def _open(self, piece: Segment) -> None:
        self.piece = piece
        self.pieces.append(piece)
        piece.start, piece.peak, self.most = dict(self.levels), dict(self.levels), self.total

    # ------------------------------------------------------------------------------------------------------- blocks

    def _block(self, name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if self.in_backward:  # run again
                return forward(*args, **kwargs)
            given, spec = tree_flatten((args, kwargs))
            key = (self.kinds[name], spec, tuple(_described(x) for x in given))
            done = self._seen.setdefault(key, [])
            if name in done or len(done) < AS_MANY:
                done.append(name)
                self.followed[name] = name
                self._next_block(name)
                self._open(Segment(name, "forward"))
                out = forward(*args, **kwargs)
                outs, out_spec = tree_flatten(out)
                if len(done) == AS_MANY:
                    places = [next((j for j, x in enumerate(given) if x is t), None) for t in outs]
                    self._made[key] = ([_described(t) if isinstance(t, Tensor) else t for t in outs], places, out_spec)
            else:
                like = done[AS_MANY - 1]
                self.followed[name] = like
                self._next_block(name)
                self._open(Segment(name, "forward", like))
                out = self._stand_in(key, given)
                outs = tree_flatten(out)[0]
            self._close()
            self._open(Segment("", "forward"))
            first = next((t for t in outs if isinstance(t, Tensor) and t.requires_grad and not t.is_leaf), None)
            if first is not None:
                first.register_hook(lambda grad: self._begin_backward_of(name))
            return out

        return run

    def _next_block(self, name: str) -> None:
        """What ran since the block before this one belongs to that; where that is not followed, it is not counted a second time."""
        self._close()
        if len(self.pieces) < 2:
            return
        last, between = self.pieces[-2:]
        if between.block or not last.block or last.block.rpartition(".")[0] != name.rpartition(".")[0]:
            return
        if last.like is None:
            self.pieces.pop()
            last.end = between.end
            if sum(between.peak.values()) > sum(last.peak.values()):
                last.peak = between.peak
            last.ops += between.ops
            last.fused += between.fused
            last.sent += between.sent
            last.tape += between.tape
        else:
            between.again = True

    def _stand_in(self, key: Any, given: list[Any]) -> Any:
        described, places, spec = self._made[key]
        sources = [x for x in given if isinstance(x, Tensor) and x.requires_grad]
        wanted = [d for d, at in zip(described, places) if at is None and isinstance(d, tuple)]
        made = iter(_StandIn.apply(self, tuple(wanted), *sources))
        outs = [given[at] if at is not None else next(made) if isinstance(d, tuple) else d for d, at in zip(described, places)]
        return tree_unflatten(outs, spec)

    def _begin_backward_of(self, name: str) -> None:
        if self.piece.phase == "backward" and self.piece.block == name:
            return
        self._close()
        like = self.followed[name]
        self._open(Segment(name, "backward", None if like == name else like))

    def _has_gradient(self, name: str, p: nn.Parameter) -> None:
        grad = p.grad
        assert grad is not None
        self.gradients[name] = grad.numel() * grad.itemsize
        found = self.alive.get(grad.untyped_storage()._cdata)
        if found is not None:
            key = grad.untyped_storage()._cdata
            self._count(found[1], -found[2])
            label = (name, "gradient")
            self.alive[key] = (found[0], label, found[2])
            self._count(label, found[2])

    # ---------------------------------------------------------------------------------------------------- operations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(t, SplitLogits) for t in types):
            return NotImplemented  # what it does with its own columns comes by
        if func is torch.ops.aten.embedding.default:
            self._looks_up(*args[:2])
        out = super().__torch_dispatch__(func, types, args, kwargs or {})
        with torch.utils._python_dispatch._disable_current_modes():
            outs = [t for t in tree_flatten(out)[0] if isinstance(t, Tensor)]
            given = tree_flatten((args, kwargs or {}))[0]
            self._operation(func, [t for t in given if isinstance(t, Tensor)], outs, any(x is True for x in given))
        return out

    def _looks_up(self, table: Tensor, index: Tensor) -> None:
        """On the meta device, nothing complains about rows that a table does not have.

        Raises:
            TPError: where the index is known, such as positions.
        """
        known = self.values.get(id(index))
        with torch.utils._python_dispatch._disable_current_modes():
            last = int(known[1].max()) if known is not None and known[1].numel() else 0
        if last >= table.shape[0]:
            raise TPError(
                f"`{self.stack[-1] or 'the model'}` is asked for row {last} of a table of {table.shape[0]:,} rows. If these are positions, the "
                f"sequence is too long for this model (`seq`); if they are tokens, the inputs are not for its vocabulary."
            )

    def keep_values(self, func: Any, args: Any, kwargs: Any, out: Any, tensors: list[Tensor]) -> None:
        if func.overloadpacket.__name__ in EMPTY:
            return
        super().keep_values(func, args, kwargs, out, tensors)
        for t in tree_flatten(out)[0]:
            known = self.values.get(id(t))
            if known is not None and known[0] is t:  # a value is known as long as its tensor lives, and does not keep it alive
                self.values[id(t)] = (None, known[1])  # type: ignore[assignment]
                weakref.finalize(t, self.values.pop, id(t), None).atexit = False

    def empty(self, shape: Any, dtype: torch.dtype) -> Tensor:
        """A tensor that is counted, as of the module that runs."""
        with torch.utils._python_dispatch._disable_current_modes():
            t = torch.empty(shape, dtype=dtype, device="meta")
            where, phase = self.where
            self._born(t.untyped_storage(), (where, "backward" if phase == "backward" else "kept"))
        return t

    def _operation(self, func: Any, ins: list[Tensor], outs: list[Tensor], flag: bool) -> None:
        where, phase = self.where
        before = {t.untyped_storage()._cdata for t in ins}
        new = []
        for t in outs:
            storage = t.untyped_storage()
            if storage._cdata in before or storage._cdata in self.uncounted or storage._cdata in self.alive:
                continue
            new.append(t)
            self._born(storage, (where, "backward" if phase == "backward" else "kept"))
        mutable = func._schema.is_mutable
        if not new and not mutable and outs:
            return  # a view
        self._write_down(func, ins, outs, where, phase, flag)

    def _write_down(self, func: Any, ins: list[Tensor], outs: list[Tensor], where: str, phase: Phase, flag: bool) -> None:
        name = func.overloadpacket.__name__
        if name in EMPTY or name == "_local_scalar_dense":
            return
        dtype = (ins or outs)[0].dtype
        if name.startswith("_scaled_dot_product"):
            backward = name.endswith("_backward")
            q, k, v = ins[1:4] if backward else ins[:3]
            flops = attention_flops(q, k, v, backward=backward)
            b, h, length, d = q.shape
            size = sum(_size(t) for t in (*ins, *outs))
            self._compute(
                Op(
                    "attention",
                    name,
                    where,
                    phase,
                    flops,
                    flops // 2 if flag else flops,
                    size,
                    (b * h, length, k.shape[2], d),
                    dtype,
                )
            )
            return
        shape = _product(name, ins)
        if shape is not None or name.startswith("convolution"):
            if len({t.dtype for t in ins if t.ndim > 1}) > 1:  # on the meta device nothing complains
                kinds = " and ".join(sorted({str(t.dtype).removeprefix("torch.") for t in ins}))
                raise TPError(
                    f"`{where or 'the loss'}` multiplies {kinds}, which raises on a real device. Cast one of them in the model (a table of "
                    "positions, for example), or use a precision with autocast ('bf16-mixed')."
                )
            flops = 2 * shape[0] * shape[1] * shape[2] * shape[3] if shape is not None else _convolution(name, ins, outs)
            size = sum(_size(t) for t in (*ins, *outs))
            self._compute(Op("product", name, where, phase, flops, flops, size, shape or (), dtype))
            return
        if name in ("embedding", "index", "gather", "index_select"):
            size = 2 * sum(_size(t) for t in outs)
        elif func._schema.is_mutable and outs and name not in ("copy_", "fill_", "zero_"):
            size = sum(_size(t) for t in ins) + _size(outs[0])
        else:
            size = sum(_size(t) for t in ins) + (0 if name == "copy_" else sum(_size(t) for t in outs))
        if size == 0:
            return
        if not self.in_backward:
            self.walk.op(where, "other", ())
        self.piece.kernel(Op("other", name, where, phase, 0, 0, size, (), dtype))
        if self._run != (where, phase) and not self._fresh:
            self._run = (where, phase)
        for t in ins if name != "embedding" else ():
            key = self._number(t)
            if key not in self._fresh:
                self._read[key] = max(self._read.get(key, 0), _size(t))
        for t in outs:
            key = self._number(t)
            self._fresh.add(key)
            self._written[key] = _size(t)

    def _compute(self, op: Op) -> None:
        self._end_run()
        if not self.in_backward:
            self.walk.op(op.module, op.kind, op.shape)
        self.piece.kernel(op)
        self.piece.compiled(op)

    def _end_run(self) -> None:
        """What a compiler would make one kernel of ends here: it reads what was there before, and writes what is alive now."""
        if not self._fresh:
            return
        alive = set(self.numbers.values())
        size = sum(self._read.values()) + sum(n for key, n in self._written.items() if key in alive or -key in self.uncounted)
        where, phase = self._run
        self.piece.compiled(Op("other", "fused", where, phase, 0, 0, size, (), torch.float32))  # type: ignore[arg-type]
        self._fresh.clear()
        self._read.clear()
        self._written.clear()

    def note_sent(self, kind: str, size: int) -> None:
        """A collective has been called; see `Group`."""
        where, phase = self.where
        self._end_run()
        if not self.in_backward:
            self.walk.sent(where, kind, size)
        self.piece.collective(Sent(kind, size, where, phase))

    # ------------------------------------------------------------------------------------------------------ memory

    def _born(self, storage: Any, label: Label) -> None:
        key, size = storage._cdata, storage.nbytes()
        finalizer = weakref.finalize(storage, self._dead, key)
        finalizer.atexit = False
        self.alive[key] = (finalizer, label, size)
        self.born += 1
        self.numbers[key] = self.born
        self._count(label, size)
        if self.total > self.most:
            self.most = self.total
            self.piece.peak = dict(self.levels)

    def _dead(self, key: int) -> None:
        found = self.alive.pop(key, None)
        if found is not None:
            del self.numbers[key]
            self._count(found[1], -found[2])

    def _number(self, t: Tensor) -> int:
        """Of its storage: above 0 for one that the step has made."""
        key = t.untyped_storage()._cdata
        return self.numbers.get(key, -key)

    def _count(self, label: Label, size: int) -> None:
        self.total += size
        self.levels[label] = self.levels.get(label, 0) + size
        self.piece.tape.append(("bytes", label, size))


class _StandIn(Function):
    """Tensors like those that a block gives, from those that it is handed; with a gradient for each of these."""

    @staticmethod
    def forward(ctx: Any, recorder: OpRecorder, wanted: tuple[Any, ...], *sources: Tensor) -> tuple[Tensor, ...]:
        ctx.like = [(s.shape, s.dtype) for s in sources]
        ctx.recorder = recorder
        outs = tuple(recorder.empty(shape, dtype) for _, shape, dtype, _ in wanted)
        ctx.mark_non_differentiable(*(t for t, (*_, grad) in zip(outs, wanted) if not grad))
        return outs

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        return (None, None, *(ctx.recorder.empty(shape, dtype) for shape, dtype in ctx.like))


def _described(x: Any) -> Any:
    if isinstance(x, Tensor):
        return ("tensor", x.shape, x.dtype, x.requires_grad)
    return x if isinstance(x, (int, float, str, bool, type(None))) else type(x)


def _size(t: Tensor) -> int:
    return min(t.numel() * t.itemsize, t.untyped_storage().nbytes())


def _product(name: str, ins: list[Tensor]) -> tuple[int, int, int, int] | None:
    """(batch, m, n, k) of a product of matrices."""
    if name in ("mm", "addmm"):
        a, b = ins[-2:]
        return 1, a.shape[0], b.shape[1], a.shape[1]
    if name in ("bmm", "baddbmm"):
        a, b = ins[-2:]
        return a.shape[0], a.shape[1], b.shape[2], a.shape[2]
    if name == "_grouped_mm":  # groups of rows, each times its own matrix; for gradients, groups of the inner dimension
        a, b = ins[:2]
        return 1, a.shape[0], b.shape[-1], a.shape[1]
    if name == "mv":
        return 1, ins[0].shape[0], 1, ins[0].shape[1]
    if name == "dot":
        return 1, 1, 1, ins[0].shape[0]
    return None


def _convolution(name: str, ins: list[Tensor], outs: list[Tensor]) -> int:
    if name == "convolution":
        return 2 * outs[0].numel() * ins[1][0].numel()
    grad, _, weight = ins[:3]
    return 2 * grad.numel() * weight[0].numel() * sum(1 for t in outs[:2] if t is not None)
