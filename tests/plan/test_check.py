"""A plan held against a model: what it fills in, what it conserves, and everything that it refuses, with numbers and remedies."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor.parallel import parallelize_module

import lightning_tp as ltp
from examples.llama import PLAN, Llama, LlamaConfig
from lightning_tp.core.comm.state import R
from lightning_tp.plan.plan import Plan
from lightning_tp.plan.rule import Rule
from lightning_tp.styles import FusedColwise, PrepareInput, PrepareOutput, Replicate, Split
from lightning_tp.testing import fake_world, run_ranks
from tests.harness import mesh

SMALL = LlamaConfig(vocab_size=61, dim=32, num_layers=2, num_heads=4, num_kv_heads=2, hidden_dim=36, max_seq_len=32)


def tiny(**changes: Any) -> Llama:
    return Llama(LlamaConfig(**{**SMALL.__dict__, **changes}))


class MLP(nn.Module):
    def __init__(self, width: int = 8, hidden: int = 16) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(self.norm(x)).relu())


def blocks(**kwargs: Any) -> nn.Module:
    return nn.ModuleDict({"blocks": nn.ModuleList(MLP(**kwargs) for _ in range(2))})


def refuses(rules: Any, model: nn.Module, *messages: str, tp: int = 2) -> str:
    """The plan is refused, and the message has all of these."""
    with pytest.raises(ltp.TPError) as error:
        Plan.of(rules if not isinstance(rules, list) else Plan(rules)).check(model, tp)
    for message in messages:
        assert message in str(error.value), f"not {message!r} in: {error.value}"
    return str(error.value)


SPLIT = {"blocks.*.up": "colwise", "blocks.*.down": "rowwise"}

# ------------------------------------------------------------------------------------------------------- what is held


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize(
    "changes", [{}, {"tied": True}, {"bias": True, "hidden_dim": 341, "vocab_size": 1003}, {"num_kv_heads": 1}], ids=str
)
def test_conservation(tp: int, changes: dict[str, Any]) -> None:
    """The ranks' shards of a split parameter are all of it, each element as often as heads are shared; the rest is whole."""
    model = tiny(**changes)
    plan = Plan(PLAN).check(model, tp)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    assert plan.splits.keys() == plan.shapes.keys() == parameters.keys()
    kv_copies = max(1, tp // model.config.num_kv_heads)
    for name, p in parameters.items():
        split, shape = plan.splits[name], plan.shapes[name]
        assert shape == tuple(p.shape)
        held = [math.prod(split.local_shape(shape, rank)) for rank in range(tp)]
        copies = kv_copies if ".wk." in name or ".wv." in name else 1
        if "norm" in name or name.endswith(("wo.bias", "w2.bias")):
            assert split.dim is None and held == [p.numel()] * tp
        else:
            assert split.dim is not None and sum(held) == p.numel() * copies, name
        seen = torch.zeros(shape)
        for rank in range(tp):
            mine = torch.zeros(shape)
            split.put(mine, torch.ones(split.local_shape(shape, rank)), rank)
            seen += mine
        assert bool((seen == (tp if split.dim is None else copies)).all()), name
    assert plan.tied == (frozenset({"output.weight"}) if changes.get("tied") else frozenset())
    numels = [
        sum(math.prod(s.local_shape(plan.shapes[n], r)) for n, s in plan.splits.items() if n not in plan.tied) for r in range(tp)
    ]
    assert max(numels) < sum(p.numel() for p in model.parameters()) or tp == 1


def test_any_width_and_any_vocabulary() -> None:
    plan = Plan(PLAN).check(tiny(hidden_dim=341, vocab_size=1003), tp=4)
    assert [plan.splits["layers.0.feed_forward.w1.weight"].length(r) for r in range(4)] == [86, 86, 86, 83]
    assert plan.splits["layers.0.feed_forward.w2.weight"].dim == 1
    assert [plan.splits["output.weight"].length(r) for r in range(4)] == [251, 251, 251, 250]
    assert plan.splits["output.weight"] == plan.splits["tok_embeddings.weight"]


def test_local_shapes_on_real_ranks_are_those_of_the_plan() -> None:
    def body() -> list[tuple[str, tuple[int, ...], tuple[int, ...]]]:
        rank, model = dist.get_rank(), tiny(hidden_dim=341, vocab_size=1003, bias=True)
        plan = Plan(PLAN).check(model, 4)
        ltp.parallelize(model, mesh(), PLAN)
        return [
            (n, tuple(p.to_local().shape), plan.splits[n].local_shape(plan.shapes[n], rank)) for n, p in model.named_parameters()
        ]

    for rank in run_ranks(body, 4):
        assert rank and [name for name, has, planned in rank if has != planned] == []


def test_entries_are_in_the_order_of_the_model() -> None:
    entries = Plan(PLAN).check(tiny(), tp=2).entries
    order = [name for name, _ in tiny().named_modules()]
    assert [e.where for e in entries] == sorted((e.where for e in entries), key=order.index)


# -------------------------------------------------------------------------------------------------------- what matches


def test_parameters_in_no_rule() -> None:
    rules = {p: s for p, s in PLAN.items() if not p.endswith("w2")}
    refuses(
        rules,
        tiny(),
        "2 of 21 parameters of Llama are not covered by any rule",
        "`layers.0.feed_forward.w2.weight` (32, 36)",
        "`'**': 'replicate'`",
    )
    message = refuses({"output": "colwise"}, tiny(), "20 of 21 parameters", ", ..")
    assert message.count("`layers.") == 3  # and not all twenty


def test_two_rules_for_one_module() -> None:
    refuses(
        {**SPLIT, "blocks.*.u*": "replicate"},
        blocks(),
        "`blocks.0.up`: two rules for one module, `colwise` and `replicate`",
        "`**` gives way",
    )
    refuses(
        [Rule("0", PrepareInput(arg=0)), Rule("0", PrepareInput(arg=0)), Rule("0", "colwise")],
        nn.Sequential(nn.Linear(2, 2)),
        "two rules for one module",
    )


def test_two_rules_for_one_weight() -> None:
    """A container and what it holds."""
    refuses(
        {**SPLIT, "blocks.0": "replicate", "blocks.1.norm": "replicate"},
        blocks(),
        "`blocks.0.up.weight`: two rules for one weight",
        "`colwise` on `blocks.0.up` and `replicate` on `blocks.0`",
    )
    refuses(
        {**SPLIT, "blocks.*.norm": "sequence", "blocks.*.norm.bias": "replicate"},
        blocks(),
        "`blocks.0.norm.bias`: two rules for one weight",
    )


def test_a_parameter_by_its_name() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pos = nn.Parameter(torch.zeros(4, 8))
            self.mlp = MLP()

    rules = {"mlp.up": "colwise", "mlp.down": "rowwise", "mlp.norm.*": "replicate", "pos": Replicate(state="R")}
    plan = Plan(rules).check(Model(), tp=2)
    assert plan.splits["pos"] == Split(R) and plan.splits["mlp.norm.bias"] == Split(None)
    refuses({**rules, "pos": "colwise"}, Model(), "`pos` is a parameter; the style `colwise` is for modules. Only `replicate`")


def test_nothing_is_split() -> None:
    refuses(
        {"**": "replicate"},
        blocks(),
        "The plan (user-provided) would replicate every parameter of ModuleDict on tp=2 ranks",
        "tensor parallelism brings nothing",
        "`colwise` and `rowwise`",
    )
    refuses({"blocks.*.norm": "sequence", "**": "replicate"}, blocks(), "would replicate every parameter")
    assert Plan({"**": "replicate"}).check(blocks(), tp=1).tp == 1  # and one rank needs no split


# ------------------------------------------------------------------------------------------------------ what fits where


def test_a_style_on_the_wrong_module() -> None:
    for style in ("colwise", "rowwise", "fused_colwise", "vocab_head"):
        refuses(
            {**SPLIT, "blocks.*.norm": style},
            blocks(),
            f"`blocks.0.norm`: the style `{style}` splits a linear layer",
            "LayerNorm",
            "`replicate`",
        )
    refuses({"blocks.0": "colwise", "**": "replicate"}, blocks(), "`blocks.0`", "this is a MLP", "name the linear layers inside it")
    refuses({**SPLIT, "blocks.*.norm": "vocab_embedding"}, blocks(), "splits an nn.Embedding, and this is a LayerNorm")


def test_heads_that_tp_does_not_divide() -> None:
    six = tiny(num_heads=6, num_kv_heads=6, dim=48)
    refuses(PLAN, six, "`layers.0.attention.wq`: 6 heads do not split over tp=4. Use tp=1, 2, 3, 6", "`replicate`", tp=4)
    Plan(PLAN).check(six, tp=3)
    refuses(
        PLAN, tiny(), "`layers.0.attention.wq`: 4 heads do not split over tp=8: tp is larger than the 4 heads. Use tp=1, 2, 4", tp=8
    )
    three = tiny(num_heads=6, num_kv_heads=3, dim=48)
    refuses(PLAN, three, "`layers.0.attention.wk`: 3 key/value heads (of 6 heads) do not split over tp=2. Use tp=1, 3, 6", tp=2)
    Plan(PLAN).check(three, tp=6)


def test_parts_that_do_not_add_up() -> None:
    model = nn.ModuleDict({"qkv": nn.Linear(8, 20), "out": nn.Linear(8, 8)})
    refuses(
        {"qkv": FusedColwise(parts=(8, 4, 4)), "out": "rowwise"}, model, "`qkv`: the parts (8, 4, 4) add up to 16, the layer has 20"
    )
    refuses(
        {"qkv": "fused_colwise", "out": "rowwise"}, model, "`qkv`: 20 output features are not 3 equal parts", "`parts=(.., ..)`"
    )


@pytest.mark.parametrize("tp", [0, -2, 1.5, "2", True])
def test_a_tp_that_is_no_number_of_ranks(tp: Any) -> None:
    refuses(PLAN, tiny(), f"`tp={tp!r}`", "1 or more", tp=tp)


# ---------------------------------------------------------------------------------------------------------- tied weights


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tok, self.mlp, self.head = nn.Embedding(10, 8), MLP(), nn.Linear(8, 10, bias=False)
        self.head.weight = self.tok.weight


ENDS = {"mlp.up": "colwise", "mlp.down": "rowwise", "mlp.norm": "replicate"}


def test_tied_weights_go_together() -> None:
    plan = Plan({**ENDS, "tok": "vocab_embedding", "head": "vocab_head"}).check(Tied(), tp=2)
    assert plan.splits["tok.weight"] == plan.splits["head.weight"] and plan.tied == {"head.weight"}
    Plan({**ENDS, "tok": "replicate", "head": "replicate"}).check(Tied(), tp=2)
    Plan({**ENDS, "**": "replicate"}).check(Tied(), tp=2)


@pytest.mark.parametrize("tok, head", [("vocab_embedding", "replicate"), ("replicate", "vocab_head"), ("colwise", "vocab_head")])
def test_tied_weights_split_in_two_ways(tok: str, head: str) -> None:
    remedy = "Tied embedding and head go together as `vocab_embedding` and `vocab_head`, or both as `replicate`"
    refuses(
        {**ENDS, "tok": tok, "head": head},
        Tied(),
        "`tok.weight` and `head.weight` are one tied weight",
        f"`{tok}` and `{head}`",
        remedy,
    )


def test_one_end_of_a_tied_weight_in_no_rule() -> None:
    """The other end alone would be split, and the two would go apart without a word."""
    for rest in ({}, {"**": "replicate"}):
        refuses(
            {**ENDS, "tok": "vocab_embedding", **rest},
            Tied(),
            "one tied weight",
            "`vocab_embedding`",
            "`head.weight` is not covered by any rule",
            "go together",
        )
        refuses(
            {**ENDS, "head": "vocab_head", **rest},
            Tied(),
            "one tied weight",
            "`vocab_head`",
            "`tok.weight` is not covered by any rule",
        )


def test_one_end_of_a_whole_tied_weight_is_enough() -> None:
    """Whole under one name, whole under the other: and still one parameter when the plan is applied."""
    with fake_world(2):
        for rules in ({"tok": "replicate"}, {"head": "replicate"}, {"**": "replicate"}):
            model = Tied()
            ltp.parallelize(model, mesh(), {**ENDS, **rules})
            assert model.head.weight is model.tok.weight and hasattr(model.tok.weight, "_tp_shard"), rules
    mesh.cache_clear()


def test_tied_weights_that_disagree_about_their_gradient() -> None:
    model = nn.ModuleDict({"mlp": MLP(), "a": nn.LayerNorm(8), "b": nn.LayerNorm(8)})
    model["b"].weight = model["a"].weight
    rules = {"mlp.up": "colwise", "mlp.down": "rowwise", "mlp.norm": "replicate", "a": "sequence"}
    refuses(
        {**rules, "b": Replicate(state="I")},
        model,
        "`a.weight` and `b.weight` are one tied weight",
        "`sequence` and `replicate`",
    )
    Plan({**rules, "b": "sequence"}).check(model, tp=2)


def test_a_module_that_is_there_twice_needs_one_rule() -> None:
    shared = MLP()
    model = nn.ModuleDict({"first": shared, "again": shared})
    plan = Plan({"first.up": "colwise", "first.down": "rowwise", "first.norm": "replicate"}).check(model, tp=2)
    assert plan.splits["first.up.weight"].dim == 0
    both = Plan({"*.up": "colwise", "*.down": "rowwise", "**": "replicate"}).check(model, tp=2)
    assert both.splits["first.up.weight"] == both.splits["again.up.weight"]


# -------------------------------------------------------------------------------------------- what is distributed already


def test_models_that_something_else_has_wrapped(gloo: dist.ProcessGroup) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    remedy = ("Pass the plain module", "FSDP2 is applied over the data-parallel axis after that")
    ddp = nn.parallel.DistributedDataParallel(tiny())
    refuses(PLAN, ddp, "`the model` is wrapped by DistributedDataParallel already", *remedy)
    refuses(PLAN, nn.ModuleDict({"net": ddp}), "`net` is wrapped by DistributedDataParallel already")
    refuses(PLAN, nn.DataParallel(tiny()), "`the model` is wrapped by DataParallel already", *remedy)
    mesh = init_device_mesh("cpu", (1,))
    sharded = tiny()
    fully_shard(sharded.layers[1], mesh=mesh)
    refuses(PLAN, sharded, "`layers.1` is wrapped by FSDP2's fully_shard already", *remedy)
    split = tiny()
    parallelize_module(
        split, mesh, {"output": Plan({"output": "colwise", "**": "replicate"}).check(split, tp=2).to_torch(split)["output"]}
    )
    refuses(PLAN, split, "`output.weight` is split already", "DTensor", "applied once, to the plain module")


def test_fsdp1(gloo: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    wrapped = FullyShardedDataParallel.__new__(FullyShardedDataParallel)  # its __init__ wants a GPU
    nn.Module.__init__(wrapped)
    wrapped._fsdp_wrapped_module = tiny()
    monkeypatch.setattr(FullyShardedDataParallel, "named_parameters", nn.Module.named_parameters)
    refuses(PLAN, nn.ModuleDict({"net": wrapped}), "`net` is wrapped by FullyShardedDataParallel already", "FSDP2")


def test_a_plan_is_applied_once() -> None:
    with fake_world(2):
        model = tiny()
        ltp.parallelize(model, mesh(), PLAN)
        with pytest.raises(ltp.TPError, match=r"`tok_embeddings.weight` is split already.*once, to the plain module"):
            ltp.parallelize(model, mesh(), PLAN)
        refuses(PLAN, model, "is split already")
    mesh.cache_clear()


def test_a_bad_plan_changes_nothing() -> None:
    """Refused before the first tensor is touched."""
    with fake_world(2):
        model = tiny()
        before = copy.deepcopy(model.state_dict())
        objects = [id(p) for p in model.parameters()]
        for rules in ({**PLAN, "nothing": "colwise"}, {**PLAN, "norm": "colwise"}, {k: v for k, v in PLAN.items() if k != "norm"}):
            with pytest.raises(ltp.TPError):
                ltp.parallelize(model, mesh(), rules)
        assert [id(p) for p in model.parameters()] == objects
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        assert type(model.output) is nn.Linear and not hasattr(model, "_tp_applied_plan")
    mesh.cache_clear()


def test_several_outputs_of_one_module_are_several_rules() -> None:
    model = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 2))
    rules = [Rule("0", "colwise"), Rule("1", "rowwise"), *(Rule("0", PrepareOutput(index=i)) for i in range(2))]
    assert sum(isinstance(e.style, PrepareOutput) for e in Plan(rules).check(model, tp=2).entries) == 2
    refuses([*rules, Rule("0", PrepareOutput(arrives="P", index=1))], model, "`0`: two rules for one module")
