"""Record one training step of a model on the meta device: every kernel, every collective, and the bytes that are alive at any time.

The model runs forward and backward with the shapes of one rank, under a `TorchDispatchMode` that sees every operator. What an operator costs is
in `op_costs`, how long tensors live in `storages`, and which blocks run at all in `repeated_blocks`.

Not seen: code that is compiled, custom CUDA kernels without a meta implementation, and the rounding of allocators.
"""

from __future__ import annotations

import sys
import weakref
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from lightning_tp._compat import is_in_place, sequence_number, sequence_number_of_backward, storage_key, without_dispatch_modes
from lightning_tp.core.comm.fake_world import FakeGroup
from lightning_tp.core.ops.split_logits import SplitLogits
from lightning_tp.errors import TPError
from lightning_tp.estimate.trace.device_kernels import Kernels
from lightning_tp.estimate.trace.forward_log import ForwardLog
from lightning_tp.estimate.trace.op_costs import EMPTY, Call, kernel_of
from lightning_tp.estimate.trace.repeated_blocks import RepeatedBlocks
from lightning_tp.estimate.trace.step_trace import (
    Alloc,
    CollectiveCall,
    End,
    Event,
    FusedOp,
    Label,
    LiveBytes,
    Phase,
    StepTrace,
    Tape,
    replay,
)
from lightning_tp.estimate.trace.storages import Fusion, LiveStorages
from lightning_tp.infer.follow.meta import Values


