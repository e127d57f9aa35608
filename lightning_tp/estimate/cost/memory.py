"""What is in the memory of one rank over a step, by kind: from the trace, and from how FSDP2 and the optimizer keep things.

FSDP2's own buffers follow its sources (`torch/distributed/fsdp/_fully_shard`): a unit's parameters whole while it runs, beside the flat
tensor they were
gathered into (in the forward until the next unit's; in the backward, the flat tensor of the unit that is gathered ahead), the flat input of a unit's
reduce-scatter until the next unit's, and the root's parameters and gradients whole from the first module to the end of the backward.

Not in here: what the allocator rounds up and can't use (fragments), CUDA's context and NCCL's buffers; `Hardware.reserved` allows for these.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

from lightning_tp.estimate.rank.rank_model import LocalParam, RankModel
from lightning_tp.estimate.rank.settings import Precision
from lightning_tp.estimate.trace.step_trace import Label, Levels, Segment

Kinds = Mapping[str, int]
MODEL_KINDS = ("parameters", "gradients", "optimizer", "buffers")
ACTIVATION_KINDS = ("attention", "MLP", "norms", "residual", "embedding", "logits and loss", "other", "backward")


@dataclass(frozen=True)
class MemorySnapshot:
    """The memory at one time.

    Args:
        name: such as "backward of layers.79".
        kinds: bytes of each kind.
    """

    name: str
    kinds: Kinds

    @property
    def total(self) -> int:
        """Bytes."""
        return sum(self.kinds.values())


@dataclass(frozen=True)
class Memory:
    """What one rank holds, in bytes.

    Args:
        parameters, gradients, optimizer, buffers: from one step to the next (gradients: after the backward).
        activations: kept for the backward when the forward has ended, by kind.
        peak: the moment when it is most.
        timeline: the largest moment of each piece of the step, in order.
    """

    parameters: int
    gradients: int
    optimizer: int
    buffers: int
    activations: Kinds
    peak: MemorySnapshot
    timeline: tuple[MemorySnapshot, ...]


@dataclass(frozen=True)
class Unit:
    """A unit of FSDP2 on a rank, bytes.

    Args:
        gathered: its parameters whole (its share of the tensor-parallel axis), as modules read them.
        summed: its gradients, as they go into the reduce-scatter.
        held: its shard.
        gradients: of the shard.
    """

    gathered: int
    summed: int
    held: int
    gradients: int


def units_of(world: RankModel, precision: Precision, dp: int) -> dict[str, Unit]:
    """FSDP2's units, by name; "" is the root's."""
    found = {}
    with_gradient = {h.name for h in trained(world)}
    for name in world.units:
        mine = [h for h in world.held if h.unit == name]
        gathered = sum(h.numel * dp * (precision.gathered or h.dtype).itemsize for h in mine)
        got = [h for h in mine if h.name in with_gradient]
        summed = sum(h.numel * dp * (precision.reduced or precision.gathered or h.dtype).itemsize for h in got)
        found[name] = Unit(
            gathered,
            summed,
            sum(h.numel * h.dtype.itemsize for h in mine),
            sum(h.numel * h.dtype.itemsize for h in got),
        )
    return found


def _with_gradient(world: RankModel) -> frozenset[str]:
    """Parameters that got a gradient, those of blocks like one that was followed included."""
    got = set(world.trace.gradients)
    blocks = {b: like for b, like in world.trace.followed.items() if b != like}
    for h in world.held:
        where = h.unit or h.name
        while where and where not in blocks:
            where = where.rpartition(".")[0]
        if where and blocks[where] + h.name[len(where) :] in got:
            got.add(h.name)
    return frozenset(got)


def trained(world: RankModel) -> list[LocalParam]:
    """The parameters that get a gradient."""
    got = _with_gradient(world)
    return [h for h in world.held if h.trained and h.name in got]


def memory_of(world: RankModel, precision: Precision, dp: int, *, optimizer: int, scratch: int, accumulate: int = 1) -> Memory:
    """The memory of a rank over a step.

    Args:
        world: traced.
        precision: of the training.
        dp: data-parallel ranks.
        optimizer: bytes of its state.
        scratch: bytes that its step needs for a while.
        accumulate: micro-batches of a step; the last one is looked at.
    """
    labels = _Labels(world)
    units = units_of(world, precision, dp)
    fsdp = dp > 1
    mine = trained(world)
    gradient = sum(h.numel * h.dtype.itemsize for h in mine)
    fixed = {
        "parameters": sum(h.numel * h.dtype.itemsize for h in world.held),
        "optimizer": optimizer,
        "buffers": world.buffers,
    }
    by_block = _block_gradients(world, mine)
    unsummed = sum(u.summed for u in units.values()) if fsdp and accumulate > 1 else 0
    grads = 0 if fsdp or accumulate == 1 else gradient  # held already when a piece begins

    extra: Counter[str] = Counter()  # of blocks that are not followed
    stand_in: Counter[str] = Counter()  # at the start of the last piece
    moments: list[MemorySnapshot] = []
    after_forward: dict[str, int] = {}
    trace = world.trace
    order = [p.block for p in trace.pieces if p.phase == "forward" and p.block and p.block in units]
    ahead = {name: before for before, name in pairwise(order)}  # gathered while this one's backward runs
    behind = {before: name for before, name in pairwise(order)}
    root = units.get("", Unit(0, 0, 0, 0))
    last_forward = [p for p in trace.pieces if p.phase == "forward"][-1]
    for piece in trace.pieces:
        of = trace.of(piece)
        kinds = [labels.sum(levels) for levels in (piece.start, of.start, of.peak, of.end)]
        start, of_start, of_peak, of_end = kinds
        if piece.like is None:
            peak = labels.sum(piece.peak)
            end = labels.sum(piece.end)
        else:
            peak, end = start + _minus(of_peak, of_start), start + _minus(of_end, of_start)
        backward = piece.phase == "backward"
        unit = units.get(piece.block) if fsdp and piece.block else None
        around: Counter[str] = Counter(fixed)
        if fsdp:
            around["gathered parameters"] = root.gathered
            around["gradients"] += grads
            around["unsharded gradients"] += unsummed
            if unit is not None:
                around["gathered parameters"] += unit.gathered
                ahead_of = units[ahead[piece.block]].gathered if backward and piece.block in ahead else 0
                around["FSDP2 buffers"] += ahead_of if backward else unit.gathered
                if backward and piece.block in behind:
                    around["FSDP2 buffers"] += units[behind[piece.block]].summed
        else:
            around["gradients"] += grads
        name = _moment(piece, world)
        grads_kind = "unsharded gradients" if fsdp else "gradients"
        at_peak = _named(peak + extra, grads_kind if accumulate == 1 or fsdp else "")
        if not piece.again:
            moments.append(_as_moment(name, around + at_peak))
        if backward and unit is not None and unit.summed:  # the gradients go into one flat tensor; the whole parameters are gone
            reducing = Counter(around)
            reducing["gathered parameters"] -= unit.gathered
            reducing["FSDP2 buffers"] += unit.summed - (units[behind[piece.block]].summed if piece.block in behind else 0)
            reducing["gradients"] += unit.gradients
            moments.append(_as_moment(f"gradients of {piece.block} are summed", reducing + _named(end + extra, grads_kind)))
        if backward and piece.block:
            if fsdp:
                grads += unit.gradients if unit is not None else 0
                unsummed -= unit.summed if unit is not None and accumulate > 1 else 0
            elif accumulate == 1:
                grads += by_block.get(piece.block, 0)
        if piece.like is not None:
            change = _minus(of_end, of_start)
            own = _minus(labels.sum(piece.end), start)
            change["gradient"] -= of.freed
            own["gradient"] -= piece.freed
            extra.update(change)
            if backward:
                extra.subtract(own)
        elif piece.again:  # with the block before, which is not followed either
            extra.subtract(_minus(end, stand_in))
        stand_in = start
        if piece is last_forward:
            extra.subtract(_let_go(world, labels))
        if not backward:
            after_forward = dict(_named(labels.sum(piece.end) + extra if piece.like is None else end + extra, ""))
    if fsdp and root.summed:
        left = labels.sum(trace.pieces[-1].end) + extra
        last = Counter(fixed) + Counter({"gradients": grads + root.gradients, "FSDP2 buffers": root.summed})
        last["FSDP2 buffers"] += units[order[0]].summed if order else 0
        moments.append(_as_moment("gradients outside of blocks are summed", last + _named(left, "unsharded gradients")))
    moments.append(_as_moment("step of the optimizer", {**fixed, "gradients": gradient, "optimizer's scratch": scratch}))
    kept = {k: n for k, n in after_forward.items() if n > 0}
    return Memory(
        fixed["parameters"],
        gradient,
        optimizer,
        world.buffers,
        kept,
        max(moments, key=lambda m: m.total),
        tuple(moments),
    )


def _block_gradients(world: RankModel, mine: list[LocalParam]) -> dict[str, int]:
    found: Counter[str] = Counter()
    blocks = set(world.blocks)
    for h in mine:
        where = h.name
        while where and where not in blocks:
            where = where.rpartition(".")[0]
        if where:
            found[where] += math.prod(h.tp_shape) * h.dtype.itemsize
    return dict(found)


def _let_go(world: RankModel, labels: _Labels) -> Counter[str]:
    """What ends to be alive with the forward, of blocks that were not followed."""
    times = Counter(like for block, like in world.trace.followed.items() if block != like)
    found: Counter[str] = Counter()
    for label, n in world.trace.let_go.items():
        where = label[0]
        while where and where not in times:
            where = where.rpartition(".")[0]
        if where:
            found.update(labels.sum({label: n * times[where]}))
    return found


def _minus(a: Counter[str], b: Counter[str]) -> Counter[str]:
    found = Counter(a)
    found.subtract(b)
    return found


def _named(levels: Counter[str], gradients: str) -> Counter[str]:
    found = Counter({k: n for k, n in levels.items() if n > 0 and k != "gradient"})
    if gradients and levels["gradient"] > 0:
        found[gradients] += levels["gradient"]
    return found


def _as_moment(name: str, kinds: Mapping[str, int]) -> MemorySnapshot:
    return MemorySnapshot(name, {k: int(n) for k, n in kinds.items() if n > 0})


def _moment(piece: Segment, world: RankModel) -> str:
    if piece.block:
        return f"{piece.phase} of {piece.block}"
    return f"{piece.phase} outside of blocks"


class _Labels:
    """Which kind a module's activations are of."""

    def __init__(self, world: RankModel) -> None:
        self.classes = world.classes
        self.blocks = set(world.blocks)
        attention, products = set(), set()
        for piece in world.trace.pieces:
            for op in piece.ops:
                if op.phase == "backward":
                    continue
                if op.kind == "attention" or op.name in ("_softmax", "bmm", "_safe_softmax"):
                    attention.add(op.module)
                elif op.kind == "product":
                    products.add(op.module)
        self.attention, self.products = attention, products
        self.known: dict[Label, str] = {}

    def sum(self, levels: Levels) -> Counter[str]:
        """Bytes of each kind."""
        found: Counter[str] = Counter()
        for label, n in levels.items():
            if n:
                kind = self.known.get(label)
                if kind is None:
                    kind = self.known[label] = self._kind(label)
                found[kind] += n
        return found

    def _kind(self, label: Label) -> str:
        module, what = label
        if what != "kept":
            return what
        if "norm" in self.classes.get(module, "").lower():
            return "norms"
        block = module
        while block and block not in self.blocks:
            block = block.rpartition(".")[0]
        if not block:
            if "embedding" in self.classes.get(module, "").lower():
                return "embedding"
            return "logits and loss" if module == "" or module in self.products else "other"
        if module == block:
            return "residual"
        part = f"{block}.{module[len(block) + 1 :].partition('.')[0]}"
        if any(m == part or m.startswith(part + ".") for m in self.attention):
            return "attention"
        if any(m == part or m.startswith(part + ".") for m in self.products):
            return "MLP"
        return "residual"
