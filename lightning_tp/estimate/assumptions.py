"""List what the numbers of an estimate rest on, in sentences."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lightning_tp.estimate.cost.hardware import Hardware
from lightning_tp.estimate.options import Options
from lightning_tp.estimate.rank.rank_model import RankModel
from lightning_tp.estimate.rank.settings import Precision, Settings


def assumptions_of(model: RankModel, hw: Hardware, options: Options, settings: Settings) -> tuple[str, ...]:
    """Return the assumptions of an estimate.

    Args:
        model: traced.
        hw: of each rank.
        options: of the training.
        settings: of the trace.
    """
    found = [
        *_of_hardware(hw, settings.precision),
        *_of_model(model, options),
        *(_of_fsdp(hw, settings.precision) if settings.dp > 1 else ()),
        *(_of_tensor_parallelism(hw, settings) if settings.tp > 1 else ()),
        *_of_training(hw, options, settings),
    ]
    return tuple(found)


def _of_hardware(hw: Hardware, precision: Precision) -> Iterator[str]:
    peak = hw.peak(precision.computes_in(torch.float32)) / 1e12
    yield (
        f"{hw.name}: {peak:g} TFLOP/s, {hw.memory_bandwidth / 1e9:,.0f} GB/s, {hw.memory_bytes / 1e9:.1f} GB, {hw.per_node} per node at "
        f"{hw.intra_bandwidth / 1e9:g} GB/s, {hw.inter_bandwidth / 1e9:g} GB/s each between nodes"
    )
    yield (
        f"achieved of these: {hw.product_efficiency:.0%} by large matmuls (less what tiles of up to {hw.tile[0]} x {hw.tile[1]} leave idle on "
        f"{hw.units} multiprocessors), {hw.attention_efficiency:.0%} by attention, {hw.memory_efficiency:.0%} of the memory bandwidth, "
        f"{hw.link_efficiency:.0%} of the link bandwidth; in training {hw.sustained:.0%} of what a kernel achieves alone"
    )
    (near, near_small), (far, far_small) = ([1e6 * s for s in latency] for latency in (hw.intra_latency, hw.inter_latency))
    yield (
        f"a hop of a ring takes {near:g} us in a node and {far:g} us between nodes (for small messages {near_small:g} and {far_small:g} us)"
    )


def _of_model(model: RankModel, options: Options) -> Iterator[str]:
    kinds = len(set(model.trace.followed.values()))
    yield f"of {len(model.blocks)} blocks {kinds} were traced; the others repeat these"
    yield "attention is fused and saves no scores" if options.fused_attention else "attention is written out and saves its scores"
    yield (
        "the kernels between two matmuls are fused, as a compiler does"
        if options.compile
        else "each operator is a kernel (eager mode)"
    )
    yield "model FLOPs count attention in full, and no recomputation; causal attention computes half"


def _of_fsdp(hw: Hardware, precision: Precision) -> Iterator[str]:
    gathered, reduced = (
        "the dtype of the model" if dtype is None else str(dtype).removeprefix("torch.")
        for dtype in (precision.gathered or precision.held, precision.reduced or precision.gathered or precision.held)
    )
    yield (
        "FSDP2 all-gathers each block again for the backward, prefetches the next unit while one computes, and keeps parameters outside the "
        f"blocks unsharded; it gathers in {gathered} and reduces in {reduced}; each byte of it slows the kernels beside it by "
        f"{hw.fsdp_traffic:g} bytes of memory traffic"
    )


def _of_tensor_parallelism(hw: Hardware, settings: Settings) -> Iterator[str]:
    yield "TP communication is not overlapped"
    if settings.rank:
        yield (
            f"tp={settings.tp} does not divide everything evenly: this is rank {settings.rank}, which holds most; the others wait for it"
        )
    if settings.tp > hw.per_node:
        yield f"tp={settings.tp} is more than the {hw.per_node} devices of a node, so TP communication crosses nodes"


def _of_training(hw: Hardware, options: Options, settings: Settings) -> Iterator[str]:
    yield (
        f"peak memory includes {hw.fragmentation:.0%} allocator overhead and {hw.reserved_bytes / 1e9:g} GB for the CUDA context and NCCL"
    )
    if options.accumulate > 1 and settings.dp > 1:
        yield "gradients stay unsharded until the last micro-batch (as with `accumulate_grad_batches` under `TPStrategy`)"
    if options.optimizer == "adamw" and hw.device != "cpu":
        yield "the optimizer updates all parameters at once (foreach), with a temporary copy of one state; `fused=True` needs none"
