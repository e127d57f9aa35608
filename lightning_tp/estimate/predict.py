"""`estimate`: what one rank of a mesh of any size holds, sends and computes in a step, and how long that takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_tp.apply.activation_checkpointing import ActivationCheckpointing
from lightning_tp.apply.parallelize import PlanLike, check_options
from lightning_tp.core.comm.mesh import DATA_PARALLEL, TENSOR_PARALLEL
from lightning_tp.errors import TPError
from lightning_tp.estimate.cost.collectives import collectives_of
from lightning_tp.estimate.cost.flops import Flops, flops_of_model, flops_of_rank, products_of
from lightning_tp.estimate.cost.hardware import Hardware, hardware
from lightning_tp.estimate.cost.memory import memory_of, trained
from lightning_tp.estimate.cost.roofline import time_of
from lightning_tp.estimate.drawn.charts import plot
from lightning_tp.estimate.drawn.pages import write_report
from lightning_tp.estimate.rank.inputs import check_size, counted, loss_of, resized
from lightning_tp.estimate.rank.optimizer import OptimizerLike, known_optimizer, optimizer_cost
from lightning_tp.estimate.rank.rank_model import RankModel
from lightning_tp.estimate.rank.settings import Precision, Settings
from lightning_tp.estimate.rank.trace_cache import TraceCache
from lightning_tp.estimate.report.step import StepReport

if TYPE_CHECKING:
    from torch.distributed.fsdp import MixedPrecisionPolicy


class Estimate(StepReport):
    """What `estimate` found for a training step on one rank: numbers, `str()` as tables, `to_json()`; and plots and a page of them."""

    def plot(self, path: str | Path) -> None:
        """Write plots of memory, collectives and time: .svg, .png or .pdf.

        Raises:
            TPError: for another file name extension, a file that can't be written, or if matplotlib is missing and needed.
        """
        plot(self, path)

    def html(self, path: str | Path, *, command: str = "") -> None:
        """Write a report as one self-contained HTML file, with a picture of the plan.

        Args:
            path: of the file.
            command: the command line that made it, shown in the report.

        Raises:
            TPError: if the file can't be written.
        """
        write_report(self, path, command=command)


@dataclass(frozen=True)
class Options:
    """How a model is trained; see `estimate`."""

    precision: str | MixedPrecisionPolicy = "bf16-mixed"
    optimizer: OptimizerLike = "adamw"
    activation_checkpointing: ActivationCheckpointing | None = None
    sequence_parallel: bool = True
    loss_parallel: bool = True
    accumulate: int = 1
    clip_gradients: bool = True
    compile: bool = False
    fused_attention: bool = True


def estimate(
    model: nn.Module,
    inputs: Mapping[str, Any] | tuple[Any, ...],
    mesh_shape: tuple[int, int] | Mapping[str, int],
    *,
    precision: str | MixedPrecisionPolicy = "bf16-mixed",
    optimizer: OptimizerLike = "adamw",
    activation_checkpointing: ActivationCheckpointing | None = None,
    sequence_parallel: bool = True,
    loss_parallel: bool = True,
    plan: PlanLike | None = None,
    hardware: str | Path | Hardware = "h100",
    loss_fn: Callable[..., Tensor] | None = None,
    batch: int | None = None,
    seq: int | None = None,
    accumulate: int = 1,
    clip_gradients: bool = True,
    compile: bool = False,
    fused_attention: bool = True,
) -> Estimate:
    """Predict memory, communication, FLOPs and time of a training step on one rank, without any of the devices.

    The model runs once, forward and backward, on the meta device with the shapes of one rank; of repeated blocks two of each kind. Nothing
    is changed in
    it, and no process group is made: a world of 16,384 ranks costs what one of two does.

    Args:
        model: on any device; on the meta device, it may be of any size.
        inputs: what forward is called with, on one data-parallel rank: keyword arguments, or a tuple.
        mesh_shape: (dp, tp), or a mapping with the axes "data_parallel" and "tensor_parallel".
        precision: a Trainer's ("32-true", "bf16-mixed", "16-mixed", "bf16-true", ..), "bf16-fsdp" (FSDP2 gathers in bfloat16, no autocast),
            or FSDP2's policy.
        optimizer: a name ("adamw", "sgd", ..), a class, or a function of a list of parameters.
        activation_checkpointing: as for `parallelize`.
        sequence_parallel: as for `parallelize`.
        loss_parallel: as for `parallelize`.
        plan: as for `parallelize`. Default: what `TPStrategy` would take.
        hardware: a known device, or the path of a JSON file with your own.
        loss_fn: `loss_fn(output)` or `loss_fn(output, inputs)`. Default: the loss in the output, or of the next token.
        batch: samples of a data-parallel rank and micro-batch, instead of those of `inputs`.
        seq: length of their tokens, instead of that of `inputs`.
        accumulate: micro-batches of an optimizer step.
        clip_gradients: whether the norm of all gradients is taken.
        compile: kernels between products are one, as a compiler makes them.
        fused_attention: False keeps attention scores, as attention that is written out.

    Raises:
        TPError: for sizes that are not above 0, unknown hardware, a mesh that does not fit the model, or a model that can't be traced.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
        >>> found = estimate(model, (torch.ones(2, 4, 8),), (1, 2), loss_fn=lambda y: y.mean(), precision="32-true")
        >>> found.held, found.memory.parameters, found.memory.optimizer
        (280, 1120, 2240)
    """
    options = Options(
        precision,
        optimizer,
        activation_checkpointing,
        sequence_parallel,
        loss_parallel,
        accumulate,
        clip_gradients,
        compile,
        fused_attention,
    )
    dp, tp = sizes_of(mesh_shape)
    for name, value in (("batch", batch), ("seq", seq), ("accumulate", accumulate)):
        check_size(name, value)
    tracer = TraceCache(model, inputs, loss_of(loss_fn), plan)
    return predict(tracer, resized(inputs, batch, seq), dp, tp, hardware, options)


def predict(tracer: TraceCache, inputs: Any, dp: int, tp: int, hardware_: str | Path | Hardware, options: Options) -> Estimate:
    """As `estimate`, for a model that has been traced before, it may be."""
    hw = hardware(hardware_)
    known_optimizer(options.optimizer)
    precision = Precision.of(options.precision)
    how = options.activation_checkpointing
    check_options(how, False, "independent", "local")
    rank = tracer.largest_rank(tp, options.sequence_parallel)
    settings = Settings(tp, dp, rank, precision, how, options.loss_parallel, hw.device, options.fused_attention)
    world = tracer.world(inputs, settings, options.sequence_parallel)
    whole = tracer.whole(inputs, settings, options.sequence_parallel)
    mine = trained(world)
    cost = optimizer_cost(options.optimizer, mine, together=hw.device != "cpu", known=tracer.steps)
    memory = memory_of(world, precision, dp, optimizer=cost.state, scratch=cost.scratch, accumulate=options.accumulate)
    collectives = collectives_of(world, precision, tp, dp, accumulate=options.accumulate, clip=options.clip_gradients, rank=rank)
    time = time_of(
        world,
        collectives,
        hw,
        tp,
        optimizer_bytes=cost.traffic,
        accumulate=options.accumulate,
        compile=options.compile,
    )
    batch, tokens, unit = counted(inputs)
    held = sum(h.numel for h in world.held)
    dtype = precision.autocast or precision.gathered or precision.held or next(iter(world.held)).dtype
    total = sum(p.numel() for p in tracer.model.parameters())
    name = options.optimizer if isinstance(options.optimizer, str) else getattr(options.optimizer, "__name__", "an optimizer")
    return Estimate(
        type(tracer.model).__name__,
        total,
        held,
        dp,
        tp,
        batch,
        tokens * dp * options.accumulate,
        options.accumulate,
        precision.name,
        name,
        how if isinstance(how, str) else "none" if how is None else "by a function",
        hw,
        memory,
        collectives,
        products_of(world),
        Flops(flops_of_model(whole), flops_of_rank(world)),
        time,
        str(tracer.plan_of(tp, options.sequence_parallel)).splitlines()[0],
        tuple(_assumptions(world, hw, options, precision, dp, tp, rank)),
        hw.peak(dtype),
        unit,
        (tracer.plan_of(tp, options.sequence_parallel), world, whole),
    )


def sizes_of(mesh_shape: tuple[int, int] | Mapping[str, int]) -> tuple[int, int]:
    """(dp, tp).

    Raises:
        TPError: if they aren't numbers above 0.
    """
    if isinstance(mesh_shape, Mapping):
        if set(mesh_shape) != {DATA_PARALLEL, TENSOR_PARALLEL}:
            raise TPError(
                f"`mesh_shape`: it has the axes {', '.join(mesh_shape)}; it needs '{DATA_PARALLEL}' and '{TENSOR_PARALLEL}'."
            )
        mesh_shape = (mesh_shape[DATA_PARALLEL], mesh_shape[TENSOR_PARALLEL])
    if not isinstance(mesh_shape, (tuple, list)) or len(mesh_shape) != 2:
        raise TPError(f"`mesh_shape={mesh_shape!r}`: give (dp, tp), such as (256, 8).")
    dp, tp = mesh_shape
    check_size("dp", dp)
    check_size("tp", tp)
    return dp, tp


def _assumptions(world: RankModel, hw: Hardware, options: Options, precision: Precision, dp: int, tp: int, rank: int) -> list[str]:
    kinds = len(set(world.trace.followed.values()))
    found = [
        f"{hw.name}: {hw.peak(precision.autocast or precision.gathered or precision.held or torch.float32) / 1e12:g} TFLOP/s, "
        f"{hw.memory_bandwidth / 1e9:,.0f} GB/s, {hw.memory_bytes / 1e9:.1f} GB, {hw.per_node} in a node at {hw.intra_bandwidth / 1e9:g} GB/s, "
        f"{hw.inter_bandwidth / 1e9:g} GB/s each between nodes",
        f"reached of these: {hw.product_efficiency:.0%} by large products (less what tiles "
        f"of up to {hw.tile[0]} x {hw.tile[1]} on {hw.units} units leave idle), "
        f"{hw.attention_efficiency:.0%} by attention, {hw.memory_efficiency:.0%} of the memory's bandwidth, {hw.link_efficiency:.0%} of the links'; "
        f"in training {hw.sustained:.0%} of what a kernel reaches alone",
        f"a hop of a ring takes {hw.intra_latency[0] * 1e6:g} us in a node and {hw.inter_latency[0] * 1e6:g} us between nodes (small messages "
        f"{hw.intra_latency[1] * 1e6:g} and {hw.inter_latency[1] * 1e6:g})",
        f"of {len(world.blocks)} blocks {kinds} were followed, the others are like one of these",
        f"the peak allows for {hw.fragmentation:.0%} that the allocator can't use and "
        f"{hw.reserved_bytes / 1e9:g} GB that are taken before (context, NCCL)",
        "attention is fused and keeps no scores" if options.fused_attention else "attention is written out and keeps its scores",
        "kernels between products are one, as a compiler makes them"
        if options.compile
        else "each operation is a kernel (eager mode)",
        "model FLOPs count attention in full, and nothing that is run again; causal attention computes half",
    ]
    if dp > 1:
        found.append(
            "FSDP2 gathers each block anew for the backward, the next unit while one computes, and keeps what is outside of "
            "blocks whole; "
            f"gathers in {precision.gathered or precision.held or 'the dtype of the model'}, "
            f"sums in {precision.reduced or precision.gathered or precision.held or 'the same'}; each byte of these slows the kernels "
            f"beside it by {hw.fsdp_traffic:g} bytes of the memory's bandwidth"
        )
    if tp > 1:
        found.append("collectives on the tensor-parallel axis are waited for")
        if rank:
            found.append(f"tp={tp} does not cut everything evenly: this is rank {rank}, which holds most; the others wait for it")
        if tp > hw.per_node:
            found.append(f"tp={tp} is more than the {hw.per_node} devices of a node: its collectives cross nodes")
    if options.accumulate > 1 and dp > 1:
        found.append("gradients stay unsharded until the last micro-batch (as `accumulate_grad_batches` under `TPStrategy`)")
    if options.optimizer == "adamw" and hw.device != "cpu":
        found.append(
            "the optimizer updates all parameters together (foreach), with a copy of one state meanwhile; `fused=True` needs none"
        )
    return [line.replace("torch.", "") for line in found]
