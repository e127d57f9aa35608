"""Predict what one rank of a mesh of any size holds, sends and computes in a step, and how long that takes: `estimate`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lightning_tp.apply.activation_checkpointing import ActivationCheckpointing
from lightning_tp.apply.parallelize import PlanLike, check_options
from lightning_tp.core.comm.mesh import DATA_PARALLEL, TENSOR_PARALLEL
from lightning_tp.errors import TPError
from lightning_tp.estimate.assumptions import assumptions_of
from lightning_tp.estimate.cost.collectives import collectives_of
from lightning_tp.estimate.cost.flops import flops_of, products_of
from lightning_tp.estimate.cost.hardware import Hardware
from lightning_tp.estimate.cost.hardware import hardware as find_hardware
from lightning_tp.estimate.cost.memory import memory_of
from lightning_tp.estimate.cost.step_time import time_of
from lightning_tp.estimate.drawn.charts import plot
from lightning_tp.estimate.drawn.pages import write_report
from lightning_tp.estimate.rank.inputs import check_size, count_batch, loss_of, resized
from lightning_tp.estimate.rank.optimizer import known_optimizer, optimizer_cost
from lightning_tp.estimate.rank.settings import OptimizerLike, Options, Settings, precision_of
from lightning_tp.estimate.rank.trace_cache import TraceCache
from lightning_tp.estimate.report.step import StepReport

if TYPE_CHECKING:
    from torch.distributed.fsdp import MixedPrecisionPolicy


class Estimate(StepReport):
    """What `estimate` predicts for a training step on one rank: numbers, `str()` as tables, `to_json()`, plots and an HTML report.

    See `StepReport` for its fields.
    """

    def plot(self, path: str | Path) -> None:
        """Write plots of memory, collectives and time: .svg, .png or .pdf.

        Raises:
            TPError: for another file name extension, a file that can't be written, or if matplotlib is missing and needed.
        """
        plot(self, path)

    def html(self, path: str | Path, *, command: str = "") -> None:
        """Write a report as one self-contained HTML file, with a picture of the plan, and the `command` line that made it.

        Raises:
            TPError: if the file can't be written.
        """
        write_report(self, path, command=command)


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

    The model runs once, forward and backward, on the meta device with the shapes of one rank; of repeated blocks, two of each kind. Nothing in it
    is changed and no process group is made: 16,384 ranks cost as little as two.

    Args:
        model: on any device; on the meta device, it may be of any size.
        inputs: what forward is called with, on one data-parallel rank: keyword arguments, or a tuple.
        mesh_shape: (dp, tp), or a mapping with the axes "data_parallel" and "tensor_parallel".
        precision: a Trainer's ("32-true", "bf16-mixed", "16-mixed", "bf16-true", ..), "bf16-fsdp" (FSDP2 gathers in bfloat16, no autocast),
            or FSDP2's `MixedPrecisionPolicy`.
        optimizer: a name ("adamw", "sgd", ..), a class, or a function of a list of parameters.
        activation_checkpointing, sequence_parallel, loss_parallel: as for `parallelize`.
        plan: as for `parallelize`. Default: the plan that `TPStrategy` would use.
        hardware: a known device, or the path of a JSON file with your own.
        loss_fn: `loss_fn(output)` or `loss_fn(output, inputs)`. Default: the loss in the output, or the next-token loss.
        batch: micro-batch size per data-parallel rank, instead of that of `inputs`.
        seq: length of the token sequences, instead of that of `inputs`.
        accumulate: micro-batches per optimizer step.
        clip_gradients: whether the norm of all gradients is computed.
        compile: whether blocks are compiled: the kernels between matmuls are fused.
        fused_attention: False saves attention scores, as attention that is written out does.

    Raises:
        TPError: for sizes that are not above 0, unknown hardware, a mesh that does not fit the model, or a model that can't be traced.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
        >>> found = estimate(model, (torch.ones(2, 4, 8),), (1, 2), loss_fn=lambda y: y.mean(), precision="32-true")
        >>> found.held, found.memory.parameters, found.memory.optimizer
        (280, 1120, 2240)
    """
    how = (activation_checkpointing, sequence_parallel, loss_parallel, accumulate, clip_gradients, compile, fused_attention)
    options = Options(precision, optimizer, *how)
    dp, tp = sizes_of(mesh_shape)
    for name, value in (("batch", batch), ("seq", seq), ("accumulate", accumulate)):
        check_size(name, value)
    cache = TraceCache(model, inputs, loss_of(loss_fn), plan)
    return predict(cache, resized(inputs, batch, seq), dp, tp, hardware, options)


