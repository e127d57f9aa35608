"""Plots and pictures as files: `Estimate.plot`, and the picture of a plan for a model that is not estimated."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import product
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lightning_tp.errors import TPError
from lightning_tp.estimate.drawn.charts import all_of
from lightning_tp.estimate.drawn.drawing import check_picture, under
from lightning_tp.estimate.drawn.picture import Picture
from lightning_tp.estimate.drawn.picture_drawing import draw_picture
from lightning_tp.estimate.drawn.picture_from_trace import of_plan, of_world
from lightning_tp.estimate.rank.settings import PRECISIONS, Precision, Settings
from lightning_tp.estimate.rank.trace_step import trace_step
from lightning_tp.estimate.report.step import StepReport
from lightning_tp.plan.checked import CheckedPlan
from lightning_tp.plan.plan import Plan

# what a plan is traced in: the model's own dtypes, or bfloat16, where a kernel is known for that alone on the meta device
TRIED = (Precision("as it is"), PRECISIONS["bf16-true"])


def plot(found: StepReport, path: str | Path) -> None:
    """Write plots of an estimate: memory over a step and at its peak, collectives of the blocks, time by part.

    Args:
        found: the estimate.
        path: of an .svg, .png or .pdf; the last two are written through matplotlib.

    Raises:
        TPError: for another ending, a file that can't be written, or matplotlib that is not there.
    """
    check_picture(path)
    under(all_of(found)).save(path)


def picture_of(
    model: nn.Module,
    inputs: Mapping[str, Any] | tuple[Any, ...],
    plan: CheckedPlan,
    *,
    loss_fn: Callable[..., Tensor] | None = None,
) -> Picture:
    """What a plan makes of a model, in the order of its forward; `draw_picture(..).save("plan.svg")` draws it.

    Args:
        model: on any device; it is traced on the meta device.
        inputs: what forward is called with; sizes of activations and of collectives are those of these, in the model's dtype.
        plan: checked against this model.
        loss_fn: as for `estimate`.

    Raises:
        TPError: for a plan that is not checked.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
        >>> plan = Plan({"0": "colwise", "2": "rowwise"}).check(model, tp=2)
        >>> picture = picture_of(model, (torch.ones(2, 4, 8),), plan, loss_fn=lambda y: y.mean())
        >>> [f"{box.name}: {box.style}" for box in picture.boxes()], [border.words for border in picture.borders()]
        (['0: column-wise', '2: row-wise'], ['all-reduce'])
    """
    from lightning_tp.estimate.rank.inputs import loss_of

    whole = Plan({"**": "replicate"}).check(model, 1)
    losses = (loss_fn, None) if loss_fn is not None else (None,)  # one that holds real tensors can't be followed; the model can
    for precision, loss in product(TRIED, losses):
        try:
            worlds = [
                trace_step(model, loss_of(loss), inputs, p, Settings(tp, 1, precision=precision))
                for p, tp in ((plan, plan.tp), (whole, 1))
            ]
        except TPError:
            continue
        return of_world(type(model).__name__, plan, *worlds)
    return of_plan(model, plan)


def plot_plan(picture: Picture, path: str | Path) -> None:
    """Write the picture of a plan as .svg, .png or .pdf.

    Raises:
        TPError: as `plot`.
    """
    check_picture(path)
    draw_picture(picture).save(path)
