"""A model on a rank of two data-parallel ones, made by hand: three blocks with a parameter each, and one outside of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lightning_tp.estimate.rank.rank_model import LocalParam, RankModel
from lightning_tp.estimate.trace.step_trace import Alloc, End, Event, Label, Op, StepTrace, Tape, replay
from lightning_tp.styles import Split

DP = 2
ROWS = {"layers.0": 10, "layers.1": 20, "layers.2": 30, "": 5}  # elements that a rank holds, by FSDP2 unit
GATHERED = {unit: rows * DP * 4 for unit, rows in ROWS.items()}  # bytes
SAVED = 100  # bytes of activations that each block saves
PEAK = 7  # bytes that each block needs temporarily


def op(name: str = "mm", module: str = "", phase: Any = "forward", **sizes: Any) -> Op:
    kind = {"mm": "product", "sdpa": "attention"}.get(name, "other")
    flops = sizes.pop("flops", 0)
    return Op(
        kind, name, module, phase, flops, sizes.pop("work", flops), sizes.pop("bytes", 1), sizes.pop("shape", ()), torch.float32
    )


def block_tape(block: str, phase: Any, events: Sequence[Event] = (), representative: str | None = None) -> Tape:
    """A block's segment: what it saves in the forward is freed in the backward, which makes its gradient."""
    saved, temporary = Label(block, "activation"), Label(block, "backward")
    gradient, size = Label(f"{block}.w", "gradient"), GATHERED.get(block, 0)
    during = [Alloc(temporary, PEAK), *events, Alloc(temporary, -PEAK)]
    if phase == "forward":
        return Tape(block, phase, representative, [Alloc(saved, SAVED), *during, End()])
    return Tape(block, phase, representative, [Alloc(gradient, size), *during, Alloc(saved, -SAVED), End(), Alloc(gradient, -size)])


def outside(phase: Any, *events: Event, duplicate: bool = False) -> Tape:
    return Tape("", phase, None, [*events, End()], duplicate)


def step(blocks: Sequence[str] = ("layers.0", "layers.1", "layers.2"), **events: Sequence[Event]) -> list[Tape]:
    """Forward and backward through blocks; `events` of each block's "forward" and "backward"."""
    forward = [block_tape(b, "forward", events.get("forward", ())) for b in blocks]
    backward = [block_tape(b, "backward", events.get("backward", ())) for b in reversed(blocks)]
    root = Alloc(Label("head", "gradient"), GATHERED[""])
    return [outside("forward"), *forward, outside("forward"), outside("backward", root), *backward, outside("backward")]


def model_of(tapes: Sequence[Tape], followed: dict[str, str] | None = None, **changes: Any) -> RankModel:
    params = tuple(
        LocalParam(f"{unit}.w" if unit else "head", (rows * DP,), (rows * DP,), rows, Split(), unit, torch.float32, True)
        for unit, rows in ROWS.items()
    )
    blocks = ("layers.0", "layers.1", "layers.2")
    gradients = {p.name: p.numel * DP * 4 for p in params}
    trace = StepTrace(replay(tapes), followed or {b: b for b in blocks}, gradients)
    fields = {"params": params, "buffer_bytes": 3, "trace": trace, "units": (*blocks, ""), "classes": {}, "blocks": blocks}
    return RankModel(**(fields | changes))
