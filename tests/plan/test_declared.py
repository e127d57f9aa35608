"""Hugging Face models by the plan that they declare themselves, in training, against one process."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_tp as ltp
from lightning_tp.core.comm.state import R
from lightning_tp.plan.declared import declared_plan
from lightning_tp.plan.plan import Plan
from lightning_tp.shards.view import local_view
from lightning_tp.styles import Colwise, PrepareInput, Replicate, Rowwise, VocabEmbedding, VocabHead
from lightning_tp.testing import assert_trees_close, randomize_, run_ranks
from tests.harness import Collectives, gradients, mesh

transformers = pytest.importorskip("transformers")

IDS = torch.randint(0, 101, (2, 13), generator=torch.Generator().manual_seed(0))
LABELS = IDS.masked_fill(torch.rand(IDS.shape, generator=torch.Generator().manual_seed(1)) < 0.2, -100)
SIZES: dict[str, Any] = dict(
    vocab_size=101,
    hidden_size=32,
    intermediate_size=54,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=32,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    use_cache=False,
)
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
    "llama-tied": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 6, "tie_word_embeddings": False},  # norms on the heads of q and k
    "mistral": {"sliding_window": 4, "tie_word_embeddings": False},
    "gemma2": {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 4},  # tied, logits capped, norms behind the layers
    "olmo2": {"tie_word_embeddings": False},  # norms over all of q and k: gathered, and cut again
    "phi3": {"tie_word_embeddings": False},  # fused projections, gathered
    "cohere": {"use_qk_norm": False},  # attention and MLP side by side, logits scaled, tied
    "gpt2": {},
}


def build(name: str, kernel: str = "sdpa", **changes: Any) -> nn.Module:
    config = transformers.AutoConfig.for_model(name.partition("-")[0], **{**SIZES, **MODELS.get(name, {}), **changes})
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation=kernel)


class Outer(nn.Module):
    """As a LightningModule has it: somewhere inside."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.backbone = inner
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, **kwargs: Any) -> Any:
        out = self.backbone(**kwargs)
        out.loss = out.loss * self.scale
        return out


def trains_alike(whole: nn.Module, what: str, **options: Any) -> nn.Module:
    """Loss, logits, gradients and, after a step, weights as those of one process; in evaluation too."""
    whole = randomize_(whole.train())
    model = copy.deepcopy(whole)
    ltp.parallelize(model, mesh(), **options)
    losses, logits = [], []
    for m in (whole, model):
        optimizer = torch.optim.SGD(m.parameters(), lr=0.1)
        out = m(input_ids=IDS, labels=LABELS)
        out.loss.backward()
        losses.append(out.loss.detach())
        logits.append(out.logits.detach().full_tensor() if hasattr(out.logits, "full_tensor") else out.logits.detach())
        if m is model:
            assert_trees_close({"loss": losses[1], "logits": logits[1]}, {"loss": losses[0], "logits": logits[0]}, name=what)
            assert_trees_close(ltp.full_gradients(model), gradients(whole), name=f"{what}: gradients")
    for m in (whole, model):
        torch.optim.SGD(m.parameters(), lr=0.1).step()
    del optimizer
    assert_trees_close(ltp.full_state_dict(model), whole.state_dict(), name=f"{what}: weights")
    with torch.inference_mode():
        again = [m.eval()(input_ids=IDS, labels=LABELS).loss for m in (whole, model)]
    assert_trees_close({"loss": again[1]}, {"loss": again[0]}, name=f"{what}: evaluation")
    return model


@pytest.mark.parametrize("name", [n for n in MODELS if n != "gpt2"])
def test_it_trains_as_one_process(name: str) -> None:
    whole = build(name, "eager" if name == "gemma2" else "sdpa")  # it has no other

    def body() -> None:
        model = trains_alike(whole, name)
        plan = model._tp_applied_plan
        assert plan.source in {f"declared by {c.__name__}" for c in type(model).__mro__} and not plan.sequence_parallel
        split = {n for n, s in plan.splits.items() if s.dim is not None}
        whole_ones = {n for n in plan.splits if n not in split}
        matrices = {n for n in whole_ones if plan.shapes[n] and len(plan.shapes[n]) > 1}
        assert not matrices, f"left whole: {sorted(matrices)}"

    run_ranks(body, 2)


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "olmo2"])
def test_fewer_key_value_heads_than_ranks(name: str, kernel: str) -> None:
    """2 heads on 4 ranks: shared where they stay split, all there where they are gathered; repeated as often as each needs."""
    whole = build(name, kernel)

    def body() -> None:
        model = trains_alike(whole, f"{name}, {kernel}")
        with local_view():
            groups = {m.num_key_value_groups for m in model.modules() if hasattr(m, "num_key_value_groups")}
        assert groups == ({1} if name == "llama" else {2})
        k = model._tp_applied_plan.splits["model.layers.0.self_attn.k_proj.weight"]
        assert k.sum_over(4) == (2 if name == "llama" else 1)

    run_ranks(body, 4)


def test_one_key_value_head() -> None:
    whole = build("llama", num_key_value_heads=1, num_attention_heads=8)

    def body() -> None:
        model = trains_alike(whole, "1 key/value head")
        with local_view():
            assert {m.num_key_value_groups for m in model.modules() if hasattr(m, "num_key_value_groups")} == {4}

    run_ranks(body, 2)


