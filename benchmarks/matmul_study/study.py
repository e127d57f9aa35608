"""Study the matmuls of a rank at each size of the tensor-parallel axis, at an equal global batch on equally many devices: `shapes`.

With FSDP alone a rank multiplies (b s, h) by (h, f): b samples of s tokens. With tensor parallelism over t ranks the same devices form groups of
t, each of which takes t times the samples, and a rank multiplies (t b s, h) by (h, f / t): as many FLOPs, more rows, fewer columns. Whether that
is faster depends on what is read for each FLOP, on how tiles fit, and on how full waves of tiles are (`estimate.cost.gemm_tiling`).

Where there are fewer samples than devices, FSDP alone leaves devices without one. What it would compute if each sequence were split evenly is
shown for comparison (`StudyPoint.possible` is False); the communication that this takes is not part of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_tp.apply.activation_checkpointing import ActivationCheckpointing
from lightning_tp.apply.parallelize import PlanLike
from lightning_tp.errors import TPError
from lightning_tp.estimate.cost.hardware import Hardware
from lightning_tp.estimate.cost.hardware import hardware as find_hardware
from lightning_tp.estimate.predict import predict
from lightning_tp.estimate.rank.inputs import check_size, loss_of, resized
from lightning_tp.estimate.rank.settings import Options
from lightning_tp.estimate.rank.trace_cache import TraceCache
from lightning_tp.plan.checked import CheckedPlan
from matmul_study.products import MatmulShape, shapes_of, with_more_keys
from matmul_study.report import Shapes, StudyPoint

TPS = (1, 2, 4, 8)
LOCAL_BATCHES = (0.5, 1.0, 2.0, 4.0, 8.0)
ROUNDING = 1e-9  # of local batches such as 1 / 3


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
    """Find the matmuls of a step, and whether tensor parallelism makes them faster, at an equal global batch.

    Args:
        model: on any device; on the meta device, it may be of any size.
        inputs: of its forward, of any batch size.
        gpus: devices, all of them used. Default: those of a node.
        global_batch: samples of a step over all devices: one local batch, `global_batch / gpus`. Not together with `local_batches`.
        local_batches: samples per device; 0.5 is one sample for two devices. Default: of 0.5, 1, 2, 4 and 8 those that make whole samples.
        tps: sizes of the tensor-parallel axis. Default: of 1, 2, 4 and 8 those that fit.
        hardware: as for `estimate`.
        seq: length of the samples, instead of that of `inputs`.
        precision, activation_checkpointing, plan, loss_fn, compile: as for `estimate`.
        progress: called with what is traced next.

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
    hw = find_hardware(hardware)
    for name, value in (("gpus", gpus), ("global_batch", global_batch), ("seq", seq)):
        check_size(name, value)
    devices = gpus or hw.per_node
    batches = _local_batches(devices, global_batch, local_batches)
    tell = progress or (lambda text: None)
    cache = TraceCache(model, inputs, loss_of(loss_fn), plan)
    plans, left_out = _plans(cache, None if tps is None else list(tps), devices, tell)
    options = Options(precision, activation_checkpointing=activation_checkpointing, compile=compile)
    study = _Study(cache, inputs, seq or sequence_length(inputs), hw, options)
    points = []
    for local_batch in batches:
        for tp in plans:
            tell(f"tracing local batch {local_batch:g}, tp={tp}")
            point = study.point(local_batch, tp, devices // tp)
            if point is not None:
                points.append(point)
    if not points:
        raise TPError(
            f"Local batches of {', '.join(f'{b:g}' for b in batches)} leave less than one sample for each group of tp={max(plans)} ranks, and "
            "these inputs have no sequence to split. Pass larger batches."
        )
    total = sum(p.numel() for p in model.parameters())
    return Shapes(type(model).__name__, total, devices, study.length, hw, tuple(points), left_out)


def sequence_length(inputs: Any) -> int | None:
    """Return the length of the tokens among the inputs; None if there are none."""
    tokens = next((t for t in tree_leaves(inputs) if isinstance(t, Tensor) and t.ndim >= 2 and not t.is_floating_point()), None)
    return None if tokens is None else tokens.shape[1]


def _local_batches(gpus: int, global_batch: int | None, local_batches: Sequence[float] | None) -> tuple[float, ...]:
    if global_batch is not None and local_batches is not None:
        raise TPError("`global_batch` and `local_batches`: one follows from the other. Pass one of them.")
    if global_batch is not None:
        return (global_batch / gpus,)
    found = tuple(local_batches) if local_batches is not None else tuple(b for b in LOCAL_BATCHES if b * gpus == int(b * gpus))
    if not found:
        raise TPError("`local_batches`: there is none. Pass at least one.")
    for b in found:
        if isinstance(b, bool) or not isinstance(b, (int, float)) or not math.isfinite(b) or b <= 0:
            raise TPError(f"`local_batches`: {b!r} is not a number of samples above 0.")
        if not _is_whole(b * gpus) or round(b * gpus) < 1:
            raise TPError(f"`local_batches`: {b:g} samples on each of {gpus} devices are {b * gpus:g}, not a whole number.")
    return tuple(sorted({float(b) for b in found}))


def _is_whole(x: float) -> bool:
    return abs(x - round(x)) <= ROUNDING


def _plans(
    cache: TraceCache, tps: list[int] | None, gpus: int, tell: Callable[[str], None]
) -> tuple[dict[int, CheckedPlan], dict[int, str]]:
    """Return the plans by tp; and the sizes that nobody asked for and that are left out, with the reason."""
    plans: dict[int, CheckedPlan] = {}
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
            plans[tp] = cache.plan_of(tp, True)
        except TPError as error:
            if tps is not None:
                raise
            left_out[tp] = str(error)
    return plans, left_out


@dataclass(frozen=True)
class _Study:
    """What is the same for all points.

    Args:
        cache: of the model's traces.
        inputs: of its forward.
        length: tokens of a sample; None if the inputs have none.
        hw: of each device.
        options: of the training.
    """

    cache: TraceCache
    inputs: Any
    length: int | None
    hw: Hardware
    options: Options

    def point(self, local_batch: float, tp: int, dp: int) -> StudyPoint | None:
        """Return a point of the study; None where not even sequences that are split make one."""
        samples = local_batch * tp
        traced = max(1, math.ceil(samples - ROUNDING))
        possible = abs(samples - traced) < ROUNDING
        length, why = self.length, self._unevenness(tp)
        if not possible:
            why = f"{round(local_batch * tp * dp)} samples for " + (f"{dp} groups of {tp}" if tp > 1 else f"{dp} devices")
            if self.length is None or not _is_whole(self.length * samples / traced):
                return None
            length = round(self.length * samples / traced)
        found = predict(self.cache, resized(self.inputs, traced, length), dp, tp, self.hw, self.options)
        matmuls = shapes_of(found.products, self.hw)
        if self.length is not None and length is not None and length != self.length:
            matmuls = self._with_full_attention(matmuls, self.length / length)
        tokens = samples * (self.length or 1)
        return StudyPoint(tp, dp, local_batch, samples, tokens, possible, why, matmuls, found if possible else None)

    def _with_full_attention(self, matmuls: tuple[MatmulShape, ...], times: float) -> tuple[MatmulShape, ...]:
        """Let a part of a sequence attend to all of it."""
        return tuple(with_more_keys(s, times, self.hw) if s.kind == "attention" else s for s in matmuls)

    def _unevenness(self, tp: int) -> str:
        """Say how much more the largest rank holds, if it is more than 1%."""
        if tp == 1:
            return ""
        plan = self.cache.plan_of(tp, True)
        splits = plan.splits
        held = [
            sum(math.prod(splits[n].local_shape(shape, rank)) for n, shape in plan.shapes.items() if n in splits)
            for rank in range(tp)
        ]
        most, mean = max(held), sum(held) / tp
        return f"uneven: the largest rank holds {most / mean - 1:.0%} more than the mean" if most > 1.01 * mean else ""
