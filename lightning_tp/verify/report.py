"""The result of `verify`, and its table."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_tp.core.tables import table
from lightning_tp.plan.checked import CheckedPlan
from lightning_tp.verify.compare import Row

SHOWN = 12  # rows of a report that are printed


@dataclass(frozen=True)
class ParityReport:
    """The comparison of a sharded model with a single process; `str()` of it is a table with the verdict in its first line.

    Args:
        ok: Whether every row is within its tolerance.
        rows: What was compared, the worst first.
        plan: The plan that was applied.
        held: The largest share of all parameters that a rank held (after sharding by FSDP2 over `dp`).
        tp: The tensor-parallel size.
        dp: The data-parallel size.
        lr: The learning rate of the steps.
    """

    ok: bool
    rows: tuple[Row, ...]
    plan: CheckedPlan
    held: float
    tp: int
    dp: int
    lr: float

    def __str__(self) -> str:
        bad = [row for row in self.rows if not row.ok]
        worst, steps = self.rows[0], sum(row.kind == "loss" for row in self.rows)
        settings = f"tp={self.tp} x dp={self.dp}, {steps} SGD steps, lr={self.lr:.2g}"
        if bad:
            verdict = f"DIFFERS from a single process: {len(bad)} of {len(self.rows)} tensors, the worst is the {worst.kind} of `{worst.name}`"
        else:
            verdict = f"Matches a single process: {len(self.rows)} tensors compared, largest relative error {worst.error:.1e}"
        cells = [("ok" if r.ok else "BAD", r.kind, r.name, f"{r.tolerance:g}", r.detail) for r in self.rows[:SHOWN]]
        lines = [f"{verdict} ({settings})", table(("", "kind", "name", "tolerance", "difference"), cells)]
        if len(self.rows) > SHOWN:
            more = self.rows[SHOWN:]
            lines.append(f"  .. and {len(more)} more, {sum(not row.ok for row in more)} of them out of tolerance")
        lines.append(f"{str(self.plan).splitlines()[0]}; with dp={self.dp}, a rank holds at most {self.held:.1%}")
        return "\n".join(lines)
