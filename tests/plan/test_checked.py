"""A checked plan: immutable, compared by its digest, the same for torch."""

from __future__ import annotations

import copy
import pickle
from dataclasses import FrozenInstanceError

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor.parallel import parallelize_module

import lightning_tp as ltp
from examples.llama import PLAN
from lightning_tp.plan.plan import Plan
from lightning_tp.styles import (
    FusedColwise,
    Replicate,
    VocabHead,
)
from lightning_tp.testing import assert_trees_close, randomize_, run_ranks
from tests.harness import mesh
from tests.plan.test_plan import loss_of, tiny


def test_it_is_immutable() -> None:
    plan = Plan(PLAN).check(tiny(), tp=2)
    before = plan.to_json(), str(plan), plan.digest
    for value, name in (
        (plan, "rules"),
        (plan, "tp"),
        (plan.rules[0], "pattern"),
        (plan.rules[0].style, "output"),
        (plan.entries[0], "where"),
    ):
        with pytest.raises(FrozenInstanceError):
            setattr(value, name, None)
    rules = dict(PLAN)
    other = Plan(rules)
    rules["output"] = "replicate"
    assert other == Plan(PLAN)
    other.without_sequence_parallel()
    assert other == Plan(PLAN) and (plan.to_json(), str(plan), plan.digest) == before


def test_it_can_be_copied_and_pickled() -> None:
    plan = Plan(PLAN).check(tiny(), tp=2)
    for twin in (copy.deepcopy(plan), pickle.loads(pickle.dumps(plan))):
        assert twin == plan and twin.digest == plan.digest and twin.splits == plan.splits


def test_digest() -> None:
    plan = Plan(PLAN)
    digests = [
        plan.digest,
        Plan({**PLAN, "norm": "replicate"}).digest,
        Plan({**PLAN, "output": VocabHead(input="S(1)")}).digest,
        plan.check(tiny(), tp=2).digest,
        plan.check(tiny(), tp=4).digest,
        plan.check(tiny(hidden_dim=40), tp=2).digest,
        plan.check(tiny(vocab_size=62), tp=2).digest,
        plan.check(tiny(num_layers=3), tp=2).digest,
        plan.check(tiny(num_kv_heads=4), tp=2).digest,
    ]
    assert len(set(digests)) == len(digests) and all(len(d) == 16 for d in digests)
    assert plan.check(tiny(), tp=2).digest == Plan(dict(PLAN)).check(tiny(), tp=2).digest == digests[3]


def test_digest_of_models_that_differ_in_one_thing_only() -> None:
    class Attention(nn.Module):
        def __init__(self, head_dim: int = 4, tokens: int = 9) -> None:
            super().__init__()
            self.head_dim = head_dim  # decides which rows a rank holds, of weights of the same shape
            self.q, self.k, self.o = nn.Linear(8, 16), nn.Linear(8, 8), nn.Linear(16, 8)
            self.pos = nn.Parameter(torch.zeros(tokens, 8))  # whole everywhere

    plan = Plan({"q": "colwise", "k": "colwise", "o": "rowwise", "pos": "replicate"})
    models = (Attention(), Attention(head_dim=8), Attention(tokens=10))
    assert len({plan.check(nn.ModuleDict({"a": model}), tp=2).digest for model in models}) == 3


def test_to_torch_trains_as_one_process() -> None:
    tokens = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(0))
    catching = {p: s for p, s in PLAN.items() if "norm" not in p} | {"**": "replicate"}

    def body() -> None:
        whole = randomize_(tiny())
        loss_of(whole, tokens).backward()
        for rules in (PLAN, Plan(PLAN).without_sequence_parallel(), catching):
            model = randomize_(tiny())
            plan = Plan.of(rules).check(model, tp=2)
            parallelize_module(model, mesh()["tensor_parallel"], plan.to_torch(model))
            loss = loss_of(model, tokens)
            loss.backward()
            assert_trees_close({"loss": loss}, {"loss": loss_of(whole, tokens)})
            got = {n: p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for n, p in model.named_parameters()}
            assert_trees_close(got, {n: p.grad for n, p in whole.named_parameters()})  # type: ignore[arg-type]

    run_ranks(body, 2)


def test_what_torch_would_get_wrong_is_refused() -> None:
    model = tiny()
    assert not hasattr(Plan(PLAN), "to_torch")  # sizes are needed
    shared = Plan(PLAN).check(model, tp=4)  # 2 key/value heads: torch would give a rank half of one
    with pytest.raises(ltp.TPError, match=r"`layers.0.attention.wk`.*`backend='local'`"):
        shared.to_torch(model)
    fused = Plan({"0": FusedColwise(parts=3), "1": "rowwise"})
    sequential = nn.Sequential(nn.Linear(4, 12), nn.Linear(12, 4))
    with pytest.raises(ltp.TPError, match=r"`0`: .*no style for a fused weight"):
        fused.check(sequential, tp=2).to_torch(sequential)
    normed = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 4))
    partial = Plan({"0": "colwise", "1": Replicate(state="R"), "2": "rowwise"}).check(normed, tp=2)
    with pytest.raises(ltp.TPError, match=r"`1`.*its gradient.*`backend='local'`"):
        partial.to_torch(normed)


def test_world_is_not_needed() -> None:
    assert not dist.is_initialized()
    assert "tp=2048" in str(
        Plan({"0": "colwise", "1": "rowwise"}).check(nn.Sequential(nn.Linear(4, 8192), nn.Linear(8192, 4)), tp=2048)
    )
