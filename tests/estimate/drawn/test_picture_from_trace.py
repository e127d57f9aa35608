from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lightning_tp import Plan, infer_plan
from lightning_tp.estimate.drawn.figure import NARROW, WIDE
from lightning_tp.estimate.drawn.picture import Box, Communication, Frame, Picture, Row, SideBySide
from lightning_tp.estimate.drawn.picture_from_trace import picture_from_registration, picture_from_trace, picture_of
from lightning_tp.estimate.drawn.picture_render import draw_picture
from lightning_tp.estimate.trace.forward_log import ForwardEvent, Shape
from lightning_tp.estimate.trace.step_trace import CollectiveCall, Segment, StepTrace
from lightning_tp.plan.checked import CheckedPlan
from tests.estimate.models import MODELS


def weights(rows: tuple[Row, ...], times: int = 1) -> int:
    """Elements of what is drawn by itself, counted as often as it stands for something."""
    total = 0
    for row in rows:
        if isinstance(row, Frame):
            total += weights(row.rows, times * row.times)
        elif isinstance(row, SideBySide):
            total += weights(row.boxes, times)
        elif isinstance(row, Box):
            total += times * row.times * sum(torch.Size(w.full).numel() for w in row.weights)
    return total


def sent_by(rows: tuple[Row, ...], times: int = 1) -> dict[str, int]:
    """Collectives by kind, counted likewise."""
    total: dict[str, int] = {}
    for row in rows:
        if isinstance(row, Frame):
            for kind, n in sent_by(row.rows, times * row.times).items():
                total[kind] = total.get(kind, 0) + n
        elif isinstance(row, Communication):
            for kind in (row.forward, row.backward):
                if kind:
                    total[kind] = total.get(kind, 0) + times * row.times
    return total


def test_every_parameter_is_drawn_once(drawn: tuple[nn.Module, CheckedPlan, Picture, dict[str, int]]) -> None:
    model, plan, picture, _ = drawn
    used = sum(p.numel() for n, p in model.named_parameters() if not n.startswith("shared."))
    twice = sum(torch.Size(plan.shapes[n]).numel() for n in plan.tied)  # at each place where a tied weight is used
    assert weights(picture.rows) == used + twice


def test_every_collective_is_drawn_where_it_happens(drawn: tuple[nn.Module, CheckedPlan, Picture, dict[str, int]]) -> None:
    _, _, picture, sent = drawn
    instead = [b for b in picture.communications() if b.where.endswith("instead")]
    counted = sent_by(picture.rows)
    if instead:  # these stand in the place of what is drawn for most blocks
        assert set(counted) == set(sent) and all(counted[k] >= n for k, n in sent.items())
    else:
        assert counted == sent


def test_blocks_are_drawn_once(drawn: tuple[nn.Module, CheckedPlan, Picture, dict[str, int]]) -> None:
    _, _, picture, _ = drawn
    blocks = [row for row in picture.rows if isinstance(row, Frame) and row.block]
    assert blocks and any(b.times > 1 and "{" in b.name for b in blocks)
    assert sum(b.times for b in blocks) in (3, 4, 5, 6) and len(blocks) <= 4


def test_shapes_follow_the_splits(drawn: tuple[nn.Module, CheckedPlan, Picture, dict[str, int]]) -> None:
    for box in drawn[2].boxes():
        for state in (box.arrives, box.leaves):
            if state.kind == "sequence":
                assert state.local != state.full and state.local[-1] == state.full[-1]
            elif state.kind == "features":
                assert state.local[:-1] == state.full[:-1] and state.local[-1] < state.full[-1]
        if box.style == "column-wise":
            assert box.leaves.kind == "features" and box.arrives.kind in ("replicated", "unknown")
        elif box.style == "row-wise":
            assert box.arrives.kind in ("features", "unknown") and box.leaves.kind == "partial", box
        elif box.cut == "sequence":
            assert box.leaves.kind == "sequence"


def test_a_plan_by_hand() -> None:
    model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
    plan = Plan({"0": "colwise", "2": "rowwise"}).check(model, 2)
    picture = picture_of(model, (torch.ones(2, 4, 8),), plan, loss_fn=lambda y: y.mean())
    first, second, border = picture.rows
    assert isinstance(first, Box) and isinstance(second, Box) and isinstance(border, Communication)
    assert (first.name, first.cut, first.arrives.full, first.leaves.local) == ("0", "columns", (2, 4, 8), (2, 4, 16))
    assert (second.name, second.cut, second.leaves.kind) == ("2", "rows", "partial")
    assert (border.forward, border.backward, border.bytes) == ("all-reduce", "", 2 * 4 * 8 * 4)
    assert picture.left_out == {"GELU": 1} and "traced forward pass" in picture.order