class OpRecorder(Values):
    """Records a step: `with recorder.recording():` around forward, `begin_backward()` and backward; then `step_trace()`.

    Args:
        model: on the meta device, with the shards of one rank.
        blocks: name -> module.
        kinds: name -> what two blocks have in common if one can represent the other.
        group: the tensor-parallel group, whose collectives are noted.
        kernels: those of the device, which keep the casts of an autocast region.
    """

    def __init__(
        self, model: nn.Module, blocks: Mapping[str, nn.Module], kinds: Mapping[str, Any], group: FakeGroup, kernels: Kernels
    ) -> None:
        super().__init__(model)
        self.model = model
        self.kernels = kernels
        self.tapes = [Tape("", "forward")]
        self.in_backward = False
        self.failed: str | None = None  # the innermost module whose forward raised
        self.forward_log = ForwardLog()
        self.blocks = RepeatedBlocks(self, blocks, kinds)
        self.storages = LiveStorages(self._note, (*model.parameters(), *model.buffers()))
        self.fusion = Fusion(self.storages, self._note)
        self.gradients: dict[str, int] = {}
        self._freed_after_forward: LiveBytes = {}
        self._nodes_from: list[tuple[int, str]] = [(0, "")]  # the sequence number from which on autograd's nodes belong to a module
        self._trained = {name: [p for p in block.parameters() if p.requires_grad] for name, block in blocks.items()}
        group.note = self._note_collective

    # -------------------------------------------------------------------------------------------------- the step as a whole

    @contextmanager
    def recording(self, inputs: Iterable[Any]) -> Iterator[None]:
        """Record what runs. The tensors among `inputs` do not count as memory of the step."""
        self.storages.uncounted |= {storage_key(t) for t in inputs if isinstance(t, Tensor)}
        names = {id(m): n for n, m in self.model.named_modules()}
        register = nn.modules.module
        handles: list[Any] = [
            register.register_module_forward_pre_hook(lambda m, x: self._enter(names.get(id(m)), x)),
            register.register_module_forward_hook(lambda m, _, o: self._leave(names.get(id(m)), o), always_call=True),
        ]
        for name, p in self.model.named_parameters():
            if p.requires_grad:
                handles.append(p.register_post_accumulate_grad_hook(lambda p, n=name: self._has_gradient(n, p)))
        try:
            with self.blocks.watching(), self:
                yield
        finally:
            for handle in handles:
                handle.remove()
            self.close_segment()
            self.storages.release()

    def begin_backward(self) -> None:
        """Begin the backward pass: the loss is there, and autocast frees the weights that it has cast."""
        events = self.tapes[-1].events
        ended = len(events)
        self.kernels.casts.clear()
        for event in events[ended:]:
            assert isinstance(event, Alloc)
            self._freed_after_forward[event.label] = self._freed_after_forward.get(event.label, 0) - event.change
        self.close_segment()
        self.in_backward = True
        self.open_segment("")

    def step_trace(self) -> StepTrace:
        """Return what was recorded."""
        log = tuple(self.forward_log.events)
        return StepTrace(replay(self.tapes), self.blocks.followed, self.gradients, log, self._freed_after_forward)

    # ------------------------------------------------------------------------------------------------------------- segments

    def open_segment(self, block: str, representative: str | None = None) -> None:
        """Begin a segment of the pass that runs."""
        self.tapes.append(Tape(block, "backward" if self.in_backward else "forward", representative))

    def close_segment(self) -> None:
        """End the segment that is open; that of a block's backward frees the block's gradients, as FSDP2 does."""
        self.fusion.flush()
        self._note(End())
        tape = self.tapes[-1]
        if tape.phase == "backward" and tape.block:
            for p in self._trained[tape.block]:
                p.grad = None

    def _note(self, event: Event) -> None:
        self.tapes[-1].events.append(event)

    # ----------------------------------------------------------------------------------------------------- which module runs

    @property
    def where(self) -> tuple[str, Phase]:
        """(module, phase) of what runs now."""
        if not self.in_backward:
            return self.stack[-1], "forward"
        if len(self.stack) > 1:
            return self.stack[-1], "recompute"
        number = sequence_number_of_backward()
        if number is None or number > self._nodes_from[-1][0]:
            return "", "backward"
        return self._nodes_from[bisect_right(self._nodes_from, number, key=lambda p: p[0]) - 1][1], "backward"

    def _enter(self, name: str | None, inputs: Any) -> None:
        self.stack.append(self.stack[-1] if name is None else name)
        if not self.in_backward:
            self._nodes_from.append((sequence_number(), self.stack[-1]))
            if name is not None:
                self.forward_log.enter(name, inputs)

    def _leave(self, name: str | None, output: Any) -> None:
        if name is not None and not self.in_backward:
            self.forward_log.leave(name, output)
        if self.failed is None and sys.exc_info()[1] is not None:
            self.failed = self.stack[-1]
        self.stack.pop()
        if not self.in_backward:
            self._nodes_from.append((sequence_number(), self.stack[-1]))
        elif len(self.stack) == 1:
            self.kernels.casts.clear()  # what is recomputed is an autocast region of its own

    # ------------------------------------------------------------------------------------------------------------ operators

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(t, SplitLogits) for t in types):
            return NotImplemented  # the operators on its local columns come by
        if func is torch.ops.aten.embedding.default:
            self._check_rows(*args[:2])
        out = super().__torch_dispatch__(func, types, args, kwargs or {})
        with without_dispatch_modes():
            given = tree_flatten((args, kwargs or {}))[0]
            inputs, outputs = ([t for t in leaves if isinstance(t, Tensor)] for leaves in (given, tree_flatten(out)[0]))
            name, flag = func.overloadpacket.__name__, any(x is True for x in given)
            call = Call(name, *self.where, inputs, outputs, is_in_place(func), flag)
            if self._count_outputs(call) or call.in_place or not outputs:  # anything else is a view
                self._note_kernel(call)
        return out

    def _count_outputs(self, call: Call) -> bool:
        """Count the storages that an operator has made; return whether there are any."""
        before = {storage_key(t) for t in call.inputs}
        label = Label(call.module, "backward" if call.phase == "backward" else "activation")
        return any([self.storages.add(t, label) for t in call.outputs if storage_key(t) not in before])

    def _note_kernel(self, call: Call) -> None:
        op = kernel_of(call)
        if op is None:
            return
        if op.kind != "other":
            self.fusion.flush()
        if not self.in_backward:
            self.forward_log.kernel(op.module, op.kind, op.shape)
        self._note(op)
        if op.kind != "other":
            self._note(FusedOp(op))
        else:  # of a table, only the rows that are looked up are read
            self.fusion.add(op.module, op.phase, call.inputs if call.name != "embedding" else (), call.outputs)

    def _note_collective(self, kind: str, size: int) -> None:
        module, phase = self.where
        self.fusion.flush()
        if not self.in_backward:
            self.forward_log.collective(module, kind, size)
        self._note(CollectiveCall(kind, size, module, phase))  # type: ignore[arg-type]

    def _has_gradient(self, name: str, p: nn.Parameter) -> None:
        grad = p.grad
        assert grad is not None
        self.gradients[name] = grad.numel() * grad.itemsize
        self.storages.relabel(grad, Label(name, "gradient"))

    def empty(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Make a tensor that is counted, as of the module that runs."""
        with without_dispatch_modes():
            t = torch.empty(shape, dtype=dtype, device="meta")
            module, phase = self.where
            self.storages.add(t, Label(module, "backward" if phase == "backward" else "activation"))
        return t

    # --------------------------------------------------------------------------------------------------------- known values

    def _check_rows(self, table: Tensor, index: Tensor) -> None:
        """Refuse rows that a table does not have, where the index is known, such as positions: on the meta device, nothing else does."""
        known = self.values.get(id(index))
        with without_dispatch_modes():
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
