"""Rank the configurations of a model on a number of devices: mesh, micro-batch size, activation checkpointing, precision.

Each size of the tensor-parallel axis, kind of checkpointing and precision is traced with one, two, and (where one sample is a special case) four
samples; other micro-batches are extrapolated from these (see `rank.extrapolate`), and more data-parallel ranks only change the arithmetic.
Larger micro-batches than one that does not fit are skipped. The configuration that ranks first is traced as it is, and all are where that shows
a difference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lightning_tp.apply.activation_checkpointing import ActivationCheckpointing
from lightning_tp.apply.parallelize import PlanLike
from lightning_tp.core.units import size
from lightning_tp.errors import TPError
from lightning_tp.estimate.cost.hardware import Hardware, hardware
from lightning_tp.estimate.drawn.pages import write_choices
from lightning_tp.estimate.predict import Estimate, predict
from lightning_tp.estimate.rank.extrapolate import ExtrapolatingCache
from lightning_tp.estimate.rank.inputs import check_size, loss_of, resized
from lightning_tp.estimate.rank.optimizer import known_optimizer
from lightning_tp.estimate.rank.settings import OptimizerLike, Options, precision_of
from lightning_tp.estimate.report.tuning import Refused, TuningReport
from lightning_tp.plan.checked import CheckedPlan

LARGEST_BATCH = 64
ORDER: tuple[ActivationCheckpointing | None, ...] = (None, "selective", "block")  # from the most memory to the least
MOST_REPLICATED = 1.5  # a rank may hold this many times its even share of the weights, else tp is of little use


class TuningResult(TuningReport):
    """The configurations that `tune` ranks: `str()` of it is a table; `to_json()`, and an HTML page.

    See `TuningReport` for its fields.
    """

    fits: tuple[Estimate, ...]

    def html(self, path: str | Path, *, command: str = "") -> None:
        """Write the configurations as one self-contained HTML file, with their memory as bars; see `Estimate.html`."""
        write_choices(self, path, command=command)


def tune(
    model: nn.Module,
    inputs: Mapping[str, Any] | tuple[Any, ...],
    gpus: int,
    global_batch: int,
    *,
    hardware_: str | Path | Hardware = "h100",
    precisions: Sequence[str] = ("bf16-mixed",),
    tps: Iterable[int] | None = None,
    checkpointing: Sequence[ActivationCheckpointing | None] = ORDER,
    optimizer: OptimizerLike = "adamw",
    plan: PlanLike | None = None,
    loss_fn: Callable[..., Tensor] | None = None,
    seq: int | None = None,
    compile: bool = False,
    most: int = 20,
    progress: Callable[[str], None] | None = None,
) -> TuningResult:
    """Rank the configurations that fit in memory by throughput.

    Args:
        model: on any device.
        inputs: of its forward, of any batch size.
        gpus: devices, all of them used.
        global_batch: samples of an optimizer step over all of them.
        hardware_: of one.
        precisions: to try.
        tps: sizes of the tensor-parallel axis to try. Default: the divisors of `gpus` up to the devices of a node.
        checkpointing: kinds to try.
        optimizer, plan, loss_fn, seq, compile: as for `estimate`.
        most: how many to keep.
        progress: called with what is tried next.

    Raises:
        TPError: for sizes that are not above 0, unknown hardware, or a model that can't be traced.
    """
    for name, value in (("gpus", gpus), ("global_batch", global_batch), ("seq", seq), ("most", most)):
        check_size(name, value)
    hw = hardware(hardware_)
    asked = list(tps) if tps is not None else [n for n in range(1, min(gpus, hw.per_node) + 1) if gpus % n == 0]
    for tp in asked:
        check_size("tp", tp)
    known_optimizer(optimizer)
    for precision in precisions:
        precision_of(precision)
    # in this order: of several that fail for one precision, the first is reported
    options = [Options(precision, optimizer, how, compile=compile) for precision in precisions for how in checkpointing]
    cache = ExtrapolatingCache(model, inputs, loss_of(loss_fn), plan)
    search = _Search(cache, inputs, seq, hw, options, progress or (lambda text: None))
    search.run(asked, gpus, global_batch)
    if search.fits and not search.first_is_exact():
        search.cache = search.cache.traced_anew()
        search.run(asked, gpus, global_batch)
    if search.failed is not None and not search.fits:
        raise search.failed
    return TuningResult(tuple(search.fits[:most]), tuple(search.refused), global_batch, gpus)


@dataclass
class _Search:
    """Tries all configurations: `run` fills `fits`, `refused`, and `failed`, the first error of a configuration."""

    cache: ExtrapolatingCache
    inputs: Any
    seq: int | None
    hw: Hardware
    options: Sequence[Options]
    progress: Callable[[str], None]
    fits: list[Estimate] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)
    failed: TPError | None = None

    def run(self, tps: Sequence[int], gpus: int, global_batch: int) -> None:
        """Try these sizes of the tensor-parallel axis."""
        self.fits, self.refused, self.failed = [], [], None
        for i, tp in enumerate(tps):
            step = f"tp={tp} ({i + 1} of {len(tps)})"
            self.progress(f"{step}: the plan")
            impossible = self._impossible(tp, gpus, global_batch)
            if impossible is not None:
                self.refused.append(impossible)
                continue
            failed: set[Any] = set()
            for options in self.options:
                if options.precision in failed:
                    continue
                self.progress(f"{step}: {options.precision}, checkpointing {options.checkpointing_name}")
                try:
                    self._try_batches(gpus // tp, tp, global_batch // (gpus // tp), options)
                except TPError as error:
                    failed.add(options.precision)
                    self.failed = self.failed or error
                    self.refused.append(Refused(f"tp={tp}, {options.precision}", str(error)))
        self.fits.sort(key=lambda e: e.time.step)

    def first_is_exact(self) -> bool:
        """Return whether the fastest is what it is when it is traced with its own micro-batch."""
        first = self.fits[0]
        if first.batch not in self.cache.extrapolated:
            return True
        wanted = (first.precision, first.activation_checkpointing)
        options = next(o for o in self.options if (precision_of(o.precision).name, o.checkpointing_name) == wanted)
        options = replace(options, accumulate=first.accumulate)
        inputs = resized(self.inputs, first.batch, self.seq)
        return predict(self.cache.traced_anew(), inputs, first.dp, first.tp, self.hw, options) == first

    def _impossible(self, tp: int, gpus: int, global_batch: int) -> Refused | None:
        if gpus % tp:
            return Refused(f"tp={tp}", f"it does not divide {gpus} devices")
        dp = gpus // tp
        if global_batch % dp:
            return Refused(
                f"tp={tp} x dp={dp}",
                f"{global_batch} samples can't be distributed evenly over {dp} data-parallel ranks ({global_batch / dp:.3g} each)",
            )
        try:
            plan = self.cache.plan_of(tp, True)
        except TPError as error:
            return Refused(f"tp={tp}", str(error))
        replicated = _mostly_replicated(plan, tp)
        return None if replicated is None else Refused(f"tp={tp}", replicated)

    def _try_batches(self, dp: int, tp: int, samples: int, options: Options) -> None:
        """Try all micro-batches of `samples` per data-parallel rank, and note those that fit."""
        batches = [b for b in range(1, min(samples, LARGEST_BATCH) + 1) if samples % b == 0]
        over: list[Estimate] = []
        # accumulated ones hold gradients that FSDP2 has not sharded, more than one large batch: so that may fit where they do not
        for batch in (b for b in batches if b < samples):
            found = self._estimate(dp, tp, samples, batch, options)
            if not found.fits:
                over.append(found)
                break  # and no larger one does
            self.fits.append(found)
        if batches[-1] == samples:
            found = self._estimate(dp, tp, samples, samples, options)
            (self.fits if found.fits else over).append(found)
        if over:
            self.refused.append(self._out_of_memory(over[0], batches))

    def _estimate(self, dp: int, tp: int, samples: int, batch: int, options: Options) -> Estimate:
        options = replace(options, accumulate=samples // batch)
        return predict(self.cache, resized(self.inputs, batch, self.seq), dp, tp, self.hw, options)

    def _out_of_memory(self, first: Estimate, batches: list[int]) -> Refused:
        """Say what does not fit: the smallest micro-batch, and which larger ones."""
        larger = [b for b in batches if b > first.batch and not any(e.batch == b and e.fits for e in self.fits[-1:])]
        which = f"batch {first.batch}" + (" or more" if larger else "")
        if larger and larger[-1] != batches[-1]:
            which = f"batch {first.batch} to {larger[-1]}"
        return Refused(
            f"tp={first.tp} x dp={first.dp}, {first.precision}, checkpointing {first.activation_checkpointing}, {which}",
            f"out of memory: {size(first.needed)} of {size(self.hw.memory_bytes)}; peak in the {first.memory.peak.name}",
        )


def _mostly_replicated(plan: CheckedPlan, tp: int) -> str | None:
    """Say why this size of the axis is of little use, because too many weights are replicated; None if it is of use."""
    if tp == 1:
        return None
    total = held = 0
    reasons: dict[str, None] = {}
    for entry in plan.entries:
        for name, split in entry.splits.items():
            shape = plan.shapes[name]
            if len(shape) < 2:
                continue
            total += math.prod(shape)
            held += math.prod(split.local_shape(shape, 0))
            if split.dim is None:
                reasons[f"`{entry.where}` {entry.reason}"] = None
    if not total or held <= MOST_REPLICATED * total / tp:
        return None
    return f"a rank would hold {held / total:.0%} of the weights, not {1 / tp:.0%}: {next(iter(reasons), '')}"
