"""What a plan says, and what making it leaves as it was."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import lightning_tp as ltp
from lightning_tp.core.comm.state import I
from lightning_tp.infer import search
from lightning_tp.infer.blocks.workload import Workload
from lightning_tp.infer.follow.features import FeatureSets
from lightning_tp.infer.follow.trace import FeatureTrace
from lightning_tp.infer.search import call_with
from tests.zoo import CASES, LM, Attention, Block, Fused, ids


def styles(plan: ltp.Plan) -> dict[str, str]:
    return {r.pattern: r.style.name for r in plan.rules}


def small(n: int = 2) -> LM:
    return LM([Block(Attention()) for _ in range(n)])


def test_each_rule_has_a_reason_and_blocks_are_folded() -> None:
    plan = ltp.infer_plan(small(), {"tokens": ids()}, tp=2)
    assert all(r.reason for r in plan.rules)
    assert plan.source == "inferred"
    found = styles(plan)
    assert found["blocks.*.attention.q"] == "colwise"
    assert found["blocks.*.attention.o"] == "rowwise"
    assert found["head"] == "vocab_head"
    assert found["emb"] == "vocab_embedding"


def test_names_do_not_matter() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.up = nn.Linear(8, 32), nn.Linear(32, 8)  # the other way round

        def forward(self, x: Tensor) -> Tensor:
            return self.up(self.down(x).relu())

    found = styles(ltp.infer_plan(Odd(), (torch.zeros(2, 3, 8),), tp=2))
    assert (found["down"], found["up"]) == ("colwise", "rowwise")


def test_model_buffers_attributes_and_random_state_stay() -> None:
    class Keeps(LM):
        def __init__(self) -> None:
            super().__init__([Block(Attention())])
            self.register_buffer("count", torch.zeros(1))
            self.cache: Any = None

        def forward(self, tokens: Tensor) -> Any:
            self.count += 1
            self.cache = torch.rand(3)
            self.made = self.cache
            return super().forward(tokens)

    model = Keeps()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    classes, names = [type(m) for m in model.modules()], sorted(vars(model))
    state = torch.get_rng_state()
    fast = torch.backends.mha.get_fastpath_enabled()
    ltp.infer_plan(model, {"tokens": ids()}, tp=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [type(m) for m in model.modules()] == classes
    assert sorted(vars(model)) == names
    assert model.cache is None
    assert all(p.grad is None for p in model.parameters())
    assert torch.backends.mha.get_fastpath_enabled() == fast


def test_without_a_process_group_and_on_meta_it_is_the_same_plan() -> None:
    assert not dist.is_initialized()
    real = ltp.infer_plan(small(), {"tokens": ids()}, tp=2)
    with torch.device("meta"):
        model = small()
    assert ltp.infer_plan(model, {"tokens": ids()}, tp=2) == real


def test_twelve_blocks_take_less_than_a_second() -> None:
    model, inputs, threads = small(12), {"tokens": ids()}, torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        best = float("inf")
        for _ in range(3):
            start = time.process_time()  # other processes may run beside this one
            ltp.infer_plan(model, inputs, tp=2)
            best = min(best, time.process_time() - start)
    finally:
        torch.set_num_threads(threads)
    assert best < 1


def test_blocks_that_are_alike_have_one_rule_each() -> None:
    plan = ltp.infer_plan(small(12), {"tokens": ids()}, tp=2)
    of_blocks = {r.pattern for r in plan.rules if r.pattern.startswith("blocks.") and not r.pattern.startswith("blocks.*")}
    assert of_blocks <= {"blocks.0", "blocks.11"}  # the ends of the stream of shards


def test_a_warm_model_has_the_plan_of_a_cold_one() -> None:
    """Python 3.11 replaces instructions by quicker ones as it runs them; places in the code must not move by that."""
    source = """
