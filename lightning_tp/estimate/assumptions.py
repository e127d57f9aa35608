"""List what the numbers of an estimate rest on, in sentences."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lightning_tp.estimate.cost.hardware import Hardware
from lightning_tp.estimate.rank.rank_model import RankModel
from lightning_tp.estimate.rank.settings import Options, Settings


def assumptions_of(model: RankModel, hw: Hardware, options: Options, settings: Settings) -> Iterator[str]:
    """Yield the assumptions of an estimate of `model`, traced with these settings."""
    precision, tp = settings.precision, settings.tp
    yield (
        f"{hw.name}: {hw.peak(precision.computes_in(torch.float32)) / 1e12:g} TFLOP/s, {hw.memory_bandwidth / 1e9:,.0f} GB/s, "
        f"{hw.memory_bytes / 1e9:.1f} GB, {hw.per_node} per node at {hw.intra_bandwidth / 1e9:g} GB/s, "
        f"{hw.inter_bandwidth / 1e9:g} GB/s each between nodes"
    )
    yield (
        f"achieved of these: {hw.product_efficiency:.0%} by large matmuls (less what tiles of up to {hw.tile[0]} x {hw.tile[1]} leave idle on "
        f"{hw.units} multiprocessors), {hw.attention_efficiency:.0%} by attention, {hw.memory_efficiency:.0%} of the memory bandwidth, "
        f"{hw.link_efficiency:.0%} of the link bandwidth; in training {hw.sustained:.0%} of what a kernel achieves alone"
    )
    (near, near_small), (far, far_small) = ([1e6 * s for s in latency] for latency in (hw.intra_latency, hw.inter_latency))
    yield f"a hop of a ring takes {near:g} us in a node and {far:g} us between nodes (for small messages {near_small:g} and {far_small:g} us)"
    yield f"of {len(model.blocks)} blocks {len(set(model.trace.followed.values()))} were traced; the others repeat these"
    yield f"peak memory includes {hw.fragmentation:.0%} allocator overhead and {hw.reserved_bytes / 1e9:g} GB for the CUDA context and NCCL"
    yield "attention is fused and saves no scores" if options.fused_attention else "attention is written out and saves its scores"
    yield (
        "kernels between two matmuls are fused, as a compiler does" if options.compile else "each operator is a kernel (eager mode)"
    )
    yield "model FLOPs count attention in full, and no recomputation; causal attention computes half"
    if settings.dp > 1:
        gathered = precision.gathered or precision.held
        reduced = precision.reduced or gathered
        yield (
            "FSDP2 all-gathers each block again for the backward, prefetches the next unit while one computes, and keeps parameters outside the "
            f"blocks unsharded; it gathers in {_dtype(gathered)} and reduces in {_dtype(reduced)}; each byte of it slows the kernels beside it "
            f"by {hw.fsdp_traffic:g} bytes of memory traffic"
        )
        if options.accumulate > 1:
            yield "gradients stay unsharded until the last micro-batch (as with `accumulate_grad_batches` under `TPStrategy`)"
    if tp > 1:
        yield "TP communication is not overlapped"
        if settings.rank:
            yield f"tp={tp} does not divide everything evenly: this is rank {settings.rank}, which holds most; the others wait for it"
        if tp > hw.per_node:
            yield f"tp={tp} is more than the {hw.per_node} devices of a node, so TP communication crosses nodes"
    if options.optimizer == "adamw" and hw.device != "cpu":
        yield "the optimizer updates all parameters at once (foreach), with a temporary copy of one state; `fused=True` needs none"


def _dtype(dtype: torch.dtype | None) -> str:
    return "the dtype of the model" if dtype is None else str(dtype).removeprefix("torch.")
