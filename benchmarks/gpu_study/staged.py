"""The backend "staged": a process group for ranks that share one GPU, which NCCL refuses. Each collective goes through host memory to gloo."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Work
from torch.futures import Future


class Done(Work):
    """A collective that is over."""

    def __init__(self, result: Any) -> None:
        super().__init__()
        self._result, self._future = result, Future()
        self._future.set_result(result)

    def wait(self, timeout: Any = None) -> bool:
        return True

    def is_completed(self) -> bool:
        return True

    def result(self) -> Any:
        return self._result

    def get_future(self) -> Future:
        return self._future


def on_host(x: Tensor) -> Tensor:
    return x.detach().cpu().contiguous().clone()


class Staged(dist.ProcessGroup):
    """Over gloo; for tensors of GPUs and of the CPU."""

    def __init__(self, store: Any, rank: int, size: int, timeout: Any) -> None:
        super().__init__(rank, size)
        self.gloo, self._rank, self._size = dist.ProcessGroupGloo(store, rank, size, timeout), rank, size

    @property
    def pg_name(self) -> str:
        return dist.distributed_c10d._world.pg_names[self]

    @property
    def group_name(self) -> str:
        return self.pg_name

    def getBackendName(self) -> str:
        return "staged"

    def getSize(self) -> int:
        return self._size

    def getRank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size

    def rank(self) -> int:
        return self._rank

    def setTimeout(self, timeout: Any) -> None:
        pass

    def _reduced(self, x: Tensor, options: Any) -> Tensor:
        op = dist.ReduceOp.SUM if options is None else getattr(options, "reduceOp", options)
        average = op == dist.ReduceOp.AVG  # which gloo lacks
        how = dist.AllreduceOptions()
        how.reduceOp = dist.ReduceOp(dist.ReduceOp.SUM) if average else op
        whole = on_host(x)
        self.gloo.allreduce([whole], how).wait()
        return whole / self._size if average else whole

    def allreduce(self, tensors: list[Tensor], options: Any = None) -> Work:
        for x in tensors:
            x.copy_(self._reduced(x, options))
        return Done(tensors)

    def broadcast(self, tensors: list[Tensor], options: Any = None) -> Work:
        for x in tensors:
            whole = on_host(x)
            self.gloo.broadcast([whole], options).wait()
            x.copy_(whole)
        return Done(tensors)

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], options: Any = None) -> Work:
        mine = on_host(inputs[0])
        found = [[mine.new_empty(x.shape) for x in outputs[0]]]
        self.gloo.allgather(found, [mine]).wait()
        for output, x in zip(outputs[0], found[0]):
            output.copy_(x)
        return Done(outputs)

    def _allgather_base(self, output: Tensor, x: Tensor, options: Any = None) -> Work:
        mine = on_host(x)
        found = torch.empty(output.numel(), dtype=mine.dtype)
        self.gloo._allgather_base(found, mine.reshape(-1)).wait()
        output.copy_(found.view(output.shape))
        return Done(output)

    def _reduce_scatter_base(self, output: Tensor, x: Tensor, options: Any = None) -> Work:
        output.copy_(self._reduced(x, options).reshape(-1).chunk(self._size)[self._rank].view(output.shape))
        return Done(output)

    def allgather_into_tensor_coalesced(self, outputs: list[Tensor], inputs: list[Tensor], options: Any = None) -> Work:
        for output, x in zip(outputs, inputs):
            self._allgather_base(output, x)
        return Done(outputs)

    def reduce_scatter_tensor_coalesced(self, outputs: list[Tensor], inputs: list[Tensor], options: Any = None) -> Work:
        for output, x in zip(outputs, inputs):
            self._reduce_scatter_base(output, x, options)
        return Done(outputs)

    def scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], options: Any = None) -> Work:
        found = [torch.empty(x.shape, dtype=x.dtype) for x in outputs]
        self.gloo.scatter(found, [[on_host(x) for x in inputs[0]]] if inputs else [], options).wait()
        for output, x in zip(outputs, found):
            output.copy_(x)
        return Done(outputs)

    def gather(self, outputs: list[list[Tensor]], inputs: list[Tensor], options: Any = None) -> Work:
        found = [[torch.empty(x.shape, dtype=x.dtype) for x in outputs[0]]] if outputs else []
        self.gloo.gather(found, [on_host(inputs[0])], options).wait()
        for output, x in zip(outputs[0] if outputs else [], found[0] if found else []):
            output.copy_(x)
        return Done(outputs)

    def send(self, tensors: list[Tensor], to: int, tag: int = 0) -> Work:
        self.gloo.send([on_host(x) for x in tensors], to, tag).wait()
        return Done(tensors)

    def recv(self, tensors: list[Tensor], of: int, tag: int = 0) -> Work:
        found = [torch.empty(x.shape, dtype=x.dtype) for x in tensors]
        self.gloo.recv(found, of, tag).wait()
        for output, x in zip(tensors, found):
            output.copy_(x)
        return Done(tensors)

    def barrier(self, options: Any = None) -> Work:
        self.gloo.barrier().wait()
        return Done([])


def register() -> None:
    """Make the backend known in this process."""
    if "staged" not in dist.Backend.backend_list:
        dist.Backend.register_backend("staged", Staged, devices=["cpu", "cuda"])
