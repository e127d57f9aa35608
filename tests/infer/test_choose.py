"""What a model declares is checked, tried, and improved on."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_tp.errors import TPError
from lightning_tp.infer.choose import default_plan
from lightning_tp.infer.search import call_with
from lightning_tp.plan.plan import Plan

X = (torch.zeros(2, 4, 16),)
GOOD = {"up": "colwise", "down": "rowwise"}


class Declares(nn.Module):
    """An MLP with a plan as Hugging Face models have it."""

    def __init__(self, tp_plan: dict[str, str], width: int = 64) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, width), nn.Linear(width, 16)
        self.config, self.tp_plan = SimpleNamespace(), tp_plan

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu())


class Baked(Declares):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu().view(2, 4, 64))


def chosen(model: nn.Module, inputs: Any = X, tp: int = 2) -> Plan:
    return default_plan(model, call_with, inputs, tp)


def test_a_declaration_that_is_as_good_is_taken() -> None:
    assert chosen(Declares(GOOD)).source == "declared by Declares"


def test_one_that_splits_less_is_improved_on() -> None:
    plan = chosen(Declares({"up": "colwise_gather_output"}))
    assert plan.source == "inferred: a rank holds 50% of the parameters; as declared by Declares, 74%"
    assert {r.pattern: r.style.name for r in plan.rules} == {"up": "colwise", "down": "rowwise", "**": "replicate"}


@pytest.mark.parametrize("words", [{"up": "sideways"}, {"up": "colwise", "down": "colwise"}], ids=["no such style", "does not run"])
def test_one_that_is_wrong_is_not_believed(words: dict[str, str]) -> None:
    assert chosen(Declares(words)).source == "inferred"


def test_one_whose_code_does_not_run_on_shards() -> None:
    plan = chosen(Baked(GOOD))
    assert plan.source == "inferred" and any(r.style.name == "local_ops" for r in plan.rules)


def test_without_inputs_that_run_the_reason_is_told() -> None:
    with pytest.raises(TPError, match=r"tracing `Declares` raised RuntimeError: .*shapes"):
        chosen(Declares({}), (torch.zeros(2, 3),))


def test_transformers() -> None:
    hf = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    ids = torch.zeros(1, 9, dtype=torch.long)
    for config, model in (("LlamaConfig", "LlamaForCausalLM"), ("Phi3Config", "Phi3ForCausalLM")):
        made = getattr(hf, model)(getattr(hf, config)(**sizes, vocab_size=512, pad_token_id=0))
        plan = chosen(made, {"input_ids": ids})
        assert plan.source.startswith("inferred: ") and f"declared by {model}" in plan.source, plan.source
