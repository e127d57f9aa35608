"""Which mesh, micro-batch, activation checkpointing and precision: all that are possible, estimated, the fastest first; and why the others are none.

The model is traced once for each size of the tensor-parallel axis, micro-batch, checkpointing and precision (a second or so each); more
data-parallel ranks or
micro-batches only change the arithmetic. What can't fit is not traced: a larger micro-batch than one that does not fit.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lightning_tp.apply import PlanLike
from lightning_tp.errors import TPError
from lightning_tp.estimate.hardware import Hardware, hardware
from lightning_tp.estimate.optimizer import OptimizerLike
from lightning_tp.estimate.predict import Options, Tracer, check_size, loss_of, predict
from lightning_tp.estimate.report import Estimate, seconds, size
from lightning_tp.estimate.world import resized
from lightning_tp.recompute import Recompute

LARGEST_BATCH = 64
ORDER: tuple[Recompute | None, ...] = (None, "selective", "block")  # from the most memory to the least
MOST_WHOLE = 1.5  # a rank may hold this many times its even share of the blocks' weights, else tp is of little use


@dataclass(frozen=True)
class Refused:
    """Something that is not possible.

    Args:
        what: the choice, or a group of them.
        why: in words, with the numbers.
    """

    what: str
    why: str


@dataclass(frozen=True)
class Tuned:
    """What there is to choose from.

    Args:
        fits: the fastest first.
        refused: what is not possible, and why.
        global_batch: samples of an optimizer step.
        gpus: devices.
    """

    fits: tuple[Estimate, ...]
    refused: tuple[Refused, ...]
    global_batch: int
    gpus: int

    def to_json(self) -> str:
        """All choices with their main numbers, and what is refused."""
        names = ("tp", "dp", "batch", "accumulate", "activation_checkpointing", "precision", "needed", "tokens_per_s", "mfu")
        fits = [{n: getattr(e, n) for n in names} | {"step_s": e.time.step} for e in self.fits]
        refused = [{"what": r.what, "why": r.why} for r in self.refused]
        return json.dumps({"gpus": self.gpus, "global_batch": self.global_batch, "fits": fits, "refused": refused}, indent=1)

    def html(self, path: str | Path, *, command: str = "") -> None:
        """Write the choices as HTML, with their memory as bars; see `Estimate.html`."""
        from lightning_tp.estimate.html import write_choices

        write_choices(self, path, command=command)

    def __str__(self) -> str:
        head = f"{len(self.fits)} choices fit on {self.gpus} devices at {self.global_batch} samples a step"
        rows = [("", "tp", "dp", "batch", "accumulate", "checkpointing", "precision", "memory", "step", "tokens/s/device", "MFU")]
        for i, e in enumerate(self.fits, 1):
            rows.append(
                (
                    str(i),
                    str(e.tp),
                    str(e.dp),
                    str(e.batch),
                    str(e.accumulate),
                    e.activation_checkpointing,
                    e.precision,
                    size(e.needed),
                    seconds(e.time.step),
                    f"{e.tokens_per_s_per_device:,.0f}",
                    f"{e.mfu:.1%}",
                )
            )
        widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
        lines = [head, *("  " + "  ".join(c.rjust(w) for c, w in zip(r, widths)) for r in rows)]
        if self.refused:
            lines += ["", "Not possible:", *(f"  {r.what}: {r.why}" for r in self.refused)]
        return "\n".join(lines)


def tune(
    model: nn.Module,
    inputs: Mapping[str, Any] | tuple[Any, ...],
    gpus: int,
    global_batch: int,
    *,
    hardware_: str | Path | Hardware = "h100",
    precisions: Sequence[str] = ("bf16-mixed",),
    tps: Iterable[int] | None = None,
    checkpointing: Sequence[Recompute | None] = ORDER,
    optimizer: OptimizerLike = "adamw",
    plan: PlanLike | None = None,
    loss_fn: Callable[..., Tensor] | None = None,
    seq: int | None = None,
    compile: bool = False,
    most: int = 20,
) -> Tuned:
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

    Raises:
        TPError: for sizes that are not above 0, unknown hardware, or a model that can't be traced.
    """
    for name, value in (("gpus", gpus), ("global_batch", global_batch), ("seq", seq)):
        check_size(name, value)
    hw = hardware(hardware_)
    asked = list(tps) if tps is not None else [n for n in range(1, min(gpus, hw.per_node) + 1) if gpus % n == 0]
    tracer = Tracer(model, inputs, loss_of(loss_fn), plan)
    fits: list[Estimate] = []
    refused: list[Refused] = []
    failed: TPError | None = None
    for tp in asked:
        check_size("tp", tp)
        if gpus % tp:
            refused.append(Refused(f"tp={tp}", f"it does not divide {gpus} devices"))
            continue
        dp = gpus // tp
        if global_batch % dp:
            refused.append(
                Refused(
                    f"tp={tp} x dp={dp}",
                    f"{global_batch} samples can't be dealt out evenly over {dp} data-parallel ranks: {global_batch / dp:.3g} each",
                )
            )
            continue
        try:
            found = tracer.plan_of(tp, True)
        except TPError as error:
            refused.append(Refused(f"tp={tp}", str(error)))
            continue
        whole = _whole(found, model, tp)
        if whole is not None:
            refused.append(Refused(f"tp={tp}", whole))
            continue
        each = global_batch // dp
        for precision in precisions:
            options = Options(precision=precision, optimizer=optimizer, compile=compile)
            try:
                _fill(tracer, inputs, seq, dp, tp, each, hw, options, checkpointing, fits, refused)
            except TPError as error:
                failed = failed or error
                refused.append(Refused(f"tp={tp}, {precision}", str(error)))
    if failed is not None and not fits:
        raise failed
    fits.sort(key=lambda e: e.time.step)
    return Tuned(tuple(fits[:most]), tuple(refused), global_batch, gpus)


def _fill(
    tracer: Tracer,
    inputs: Any,
    seq: int | None,
    dp: int,
    tp: int,
    each: int,
    hw: Hardware,
    options: Options,
    checkpointing: Sequence[Recompute | None],
    fits: list[Estimate],
    refused: list[Refused],
) -> None:
    for how in checkpointing:
        over: Estimate | None = None
        for batch in (b for b in range(1, min(each, LARGEST_BATCH) + 1) if each % b == 0):
            found = predict(
                tracer,
                resized(inputs, batch, seq),
                dp,
                tp,
                hw,
                replace(options, activation_checkpointing=how, accumulate=each // batch),
            )
            if not found.fits:
                over = found
                break  # and no larger one does
            fits.append(found)
        if over is not None:
            named = how if isinstance(how, str) else "none"
            what = f"tp={tp} x dp={dp}, {options.precision}, checkpointing {named}, batch {over.batch}" + (
                "" if over.batch == each else " or more"
            )
            refused.append(
                Refused(
                    what,
                    f"{size(over.over)} over the memory of {hw.name} ({size(over.needed)} needed, most at the {over.memory.peak.name})",
                )
            )


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
