from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lightning_tp import TPError
from lightning_tp.estimate.cost.hardware import hardware
from lightning_tp.estimate.predict import estimate
from lightning_tp.estimate.tune import tune
from tests.estimate.models import MODELS, TOKENS
from tests.estimate.models import meta_llama as llama


def test_what_fits_is_ranked_and_the_rest_has_a_reason() -> None:
    from llama import PLAN

    model = llama(layers=6, vocab_size=8192)
    need = estimate(model, TOKENS, (2, 2), batch=1, seq=256).memory.peak.total
    small = replace(hardware("h100"), memory_bytes=0.65 * need, reserved_bytes=0, per_node=16)
    found = tune(model, TOKENS, 16, 8, hardware_=small, seq=256, plan=PLAN)
    assert found.fits and all(e.fits and e.dp * e.tp == 16 for e in found.fits)
    assert all(e.batch * e.accumulate * e.dp == 8 for e in found.fits)
    times = [e.time.step for e in found.fits]
    assert times == sorted(times)
    reasons = {r.what: r.why for r in found.refused}
    assert "can't be distributed evenly over 16" in reasons["tp=1 x dp=16"]  # less than a sample for each
    assert any(why.startswith("out of memory: ") and "; peak in the " in why for why in reasons.values())
    assert any(what.startswith("tp=16") for what in reasons)  # its eight heads are not cut in sixteen
    assert "Not possible:" in str(found) and json.loads(found.to_json())["fits"][0]["tp"] == found.fits[0].tp


@pytest.mark.parametrize("tp", [1, 2])
def test_it_says_what_estimate_says(tp: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from llama import PLAN

    from lightning_tp.estimate.rank import trace_cache

    traced: list[int] = []
    step = trace_cache.trace_step
    monkeypatch.setattr(
        trace_cache, "trace_step", lambda m, f, inputs, *a: (traced.append(len(inputs["tokens"])), step(m, f, inputs, *a))[1]
    )
    model = llama(layers=4)
    found = tune(model, TOKENS, 4, 64, tps=[tp], seq=32, plan=PLAN, compile=True, checkpointing=[None, "block"])
    assert {e.batch for e in found.fits} == {n for n in (1, 2, 4, 8, 16, 32) if n <= 16 * tp}
    assert sum(n > 4 for n in traced) <= 2  # the first choice, and the FLOPs of its whole model; others follow from a few
    for e in found.fits:
        how = None if e.activation_checkpointing == "none" else e.activation_checkpointing
        mesh = (e.dp, e.tp)
        mine = estimate(
            model,
            TOKENS,
            mesh,
            batch=e.batch,
            seq=32,
            accumulate=e.accumulate,
            plan=PLAN,
            compile=True,
            activation_checkpointing=how,
        )  # type: ignore[arg-type]
        assert mine == e


def test_a_model_that_is_not_linear_is_traced_as_it_is() -> None:
    """From four samples on it does more than the line through one and two says."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(64, 256), nn.Linear(256, 64)

        def forward(self, x: Tensor) -> Tensor:
            y = self.down(torch.relu(self.up(x)))
            return self.down(torch.relu(self.up(y))) if len(x) >= 4 else y

    model, inputs = Odd(), (torch.ones(1, 8, 64),)
    options = {"loss_fn": lambda y: y.mean()}
    found = tune(model, inputs, 1, 8, checkpointing=[None], **options)
    assert {e.batch for e in found.fits} == {1, 2, 4, 8}
    for e in found.fits:
        assert e == estimate(model, inputs, (1, 1), batch=e.batch, accumulate=e.accumulate, **options)


def test_one_large_batch_fits_where_accumulated_small_ones_do_not() -> None:
    """Between micro-batches FSDP2 keeps whole gradients; with one micro-batch it does not."""
    from llama import PLAN

    model = llama(layers=6, vocab_size=8192)
    common = {"seq": 16, "plan": PLAN, "activation_checkpointing": "block"}
    one = estimate(model, TOKENS, (8, 2), batch=4, **common)  # type: ignore[arg-type]
    several = estimate(model, TOKENS, (8, 2), batch=1, accumulate=4, **common)  # type: ignore[arg-type]
    assert one.memory.peak.total < several.memory.peak.total
    between = (one.memory.peak.total + several.memory.peak.total) / 2 * 1.1
    small = replace(hardware("h100"), memory_bytes=between, reserved_bytes=0, fragmentation=0.1)
    found = tune(model, TOKENS, 16, 32, hardware_=small, seq=16, plan=PLAN, tps=[2], checkpointing=["block"])
    assert [(e.batch, e.accumulate) for e in found.fits] == [(4, 1)]
    assert [r.what.rpartition(", ")[2] for r in found.refused] == ["batch 1 to 2"]


@pytest.mark.parametrize("options", [{"gpus": 0}, {"global_batch": -1}, {"tps": [0]}, {"hardware_": "none"}])
def test_mistakes(options: dict[str, object]) -> None:
    with pytest.raises(TPError):
        tune(llama(), TOKENS, **({"gpus": 4, "global_batch": 8} | options))  # type: ignore[arg-type]


def test_sizes_that_do_not_divide() -> None:
    found = tune(llama(), TOKENS, 6, 12, tps=[4], precisions=["32-true"])
    assert not found.fits and "does not divide 6" in found.refused[0].why


def test_images_are_samples() -> None:
    build, inputs, _ = MODELS["vit"]()
    found = tune(build().to("meta"), inputs, 2, 4, tps=[1], checkpointing=[None])
    assert "samples/s/device" in str(found) and "token" not in str(found)
    assert json.loads(found.to_json())["fits"][0]["samples_per_s"] == found.fits[0].tokens_per_s


def test_meta_inputs() -> None:
    assert tune(llama(), {"tokens": torch.zeros(1, 16, dtype=torch.int64, device="meta")}, 2, 2, checkpointing=[None]).fits


def test_a_tp_that_shards_little_is_of_little_use() -> None:
    """Of these weights 80% stay whole: a rank of eight would hold 82%, not 12%."""
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16), nn.Flatten(), nn.Linear(64, 64)).to("meta")
    plan = {"0": "colwise", "2": "rowwise", "4": "replicate"}
    found = tune(model, (torch.ones(1, 4, 16),), 8, 8, plan=plan, tps=[8], loss_fn=lambda y: y.mean())
    assert not found.fits
    (why,) = [r.why for r in found.refused if r.what == "tp=8"]
    assert why.startswith("a rank would hold 82% of the weights, not 12%: `4` ")


def test_a_page_is_written(tmp_path: Path) -> None:
    found = tune(llama(layers=2), TOKENS, 1, 1, checkpointing=[None])
    found.html(tmp_path / "tune.html")
    assert "bf16-mixed" in (tmp_path / "tune.html").read_text()
