from __future__ import annotations

from lightning_tp.plan.plan import Plan
from lightning_tp.verify.compare import Row
from lightning_tp.verify.report import SHOWN, ParityReport


def report(*errors: float) -> ParityReport:
    rows = [Row("step 0", "loss", 1e-7, 1e-3, "detail of the loss")]
    rows += [Row(f"w{i}", "grad", error, 1e-3, f"error {error}") for i, error in enumerate(errors)]
    rows.sort(key=lambda row: -row.severity)
    return ParityReport(all(row.ok for row in rows), tuple(rows), Plan({"*": "replicate"}), 0.271, 2, 4, 0.0123)


def test_a_match() -> None:
    lines = str(report(3.5e-5, 1e-6)).splitlines()
    assert lines[0] == (
        "Matches a single process: 3 tensors compared, largest relative error 3.5e-05 (tp=2 x dp=4, 1 SGD steps, lr=0.012)"
    )
    assert lines[1].split() == ["kind", "name", "tolerance", "difference"]
    assert lines[2].split() == ["ok", "grad", "w0", "0.001", "error", "3.5e-05"]
    assert lines[-1].endswith("; with dp=4, a rank holds at most 27.1%") and len(lines) == 6


def test_a_difference() -> None:
    bad = report(*[0.5] * (SHOWN + 2))
    lines = str(bad).splitlines()
    assert lines[0].startswith("DIFFERS from a single process: 14 of 15 tensors, the worst is the grad of `w0` (tp=2 x dp=4")
    assert [line.split()[0] for line in lines[2 : 2 + SHOWN]] == ["BAD"] * SHOWN
    assert lines[2 + SHOWN] == "  .. and 3 more, 2 of them out of tolerance"