class Cold(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.o = torch.nn.Linear(8, 24), torch.nn.Linear(8, 8)
    def heads(self, x):
        return tuple(t.view(2, 3, 4, 2).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
    def forward(self, x):
        q, k, v = self.heads(x)
        return self.o(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).reshape(2, 3, 8))
"""
    space: dict[str, Any] = {"torch": torch}
    exec(compile(source, "<cold>", "exec"), space)
    model = space["Cold"]()
    x = (torch.zeros(2, 3, 8),)
    cold = ltp.infer_plan(model, x, tp=2)
    for _ in range(50):
        model(*x)
    assert ltp.infer_plan(model, x, tp=2) == cold


def test_a_plan_survives_json() -> None:
    plan = ltp.infer_plan(LM([Block(Fused("slices"))]), {"tokens": ids()}, tp=2)
    assert ltp.Plan.from_json(plan.to_json()) == plan


def test_a_head_that_something_else_reads_is_split_and_gathered() -> None:
    class Own(LM):
        def forward(self, tokens: Tensor) -> Any:
            return super().forward(tokens).softmax(-1).pow(2).sum()

    plan = ltp.infer_plan(Own([Block(Attention())]), {"tokens": ids()}, tp=2)
    (head,) = [r for r in plan.rules if r.pattern == "head"]
    assert (head.style.name, head.style.options()["output"]) == ("colwise", "I")
    assert "gathered" in head.reason


def test_code_that_does_not_run_on_shards_is_kept_whole() -> None:
    class Strict(nn.Module):
        """Its own C-like function wants the whole width, and nothing of what it does can be seen."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 32), nn.Linear(32, 8), nn.Linear(8, 32)
            self.d = nn.Linear(32, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            if y.detach().clone().untyped_storage().nbytes() != 2 * 3 * 32 * 4:
                raise RuntimeError("not the whole")
            return self.d(self.c(self.b(y)).relu())

    found = {r.pattern: r for r in ltp.infer_plan(Strict(), (torch.zeros(2, 3, 8),), tp=2).rules}
    assert "a" not in found or found["a"].style.output == I  # type: ignore[attr-defined]
    assert "a" in found or "does not run on local shards" in found["a.weight"].reason


def test_tp_is_checked() -> None:
    with pytest.raises(ltp.TPError, match="tp=0"):
        ltp.infer_plan(small(), {"tokens": ids()}, tp=0)


def test_a_model_with_nothing_to_split_is_told() -> None:
    model = nn.Sequential(nn.Conv1d(4, 4, 3), nn.ReLU())
    plan = ltp.infer_plan(model, (torch.zeros(2, 4, 9),), tp=2).check(model, 2)
    assert not plan.shards_anything
    assert "Nothing in its forward can be sharded" in plan.why_nothing_is_sharded(model)


def test_what_stays_whole_says_why_and_what_it_costs() -> None:
    model, inputs, _ = CASES["experts_einsum"]()
    reasons = {r.pattern: r.reason for r in ltp.infer_plan(model, inputs, tp=2).rules}
    router = next(reason for name, reason in reasons.items() if "softmax" in reason)
    assert re.fullmatch(r"`softmax` in `.*` needs features from several ranks; \d+\.\d\d% of the parameters", router)
    assert re.fullmatch(r"replicated: its input is not sharded; such weights are \d+\.\d\d% of the parameters", reasons["**"])


@pytest.mark.parametrize("name", ["hf_gpt2", "hf_bert", "hf_bart", "hf_t5", "torch_decoder", "fused_slices", "modulated"])
def test_dropout_changes_no_plan(name: str) -> None:
    """Its masks are made in place from labelled tensors, and whole blocks may be dropped by chance."""
    if name not in CASES:
        pytest.skip("transformers is not installed" if name.startswith("hf_") else "no such case")
    model, inputs, _ = CASES[name]()
    without = ltp.infer_plan(model, inputs, tp=2)
    for module in model.modules():
        for attribute, value in list(vars(module).items()):
            if value == 0.0 and isinstance(value, float) and ("drop" in attribute or isinstance(module, nn.Dropout)):
                setattr(module, attribute, 0.3)
    model.train()
    assert ltp.infer_plan(model, inputs, tp=2) == without


@pytest.mark.parametrize("kind", ["mixtral", "deepseek_v3"])
def test_plan_of_experts_behind_a_router_is_the_same_without_weights(kind):
    """On the meta device a router chooses nothing: what is taken by its choice is not known."""
    hf = pytest.importorskip("transformers")
    sizes = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 128,
    }  # fmt: skip
    if kind == "mixtral":
        config = hf.MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=4)
    else:
        config = hf.DeepseekV3Config(
            **sizes, num_key_value_heads=4, moe_intermediate_size=32, n_routed_experts=4, num_experts_per_tok=2, n_group=2,
            topk_group=1, q_lora_rank=32, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16,
            first_k_dense_replace=1,
        )  # fmt: skip
    ids = torch.zeros(2, 16, dtype=torch.long)
    inputs = {"input_ids": ids, "labels": ids, "use_cache": False}
    with torch.device("meta"):
        meta = hf.AutoModelForCausalLM.from_config(config)
    plan = ltp.infer_plan(meta, inputs, 2)
    assert re.search(r"mlp\.experts\.gate_up_proj +shard\(dim=1\)", str(plan))
    assert plan.digest == ltp.infer_plan(hf.AutoModelForCausalLM.from_config(config), inputs, 2).digest


def test_a_part_of_a_fused_weight_is_shared_so_often_and_then_none_is(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(4, 6))
    masks = iter(torch.eye(6).bool())
    monkeypatch.setattr(search, "factor_to_share", lambda refused, trace: (("0.weight", 0), next(masks)))
    trace = FeatureTrace(FeatureSets())
    of_model = search.Search(Workload(model, call_with, (torch.zeros(1, 4),), 2))
    for shared in range(1, search.MOST_SHARES + 1):
        assert of_model.share_factor({}, trace)
        assert int(of_model.shared["0.weight", 0].sum()) == shared
    assert not of_model.share_factor({}, trace) and not of_model.shared
