from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_tp import Plan, estimate, infer_plan
from lightning_tp.estimate.drawn.picture import Border, Box, Frame, Picture, Row, Side
from lightning_tp.estimate.drawn.picture_drawing import NARROW, WIDE, draw_picture
from lightning_tp.estimate.drawn.picture_from_trace import of_plan, of_world
from lightning_tp.estimate.drawn.plots import picture_of
from tests.estimate.models import MODELS

IDS = torch.zeros(2, 32, dtype=torch.int64)


def mixtral() -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=4,
        num_local_experts=4,
    )  # fmt: skip
    return lambda: MixtralForCausalLM(config), {"input_ids": IDS, "labels": IDS, "use_cache": False}, None


def t5() -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=256, d_model=64, d_kv=8, num_heads=8, d_ff=128, num_layers=3, decoder_start_token_id=0, pad_token_id=0
    )
    return lambda: T5ForConditionalGeneration(config), {"input_ids": IDS, "labels": IDS, "use_cache": False}, None


def written_out() -> Any:
    def build() -> nn.Module:
        return nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 8, 128, batch_first=True), 3, enable_nested_tensor=False)

    return build, (torch.ones(2, 16, 64),), lambda y: y.mean()


ZOO = {**{k: v for k, v in MODELS.items() if k != "bert"}, "mixtral": mixtral, "t5": t5, "nn.TransformerEncoder": written_out}


@pytest.fixture(scope="module", params=ZOO)
def drawn(request: pytest.FixtureRequest) -> tuple[nn.Module, Plan, Picture, dict[str, int]]:
    """(model, plan, picture, collectives of the forward and backward by kind)."""
    build, inputs, loss = ZOO[request.param]()
    model = build()
    found = estimate(model, inputs, (1, 2), loss_fn=loss, precision="bf16-true")
    assert found.traced is not None
    plan, world, whole = found.traced
    sent: dict[str, int] = {}
    for c in found.collectives:
        if c.axis == "tp" and c.where not in ("norm of gradients", "partial gradients"):
            sent[c.kind] = sent.get(c.kind, 0) + c.count
    return model, plan, of_world(type(model).__name__, plan, world, whole), sent


def weights(rows: tuple[Row, ...], times: int = 1) -> int:
    """Elements of what is drawn by itself, counted as often as it stands for something."""
    total = 0
    for row in rows:
        if isinstance(row, Frame):
            total += weights(row.rows, times * row.times)
        elif isinstance(row, Side):
            total += weights(row.boxes, times)
        elif isinstance(row, Box):
            total += times * row.times * sum(torch.Size(w.whole).numel() for w in row.weights)
            if "modules, " in row.style:
                total += times * row.times * int(row.style.split("modules, ")[1].split(" ")[0].replace(",", ""))
    return total


def sent_by(rows: tuple[Row, ...], times: int = 1) -> dict[str, int]:
    """Collectives by kind, counted likewise."""
    total: dict[str, int] = {}
    for row in rows:
        if isinstance(row, Frame):
            for kind, n in sent_by(row.rows, times * row.times).items():
                total[kind] = total.get(kind, 0) + n
        elif isinstance(row, Border):
            for kind in (row.forward, row.backward):
                if kind:
                    total[kind] = total.get(kind, 0) + times * row.times
    return total


def test_every_parameter_is_drawn_once(drawn: tuple[nn.Module, Plan, Picture, dict[str, int]]) -> None:
    model, plan, picture, _ = drawn
    used = sum(p.numel() for n, p in model.named_parameters() if not n.startswith("shared."))
    twice = sum(torch.Size(plan.shapes[n]).numel() for n in plan.tied)  # at each place where a tied weight is used
    assert weights(picture.rows) == used + twice


def test_every_collective_is_drawn_where_it_happens(drawn: tuple[nn.Module, Plan, Picture, dict[str, int]]) -> None:
    _, _, picture, sent = drawn
    instead = [b for b in picture.borders() if b.where.endswith("instead")]
    counted = sent_by(picture.rows)
    if instead:  # these stand in the place of what is drawn for most blocks
        assert set(counted) == set(sent) and all(counted[k] >= n for k, n in sent.items())
    else:
        assert counted == sent