def test_where_the_backward_alone_sends() -> None:
    """A column-wise layer behind something with a gradient sums it where it is entered."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 32), nn.Linear(32, 8))
    plan = Plan({"0": "replicate", "1": "colwise", "2": "rowwise"}).check(model, 2)
    picture = picture_of(model, (torch.ones(2, 4, 8),), plan, loss_fn=lambda y: y.mean())
    assert [b.words for b in picture.communications()] == ["backward: all-reduce", "all-reduce"]
    assert isinstance(picture.rows[1], Communication)


def pictured(
    plan: CheckedPlan, events: list[ForwardEvent], *backward: CollectiveCall, whole: list[ForwardEvent] | None = None
) -> Picture:
    """The picture of a log of one rank, and of one of one process."""
    traces: list[Any] = [
        SimpleNamespace(
            trace=StepTrace([Segment("", "backward", collectives=Counter(calls))], {}, {}, tuple(log)), classes={}, blocks=()
        )
        for log, calls in ((events, backward), (whole or events, ()))
    ]
    return picture_from_trace("Net", plan, *traces)


def call(module: str, *inside: ForwardEvent, arrives: Shape = (2, 8), leaves: Shape = (2, 8)) -> list[ForwardEvent]:
    return [ForwardEvent("enter", module, shape=arrives), *inside, ForwardEvent("leave", module, shape=leaves)]


def reduce(module: str, size: int, kind: str = "all-reduce") -> ForwardEvent:
    return ForwardEvent("collective", module, kind, bytes=size)


PRODUCT = ForwardEvent("kernel", "0", "product", (1, 2, 8, 8))


def test_an_all_reduce_is_paired_with_one_of_its_size() -> None:
    plan = Plan({"0": "rowwise"}).check(nn.Sequential(nn.Linear(8, 8)), 2)
    log = call("", *call("0", PRODUCT, reduce("0", 64)))
    same, other = (pictured(plan, log, CollectiveCall("all-reduce", n, "0", "backward")) for n in (64, 32))
    assert [c.words for c in same.communications()] == ["all-reduce, backward: all-reduce"]
    assert [c.words for c in other.communications()] == ["backward: all-reduce", "all-reduce"]


def test_each_call_has_its_own_collectives_of_the_backward_pass() -> None:
    plan = Plan({"0": "colwise"}).check(nn.Sequential(nn.Linear(8, 8)), 2)
    log = call("", *call("0", PRODUCT), *call("0", PRODUCT))
    picture = pictured(
        plan, log, CollectiveCall("all-reduce", 64, "0", "backward"), CollectiveCall("all-reduce", 32, "0", "backward")
    )
    assert [(type(row).__name__, getattr(row, "bytes", 0)) for row in picture.rows] == [
        ("Communication", 64), ("Box", 0), ("Communication", 32), ("Box", 0),
    ]  # fmt: skip


def test_what_a_loss_sums_is_said_to_be_in_the_loss() -> None:
    plan = Plan({"0": "colwise"}).check(nn.Sequential(nn.Linear(8, 8)), 2)
    picture = pictured(plan, [*call("", reduce("", 4), *call("0", PRODUCT), reduce("", 8)), reduce("", 16)])
    assert [(c.bytes, c.reason) for c in picture.communications()] == [(4, ""), (8, "in the loss"), (16, "in the loss")]


def test_outputs_that_are_gathered_leave_the_matmul_sharded() -> None:
    plan = Plan({"0": "colwise"}).check(nn.Sequential(nn.Linear(8, 6)), 2)
    log = call("", *call("0", PRODUCT, reduce("0", 48, "all-gather"), leaves=(2, 6)), leaves=(2, 6))
    (box,) = pictured(plan, log).boxes()
    assert (box.arrives.kind, box.leaves.kind, box.leaves.local) == ("replicated", "features", (2, 3))


def test_heads_of_a_rank_and_of_all() -> None:
    plan = Plan({"0": "colwise"}).check(nn.Sequential(nn.Linear(8, 8)), 2)

    def log(heads: int) -> list[ForwardEvent]:
        attention = ForwardEvent("kernel", "", "attention", (heads, 32, 64, 8))
        scores = ForwardEvent("kernel", "", "product", (heads, 32, 64, 8))
        return call("", *call("0", PRODUCT), attention, scores)

    _, attention, scores = pictured(plan, log(16), whole=log(128)).boxes()
    assert attention.style == "16 of 128 (batch x heads), 32 queries, 64 keys"
    assert scores.style == "16 of 128 x (32 x 8) (8 x 64)"
    _, whole, _ = pictured(plan, log(16)).boxes()
    assert whole.style == "16 (batch x heads), 32 queries, 64 keys"


def test_modules_that_read_the_same_stand_beside_each_other() -> None:
    build, inputs, loss = MODELS["llama"]()
    model = build()
    plan = infer_plan(model, inputs, 2).check(model, 2)
    block = next(r for r in picture_of(model, inputs, plan, loss_fn=loss).rows if isinstance(r, Frame))
    sides = [r for f in block.rows if isinstance(f, Frame) for r in f.rows if isinstance(r, SideBySide)]
    assert [[b.name for b in s.boxes] for s in sides] == [["wq", "wk", "wv"], ["w1", "w3"]]


def test_a_model_that_can_not_be_traced_is_drawn_as_it_is_registered() -> None:
    class Deciding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(self.up(x)) if float(x.sum() * self.up.weight.sum()) > 1e9 else self.down(self.up(x).relu())

    model = Deciding()
    plan = Plan({"up": "colwise", "down": "rowwise"}).check(model, 2)
    picture = picture_of(model, (torch.ones(2, 8),), plan, loss_fn=lambda y: y.mean())
    assert picture == picture_from_registration(model, plan) and "registration" in picture.order
    assert [b.name for b in picture.boxes()] == ["up", "down"] and not list(picture.communications())
    assert "order of registration" in " ".join(t.get_text() for t in draw_picture(picture).axes[0].texts)


@pytest.mark.slow
def test_the_zoo() -> None:
    """Whatever modules are called and however they are written: all parameters are drawn, and most models are traced."""
    from tests.zoo import CASES

    registered = []
    for name, build in CASES.items():
        model, inputs, loss = build()
        plan = infer_plan(model, inputs, 2).check(model, 2)
        picture = picture_of(model, inputs, plan, loss_fn=loss)
        assert weights(picture.rows) >= sum(p.numel() for p in model.parameters()), name  # more, where a module runs twice
        for width in (WIDE, NARROW):
            assert draw_picture(picture, width).axes[0].texts
        if "registration" in picture.order:
            registered.append(name)
    assert len(registered) <= 10, registered
