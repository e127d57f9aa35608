"""Hold the configurations that `tune` ranks, and show them as a table and JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass

from lightning_tp.core.tables import table
from lightning_tp.core.units import seconds, size
from lightning_tp.estimate.report.step import StepReport


@dataclass(frozen=True)
class Refused:
    """A configuration that is not possible, or a group of them."""

    what: str  # the configuration
    why: str  # in words, with the numbers


@dataclass(frozen=True)
class TuningReport:
    """The configurations of a model on a number of devices; `str()` of it is a table."""

    fits: tuple[StepReport, ...]  # those that fit in memory, the fastest first
    refused: tuple[Refused, ...]  # those that are not possible
    global_batch: int  # samples of an optimizer step
    gpus: int  # devices

    def to_json(self) -> str:
        """Return all configurations with their main numbers, and those that are refused, as JSON."""
        names = ("tp", "dp", "batch", "accumulate", "activation_checkpointing", "precision", "needed")
        fits = [
            {n: getattr(e, n) for n in names} | {f"{e.unit}_per_s": e.tokens_per_s, "mfu": e.mfu, "step_s": e.time.step}
            for e in self.fits
        ]
        refused = [{"what": r.what, "why": r.why} for r in self.refused]
        return json.dumps({"gpus": self.gpus, "global_batch": self.global_batch, "fits": fits, "refused": refused}, indent=1)

    def __str__(self) -> str:
        unit = self.fits[0].unit if self.fits else "tokens"
        header = ("", "tp", "dp", "batch", "accumulate", "checkpointing", "precision", "memory", "step", f"{unit}/s/device", "MFU")
        rows = [
            (
                *map(str, (i, e.tp, e.dp, e.batch, e.accumulate, e.activation_checkpointing, e.precision)),
                *(size(e.needed), seconds(e.time.step), f"{e.tokens_per_s_per_device:,.0f}", f"{e.mfu:.1%}"),
            )
            for i, e in enumerate(self.fits, 1)
        ]
        head = f"{len(self.fits)} configurations fit on {self.gpus} devices at a global batch of {self.global_batch} samples"
        lines = [head, table(header, rows, right=range(len(header)))]
        if self.refused:
            lines += ["", "Not possible:", *(f"  {r.what}: {r.why}" for r in self.refused)]
        return "\n".join(lines)