def test_blocks_are_drawn_once(drawn: tuple[nn.Module, Plan, Picture, dict[str, int]]) -> None:
    _, _, picture, _ = drawn
    blocks = [row for row in picture.rows if isinstance(row, Frame) and row.block]
    assert blocks and any(b.times > 1 and "{" in b.name for b in blocks)
    assert sum(b.times for b in blocks) in (3, 4, 5, 6) and len(blocks) <= 4


def test_shapes_follow_the_splits(drawn: tuple[nn.Module, Plan, Picture, dict[str, int]]) -> None:
    for box in drawn[2].boxes():
        for state in (box.arrives, box.leaves):
            if state.kind == "tokens":
                assert state.local != state.whole and state.local[-1] == state.whole[-1]
            elif state.kind == "features":
                assert state.local[:-1] == state.whole[:-1] and state.local[-1] < state.whole[-1]
        if box.style == "column-wise":
            assert box.leaves.kind == "features" and box.arrives.kind in ("whole", "unknown")
        elif box.style == "row-wise":
            assert box.arrives.kind in ("features", "unknown") and box.leaves.kind == "partial", box
        elif box.cut == "tokens":
            assert box.leaves.kind == "tokens"


@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_drawing(drawn: tuple[nn.Module, Plan, Picture, dict[str, int]], width: float) -> None:
    d = draw_picture(drawn[2], width)
    for s in d.shapes:
        xs, ys = zip(*(s.points if s.kind != "rect" else (s.points[0], tuple(map(sum, zip(*s.points))))))
        assert min(xs) >= 0 and max(xs) <= width and min(ys) >= 0 and max(ys) <= d.height, s
    boxes = [s for s in d.shapes if s.kind == "rect" and s.fill == "box"]
    for i, a in enumerate(boxes):  # none over another
        for b in boxes[i + 1 :]:
            (ax, ay), (aw, ah) = a.points
            (bx, by), (bw, bh) = b.points
            assert ax + aw <= bx or bx + bw <= ax or ay + ah <= by or by + bh <= ay
    assert len(d.svg()) < 300_000


def test_a_plan_by_hand() -> None:
    model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
    plan = Plan({"0": "colwise", "2": "rowwise"}).check(model, 2)
    picture = picture_of(model, (torch.ones(2, 4, 8),), plan, loss_fn=lambda y: y.mean())
    first, second, border = picture.rows
    assert isinstance(first, Box) and isinstance(second, Box) and isinstance(border, Border)
    assert (first.name, first.cut, first.arrives.whole, first.leaves.local) == ("0", "columns", (2, 4, 8), (2, 4, 16))
    assert (second.name, second.cut, second.leaves.kind) == ("2", "rows", "partial")
    assert (border.forward, border.backward, border.bytes) == ("all-reduce", "", 2 * 4 * 8 * 4)
    assert picture.left_out == {"GELU": 1} and "ran in the trace" in picture.order


def test_where_the_backward_alone_sends() -> None:
    """A column-wise layer behind something with a gradient sums it where it is entered."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 32), nn.Linear(32, 8))
    plan = Plan({"0": "replicate", "1": "colwise", "2": "rowwise"}).check(model, 2)
    picture = picture_of(model, (torch.ones(2, 4, 8),), plan, loss_fn=lambda y: y.mean())
    assert [b.words for b in picture.borders()] == ["backward: all-reduce", "all-reduce"]
    assert isinstance(picture.rows[1], Border)


def test_modules_that_read_the_same_stand_beside_each_other() -> None:
    build, inputs, loss = MODELS["llama"]()
    model = build()
    plan = infer_plan(model, inputs, 2).check(model, 2)
    block = next(r for r in picture_of(model, inputs, plan, loss_fn=loss).rows if isinstance(r, Frame))
    sides = [r for f in block.rows if isinstance(f, Frame) for r in f.rows if isinstance(r, Side)]
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
    assert picture == of_plan(model, plan) and "registered" in picture.order
    assert [b.name for b in picture.boxes()] == ["up", "down"] and not list(picture.borders())
    assert "registered" in draw_picture(picture).svg()


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
            assert draw_picture(picture, width).svg()
        if "registered" in picture.order:
            registered.append(name)
    assert len(registered) <= 10, registered
