from __future__ import annotations

import pytest
import torch
from torch.distributed.fsdp import MixedPrecisionPolicy

from lightning_tp import TPError
from lightning_tp.estimate import estimate
from lightning_tp.estimate.rank.settings import PRECISIONS, Options, Precision, precision_of
from tests.estimate.models import TOKENS, meta_llama


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed", "bf16-true", "64-true"])
def test_precisions(precision: str) -> None:
    found, single = (estimate(meta_llama(), TOKENS, (4, 2), precision=p) for p in (precision, "32-true"))
    factor = {"bf16-true": 0.5, "64-true": 2.0}.get(precision, 1.0)
    assert found.memory.parameters == factor * single.memory.parameters
    kept = sum(found.memory.activations.values()) / sum(single.memory.activations.values())
    assert {"32-true": 1, "64-true": 1.6}.get(precision, 0.4) <= kept <= {"32-true": 1, "64-true": 2}.get(precision, 0.9)
    scaled = [c for c in found.collectives if "finite" in c.where]
    assert len(scaled) == (2 if precision == "16-mixed" else 0)


@pytest.mark.parametrize(
    ("precision", "inputs", "buffers", "computes"),
    [
        ("32-true", None, None, torch.float32),
        ("bf16-mixed", None, None, torch.bfloat16),
        ("16-true", torch.float16, torch.float16, torch.float16),
        ("64-true", None, torch.float64, torch.float64),
        ("bf16-fsdp", None, None, torch.bfloat16),
    ],
)
def test_what_a_trainer_converts(
    precision: str, inputs: torch.dtype | None, buffers: torch.dtype | None, computes: torch.dtype
) -> None:
    found = precision_of(precision)
    assert found is PRECISIONS[precision]
    assert (found.inputs, found.buffers, found.computes_in(torch.int8)) == (inputs, buffers, computes)


def test_a_policy_of_fsdp2() -> None:
    found = precision_of(MixedPrecisionPolicy(torch.bfloat16, torch.float32))
    assert found == Precision("policy", gathered=torch.bfloat16, reduced=torch.float32)
    assert precision_of(MixedPrecisionPolicy()).computes_in(torch.float16) == torch.float16


def test_an_unknown_name() -> None:
    with pytest.raises(TPError, match=r"Unknown `precision='fp8'`. Valid are 32-true, bf16-mixed"):
        precision_of("fp8")


def test_names_for_reading() -> None:
    assert (Options().checkpointing_name, Options().optimizer_name) == ("none", "adamw")
    given = Options(optimizer=torch.optim.SGD, activation_checkpointing=lambda name, module: True)
    assert (given.checkpointing_name, given.optimizer_name) == ("by a function", "SGD")
    assert Options(activation_checkpointing="block").checkpointing_name == "block"
