"""`shapes`: the matrix products that a rank computes at each size of the tensor-parallel axis, at an equal global batch on equally many devices.

With FSDP alone a rank multiplies (b s, h) by (h, f): b samples of s tokens. With tensor parallelism over t ranks the same devices form groups of
t, each of which takes t times the samples, and a rank multiplies (t b s, h) by (h, f / t): as many FLOPs, more rows, fewer columns. Whether that is
faster depends on what is read for each FLOP, on how tiles fit, and on how full waves of tiles are; `tiles.py` has the model.

Where there are fewer samples than devices, FSDP alone leaves devices without one. What it would compute if each sequence were split evenly is
shown for comparison (`StudyPoint.possible` is False); the communication that this takes is not part of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from lightning_tp.apply.activation_checkpointing import ActivationCheckpointing
from lightning_tp.apply.parallelize import PlanLike
from lightning_tp.errors import TPError
from lightning_tp.estimate.cost.hardware import Hardware, hardware
from lightning_tp.estimate.cost.products import longer, shapes_of
from lightning_tp.estimate.predict import Options, predict
from lightning_tp.estimate.rank.inputs import check_size, loss_of, resized
from lightning_tp.estimate.rank.trace_cache import TraceCache
from lightning_tp.estimate.report.matmul import Shapes, StudyPoint
from lightning_tp.plan.plan import Plan

TPS = (1, 2, 4, 8)


LOCAL_BATCHES = (0.5, 1.0, 2.0, 4.0, 8.0)


def shapes(
    model: nn.Module,
    inputs: Mapping[str, Any] | tuple[Any, ...],
    *,
    gpus: int | None = None,
    global_batch: int | None = None,
    local_batches: Sequence[float] | None = None,
    tps: Iterable[int] | None = None,
    hardware: str | Path | Hardware = "h100",
    seq: int | None = None,
    precision: str = "bf16-mixed",
    activation_checkpointing: ActivationCheckpointing | None = None,
    plan: PlanLike | None = None,
    loss_fn: Callable[..., Tensor] | None = None,
    compile: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Shapes:
    """The matrix products of a step, and how fast they are, for each size of the tensor-parallel axis at an equal global batch.

    Args:
        model: on any device; on the meta device, it may be of any size.
        inputs: of its forward, of any batch size.
        gpus: devices, all of them used. Default: those of a node.
        global_batch: samples of a step over all of them: one local batch, `global_batch / gpus`. Not together with `local_batches`.
        local_batches: samples for each device; 0.5 are one for two devices. Default: of 0.5, 1, 2, 4 and 8 those that make
            whole samples.
        tps: sizes of the tensor-parallel axis. Default: of 1, 2, 4 and 8 those that fit.
        hardware: what the times are for; as for `estimate`.
        seq: length of the samples, instead of that of `inputs`.
        precision, activation_checkpointing, plan, loss_fn, compile: as for `estimate`.
        progress: is told what is traced next.

    Raises:
        TPError: for sizes that are not above 0, unknown hardware, or a tp that does not fit the model or the devices.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
        >>> found = shapes(model, (torch.ones(1, 8),), gpus=2, local_batches=[64], loss_fn=lambda y: y.mean(), tps=[1, 2])
        >>> for tp in (1, 2):
        ...     one = next(s for s in found.cell(64, tp).products if s.role == "forward" and "0" in s.modules)
        ...     print(one.m, one.k, one.n, one.flops)
        64 8 32 32768
        128 8 16 32768
    """
    hw = _hardware(hardware)
    for name, value in (("gpus", gpus), ("global_batch", global_batch), ("seq", seq)):
        check_size(name, value)
    count = gpus or hw.per_node
    batches = _batches(count, global_batch, local_batches)
    tracer = TraceCache(model, inputs, loss_of(loss_fn), plan)
    tell = progress or (lambda text: None)
    given = list(tps) if tps is not None else None
    plans, left_out = _plans(tracer, given, count, tell)
    length = seq or _length(inputs)
    cells = []
    for local in batches:
        for tp in plans:
            tell(f"tracing local batch {local:g}, tp={tp}")
            options = Options(precision, "adamw", activation_checkpointing, compile=compile)
            cell = _cell(tracer, inputs, length, local, tp, count // tp, hw, options)
            if cell is not None:
                cells.append(cell)
    if not cells:
        raise TPError(
            f"Local batches of {', '.join(f'{b:g}' for b in batches)} leave less than one sample for each group of tp={max(plans)} ranks, and "
            "these inputs have no sequence to split. Give larger batches."
        )
    total = sum(p.numel() for p in model.parameters())
    return Shapes(type(model).__name__, total, count, length, hw, tuple(cells), left_out)


_hardware = hardware  # `hardware` is an argument above


def _batches(gpus: int, global_batch: int | None, local_batches: Sequence[float] | None) -> tuple[float, ...]:
    if global_batch is not None and local_batches is not None:
        raise TPError("`global_batch` and `local_batches`: one follows from the other; give one of them.")
    if global_batch is not None:
        return (global_batch / gpus,)
    found = tuple(local_batches) if local_batches is not None else tuple(b for b in LOCAL_BATCHES if b * gpus == int(b * gpus))
    if not found:
        raise TPError("`local_batches`: there is none.")
    for b in found:
        if isinstance(b, bool) or not isinstance(b, (int, float)) or not math.isfinite(b) or b <= 0:
            raise TPError(f"`local_batches`: {b!r} is no number of samples above 0.")
        if abs(b * gpus - round(b * gpus)) > 1e-9 or round(b * gpus) < 1:
            raise TPError(f"`local_batches`: {b:g} samples on each of {gpus} devices are {b * gpus:g}, not a whole number.")
    return tuple(sorted({float(b) for b in found}))


def _plans(
    tracer: TraceCache, tps: list[int] | None, gpus: int, tell: Callable[[str], None]
) -> tuple[dict[int, Plan], dict[int, str]]:
    plans: dict[int, Plan] = {}
    left_out: dict[int, str] = {}
    for tp in sorted(set(tps)) if tps is not None else TPS:
        check_size("tp", tp)
        if gpus % tp:
            if tps is not None:
                fit = [n for n in range(1, gpus + 1) if gpus % n == 0]
                raise TPError(f"tp={tp} does not divide {gpus} devices. These do: {', '.join(map(str, fit))}.")
            left_out[tp] = f"it does not divide {gpus} devices"
            continue
        tell(f"planning tp={tp}")
        try:
            plans[tp] = tracer.plan_of(tp, True)
        except TPError as error:
            if tps is not None:
                raise
            left_out[tp] = str(error)
    return plans, left_out


def _length(inputs: Any) -> int | None:
    tokens = next((t for t in tree_flatten(inputs)[0] if isinstance(t, Tensor) and t.ndim >= 2 and not t.is_floating_point()), None)
    return None if tokens is None else tokens.shape[1]


def _held(plan: Plan, rank: int) -> int:
    splits = plan.splits
    return sum(math.prod(splits[n].local_shape(shape, rank)) for n, shape in plan.shapes.items() if n in splits)


def _cell(
    tracer: TraceCache, inputs: Any, length: int | None, local: float, tp: int, dp: int, hw: Hardware, options: Options
) -> StudyPoint | None:
    """That cell; None where not even a split sequence would do."""
    samples = local * tp
    whole = max(1, math.ceil(samples - 1e-9))
    possible = abs(samples - whole) < 1e-9
    seq = length
    why = ""
    if not possible:
        have = round(local * tp * dp)
        why = f"{have} samples for {dp} groups of {tp}" if tp > 1 else f"{have} samples for {dp} devices"
        if length is None or abs(length * samples / whole - round(length * samples / whole)) > 1e-9:
            return None
        seq = round(length * samples / whole)
    elif tp > 1:
        plan = tracer.plan_of(tp, True)
        held = [_held(plan, r) for r in range(tp)]
        most, mean = max(held), sum(held) / tp
        why = f"uneven: the largest rank holds {most / mean - 1:.0%} more than the mean" if most > 1.01 * mean else ""
    found = predict(tracer, resized(inputs, whole, seq if length is not None else None), dp, tp, hw, options)
    rows = shapes_of(found.products, hw)
    if length is not None and seq != length:  # attention of a part of a sequence looks at all of it
        rows = tuple(longer(s, length / (seq or 1), hw) if s.kind == "attention" else s for s in rows)
    tokens = samples * (length or 1)
    return StudyPoint(tp, dp, local, samples, tokens, possible, why, rows, found if possible else None)
