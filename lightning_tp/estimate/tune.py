"""Which mesh, micro-batch, activation checkpointing and precision: all that are possible, estimated, the fastest first; and why the others are none.

For each size of the tensor-parallel axis, checkpointing and precision the model is traced with one, two, and (where one sample is a case of its own)
four samples; other micro-batches follow from these (see `scale.py`), and more data-parallel ranks only change the arithmetic. What can't fit is
not looked at: a larger micro-batch than one that does not fit. The choice that comes out first is traced as it is, and all are where that shows
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
from lightning_tp.estimate.predict import Estimate, Options, predict
from lightning_tp.estimate.rank.extrapolate import ScalingTracer
from lightning_tp.estimate.rank.inputs import check_size, loss_of, resized
from lightning_tp.estimate.rank.optimizer import OptimizerLike, known_optimizer
from lightning_tp.estimate.rank.settings import Precision
from lightning_tp.estimate.report.tuning import Refused, TuningReport

LARGEST_BATCH = 64


ORDER: tuple[ActivationCheckpointing | None, ...] = (None, "selective", "block")  # from the most memory to the least


MOST_WHOLE = 1.5  # a rank may hold this many times its even share of the blocks' weights, else tp is of little use


class TuningResult(TuningReport):
    """What `tune` found: the configurations that fit, `str()` as a table, `to_json()`; and a page of them."""

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
    """The choices that fit, the fastest first.

    Args:
        model: on any device.
        inputs: of its forward, of any batch size.
        gpus: devices, all of them used.
        global_batch: samples of an optimizer step over all of them.
        hardware_: of one.
        precisions: to look at.
        tps: sizes of the tensor-parallel axis. Default: the divisors of `gpus` up to the devices of a node.
        checkpointing: kinds to look at.
        optimizer, plan, loss_fn, seq, compile: as for `estimate`.
        most: how many to keep.
        progress: told what is looked at.

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
        Precision.of(precision)
    search = _Search(
        ScalingTracer(model, inputs, loss_of(loss_fn), plan),
        inputs,
        seq,
        hw,
        [Options(precision=p, optimizer=optimizer, compile=compile) for p in precisions],
        checkpointing,
        progress or (lambda text: None),
    )
    search.run(asked, gpus, global_batch)
    if search.fits and not search.first_is_right():
        search.tracer.as_it_is()
        search.run(asked, gpus, global_batch)
    if search.failed is not None and not search.fits:
        raise search.failed
    return TuningResult(tuple(search.fits[:most]), tuple(search.refused), global_batch, gpus)


@dataclass
class _Search:
    """Goes through all choices."""

    tracer: ScalingTracer
    inputs: Any
    seq: int | None
    hw: Hardware
    options: Sequence[Options]
    checkpointing: Sequence[ActivationCheckpointing | None]
    progress: Callable[[str], None]
    fits: list[Estimate] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)
    failed: TPError | None = None

    def run(self, asked: Sequence[int], gpus: int, global_batch: int) -> None:
        """Of these sizes of the tensor-parallel axis."""
        self.fits, self.refused, self.failed = [], [], None
        for i, tp in enumerate(asked):
            self.progress(f"tp={tp} ({i + 1} of {len(asked)}): the plan")
            why = self._impossible(tp, gpus, global_batch)
            if why is not None:
                self.refused.append(why)
                continue
            dp = gpus // tp
            for options in self.options:
                try:
                    for how in self.checkpointing:
                        named = how if isinstance(how, str) else "none" if how is None else "by a function"
                        self.progress(f"tp={tp} ({i + 1} of {len(asked)}): {options.precision}, checkpointing {named}")
                        self._batches(dp, tp, global_batch // dp, replace(options, activation_checkpointing=how), named)
                except TPError as error:
                    self.failed = self.failed or error
                    self.refused.append(Refused(f"tp={tp}, {options.precision}", str(error)))
        self.fits.sort(key=lambda e: e.time.step)

    def first_is_right(self) -> bool:
        """Whether the fastest is what it is if it is traced with its own micro-batch."""
        e = self.fits[0]
        if e.batch not in self.tracer.computed:
            return True  # it was
        how = next(
            h
            for h in self.checkpointing
            if (h if isinstance(h, str) else "none" if h is None else "by a function") == e.activation_checkpointing
        )
        options = next(o for o in self.options if Precision.of(o.precision).name == e.precision)
        exact = replace(self.tracer, exact=True, _worlds={}, _wholes={}, _traced={})
        options = replace(options, activation_checkpointing=how, accumulate=e.accumulate)
        return predict(exact, resized(self.inputs, e.batch, self.seq), e.dp, e.tp, self.hw, options) == e

    def _impossible(self, tp: int, gpus: int, global_batch: int) -> Refused | None:
        if gpus % tp:
            return Refused(f"tp={tp}", f"it does not divide {gpus} devices")
        dp = gpus // tp
        if global_batch % dp:
            each = f"{global_batch} samples can't be dealt out evenly over {dp} data-parallel ranks: {global_batch / dp:.3g} each"
            return Refused(f"tp={tp} x dp={dp}", each)
        try:
            found = self.tracer.plan_of(tp, True)
        except TPError as error:
            return Refused(f"tp={tp}", str(error))
        whole = _whole(found, self.tracer.model, tp)
        return None if whole is None else Refused(f"tp={tp}", whole)

    def _batches(self, dp: int, tp: int, each: int, options: Options, named: str) -> None:
        """All micro-batches of `each` samples of a data-parallel rank; those that fit are noted."""
        sizes = [b for b in range(1, min(each, LARGEST_BATCH) + 1) if each % b == 0]
        accumulated = [
            b for b in sizes if b < each
        ]  # between steps these hold gradients that FSDP2 has not cut: more than one large batch
        over: list[Estimate] = []
        for batch in accumulated:
            found = self._one(dp, tp, each, batch, options)
            if not found.fits:
                over.append(found)
                break  # and no larger one does
            self.fits.append(found)
        if sizes[-1] == each:
            found = self._one(dp, tp, each, each, options)
            (self.fits if found.fits else over).append(found)
        if not over:
            return
        first = over[0]
        larger = [b for b in sizes if b > first.batch and not any(e.batch == b and e.fits for e in self.fits[-1:])]
        which = f"batch {first.batch}" + (" or more" if larger else "")
        if larger and larger[-1] != sizes[-1]:
            which = f"batch {first.batch} to {larger[-1]}"
        self.refused.append(
            Refused(
                f"tp={tp} x dp={dp}, {options.precision}, checkpointing {named}, {which}",
                f"{size(first.over)} over the memory of {self.hw.name} ({size(first.needed)} needed, most at the {first.memory.peak.name})",
            )
        )

    def _one(self, dp: int, tp: int, each: int, batch: int, options: Options) -> Estimate:
        options = replace(options, accumulate=each // batch)
        return predict(self.tracer, resized(self.inputs, batch, self.seq), dp, tp, self.hw, options)


def _whole(plan: Any, model: nn.Module, tp: int) -> str | None:
    """Why this size of the axis is of little use: what stays whole."""
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
    if not total or held <= MOST_WHOLE * total / tp:
        return None
    some = next(iter(reasons), "")
    return f"a rank would hold {held / total:.0%} of the weights, not {1 / tp:.0%}: {some}"
