"""Compute how long one kernel or one collective takes.

A kernel takes the longer of its FLOPs at the achievable peak and its bytes at the achievable bandwidth, and no less than a launch. A matmul is
computed in tiles: see `gemm_tiling`. In training less is achieved than by a kernel alone: `Hardware.sustained`.

A ring over p ranks passes (p - 1) / p of the bytes on in p - 1 hops. The latency of the hops grows with p, however fast the links are: that is
what limits FSDP alone. Small messages use the protocol with lower latency and a quarter of the bandwidth where that is faster, and reductions
over many nodes a tree. The ranks of a tensor-parallel group are neighbours. A data-parallel group has per_node / tp ranks in a node, which share
its network ports.
"""

from __future__ import annotations

import math

import torch

from lightning_tp.estimate.cost.gemm_tiling import tiling
from lightning_tp.estimate.cost.hardware import Hardware
from lightning_tp.estimate.trace.step_trace import Op

PROTOCOLS = (1.0, 0.25)  # share of the bandwidth, for large messages and for small ones; see `Hardware.intra_latency`


def product_seconds(hw: Hardware, batch: int, m: int, n: int, k: int, dtype: torch.dtype, size: int) -> float:
    """Return the time of `batch` matmuls (m, k) x (k, n) that move `size` bytes, on a device that does nothing else."""
    return tiling(hw, batch, m, n, k, dtype, size).seconds


def kernel_seconds(hw: Hardware, op: Op) -> float:
    """Return the time of a kernel in the middle of training."""
    if op.kind == "product" and op.shape:
        batch, m, n, k = op.shape
        return product_seconds(hw, batch, m, n, k, op.dtype, op.bytes) / hw.sustained
    moving = op.bytes / (hw.memory_bandwidth * hw.memory_efficiency)
    efficiency = hw.attention_efficiency if op.kind == "attention" else hw.product_efficiency / 2
    computing = op.work / (hw.peak(op.dtype) * efficiency) if op.kind != "other" else 0.0
    return max(computing / hw.sustained, moving / hw.sustained, hw.kernel_s)


def collective_seconds(hw: Hardware, kind: str, size: int, ranks: int, in_node: int) -> float:
    """Return the time of a collective ("all-reduce", ..) of `size` bytes, the full tensor's, over ranks of which `in_node` share a node."""
    if ranks == 1:
        return 0.0
    nodes = math.ceil(ranks / in_node)
    passes = 2 if kind == "all-reduce" else 1  # it reduces, then gathers
    bandwidth = _ring_bandwidth(hw, nodes, in_node) * hw.link_efficiency
    moved = passes * size * (ranks - 1) / ranks
    far_hops = nodes if nodes > 1 else 0
    near_hops = max(0, ranks - 1 - far_hops)
    best = math.inf
    for share, near, far in zip(PROTOCOLS, hw.intra_latency, hw.inter_latency):
        ring = passes * (near_hops * near + far_hops * far)
        tree = 2 * (math.log2(nodes) * far + (in_node - 1) * near) if kind == "all-reduce" and nodes > 1 else math.inf
        best = min(best, moved / (bandwidth * share) + min(ring, tree))
    return best + hw.kernel_s


def _ring_bandwidth(hw: Hardware, nodes: int, in_node: int) -> float:
    if nodes == 1:
        return hw.intra_bandwidth
    return min(hw.intra_bandwidth, in_node * hw.inter_bandwidth) if in_node > 1 else hw.inter_bandwidth


def in_node(hw: Hardware, axis: str, tp: int, ranks: int) -> int:
    """Return how many ranks of a group of this axis are in one node."""
    neighbours = hw.per_node if axis == "tp" else hw.per_node // tp
    return max(1, min(ranks, neighbours))