def predict(cache: TraceCache, inputs: Any, dp: int, tp: int, hardware: str | Path | Hardware, options: Options) -> Estimate:
    """Predict as `estimate` does, for a model whose earlier traces are kept."""
    hw = find_hardware(hardware)
    check_options(options.activation_checkpointing, False, "independent", "local")
    settings = _settings(cache, dp, tp, hw, options)
    precision = settings.precision
    model = cache.rank_model(inputs, settings)
    unsharded = cache.unsharded(inputs, settings)
    accumulate = options.accumulate
    optimizer = optimizer_cost(options.optimizer, model.trained, foreach=hw.device != "cpu", known=cache.step_costs)
    memory = memory_of(model, precision, dp, optimizer=optimizer.state, scratch=optimizer.scratch, accumulate=accumulate)
    collectives = collectives_of(model, precision, tp, dp, accumulate=accumulate, clip=options.clip_gradients)
    time = time_of(model, collectives, hw, tp, optimizer_bytes=optimizer.traffic, accumulate=accumulate, compile=options.compile)
    batch = count_batch(inputs)
    plan = cache.plan_of(tp, options.sequence_parallel)
    return Estimate(
        model=type(cache.model).__name__,
        parameters=sum(p.numel() for p in cache.model.parameters()),
        held=sum(p.numel for p in model.params),
        dp=dp,
        tp=tp,
        batch=batch.samples,
        tokens=batch.tokens * dp * accumulate,
        accumulate=accumulate,
        precision=precision.name,
        optimizer=options.optimizer_name,
        activation_checkpointing=options.checkpointing_name,
        hardware=hw,
        memory=memory,
        collectives=collectives,
        products=products_of(model),
        flops=flops_of(model, unsharded),
        time=time,
        plan=str(plan).splitlines()[0],
        assumptions=tuple(assumptions_of(model, hw, options, settings)),
        peak_flops=hw.peak(precision.computes_in(model.params[0].dtype)),
        unit=batch.unit,
        traced=(plan, model, unsharded),
    )


def _settings(cache: TraceCache, dp: int, tp: int, hw: Hardware, options: Options) -> Settings:
    """Return the settings of the rank that holds most."""
    precision = precision_of(options.precision)
    known_optimizer(options.optimizer)  # a mistake in any option is found before the model is traced
    rank = cache.largest_rank(tp, options.sequence_parallel)
    how = (options.activation_checkpointing, options.loss_parallel, hw.device, options.fused_attention, options.sequence_parallel)
    return Settings(tp, dp, rank, precision, *how)


def sizes_of(mesh_shape: tuple[int, int] | Mapping[str, int]) -> tuple[int, int]:
    """Return (dp, tp) of a mesh; `TPError` if they are not two whole numbers above 0."""
    if isinstance(mesh_shape, Mapping):
        if set(mesh_shape) != {DATA_PARALLEL, TENSOR_PARALLEL}:
            raise TPError(
                f"`mesh_shape` needs the axes '{DATA_PARALLEL}' and '{TENSOR_PARALLEL}', but has {', '.join(mesh_shape)}."
            )
        mesh_shape = (mesh_shape[DATA_PARALLEL], mesh_shape[TENSOR_PARALLEL])
    if not isinstance(mesh_shape, (tuple, list)) or len(mesh_shape) != 2:
        raise TPError(f"`mesh_shape={mesh_shape!r}`: give (dp, tp), such as (256, 8).")
    dp, tp = mesh_shape
    check_size("dp", dp)
    check_size("tp", tp)
    return dp, tp
