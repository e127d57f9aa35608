"""How long a step takes: each kernel by what it computes or moves, each collective by bandwidth and latency, and what overlaps.

A kernel takes the longer of its FLOPs at the reachable peak and its bytes at the reachable bandwidth, and no less than a launch. A product
is computed in tiles, as `tiles.py` says. In training less is reached than by a kernel alone: `Hardware.sustained`. A piece of the step (a
block forward, a block backward) can't take less than the host needs to start its kernels.

A ring over p ranks hands (p - 1) / p of the bytes on in p - 1 hops. The latency of the hops grows with p, however fast links are: it is the
reason why FSDP alone ends somewhere. Small messages take the protocol with a shorter latency and a quarter of the bandwidth, if that is
faster; sums over many nodes a tree. The ranks of a tensor-parallel group are neighbours. A data-parallel group has per_node / tp ranks in a
node, whose network ports it uses together.

Collectives on the tensor-parallel axis are waited for. FSDP2's gather of the next unit and its reduce-scatter of the one before run beside
the computation of a block: with overlap a piece takes the longer of the two. What they read and write (`Hardware.fsdp_traffic`) slows it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from lightning_tp.estimate.cost.collectives import Collective
from lightning_tp.estimate.cost.gemm_tiling import tiling
from lightning_tp.estimate.cost.hardware import Hardware
from lightning_tp.estimate.rank.rank_model import RankModel
from lightning_tp.estimate.trace.step_trace import Op, Segment


@dataclass(frozen=True)
class Time:
    """Seconds of one optimizer step on a rank; products, attention, other, tp, dp_exposed, slowed, host and optimizer add up to `step`.

    Args:
        step: with overlap.
        without_overlap: one after the other: the same with `dp` instead of `dp_exposed`.
        products, attention, other: kernels, by what they are.
        tp: collectives on the tensor-parallel axis.
        dp: on the data-parallel axis, all of them.
        dp_exposed: of these, what nothing hides.
        slowed: what kernels take longer because FSDP2's collectives read and write the memory beside them.
        optimizer: its step.
        host: what waits for the host, beyond the kernels.
    """

    step: float
    without_overlap: float
    products: float
    attention: float
    other: float
    tp: float
    dp: float
    dp_exposed: float
    slowed: float
    optimizer: float
    host: float


def product_seconds(hw: Hardware, batch: int, m: int, n: int, k: int, dtype: torch.dtype, size: int) -> float:
    """One product, `batch` times (m, k) x (k, n), that moves `size` bytes, on a device that does nothing else."""
    return tiling(hw, batch, m, n, k, dtype, size).seconds


def kernel_seconds(hw: Hardware, op: Op) -> float:
    """One kernel, in the middle of training."""
    if op.kind == "product" and op.shape:
        batch, m, n, k = op.shape
        return product_seconds(hw, batch, m, n, k, op.dtype, op.bytes) / hw.sustained
    moved = op.bytes / (hw.memory_bandwidth * hw.memory_efficiency)
    efficiency = hw.attention_efficiency if op.kind == "attention" else hw.product_efficiency / 2
    computed = op.work / (hw.peak(op.dtype) * efficiency) if op.kind != "other" else 0.0
    return max(computed / hw.sustained, moved / hw.sustained, hw.kernel_s)


def collective_seconds(hw: Hardware, kind: str, size: int, ranks: int, in_node: int) -> float:
    """One collective.

    Args:
        kind: "all-reduce", "all-gather" or "reduce-scatter".
        size: bytes of the whole tensor.
        ranks: that take part.
        in_node: how many of them are in one node.
    """
    if ranks == 1:
        return 0.0
    nodes = math.ceil(ranks / in_node)
    times = 2 if kind == "all-reduce" else 1
    bandwidth = (
        hw.intra_bandwidth
        if nodes == 1
        else min(hw.intra_bandwidth, in_node * hw.inter_bandwidth)
        if in_node > 1
        else hw.inter_bandwidth
    )
    bandwidth *= hw.link_efficiency
    moved = times * size * (ranks - 1) / ranks
    between = nodes if nodes > 1 else 0
    within = ranks - 1 - between if nodes > 1 else ranks - 1
    best = math.inf
    for protocol, share in ((0, 1.0), (1, 0.25)):
        near, far = hw.intra_latency[protocol], hw.inter_latency[protocol]
        ring = times * (max(0, within) * near + between * far)
        tree = 2 * (math.log2(max(1, nodes)) * far + (in_node - 1) * near) if kind == "all-reduce" and nodes > 1 else math.inf
        best = min(best, moved / (bandwidth * share) + min(ring, tree))
    return best + hw.kernel_s


def in_node(hw: Hardware, axis: str, tp: int, ranks: int) -> int:
    """How many ranks of a group of this axis are in one node."""
    if axis == "tp":
        return max(1, min(ranks, hw.per_node))
    return max(1, min(ranks, hw.per_node // tp))


def time_of(
    world: RankModel,
    collectives: Iterable[Collective],
    hw: Hardware,
    tp: int,
    *,
    optimizer_bytes: int,
    accumulate: int = 1,
    compile: bool = False,
) -> Time:
    """A step of `accumulate` micro-batches."""
    costs: dict[int, tuple[dict[str, float], float, int]] = {}
    moves = hw.memory_bandwidth * hw.memory_efficiency * hw.sustained  # bytes a second

    def cost(piece: Segment) -> tuple[dict[str, float], float, int]:
        found = costs.get(id(piece))
        if found is None:
            kinds: dict[str, float] = defaultdict(float)
            ops = piece.fused if compile and piece.block else piece.ops  # as `compile=True` of the strategy: block by block
            for op, n in ops.items():
                kinds[op.kind] += n * kernel_seconds(hw, op)
            sent = sum(n * collective_seconds(hw, s.kind, s.bytes, tp, in_node(hw, "tp", tp, tp)) for s, n in piece.sent.items())
            found = costs[id(piece)] = (kinds, sent, sum(ops.values()) + sum(piece.sent.values()))
        return found

    beside: dict[tuple[str, str], float] = defaultdict(float)  # (block, phase) -> seconds of FSDP2 that run beside its computation
    longer: dict[tuple[str, str], float] = defaultdict(float)  # the same -> seconds that the computation takes longer for it
    alone = dp = 0.0
    step_sent = 0.0
    for c in collectives:
        seconds = collective_seconds(hw, c.kind, c.bytes, c.ranks, in_node(hw, c.axis, tp, c.ranks))
        if c.axis == "tp":
            step_sent += (
                seconds * c.count if c.where in ("shares of gradients", "norm of gradients", "whether gradients are finite") else 0
            )
            continue
        dp += seconds * c.count
        if c.where in world.blocks:
            beside[c.where, c.phase] += seconds * c.count / accumulate
            longer[c.where, c.phase] += c.bytes * c.count * hw.fsdp_traffic / moves / accumulate
        else:
            alone += seconds * c.count
    kernels: dict[str, float] = defaultdict(float)
    tp_seconds = host = exposed = slowed = 0.0
    once = serial = 0.0
    last = world.trace.pieces
    first_gather = next((p.block for p in last if p.block), "")
    for piece in last:
        if piece.again:
            continue
        of = world.trace.of(piece)
        kinds, sent, starts = cost(of)
        slow = longer.get((piece.block, piece.phase), 0.0)
        busy = sum(kinds.values()) + sent + slow
        waits = max(0.0, starts * hw.host_s - busy) if hw.device != "cpu" else starts * hw.host_s
        fsdp = beside.get((piece.block, piece.phase), 0.0)
        hidden = min(fsdp, busy + waits) if piece.block != first_gather or piece.phase != "forward" else 0.0
        once += busy + waits + fsdp - hidden
        serial += busy + waits + fsdp
        for kind, seconds in kinds.items():
            kernels[kind] += seconds
        tp_seconds += sent
        host += waits
        slowed += slow
        exposed += fsdp - hidden
    optimizer = optimizer_bytes / moves
    rest = alone + step_sent + optimizer
    return Time(
        once * accumulate + rest,
        serial * accumulate + rest,
        kernels["product"] * accumulate,
        kernels["attention"] * accumulate,
        kernels["other"] * accumulate,
        tp_seconds * accumulate + step_sent,
        dp,
        exposed * accumulate + alone,
        slowed * accumulate,
        optimizer,
        host * accumulate,
    )
