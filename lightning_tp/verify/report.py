"""The result of `verify`."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_tp.errors import TPError
from lightning_tp.plan.checked import CheckedPlan
from lightning_tp.plan.table import columns
from lightning_tp.verify.compare import Row

SHOWN = 12  # rows of a report that are printed


@dataclass(frozen=True)
class ParityReport:
    """What `verify` found; `str()` of it is a table, the verdict in its first line.

    Args:
        ok: whether every row is.
        rows: what was compared, the worst first.
        plan: the plan that was applied, checked.
        held: the share of all parameters that a rank held, the largest of all ranks (FSDP2's cut over `dp` included).
        tp: the size of the tensor-parallel axis.
        dp: the size of the data-parallel axis.
        lr: the learning rate of the steps.
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
        where = f"tp={self.tp} x dp={self.dp}, {steps} steps of SGD at lr={self.lr:.2g}"
        if bad:
            head = (
                f"NOT as in one process ({where}): {len(bad)} of {len(self.rows)} differ, worst the {worst.kind} of `{worst.name}`"
            )
        else:
            head = f"As in one process ({where}): {len(self.rows)} compared, the worst error is {worst.error:.1e}"
        rows = [("", "kind", "name", "tolerance", "found")]
        rows += [("ok" if r.ok else "BAD", r.kind, r.name, f"{r.tolerance:g}", r.detail) for r in self.rows[:SHOWN]]
        lines = [head, *columns(rows)]
        if len(self.rows) > SHOWN:
            lines.append(f"  .. and {len(self.rows) - SHOWN} more, {sum(not row.ok for row in self.rows[SHOWN:])} of them bad")
        lines.append(f"{str(self.plan).splitlines()[0]}; with dp={self.dp} at most {self.held:.1%}")
        return "\n".join(lines)

    def raise_if_bad(self) -> None:
        """Nothing, if it is as in one process.

        Raises:
            TPError: if not, with the report as its message.
        """
        if not self.ok:
            raise TPError(str(self))