def test_inside_another_module_and_without_loss_parallel() -> None:
    def body() -> None:
        model = trains_alike(Outer(build("llama-tied")), "outer", loss_parallel=False)
        assert model.backbone.lm_head.weight is model.backbone.model.embed_tokens.weight
        assert model._tp_applied_plan.splits["scale"].dim is None
        base = transformers.AutoModel.from_config(build("llama").config)
        plan = declared_plan(nn.ModuleDict({"encoder": base}), tp=2)
        assert (
            plan is not None
            and plan.check(nn.ModuleDict({"encoder": base}), 2).splits["encoder.layers.0.mlp.up_proj.weight"].dim == 0
        )

    run_ranks(body, 2)


def test_what_is_sent() -> None:
    def body() -> None:
        model = build("llama")
        ltp.parallelize(model, mesh())
        for turn in range(2):
            with Collectives() as forward:
                loss = model(input_ids=IDS, labels=LABELS).loss
            with Collectives() as backward:
                loss.backward()
            if turn:
                # the embedding, two for each of two blocks, two for the loss; backward: the head, and two for each block
                assert forward.kinds == ["all-reduce"] * 7 and backward.kinds == ["all-reduce"] * 5

    run_ranks(body, 2)


# ------------------------------------------------------------------------------------------------------ plans, not run


def test_the_plan_of_llama() -> None:
    model = build("llama")
    plan = declared_plan(model, tp=2)
    assert plan is not None
    assert {r.pattern: r.style for r in plan.rules} == {
        **{f"model.layers.*.self_attn.{n}_proj": Colwise() for n in "qkv"},
        "model.layers.*.self_attn.o_proj": Rowwise(),
        "model.layers.*.mlp.gate_proj": Colwise(),
        "model.layers.*.mlp.up_proj": Colwise(),
        "model.layers.*.mlp.down_proj": Rowwise(),
        "model.embed_tokens": VocabEmbedding(),
        "lm_head": VocabHead(),
        "**": Replicate(),
    }
    assert {r.reason for r in plan.rules} >= {"declared", "rows of the vocabulary", "not in the declared plan"}
    assert Plan.from_json(plan.to_json()) == plan
    heads = {e.where: (e.style.heads, e.style.query_heads) for e in plan.check(model, 2).entries if isinstance(e.style, Colwise)}
    assert heads["model.layers.0.self_attn.q_proj"] == (4, 4) and heads["model.layers.0.self_attn.k_proj"] == (2, 4)
    assert heads["model.layers.0.mlp.up_proj"] == (None, None)


def test_shared_heads_are_told_to_the_attention() -> None:
    shared = declared_plan(build("llama"), tp=4)
    assert shared is not None
    told = {r.pattern: r.style for r in shared.rules if isinstance(r.style, PrepareInput)}
    style = PrepareInput(arrives="I", wanted="I", attributes=(("num_key_value_groups", 1),))
    assert told == {f"model.layers.{i}.self_attn": style for i in range(2)}
    for name in ("llama", "olmo2"):
        plan = declared_plan(build(name), tp=2 if name == "llama" else 4)
        assert plan is not None and not any(isinstance(r.style, PrepareInput) for r in plan.rules)


def test_a_norm_between_the_layers_gets_its_gradient_summed() -> None:
    model = build("qwen3")
    plan = declared_plan(model, tp=2)
    assert plan is not None
    splits = plan.check(model, 2).splits
    says_so = any(
        "q_norm" in pattern for pattern in model.tp_plan
    )  # transformers does from 5.1 on; before, the first gradients tell
    assert splits["model.layers.0.self_attn.q_norm.weight"].state == (R if says_so else None)
    assert splits["model.layers.0.input_layernorm.weight"].sum_over(2) == 1


def test_a_declared_style_that_is_not_known_here() -> None:
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1}
    with pytest.raises(ltp.TPError) as error:
        declared_plan(build("mixtral", **experts), tp=2)
    message = str(error.value)
    assert re.match(
        r"`model\.layers\.\*\.mlp\.\S+`: MixtralForCausalLM declares the style '\w+', which has no counterpart", message
    )
    assert "`plan=`" in message and "colwise, rowwise" in message
    with pytest.raises(ltp.TPError, match=r"`inner.model.layers"):
        declared_plan(nn.ModuleDict({"inner": build("mixtral", **experts)}), tp=2)


def test_sizes_that_do_not_fit_tp() -> None:
    plan = declared_plan(build("llama"), tp=3)
    assert plan is not None
    with pytest.raises(ltp.TPError, match=r"`model.layers.0.self_attn.q_proj`: 4 heads do not split over tp=3. Use tp=1, 2, 4"):
        plan.check(build("llama"), 3)


def test_models_that_declare_nothing() -> None:
    class Plain(nn.Module):
        config, tp_plan = None, None

    for model in (nn.Linear(2, 2), Plain(), build("gpt2", n_embd=8, n_head=2, n_layer=1)):
        assert declared_plan(model, tp=2) is None
    two = nn.ModuleDict({"a": build("llama"), "b": build("llama")})
    assert declared_plan(two, tp=2) is None  # which one is it?


def test_on_meta() -> None:
    with torch.device("meta"):
        model = build("llama")
    plan = declared_plan(model, tp=2)
    other = declared_plan(build("llama"), tp=2)
    assert plan is not None and other is not None and plan.check(model, 2).splits == other.check(build("llama"), 2).splits


def test_a_mask_and_positions_go_through() -> None:
    """What is no activation is handed on as it is."""
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0
    whole = randomize_(build("llama"))

    def body() -> None:
        model = ltp.parallelize(copy.deepcopy(whole), mesh())
        kwargs: dict[str, Tensor] = dict(input_ids=IDS, attention_mask=mask, position_ids=mask.cumsum(1) - 1, labels=LABELS)
        assert_trees_close({"loss": model(**kwargs).loss}, {"loss": whole(**kwargs).loss})

    run_ranks(body, 2)
