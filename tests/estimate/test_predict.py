from __future__ import annotations

import json
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_tp import TPError
from lightning_tp.estimate import Estimate, estimate
from lightning_tp.estimate.drawn.pages import report
from tests.estimate.models import MODELS


def llama(layers: int = 6, **options: Any) -> nn.Module:
    from llama import Llama, LlamaConfig

    with torch.device("meta"):
        return Llama(LlamaConfig(num_layers=layers, **options))


TOKENS = {"tokens": torch.zeros(2, 64, dtype=torch.int64)}
MODELS["llama"]()  # puts examples/ on the path


def of(layers: int = 6, mesh: tuple[int, int] = (4, 2), **options: Any) -> Estimate:
    return estimate(llama(layers), TOKENS, mesh, **options)


def test_nothing_of_the_model_is_changed() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8)).eval()
    before, classes = {n: p.clone() for n, p in model.state_dict().items()}, [type(m) for m in model.modules()]
    estimate(model, (torch.ones(2, 4, 8),), (2, 2), loss_fn=lambda y: y.mean(), activation_checkpointing=lambda n, m: n == "0")
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())
    assert [type(m) for m in model.modules()] == classes and not model.training
    assert all(p.grad is None for p in model.parameters()) and not torch.distributed.is_initialized()


def test_blocks_that_are_not_followed_count_as_if_they_were() -> None:
    """Six layers of which five are alike, against as many that are followed because each has a setting of its own."""
    for options in ({}, {"activation_checkpointing": "block", "accumulate": 3}):
        quick = of(mesh=(2, 2), **options)  # type: ignore[arg-type]
        model = llama()
        for i, layer in enumerate(model.layers):  # type: ignore[arg-type]
            layer.setting = f"{i}th"
        whole = estimate(model, TOKENS, (2, 2), **options)  # type: ignore[arg-type]
        assert quick.memory == replace(whole.memory, timeline=quick.memory.timeline)
        assert [m.total for m in quick.memory.timeline] == [m.total for m in whole.memory.timeline]
        assert sorted(map(str, quick.collectives)) == sorted(map(str, whole.collectives))
        assert quick.flops == whole.flops and quick.time.step == pytest.approx(whole.time.step)


