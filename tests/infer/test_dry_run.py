from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lightning_tp as ltp
from examples.llama import PLAN as LLAMA_PLAN
from examples.llama import Llama, LlamaConfig
from lightning_tp.apply.unsplit import always_on_shards
from lightning_tp.core.comm.mesh import make_mesh
from lightning_tp.core.comm.state import I, P
from lightning_tp.core.modules.snapshot import preserve_modules
from lightning_tp.infer.blocks.repeated import RepeatedBlocks
from lightning_tp.infer.blocks.workload import Workload
from lightning_tp.infer.dry_run import blocks_of_one_plan, count_collectives, dry_run
from lightning_tp.shards import gradients
from lightning_tp.styles import PrepareOutput
from lightning_tp.testing import fake_world


class Views(nn.Module):
    """A size that is known as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 9), nn.Linear(9, 4)
        self.kept: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.kept.append(1)
        return self.b(self.a(x).view(2, 9))


PLAN = ltp.Plan({"a": "colwise", "b": "rowwise"})


def test_what_raises_on_a_rank_is_found_with_its_module() -> None:
    model = nn.Sequential(Views(), nn.Linear(4, 4))
    plan = ltp.Plan({"0.a": "colwise", "0.b": "rowwise", "**": "replicate"})
    failed = dry_run(Workload(model, lambda m, x: m(x), torch.zeros(2, 4), 2), plan)
    assert failed is not None
    assert failed.module == "0"
    assert "view" in failed.why or "shape" in failed.why


class FirstOnly(Views):
    """Runs with the 5 features of the first rank, not with the 4 of the last."""

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).unflatten(-1, (5, -1)).flatten(-2))


def test_what_raises_on_the_last_rank_only_is_found() -> None:
    failed = dry_run(Workload(FirstOnly(), lambda m, x: m(x), torch.zeros(2, 4), 2), PLAN)
    assert failed is not None and failed.module == ""


def test_what_runs_passes_on_uneven_shards_and_leaves_the_model_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 4))
    before, weights = [type(m) for m in model.modules()], [id(p) for p in model.parameters()]
    assert dry_run(Workload(model, lambda m, x: m(x), torch.zeros(2, 3, 4), 2), ltp.Plan({"0": "colwise", "2": "rowwise"})) is None
    assert [type(m) for m in model.modules()] == before
    assert [id(p) for p in model.parameters()] == weights
    assert (model[0].out_features, model[2].in_features) == (9, 9)


def test_a_plan_that_does_not_fit_is_a_failure_and_one_that_splits_nothing_is_not() -> None:
    model = Views()
    model.b.weight = nn.Parameter(torch.zeros(4, 9))
    workload = Workload(model, lambda m, x: m(x), torch.zeros(2, 4), 2)
    assert dry_run(workload, ltp.Plan({"a": "colwise"})) is not None
    assert dry_run(workload, ltp.Plan({"**": "replicate"}, "inferred")) is None


def test_weights_on_meta() -> None:
    failed = dry_run(Workload(Views().to("meta"), lambda m, x: m(x), torch.zeros(2, 4), 2), PLAN)
    assert failed is not None and "shape '[2, 9]'" in failed.why


def test_what_only_values_tell_is_not_held_against_a_plan() -> None:
    def call(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return model[1](model[0](x)) if model[0](x).sum() > 0 else x

    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4)).to("meta")
    assert dry_run(Workload(model, call, torch.zeros(2, 4), 2), ltp.Plan({"0": "colwise", "1": "rowwise"})) is None


def test_attributes_lists_hooks_and_classes_come_back() -> None:
    model = Views()
    with preserve_modules(model):
        model(torch.zeros(2, 4))
        model.new = 1  # type: ignore[assignment]
        model.a.register_forward_hook(lambda *_: None)
        model.b.__class__ = nn.Identity
    assert model.kept == []
    assert not hasattr(model, "new")
    assert not model.a._forward_hooks
    assert type(model.b) is nn.Linear


NAMES = {"allreduce_": "all-reduce", "_allgather_base_": "all-gather", "_reduce_scatter_base_": "reduce-scatter"}


class _Sent(TorchDispatchMode):
    """Counts what the process group is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.counts[NAMES[func.overloadpacket.__name__]] += 1
        return func(*args, **(kwargs or {}))


def small_llama() -> nn.Module:
    return Llama(LlamaConfig(vocab_size=130, dim=32, num_layers=2, num_heads=4, num_kv_heads=2, hidden_dim=54))


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_counted_are_the_collectives_of_the_applied_plan(tp: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients, "CHECKED_PASSES", 0)  # the gradients of a fake world are none to compare
    tokens = torch.randint(0, 130, (2, 12))
    loss_of: Any = lambda m, x: m(x).float().square().mean()  # noqa: E731
    model = small_llama().to(device)
    weights = [id(p) for p in model.parameters()]
    counted = count_collectives(model, loss_of, tokens, ltp.Plan(LLAMA_PLAN).check(model, tp), tp)
    with fake_world(tp):
        applied = ltp.parallelize(small_llama(), make_mesh("cpu", 1, tp), LLAMA_PLAN).eval()
        with _Sent() as sent, always_on_shards():
            loss_of(applied, tokens).backward()
    assert counted == dict(sent.counts)
    assert counted["all-reduce"] == tp // 2  # with tp=4, two ranks share key/value heads: a sum over these, and one over all
    assert [id(p) for p in model.parameters()] == weights and model.training and all(p.grad is None for p in model.parameters())


def test_blocks_at_the_boundaries_of_a_stream_run_by_themselves() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4)) for _ in range(4)))
    linear = {"*.0": "colwise", "*.1": "rowwise"}
    copies = {str(i): "0" for i in range(1, 4)}
    alike = blocks_of_one_plan(RepeatedBlocks(copies), ltp.Plan(linear).check(model, 2))
    assert alike.copies == copies
    ends = {**linear, **{block: PrepareOutput(arrives=P, wanted=I) for block in "23"}}
    assert blocks_of_one_plan(RepeatedBlocks(copies), ltp.Plan(ends).check(model, 2)).copies == {"1": "0"}
