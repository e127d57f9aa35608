"""Write down what each block does: its operations, with where each operand comes from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from lightning_tp.infer.follow.meta import Values


class OperationLog(Values):
    """Record the operations inside blocks while a model runs; features are not followed.

    Two blocks with equal entries do the same: each entry has the operation, the module inside the block, and for each operand whether
    it is a parameter of the block, was made by an earlier operation of it, was given to it, or comes from elsewhere in the model.
    """

    def __init__(self, model: nn.Module, blocks: Mapping[str, nn.Module]) -> None:
        super().__init__(model)
        self.blocks = blocks
        self.entries: dict[str, list[Any]] = {}  # block -> what it did
        self.running: str | None = None
        self.origins: dict[int, tuple[Tensor, Any]] = {}  # of the tensors that the running block has seen
        self.outside = {id(t): (t, ("outside", n)) for n, t in [*model.named_parameters(), *model.named_buffers()]}
        self.handles: list[Any] = []

    def __enter__(self) -> Any:
        for name, block in self.blocks.items():
            self.handles.append(block.register_forward_pre_hook(lambda module, args, name=name: self._enter(name)))
            self.handles.append(block.register_forward_hook(lambda module, args, out: self._leave()))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        for handle in self.handles:
            handle.remove()
        super().__exit__(*error)

    def _enter(self, name: str) -> None:
        self.running = name
        block = self.blocks[name]
        tensors = [*block.named_parameters(), *block.named_buffers()]
        self.origins = dict(self.outside) | {id(t): (t, ("own", n)) for n, t in tensors}
        shapes = tuple((n, tuple(t.shape), t.dtype, t.requires_grad) for n, t in tensors)
        classes = tuple((n, type(m), m.training) for n, m in block.named_modules())
        self.entries.setdefault(name, []).append((type(block), shapes, classes))

    def _leave(self) -> None:
        self.running, self.origins = None, {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if self.running is not None:
            entries = self.entries[self.running]
            module = self.stack[-1].removeprefix(self.running)
            entries.append((func, module, *(self._operand(x) for x in tree_flatten((args, kwargs))[0])))
            for i, t in enumerate(tree_flatten(out)[0]):
                if isinstance(t, Tensor):
                    self.origins[id(t)] = (t, ("made", len(entries), i))
        return out

    def _operand(self, x: Any) -> Any:
        if isinstance(x, float):
            return float  # a scale: it moves nothing to another place
        if not isinstance(x, Tensor):
            return x if isinstance(x, (int, str, type(None))) else str(x)
        if id(x) not in self.origins:
            self.origins[id(x)] = (x, ("given", len(self.origins), tuple(x.shape), x.dtype))
        return self.origins[id(x)][1]
