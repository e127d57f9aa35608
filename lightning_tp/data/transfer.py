"""Send batches between the ranks of a mesh: always over gloo on the CPU, whatever backend the model's own collectives use."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._pytree import tree_leaves, tree_map

from lightning_tp._compat import gather_rows
from lightning_tp.core.comm.mesh import DATA_PARALLEL, TENSOR_PARALLEL
from lightning_tp.core.ops.generators import RandomStates, generators_in
from lightning_tp.core.trees import map_tensors, tensors_in
from lightning_tp.data.reader import Message, adopt_random_states
from lightning_tp.errors import TPError


class Ranks:
    """The position of this rank in the (data-parallel, tensor-parallel) mesh, and the groups over which batches travel. A collective."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh = mesh
        rows = mesh.mesh.tolist()
        self.dp, self.tp = len(rows), len(rows[0])
        self.dp_rank, self.tp_rank = mesh.get_local_rank(DATA_PARALLEL), mesh.get_local_rank(TENSOR_PARALLEL)
        self.zero = rows[0][0]  # the global rank of the first rank of the mesh,
        self.first = rows[self.dp_rank][0]  # and of the first rank of this tensor-parallel group
        self.dp_group, self.tp_group = mesh.get_group(DATA_PARALLEL), mesh.get_group(TENSOR_PARALLEL)
        if dist.get_backend(self.tp_group) != "gloo":
            self.tp_group, _ = dist.new_subgroups_by_enumeration(rows, backend="gloo")
            self.dp_group, _ = dist.new_subgroups_by_enumeration([list(column) for column in zip(*rows)], backend="gloo")
        self.states = RandomStates()  # to be equal in a tensor-parallel group
        self.given: tuple[str, int] = ("", 0)  # the last step, and the fingerprint of what it was given

    def watch(self, roots: Mapping[str, Any]) -> None:
        """Let the random generators that these objects hold start alike on all ranks of this tensor-parallel group, and stay so. A collective."""
        if self.tp > 1:
            self.states.generators |= generators_in(roots)
            self.states.take_over(self.tp_group)

    def agree(self, value: int, warn: Callable[[str], None]) -> list[int]:
        """Gather a number as `over_tp` does, and compare the random states in the group, and what the last step was given. A collective.

        Where states differ, all ranks take over those of the first, and are told so.

        Raises:
            TPError: on all ranks of the group, if the last step was given other tensors on some of them.
        """
        if self.tp == 1:
            return [value]
        rows = gather_rows(torch.tensor([value, self.states.hash(), self.given[1]]), self.tp_group)
        values, states, given = (len(set(column)) > 1 for column in rows.T.tolist())
        if given:
            raise TPError(
                f"{self.given[0]}: the ranks of a tensor-parallel group were given different batches. Loaders give them the same one, so look "
                "at what changes it afterwards: let `on_before_batch_transfer`, `on_after_batch_transfer` and the like do the same on every rank, "
                "with random numbers of equal seeds."
            )
        if states:
            self.states.take_over(self.tp_group)
            if not values:
                warn(
                    "the random states of a tensor-parallel group differed: numbers were drawn on some of its ranks only, or seeded by the rank. "
                    "All continue with those of its first rank. Draw and seed alike on all ranks of a group."
                )
        return [int(row[0]) for row in rows.tolist()]

    def over_tp(self, value: int) -> list[int]:
        """Gather a number from each rank of this tensor-parallel group. A collective."""
        return _gather(value, self.tp_group, self.tp)

    def over_dp(self, value: int) -> list[int]:
        """Gather a number from each data-parallel rank with the same tensor-parallel rank. A collective."""
        return _gather(value, self.dp_group, self.dp)


def _gather(value: int, group: dist.ProcessGroup, size: int) -> list[int]:
    return [value] if size == 1 else gather_rows(torch.tensor([value]), group).flatten().tolist()


