from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from lightning_tp import TPError
from lightning_tp.estimate.hardware import hardware
from lightning_tp.estimate.predict import estimate
from lightning_tp.estimate.tune import tune
from tests.estimate.test_predict import TOKENS, llama


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
    assert "can't be dealt out evenly over 16" in reasons["tp=1 x dp=16"]  # less than a sample for each
    assert any(" over the memory of " in why for why in reasons.values())
    assert any(what.startswith("tp=16") for what in reasons)  # its eight heads are not cut in sixteen
    assert "Not possible:" in str(found) and json.loads(found.to_json())["fits"][0]["tp"] == found.fits[0].tp


@pytest.mark.parametrize("options", [{"gpus": 0}, {"global_batch": -1}, {"tps": [0]}, {"hardware_": "none"}])
def test_mistakes(options: dict[str, object]) -> None:
    with pytest.raises(TPError):
        tune(llama(), TOKENS, **({"gpus": 4, "global_batch": 8} | options))  # type: ignore[arg-type]


def test_sizes_that_do_not_divide() -> None:
    found = tune(llama(), TOKENS, 6, 12, tps=[4], precisions=["32-true"])
    assert not found.fits and "does not divide 6" in found.refused[0].why


def test_meta_inputs() -> None:
    assert tune(llama(), {"tokens": torch.zeros(1, 16, dtype=torch.int64, device="meta")}, 2, 2, checkpointing=[None]).fits
