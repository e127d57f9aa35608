from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_tp import TPError
from lightning_tp.estimate import Estimate, estimate
from lightning_tp.estimate.drawn.pages import report
from tests.estimate.models import MODELS, TOKENS, meta_llama


def of(layers: int = 6, mesh: Any = (4, 2), **options: Any) -> Estimate:
    return estimate(meta_llama(layers), TOKENS, mesh, **options)


def test_what_is_asked_for_is_in_the_estimate() -> None:
    found = of(accumulate=3, precision="32-true", optimizer="sgd", activation_checkpointing="block", hardware="a100")
    assert (found.model, found.dp, found.tp, found.batch, found.accumulate, found.tokens) == ("Llama", 4, 2, 2, 3, 2 * 64 * 4 * 3)
    assert (found.precision, found.optimizer, found.activation_checkpointing) == ("32-true", "sgd", "block")
    assert found.hardware.key == "a100" and found.peak_flops == found.hardware.peak(torch.float32)
    assert found.parameters == sum(p.numel() for p in meta_llama().parameters())
    assert found.plan.startswith("Plan") and found.traced is not None and found.held * 4 == found.memory.parameters


def test_options_reach_what_they_are_about() -> None:
    plain = of()
    assert of(mesh={"tensor_parallel": 2, "data_parallel": 4}) == plain
    assert of(compile=True).time.other < plain.time.other
    assert sum(of(fused_attention=False).memory.activations.values()) > sum(plain.memory.activations.values())
    assert len(of(clip_gradients=False).collectives) == len(plain.collectives) - 2
    kinds = [{c.kind for c in of(mesh=(1, 2), sequence_parallel=s).collectives if c.phase == "forward"} for s in (True, False)]
    assert "reduce-scatter" in kinds[0] and "reduce-scatter" not in kinds[1]
    assert of(loss_parallel=False).memory.activations["logits and loss"] > plain.memory.activations["logits and loss"]


def test_pictures_and_pages_are_written(tmp_path: Path) -> None:
    found = of(layers=2)
    found.html(tmp_path / "page.html", command="lightning-tp estimate")
    assert "Llama" in (tmp_path / "page.html").read_text()
    found.plot(tmp_path / "plot.svg")
    assert "<svg" in (tmp_path / "plot.svg").read_text()


@pytest.mark.slow
def test_cost_does_not_depend_on_ranks_or_blocks() -> None:
    of()
    start = time.process_time()
    of(layers=6, mesh=(2, 2))
    few = time.process_time() - start
    start = time.process_time()
    large = of(layers=30, mesh=(65536, 2))
    assert time.process_time() - start < 6 * few + 1
    assert large.dp * large.tp == 131072


def test_inputs_without_tokens_are_counted_in_samples() -> None:
    build, inputs, _ = MODELS["vit"]()
    found = estimate(build(), inputs, (2, 1), accumulate=3)
    assert (found.unit, found.tokens) == ("samples", 4 * 2 * 3)
    assert (
        "per step of 24 samples" in str(found) and "samples/s" in str(found) and "token" not in str(found).partition("Assumed")[0]
    )
    page = report(found)
    assert "24 samples per step" in page and "<dt>samples/s</dt>" in page and "tokens/s" not in page
    values = json.loads(found.to_json())
    assert values["unit"] == "samples" and values["samples"] == 24 and values["samples_per_s"] == found.tokens_per_s
    assert not any("tokens" in name for name in values)
    with pytest.raises(TPError, match="no tokens"):
        estimate(build(), inputs, (1, 1), seq=8)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"hardware": "h1000"}, ["'h1000'", "t4, a100-40gb, a100, h100", "JSON"]),
        ({"mesh": (0, 2)}, ["`dp=0`"]),
        ({"mesh": (2, -1)}, ["`tp=-1`"]),
        ({"mesh": (2, 2, 2)}, ["(256, 8)"]),
        ({"mesh": {"dp": 2, "tp": 2}}, ["data_parallel"]),
        ({"seq": 0}, ["`seq=0`"]),
        ({"batch": -3}, ["`batch=-3`"]),
        ({"accumulate": 0}, ["`accumulate=0`"]),
        ({"precision": "fp8"}, ["'fp8'", "bf16-mixed"]),
        ({"optimizer": "lion"}, ["'lion'", "adamw"]),
        ({"activation_checkpointing": "all"}, ["'all'", "'selective'"]),
        ({"mesh": (1, 3), "plan": "PLAN"}, ["tp=3 does not fit Llama", "These fit: tp=1, 2, 4"]),
    ],
)
def test_mistakes_are_one_clear_error(options: dict[str, Any], words: list[str]) -> None:
    from llama import PLAN

    mesh = options.pop("mesh", (2, 2))
    if options.get("plan") == "PLAN":
        options["plan"] = PLAN
    with pytest.raises(TPError) as error:
        estimate(meta_llama(), TOKENS, mesh, **options)
    assert all(word in str(error.value) for word in words), str(error.value)