class _Slot(NamedTuple):
    """What stands in a batch for a tensor whose bytes are sent apart from it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    pinned: bool
    requires_grad: bool
    num_bytes: int


_CANNOT_PICKLE = (
    "A batch has to be sent to the other ranks of its tensor-parallel group, but it cannot be pickled ({}). Let the loader yield tensors, "
    "numbers, strings, and containers or objects of these."
)


def broadcast_message(message: Message | None, ranks: Ranks) -> Message:
    """Send a message of the first rank of a tensor-parallel group to all of them, and raise the error it reports. A collective."""
    if ranks.tp_rank == 0:
        assert message is not None
        return (message if ranks.tp == 1 else _send(message, ranks)).or_raise()
    return _receive(ranks).or_raise()


def _send(message: Message, ranks: Ranks) -> Message:
    tensors: list[Tensor] = []
    batch = for_own_gpu(map_tensors(lambda t: _taken_out(t, tensors), message.batch))
    header = [message._replace(batch=batch, error=None)]
    try:
        dist.broadcast_object_list(header, src=ranks.first, group=ranks.tp_group)
    except (TypeError, AttributeError, pickle.PicklingError) as error:  # nothing was sent yet
        message = Message("error", f"a batch cannot be pickled: {error}", error=TPError(_CANNOT_PICKLE.format(error)))
        tensors = []
        dist.broadcast_object_list([message._replace(error=None)], src=ranks.first, group=ranks.tp_group)
    if tensors:
        dist.broadcast(torch.cat(tensors), src=ranks.first, group=ranks.tp_group)
    return message


def _receive(ranks: Ranks) -> Message:
    received: list[Any] = [None]
    dist.broadcast_object_list(received, src=ranks.first, group=ranks.tp_group)
    message: Message = received[0]
    adopt_random_states(message.rng)
    sizes = [slot.num_bytes for slot in tree_leaves(message.batch, is_leaf=_is_slot) if _is_slot(slot)]
    raw = torch.empty(sum(sizes), dtype=torch.uint8)
    if len(raw):
        dist.broadcast(raw, src=ranks.first, group=ranks.tp_group)
    pieces = iter(raw.split(sizes))
    return message._replace(
        batch=tree_map(lambda x: _filled(x, next(pieces)) if _is_slot(x) else x, message.batch, is_leaf=_is_slot)
    )


class _Pickler(pickle.Pickler):
    """Pickles tensors of a GPU for that of whoever unpickles them; by themselves they would come to the one with the same number."""

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_cuda:
            return NotImplemented
        return _on_own_gpu, (value.detach().cpu(), value.requires_grad)


def _on_own_gpu(t: Tensor, requires_grad: bool) -> Tensor:
    return t.to("cuda").requires_grad_(requires_grad)


class _ForOwnGpu:
    """A value in an object collective that arrives as itself, with its tensors of a GPU on that of the rank that receives it."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __reduce__(self) -> Any:
        stream = io.BytesIO()
        _Pickler(stream).dump(self.value)
        return pickle.loads, (stream.getvalue(),)


def for_own_gpu(value: Any) -> Any:
    """Prepare a value for an object collective: tensors of a GPU arrive on that of the rank that receives them."""
    on_gpu = torch.cuda.is_initialized() and any(t.is_cuda for t in tensors_in(value))
    return _ForOwnGpu(value) if on_gpu else value


def _taken_out(t: Tensor, tensors: list[Tensor]) -> Any:
    """Append a tensor's bytes to `tensors`, and return its slot; tensors of other kinds (sparse, subclasses) are pickled with the batch."""
    if type(t) is not Tensor or t.layout != torch.strided or t.is_quantized:
        return t
    raw = t.detach().cpu().contiguous().reshape(-1)
    raw = raw.view(torch.uint8) if raw.numel() else raw.to(torch.uint8)
    if raw.numel():
        tensors.append(raw)
    pinned = t.is_pinned() if torch.cuda.is_available() else False
    return _Slot(tuple(t.shape), t.dtype, t.device, pinned, t.requires_grad, raw.numel())


def _is_slot(x: Any) -> bool:
    return isinstance(x, _Slot)


def _filled(slot: _Slot, raw: Tensor) -> Tensor:
    """Make the tensor of a slot from its bytes."""
    if not slot.num_bytes:
        t = torch.empty(slot.shape, dtype=slot.dtype, device=slot.device.type)
    else:
        t = raw.clone().view(slot.dtype).view(slot.shape)  # its own memory, aligned
        t = t.pin_memory() if slot.pinned else t if slot.device.type == "cpu" else t.to(slot.device.type)
    return t.requires_grad_(slot.requires_grad)
