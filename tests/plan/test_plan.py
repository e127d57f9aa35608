"""A plan as a value: patterns, JSON, equality, digest; and the same plan handed to torch."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor.parallel import parallelize_module

import lightning_tp as ltp
from examples.llama import PLAN, Llama, LlamaConfig
from lightning_tp.plan.plan import Plan
from lightning_tp.plan.rule import Rule
from lightning_tp.styles import (
    Colwise,
    FusedColwise,
    PrepareInput,
    PrepareOutput,
    Replicate,
    Rowwise,
    Sequence,
    Style,
    VocabEmbedding,
    VocabHead,
)
from lightning_tp.testing import assert_trees_close, randomize_, run_ranks
from tests.harness import mesh

SMALL = LlamaConfig(vocab_size=61, dim=32, num_layers=2, num_heads=4, num_kv_heads=2, hidden_dim=36, max_seq_len=32)


def tiny(**changes: Any) -> Llama:
    return Llama(LlamaConfig(**{**SMALL.__dict__, **changes}))


# ------------------------------------------------------------------------------------------------------------ patterns


@pytest.mark.parametrize(
    "pattern, yes, no",
    [
        ("wq", ["wq"], ["wq.weight", "a.wq", "wqx", "xwq"]),
        ("layers.*.wq", ["layers.0.wq", "layers.11.wq", "layers.last.wq"], ["layers.wq", "layers.0.a.wq", "xlayers.0.wq"]),
        ("layers.*", ["layers.0"], ["layers", "layers.0.wq"]),
        ("w*", ["w", "wq", "wk"], ["wq.weight", "aw"]),
        ("layers.1*.w[q", ["layers.1.w[q", "layers.12.w[q"], ["layers.2.w[q", "layers.1.wq"]),  # nothing else is special
        ("a.b", ["a.b"], ["axb", "a.b.c"]),
        ("*_norm", ["ffn_norm", "_norm"], ["ffn_norm.weight", "ffn.norm"]),
        ("**", ["", "a", "a.b", "a.b.c"], []),
        ("**.wq", ["wq", "a.wq", "a.b.wq"], ["a.wq.b", "awq"]),
        ("a.**", ["a", "a.b", "a.b.c"], ["ab", "b.a"]),
        ("a.**.wq", ["a.wq", "a.b.wq", "a.b.c.wq"], ["wq", "b.a.wq", "a.b"]),
        ("**.attn.*", ["attn.q", "x.y.attn.q"], ["attn", "attn.q.weight"]),
        ("", [""], ["a"]),
    ],
)
def test_patterns(pattern: str, yes: list[str], no: list[str]) -> None:
    rule = Rule(pattern, "replicate")
    assert [name for name in yes if not rule.matches(name)] == []
    assert [name for name in no if rule.matches(name)] == []


def test_a_plan_is_relative() -> None:
    """Written for a transformer, it finds it inside a LightningModule, and two modules deep."""

    class Module(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.metric = nn.ParameterDict()
            self.net = inner

    at_root = Plan(PLAN).check(tiny(), tp=2)
    for wrapped, prefix in ((Module(tiny()), "net."), (Module(Module(tiny())), "net.net.")):
        inside = Plan(PLAN).check(wrapped, tp=2)
        assert inside.splits == {prefix + name: split for name, split in at_root.splits.items()}
        assert inside.shapes == {prefix + name: shape for name, shape in at_root.shapes.items()}
        assert [(e.where.removeprefix(prefix.removesuffix(".")).removeprefix("."), e.style) for e in inside.entries] == [
            (e.where, e.style) for e in at_root.entries
        ]


def test_a_relative_plan_covers_what_lies_outside_only_by_its_catch_all() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.probe = tiny(), nn.Linear(3, 3)

    with pytest.raises(
        ltp.TPError, match=r"2 of 23 parameters of Two are not covered by any rule of the plan: `probe.weight` .3, 3., `probe.bias`"
    ):
        Plan(PLAN).check(Two(), tp=2)
    whole = Plan({**PLAN, "**": "replicate"}).check(Two(), tp=2)
    assert whole.splits["probe.weight"].dim is None and whole.splits["net.output.weight"].dim == 0


# ---------------------------------------------------------------------------------------------------------- plain data

EVERY: list[Style] = [
    Colwise(),
    Colwise(heads=8, query_heads=16, input="S(1)", output="I"),
    Colwise(ranges=(((0, 4), (6, 7)), ((4, 6), (7, 9)))),
    Rowwise(),
    Rowwise(input="I", output="S(1)"),
    Rowwise(ranges=(((0, 4),), ((4, 9),))),
    FusedColwise(),
    FusedColwise(parts=(64, 16, 16), heads=(4, 1, 1), input="R"),
    FusedColwise(parts=2, heads=8),
    FusedColwise(parts=(6, 6), heads=(2, None)),  # type: ignore[arg-type]
    Sequence(),
    Sequence(input="I", output="I"),
    VocabEmbedding(),
    VocabEmbedding(output="S(1)"),
    VocabHead(),
    VocabHead(input="S(1)"),
    Replicate(),
    Replicate(state="R"),
    Replicate(state="I"),
    PrepareInput(),
    PrepareInput(arrives="S(1)", wanted="I", arg="hidden_states", attributes=(("groups", 2), ("heads", 4))),
    PrepareInput(arg=0),
    PrepareOutput(),
    PrepareOutput(arrives="P", wanted="S(1)", index=2),
]


def test_json_round_trip_of_every_style_with_options() -> None:
    plan = Plan([Rule(f"m{i}.*", style, f"reason {i}") for i, style in enumerate(EVERY)], source="declared by Nobody")
    again = Plan.from_json(plan.to_json())
    assert again == plan and hash(again) == hash(plan)
    assert again.rules == plan.rules and [r.style for r in again.rules] == EVERY
    assert [r.reason for r in again.rules] == [f"reason {i}" for i in range(len(EVERY))]
    assert (again.source, again.digest) == ("declared by Nobody", plan.digest)
    data = json.loads(plan.to_json())
    assert data["version"] == 1 and data["rules"][0] == {"pattern": "m0.*", "style": "colwise", "options": {}, "reason": "reason 0"}


def test_json_of_a_checked_plan_has_its_rules_alone() -> None:
    plan = Plan(PLAN)
    assert plan.check(tiny(), tp=2).to_json() == plan.to_json()


RULES_THAT_ARE_NONE = ["3", '[{"pattern": "a"}]', '[["a", "colwise"]]', '[{"pattern": "a", "style": "colwise", "options": 3}]']


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", "null", '"colwise"', "{}", *(f'{{"rules": {rules}}}' for rules in RULES_THAT_ARE_NONE)]
)
def test_bad_json(text: str) -> None:
    with pytest.raises(ltp.TPError, match=r"This is not a plan.*`Plan.to_json`"):
        Plan.from_json(text)


def test_json_with_a_style_or_an_option_that_there_is_not() -> None:
    with pytest.raises(ltp.TPError, match=r"`a.b`: unknown style.*'columns'"):
        Plan.from_json('{"rules": [{"pattern": "a.b", "style": "columns"}]}')
    with pytest.raises(ltp.TPError, match=r"`a.b`: .*'headz'"):
        Plan.from_json('{"rules": [{"pattern": "a.b", "style": "colwise", "options": {"headz": 2}}]}')


def test_of(tmp_path: Path) -> None:
    plan = Plan(PLAN)
    file = tmp_path / "plan.json"
    file.write_text(plan.to_json())
    assert Plan.of(plan) is plan
    assert Plan.of(PLAN) == Plan.of(file) == Plan.of(str(file)) == plan
    with pytest.raises(ltp.TPError, match=r"`plan='.*no_such.json'`: there is no such file. Pass a Plan, a dict"):
        Plan.of(tmp_path / "no_such.json")
    with pytest.raises(ltp.TPError, match=r"there is no such file"):
        Plan.of(str(tmp_path))
    with pytest.raises(ltp.TPError, match=r"`plan=3`: .*Pass a Plan, a dict"):
        Plan.of(3)  # type: ignore[arg-type]


# ----------------------------------------------------------------------------------------------------------- as a value


def test_equality_is_that_of_rules_and_source() -> None:
    plan = Plan({"a": "colwise", "b": "rowwise"})
    assert plan == Plan([Rule("a", Colwise()), Rule("b", "rowwise")])
    assert plan != Plan({"a": "colwise"}) and plan != Plan({"b": "rowwise", "a": "colwise"})
    assert plan != Plan({"a": Colwise(heads=2), "b": "rowwise"}) and plan != Plan(plan.rules, source="inferred")
    checked = Plan(PLAN).check(tiny(), tp=2)
    assert checked == Plan(PLAN).check(tiny(), tp=2) != Plan(PLAN) and Plan.of(checked) == Plan(PLAN)
    assert len({plan, Plan(plan.rules)}) == 1


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


def test_checking_changes_neither_the_model_nor_the_plan() -> None:
    model = tiny()
    before = {name: (id(p), p.detach().clone()) for name, p in model.named_parameters()}
    plan = Plan(PLAN)
    plan.check(model, tp=4)
    assert plan == Plan(PLAN)
    assert all(id(p) == before[n][0] and torch.equal(p, before[n][1]) for n, p in model.named_parameters())
    assert not any(hasattr(p, "_tp_shard") for p in model.parameters())


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


def test_on_meta() -> None:
    with torch.device("meta"):
        model = tiny()
    assert Plan(PLAN).check(model, tp=2).splits == Plan(PLAN).check(tiny(), tp=2).splits


# ------------------------------------------------------------------------------------------------- sequence parallelism


def test_without_sequence_parallel() -> None:
    rules = {
        "a": "sequence",
        "b": Sequence(input="I"),
        "c": Colwise(input="S(1)", heads=2),
        "d": Rowwise(output="S(1)"),
        "e": VocabEmbedding(output="S(1)"),
        "f": VocabHead(input="S(1)"),
        "g": FusedColwise(input="S(1)", parts=2),
        "h": PrepareInput(arrives="S(1)", arg="x", attributes=(("n", 1),)),
        "i": PrepareInput(arrives="I", wanted="S(1)"),
        "j": PrepareOutput(arrives="S(1)", wanted="I"),
        "k": PrepareOutput(arrives="P", wanted="S(1)"),
        "l": Colwise(),
        "m": Replicate(),
    }
    plan = Plan(rules, source="user-provided")
    whole = plan.without_sequence_parallel()
    assert plan.sequence_parallel and not whole.sequence_parallel
    assert {r.pattern: r.style for r in whole.rules} == {
        "a": Replicate(state="I"),
        "b": Replicate(state="I"),
        "c": Colwise(input="I", heads=2),
        "d": Rowwise(output="I"),
        "e": VocabEmbedding(output="I"),
        "f": VocabHead(input="I"),
        "g": FusedColwise(input="I", parts=2),
        "h": PrepareInput(arg="x", attributes=(("n", 1),)),
        "k": PrepareOutput(arrives="P", wanted="I"),
        "l": Colwise(),
        "m": Replicate(),
    }
    assert whole.without_sequence_parallel() == whole


def test_sequence_parallel_is_seen_in_any_style() -> None:
    for style in ("sequence", Rowwise(output="S(1)"), VocabEmbedding(output="S(1)"), PrepareInput(wanted="S(1)")):
        assert Plan({"x": style}).sequence_parallel, style
    for style in ("rowwise", "replicate", "vocab_head", PrepareOutput()):
        assert not Plan({"x": style}).sequence_parallel, style


def test_the_example_without_sequence_parallel_trains_alike() -> None:
    tokens = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(0))

    def body() -> None:
        whole = randomize_(tiny(bias=True))
        loss_of(whole, tokens).backward()
        gradients = {n: p.grad for n, p in whole.named_parameters() if p.grad is not None}
        for plan in (Plan(PLAN), Plan(PLAN).without_sequence_parallel()):
            model = randomize_(tiny(bias=True))
            ltp.parallelize(model, mesh(), plan)
            loss = loss_of(model, tokens)
            loss.backward()
            assert_trees_close({"loss": loss}, {"loss": loss_of(whole, tokens)})
            assert_trees_close(ltp.full_gradients(model), gradients)

    run_ranks(body, 2)


# ------------------------------------------------------------------------------------------------------------ for torch


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


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