def test_flops_are_those_that_are_counted_by_hand() -> None:
    found = of(layers=4, mesh=(1, 1))
    d, ff, v, s, heads, kv = 128, 344, 512, 64, 8, 4
    weights = 4 * (d * d * 2 + 2 * d * kv * (d // heads) + 3 * d * ff) + v * d
    assert found.flops.model == 6 * weights * 2 * s + 4 * 14 * s * s * d * 2  # attention: 4 forward, 10 backward
    again = of(layers=4, mesh=(1, 1), activation_checkpointing="block")
    assert again.flops.model == found.flops.model and again.flops.rank > found.flops.rank


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


def test_more_data_parallel_ranks_only_cut_what_is_held() -> None:
    small, large = of(mesh=(2, 2)), of(mesh=(64, 2))
    assert large.memory.parameters < small.memory.parameters / 20
    assert large.memory.activations == small.memory.activations
    assert large.time.dp > small.time.dp  # latency


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed", "bf16-true", "64-true"])
def test_precisions(precision: str) -> None:
    found, single = of(precision=precision), of(precision="32-true")
    factor = {"bf16-true": 0.5, "64-true": 2.0}.get(precision, 1.0)
    assert found.memory.parameters == factor * single.memory.parameters
    kept = sum(found.memory.activations.values()) / sum(single.memory.activations.values())
    assert {"32-true": 1, "64-true": 1.6}.get(precision, 0.4) <= kept <= {"32-true": 1, "64-true": 2}.get(precision, 0.9)
    scaled = [c for c in found.collectives if "finite" in c.where]
    assert len(scaled) == (2 if precision == "16-mixed" else 0)


def test_sizes_of_the_inputs_can_be_others() -> None:
    found = of(batch=3, seq=32)
    assert (found.batch, found.tokens) == (3, 3 * 32 * 4)


def test_optimizers() -> None:
    weights = of().memory.parameters
    assert of(optimizer="adamw").memory.optimizer == 2 * weights
    assert of(optimizer="sgd").memory.optimizer == 0
    assert of(optimizer=lambda p: torch.optim.SGD(p, 0.1, momentum=0.9)).memory.optimizer == weights
    assert of(optimizer=torch.optim.Adam).memory.optimizer == 2 * weights


def test_what_it_says() -> None:
    found = of()
    text = str(found)
    for word in (
        "tokens/s",
        "MFU",
        "all-gather",
        "parameters",
        "Assumed:",
        "us between nodes",
        "at its peak",
        "nothing overlapping",
    ):
        assert word in text
    values = json.loads(found.to_json())
    assert values["memory"]["peak"]["total"] == found.memory.peak.total == max(m.total for m in found.memory.timeline)
    assert values["tokens_per_s"] == found.tokens_per_s and values["hardware"]["key"] == "h100"
    assert {p["m"] for p in values["products"]} and values["collectives"][0]["kind"]


def test_the_rank_that_holds_most() -> None:
    model = MODELS["llama"]()[0]().to("meta")  # four groups of heads on three ranks: 1, 1 and 2
    found = estimate(model, TOKENS, (1, 3))
    assert any("this is rank 2, which holds most" in a for a in found.assumptions)
    assert found.held > sum(p.numel() for p in model.parameters()) / 3
    assert not any("holds most" in a for a in estimate(model, TOKENS, (1, 2)).assumptions)


def test_a_sequence_longer_than_the_table_of_positions() -> None:
    build, inputs, _ = MODELS["gpt2"]()
    for mesh in ((1, 1), (2, 2)):
        assert estimate(build(), inputs, mesh, seq=64).tokens == 128 * mesh[0]
        with pytest.raises(TPError, match=r"`transformer.wpe` is asked for row 127 of a table of 64 rows.*`seq`"):
            estimate(build(), inputs, mesh, seq=128)
    build, inputs, _ = MODELS["bert"]()
    with pytest.raises(TPError, match=r"`bert.embeddings`"):
        estimate(build(), inputs, (1, 2), seq=128)


def test_inputs_without_tokens_are_counted_in_samples() -> None:
    build, inputs, _ = MODELS["vit"]()
    found = estimate(build(), inputs, (2, 1), accumulate=3)
    assert (found.unit, found.tokens) == ("samples", 4 * 2 * 3)
    assert "a step of 24 samples" in str(found) and "samples/s" in str(found) and "token" not in str(found).partition("Assumed")[0]
    page = report(found)
    assert "24 samples per step" in page and "<dt>samples/s</dt>" in page and "tokens/s" not in page
    values = json.loads(found.to_json())
    assert values["unit"] == "samples" and values["samples"] == 24 and values["samples_per_s"] == found.tokens_per_s
    assert not any("tokens" in name for name in values)
    with pytest.raises(TPError, match="no tokens"):
        estimate(build(), inputs, (1, 1), seq=8)


class Decides(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
            if x.sum() > 0:
                x = -x
        return x


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
        estimate(llama(), TOKENS, mesh, **options)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_model_that_cannot_be_traced_says_where() -> None:
    with pytest.raises(TPError, match=r"decides by the value"):
        estimate(Decides(), (torch.ones(2, 4, 8),), (1, 1), loss_fn=lambda y: y.mean())

    class Raises(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).numpy()  # type: ignore[return-value]

    model = nn.Sequential(nn.Linear(8, 8), Raises(8, 8))
    with pytest.raises(TPError, match=r"`1` ended with .*in the forward, tp=1"):
        estimate(model, (torch.ones(2, 4, 8),), (1, 1), loss_fn=lambda y: y.mean())


def test_dtypes_that_do_not_go_together() -> None:
    with pytest.raises(TPError, match=r"multiplies bfloat16 and float32"):
        of(precision="bf16-fsdp")  # the table of positions of this Llama is float32


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_products_of_experts_count(precision):
    hf = pytest.importorskip("transformers")
    config = hf.MixtralConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=64,
        num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    with torch.device("meta"):
        model = hf.MixtralForCausalLM(config)
    ids = torch.zeros(2, 8, dtype=torch.long)
    found = estimate(model, {"input_ids": ids, "labels": ids, "use_cache": False}, (1, 2), precision=precision)
    rows = 2 * 8 * 2  # each token goes to two experts
    flops = sum(p.flops for p in found.products if p.module.endswith("experts"))
    assert flops == 2 * 3 * 2 * rows * 32 * (
        2 * 32 + 32
    )  # blocks x (forward and two gradients) x .. x (gate and up, down) of this rank


def test_a_loss_may_hold_tensors_of_the_cpu() -> None:
    """Labels, class weights and masks that a function closes over: the model is on the meta device, and they are not."""
    model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 10))
    labels, weight, mask = torch.tensor([3, 7]), torch.ones(10), torch.tensor([True, False])

    def over(labels: Tensor, weight: Tensor, mask: Tensor) -> Estimate:
        def loss_fn(y: Tensor) -> Tensor:
            each = nn.functional.cross_entropy(y, labels, weight, reduction="none")
            seen = torch.zeros(10)
            seen += y.detach().abs().sum(0)  # in place, too
            return (each * mask.float()).sum() / mask.sum() + (y * weight / seen).square().mean()

        return estimate(model, (torch.ones(2, 8),), (2, 2), loss_fn=loss_fn)

    held, there = over(labels, weight, mask), over(labels.to("meta"), weight.to("meta"), mask.to("meta"))
    # what is computed of them alone stays on the CPU: the mask as floats and its sum
    assert abs(held.memory.peak.total - there.memory.peak.total) <= 16
    assert held.flops == there.flops and held.time.step == pytest.approx(there.time.step, rel=0.1)
    assert labels.tolist() == [3, 7] and not weight.is_meta and weight.tolist() == [1.0] * 10
