"""Draw what `shapes` found: FLOP/s of matrix products, and tokens/s of the whole step, against the local batch, a line for each tp."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_tp.core.units import count
from lightning_tp.errors import TPError
from lightning_tp.estimate.drawn.drawing import check_picture

if TYPE_CHECKING:
    from lightning_tp.estimate.report.matmul import Shapes

COLORS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
)  # Okabe and Ito: told apart by the color-blind
MARKS = ("o", "s", "^", "D", "v", "P", "X")


def check(path: str | Path, option: str = "") -> None:
    """Before anything is computed.

    Raises:
        TPError: as `check_picture`; also for an .svg, if matplotlib is missing.
    """
    check_picture(path, option, always=True)


def draw(found: Shapes, path: str | Path) -> None:
    """Write the picture.

    Raises:
        TPError: as `check`; or if the file can't be written.
    """
    check(path)
    figure = new_figure((9.0, 3.8))
    left, right = figure.subplots(1, 2)
    products(left, found)
    steps(right, found)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False, fontsize=9)
    of = f", samples of {found.seq:,} tokens" if found.seq is not None else ""
    figure.suptitle(f"{found.model}, {count(found.parameters)} parameters, {found.gpus:,} x {found.hardware.name}{of}", fontsize=10)
    save(figure, path)


def products(axes: Any, found: Shapes) -> None:
    """FLOP/s of matrix products; hollow marks where sequences would have to be split."""
    for i, tp in enumerate(found.tps):
        cells = [c for c in found.cells if c.tp == tp]
        x, y = [c.local_batch for c in cells], [c.flop_s / 1e12 for c in cells]
        color, mark = COLORS[i % len(COLORS)], MARKS[i % len(MARKS)]
        axes.plot(x, y, color=color, linewidth=1.4, marker=mark, markersize=5.5, label=f"tp={tp}")
        split = [c for c in cells if not c.possible]
        axes.plot(
            [c.local_batch for c in split],
            [c.flop_s / 1e12 for c in split],
            mark,
            color=color,
            markerfacecolor="white",
            markersize=5.5,
        )
    if any(not c.possible for c in found.cells):
        axes.plot([], [], "o", color="0.3", markerfacecolor="white", label="hollow: only with split sequences")
    axes.set_ylabel("matrix products, TFLOP/s (predicted)")
    finish(axes, found)


def steps(axes: Any, found: Shapes) -> None:
    """Tokens/s of the whole step on a device; hollow where memory does not suffice."""
    for i, tp in enumerate(found.tps):
        cells = [(c, c.estimate) for c in found.cells if c.tp == tp and c.estimate is not None]
        color, mark = COLORS[i % len(COLORS)], MARKS[i % len(MARKS)]
        x, y = [c.local_batch for c, _ in cells], [e.tokens_per_s_per_device for _, e in cells]
        axes.plot(x, y, color=color, linewidth=1.4, marker=mark, markersize=5.5, label=f"tp={tp}")
        over = [(c.local_batch, e.tokens_per_s_per_device) for c, e in cells if not e.fits]
        axes.plot([b for b, _ in over], [v for _, v in over], mark, color=color, markerfacecolor="white", markersize=5.5)
    unit = "tokens" if found.seq is not None else "samples"
    hollow = any(c.estimate is not None and not c.estimate.fits for c in found.cells)
    axes.set_ylabel(f"whole step, {unit}/s on a device" + ("\n(hollow: does not fit in memory)" if hollow else ""))
    finish(axes, found)


def finish(axes: Any, found: Shapes) -> None:
    """What both have."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(found.local_batches, [f"{b:g}" for b in found.local_batches])
    axes.minorticks_off()
    axes.set_xlabel("local batch: samples for each device")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def new_figure(size: tuple[float, float]) -> Any:
    """A figure that no window knows of."""
    from matplotlib.figure import Figure

    return Figure(figsize=size, layout="constrained")


def save(figure: Any, path: str | Path) -> None:
    """Write it, the same bytes each time.

    Raises:
        TPError: if the file can't be written.
    """
    import matplotlib

    metadata = {"Date": None} if str(path).lower().endswith(".svg") else {}
    try:
        with matplotlib.rc_context({"svg.hashsalt": "lightning-tp", "svg.fonttype": "none"}):
            figure.savefig(path, dpi=110, metadata=metadata)
    except OSError as error:
        raise TPError(f"`{path}` can't be written: {error.strerror}.") from None
