from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_tp import TPError
from lightning_tp.estimate import estimate
from lightning_tp.estimate.rank import trace_cache
from lightning_tp.estimate.rank.inputs import loss_of
from lightning_tp.estimate.rank.settings import PRECISIONS, Settings
from lightning_tp.estimate.rank.trace_cache import TraceCache
from tests.estimate.models import MODELS, TOKENS


def small(hidden: int = 32, **options: Any) -> TraceCache:
    model = nn.Sequential(nn.Linear(8, hidden), nn.GELU(), nn.Linear(hidden, 8)).to("meta")
    return TraceCache(model, (torch.ones(2, 8),), loss_of(lambda y: y.mean()), **options)


def test_each_distinct_step_is_traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    traced: list[Settings] = []
    step = trace_cache.trace_step
    monkeypatch.setattr(trace_cache, "trace_step", lambda *a: traced.append(a[-1]) or step(*a))
    cache = small()
    two = cache.rank_model(cache.inputs, Settings(1, 2))
    many = cache.rank_model((torch.zeros(2, 8),), Settings(1, 64))  # other values, and more data-parallel ranks
    assert len(traced) == 1 and two.trace is many.trace
    assert [p.rows for p in two.params] == [16, 16, 4, 4] and [p.rows for p in many.params] == [1, 1, 1, 1]
    cache.unsharded(cache.inputs, Settings(2, 2, rank=1, activation_checkpointing=lambda n, m: n == "0"))
    assert len(traced) == 1  # it is the model of tp=1
    distinct = [Settings(1, 1), Settings(2, 2), Settings(1, 2, precision=PRECISIONS["32-true"]), Settings(1, 2, device="cpu")]
    for settings in distinct:
        cache.rank_model(cache.inputs, settings)
    assert len(traced) == 1 + len(distinct)
    cache.rank_model((torch.ones(3, 8),), Settings(1, 2))
    assert len(traced) == 2 + len(distinct)


def test_the_rank_that_holds_most() -> None:
    model = MODELS["llama"]()[0]().to("meta")  # four groups of heads on three ranks: 1, 1 and 2
    found = estimate(model, TOKENS, (1, 3))
    assert any("this is rank 2, which holds most" in a for a in found.assumptions)
    assert found.held > sum(p.numel() for p in model.parameters()) / 3
    assert not any("holds most" in a for a in estimate(model, TOKENS, (1, 2)).assumptions)
    assert small().largest_rank(2, True) == 0  # all hold as much


def test_plans() -> None:
    cache = small(plan={"0": "colwise", "2": "rowwise"})
    assert cache.plan_of(2, True) is cache.plan_of(2, True)
    assert not cache.plan_of(1, True).shards_anything and cache.plan_of(1, True).tp == 1
    with pytest.raises(TPError, match="would replicate every parameter"):
        small(plan={"**": "replicate"}).plan_of(2, True)


def test_sizes_that_fit_are_suggested() -> None:
    from tests.estimate.models import meta_llama

    from llama import PLAN  # isort: skip

    with pytest.raises(TPError, match=r"tp=3 does not fit Llama: .* These fit: tp=1, 2, 4"):
        TraceCache(meta_llama(), TOKENS, loss_of(None), PLAN).plan_of(3, True)
