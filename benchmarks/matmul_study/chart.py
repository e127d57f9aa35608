"""Charts of the matmul study: FLOP/s of the matmuls, and tokens/s of the whole step, against the local batch, a line for each tp."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_tp.core.units import count
from lightning_tp.estimate.drawn.figure import check_plot, new_figure, save
from matmul_study.report import Shapes, StudyPoint

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colors, told apart by the color-blind
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def plot_study(found: Shapes, path: str | Path) -> None:
    """Write both charts beside each other as .svg, .png or .pdf.

    Raises:
        TPError: for another file name extension, without matplotlib, or if the file can't be written.
    """
    check_plot(path)
    figure = new_figure((9.0, 3.8))
    left, right = figure.subplots(1, 2)
    matmul_rates(left, found)
    step_rates(right, found)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False, fontsize=9)
    of = f", samples of {found.seq:,} tokens" if found.seq is not None else ""
    title = f"{found.model}, {count(found.parameters)} parameters, {found.gpus:,} x {found.hardware.name}{of}"
    figure.suptitle(title, fontsize=10)
    save(figure, path, title)


def matmul_rates(axes: Axes, found: Shapes) -> None:
    """Draw the FLOP/s of matmuls; hollow markers where sequences would have to be split."""
    _lines(axes, found, found.cells, lambda c: c.flop_s / 1e12, lambda c: not c.possible)
    if any(not c.possible for c in found.cells):
        axes.plot([], [], "o", color="0.3", markerfacecolor="none", label="hollow: only with split sequences")
    axes.set_ylabel("matmuls, TFLOP/s (predicted)")


def step_rates(axes: Axes, found: Shapes) -> None:
    """Draw the tokens/s per device of the whole step; hollow markers where it does not fit in memory."""
    rates = {id(c): c.estimate for c in found.cells if c.estimate is not None}
    cells = [c for c in found.cells if id(c) in rates]
    _lines(axes, found, cells, lambda c: rates[id(c)].tokens_per_s_per_device, lambda c: not rates[id(c)].fits)
    unit = "tokens" if found.seq is not None else "samples"
    hollow = any(not e.fits for e in rates.values())
    axes.set_ylabel(f"whole step, {unit}/s per device" + ("\n(hollow: does not fit in memory)" if hollow else ""))


def line_style(i: int) -> dict[str, Any]:
    """Return the style of the i-th line of a chart."""
    return {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)], "markersize": 5.5, "linewidth": 1.4}


def _lines(
    axes: Axes,
    found: Shapes,
    cells: Sequence[StudyPoint],
    value: Callable[[StudyPoint], float],
    is_hollow: Callable[[StudyPoint], bool],
) -> None:
    for i, tp in enumerate(found.tps):
        of_tp = [c for c in cells if c.tp == tp]
        axes.plot([c.local_batch for c in of_tp], [value(c) for c in of_tp], label=f"tp={tp}", **line_style(i))
        hollow = [c for c in of_tp if is_hollow(c)]
        style = line_style(i) | {"linestyle": "", "markerfacecolor": "white"}
        axes.plot([c.local_batch for c in hollow], [value(c) for c in hollow], **style)
    axes.set_xscale("log", base=2)
    axes.set_xticks(found.local_batches, [f"{b:g}" for b in found.local_batches])
    axes.minorticks_off()
    axes.set_xlabel("local batch: samples per device")
    axes.set_ylim(0, 1.05 * axes.dataLim.y1)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
