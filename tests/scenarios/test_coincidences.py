"""Plans follow the data, not the numbers: sizes that happen to be equal, and batches that are not the one a plan was made from."""

from __future__ import annotations

import functools
import math
import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import lightning_tp as ltp
from lightning_tp.core.comm.mesh import make_mesh
from lightning_tp.core.comm.state import WIDTH
from lightning_tp.styles import RewrittenCalls
from lightning_tp.testing import assert_trees_close, randomize_, run_ranks
from tests import zoo
from tests.zoo import CASES

B, T, D = 2, 3, 8
Between = Callable[["Net", Tensor], Tensor]


class Net(nn.Module):
    """Something between two layers, on their (B, T, D): a rank has D / tp."""

    def __init__(self, between: Between) -> None:
        super().__init__()
        self.a, self.b, self.w, self.between = nn.Linear(4, D), nn.Linear(D, 4), nn.Parameter(torch.rand(D)), between

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.gelu(self.between(self, self.a(x))))


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (4, 2)).transpose(1, 2)


def merged(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(-2)


def tokens(x: Tensor) -> Tensor:
    """As many as there are features."""
    return x.repeat(1, 3, 1)[:, :D]


def slopes(m: Net, x: Tensor) -> Tensor:
    y = heads(x)
    return merged(y * (2.0 ** -torch.arange(1, y.shape[1] + 1))[:, None, None])


def slopes_in_a_list(m: Net, x: Tensor) -> Tensor:
    y = heads(x)
    return merged(y * torch.tensor([2.0 ** -(i + 1) for i in range(y.shape[1])])[:, None, None])


def loop(m: Net, x: Tensor) -> Tensor:
    y = x
    for _ in range(x.shape[-1]):
        y = y + m.w.sum()
    return y


def written(m: Net, x: Tensor) -> Tensor:
    y = x.clone()
    y[..., 2:4] = 0.0
    return y


def written_token(m: Net, x: Tensor) -> Tensor:
    y = x.clone()
    y[:, 1] = torch.arange(8.0)
    return y


def added_by_index(m: Net, x: Tensor) -> Tensor:
    flat = tokens(x).flatten(0, 1)[:D]
    return torch.zeros(6, flat.shape[-1]).index_add(0, torch.tensor([0, 1, 2, 3, 4, 5, 0, 1]), flat).view(B, T, -1)


def scores(m: Net, x: Tensor) -> Tensor:
    y = heads(x).repeat(1, 1, 2, 1)[:, :, :4]  # as many tokens as heads
    mask = torch.rand(4, 4, generator=torch.Generator().manual_seed(0))
    return merged(F.scaled_dot_product_attention(y, y, y, attn_mask=mask)[:, :, :T])


# name -> what is done to features, and whether the layers can be split all the same
BETWEEN: dict[str, tuple[Between, bool]] = {
    # sizes of a shard that code computes with: numbers, not sizes
    "arange": (lambda m, x: x * torch.arange(x.shape[-1]), True),
    "linspace": (lambda m, x: x * torch.linspace(0, 1, x.size(-1)), True),
    "factor": (lambda m, x: x * x.shape[-1], True),
    "divisor": (lambda m, x: x / x.shape[-1], True),
    "half": (lambda m, x: x + x.shape[-1] * 0.5, True),
    "quotient": (lambda m, x: x * (100 // x.shape[-1]), True),
    "power": (lambda m, x: x * 2.0 ** -x.shape[-1], True),
    "logarithm": (lambda m, x: x * math.log2(x.shape[-1]), True),
    "int": (lambda m, x: x * int(x.shape[-1]), True),
    "tensor": (lambda m, x: x * torch.tensor(x.shape[-1]), True),
    "numel": (lambda m, x: x / x.numel(), True),
    "len": (lambda m, x: (x.mT.transpose(0, 1) * len(x.mT.transpose(0, 1))).transpose(0, 1).mT, True),
    "prefix_of_a_parameter": (lambda m, x: x * m.w[: x.shape[-1]], True),
    "index_into_numbers": (lambda m, x: x + torch.arange(9.0)[x.shape[-1]], True),
    "slopes": (slopes, True),
    "slopes_in_a_list": (slopes_in_a_list, True),
    "loop": (loop, True),
    # operations that are others on shards
    "roll": (lambda m, x: x + x.roll(1, -1), False),
    "triangle": (lambda m, x: x[..., None].expand(*x.shape, D).tril().sum(-1), False),
    "written": (written, False),
    "written_token": (written_token, True),
    # as many of this as of that
    "outer_product": (
        lambda m, x: torch.stack([torch.outer(torch.arange(8.0), t).sum(0) for t in x.flatten(0, 1)]).view(B, T, -1),
        True,
    ),
    "square_product": (lambda m, x: ((torch.arange(64.0).view(D, D) / 64) @ tokens(x))[:, :T], True),
    "square_einsum": (lambda m, x: torch.einsum("st,btd->bsd", torch.arange(64.0).view(D, D) / 64, tokens(x))[:, :T], True),
    "square_mask": (lambda m, x: tokens(x).masked_fill(torch.ones(D, 1).cumsum(0) > 4, 0.0)[:, :T], True),
    "joined_squares": (lambda m, x: torch.cat((tokens(x), torch.arange(64.0).view(1, D, D).expand(B, D, D)), 1)[:, 6:9], True),
    "added_by_index": (added_by_index, False),
    "scores": (scores, True),
}


def net(name: str) -> tuple[Net, tuple[Tensor]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return randomize_(Net(BETWEEN[name][0])), (zoo.noise(B, T, 4),)  # type: ignore[return-value]


def weighted(out: Tensor) -> Tensor:
    return zoo.weighted(out)


# -------------------------------------------------------------------------------------------------------------- models

_DECODER = {**zoo._DECODER, "max_position_embeddings": 64}
_ROUTED = {**_DECODER, "num_local_experts": 4, "num_experts_per_tok": 2}
# name -> model type, sizes without coincidences, sizes with them
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "experts_twice_as_wide": ("mixtral", {**_ROUTED, "intermediate_size": 48}, {**_ROUTED, "intermediate_size": 16}),  # 2 * 16 = 32
    "experts_as_wide": ("mixtral", {**_ROUTED, "intermediate_size": 48}, {**_ROUTED, "intermediate_size": 32}),
    "heads_as_wide_as_many": ("llama", _DECODER, {**_DECODER, "hidden_size": 16, "num_attention_heads": 4, "head_dim": 4}),
    "vocabulary_as_inner_width": ("llama", _DECODER, {**_DECODER, "vocab_size": 128, "intermediate_size": 128}),
    "keys_as_wide_as_a_head": (
        "llama",
        {**_DECODER, "num_key_value_heads": 1, "head_dim": 24},
        {**_DECODER, "num_key_value_heads": 1, "head_dim": 32},
    ),
    "alibi": ("bloom", zoo._CONFIGS["bloom"][2], {**zoo._CONFIGS["bloom"][2], "hidden_size": 16}),
}
PRIMES = (3, 13)
BATCHES = [(4, 4), (8, 8), (2, 16), (4, 8), (1, 32)]  # heads, head widths, widths and shards of them


def hf(name: str, batch: tuple[int, int], like: bool = False) -> Any:
    kind, plain, sizes = MODELS[name]
    sizes = plain if like else sizes
    tokens = zoo.ids(*batch, vocab=sizes["vocab_size"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model, _, _ = zoo._transformers("AutoModelForCausalLM", kind, sizes)
    return randomize_(model).train(), {"input_ids": tokens, "labels": tokens}, lambda out: out.loss


def case(name: str, batch: tuple[int, int]) -> Any:
    defaults = zoo.ids.__defaults__
    zoo.ids.__defaults__ = (*batch, *defaults[2:])
    try:
        model, inputs, loss_fn = CASES[name]()
    finally:
        zoo.ids.__defaults__ = defaults
    return model, inputs, loss_fn


def what_is_done(plan: ltp.Plan) -> dict[str, Any]:
    """Without sizes: the styles, and which operands are cut in which calls."""
    done = {}
    for rule in plan.rules:
        calls = rule.style.calls if isinstance(rule.style, RewrittenCalls) else ()
        changed = {
            (c.name, tuple((o.path, o.part is not None) for o in c.operands), c.leave) for c in calls if c.operands or c.leave
        }
        done[rule.pattern, rule.style.name] = changed
    return done


# -------------------------------------------------------------------------------------------------------------- parity


def _parity(build: Callable[[], Any], plan: ltp.Plan, mesh: Any) -> str:
    """Empty, or what differs from one process."""
    try:
        found = []
        with sdpa_kernel(SDPBackend.MATH):
            for split in (False, True):
                model, inputs, loss_fn = build()
                if split:
                    ltp.parallelize(model, mesh, plan)
                loss = loss_fn(model(**inputs) if isinstance(inputs, dict) else model(*inputs))
                loss.backward()
                grads = {n: p.grad for n, p in model.named_parameters(remove_duplicate=False) if p.grad is not None}
                found.append((loss.detach(), ltp.full_gradients(model) if split else grads))
        (loss, grads), (got, got_grads) = found
        assert_trees_close({"loss": got}, {"loss": loss}, rtol=1e-4)
        if dist.get_rank() == 0:
            assert_trees_close(got_grads, grads, rtol=2e-3, floor=1e-3, name="gradients")
    except Exception:
        return traceback.format_exc(limit=-3)
    return ""


def _on_ranks(jobs: dict[str, Any]) -> dict[str, str]:
    mesh = make_mesh("cpu", 1, dist.get_world_size())
    return {key: _parity(functools.partial(_BUILD[of], *args), plan, mesh) for key, (of, args, plan) in jobs.items()}


def _net(name: str) -> Any:
    return *net(name), weighted


_BUILD: dict[str, Callable[..., Any]] = {"net": _net, "hf": hf, "case": case}


@functools.cache
def _results() -> tuple[dict[str, ltp.Plan], dict[str, str]]:
    """All plans, and all parity in one start of two ranks."""
    plans = {name: ltp.infer_plan(*net(name), tp=2) for name in BETWEEN}
    jobs: dict[str, Any] = {name: ("net", (name,), plan) for name, plan in plans.items()}
    if hasattr(zoo, "_CONFIGS") and any(n.startswith("hf_") for n in CASES):
        for name in MODELS:
            model, inputs, _ = hf(name, PRIMES)
            plans[name] = ltp.infer_plan(model, inputs, tp=2)
            for batch in (PRIMES, (4, 4), (2, 16)):
                jobs[f"{name} {batch}"] = ("hf", (name, batch), plans[name])
    for name in ("plain", "scores_alibi", "sequence_first", "scan", "experts_loop"):
        model, inputs, _ = case(name, PRIMES)
        plans[name] = ltp.infer_plan(model, inputs, tp=2)
        for batch in ((4, 4), (1, 32)):
            jobs[f"{name} {batch}"] = ("case", (name, batch), plans[name])
    return plans, run_ranks(_on_ranks, 2, jobs)[0]


@pytest.mark.parametrize("name", BETWEEN)
def test_what_is_between_two_layers_equals_one_process(name: str) -> None:
    plans, results = _results()
    assert not results[name], results[name]
    assert ("a", "colwise") in {(r.pattern, r.style.name) for r in plans[name].rules} or not BETWEEN[name][1]


@pytest.mark.parametrize("name", MODELS)
def test_equal_sizes_in_a_model_change_nothing(name: str) -> None:
    pytest.importorskip("transformers")
    plans, results = _results()
    model, inputs, _ = hf(name, PRIMES, like=True)
    assert what_is_done(plans[name]) == what_is_done(ltp.infer_plan(model, inputs, tp=2))
    for key, result in results.items():
        assert not key.startswith(f"{name} ") or not result, (key, result)


@pytest.mark.parametrize("name", ["plain", "scores_alibi", "sequence_first", "scan", "experts_loop"])
def test_another_batch_than_the_plan_was_made_from(name: str) -> None:
    for key, result in _results()[1].items():
        assert not key.startswith(f"{name} ") or not result, (key, result)


@pytest.mark.parametrize("name", ["mha", "mha_sequence_first", "scores_alibi"])
@pytest.mark.parametrize("batch", [(4, 4)])
def test_as_many_sequences_as_tokens(name: str, batch: tuple[int, int]) -> None:
    plans = [ltp.infer_plan(*case(name, of)[:2], tp=2) for of in (PRIMES, batch)]
    assert what_is_done(plans[1]) == what_is_done(plans[0])


@pytest.mark.parametrize("name", ["roll", "triangle", "written", "outer_product"])
def test_what_is_too_large_to_be_tried_is_not_split(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_tp.infer.calls.try_on_shards.MOST_TRIED", 0)
    plan = ltp.infer_plan(*net(name), tp=2)
    assert not any(r.style.splits_parameters and getattr(r.style, "output", None) == WIDTH for r in plan.rules)


def test_heads_of_two_branches_in_one_weight_are_dealt_out_each_by_itself() -> None:
    class Branches(nn.Module):
        """Four heads of 8 and two of 8."""

        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.o1, self.o2 = nn.Linear(32, 3 * 8 * 6), nn.Linear(32, 32), nn.Linear(16, 32)

        def forward(self, x: Tensor) -> Tensor:
            out = x
            for y, num_heads, o in zip(self.qkv(x).split((96, 48), -1), (4, 2), (self.o1, self.o2), strict=True):
                q, k, v = (t.view(*x.shape[:2], num_heads, 8).transpose(1, 2) for t in y.chunk(3, -1))
                out = out + o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(*x.shape[:2], num_heads * 8))
            return out

    plan = ltp.infer_plan(Branches(), (zoo.noise(3, 13, 32),), tp=2)
    assert {r.pattern: r.style.name for r in plan.rules if r.pattern in ("qkv", "o1", "o2")} == {
        "qkv": "colwise",
        "o1": "rowwise",
        "o2": "rowwise",
    }


# inputs of other kinds; in a small batch an expert is given no tokens, and the stream stays whole
OTHER_INPUTS = {"windows", "convolutions", "twice", "pictures", "modulated", "experts_loop", "hf_mamba"}


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in CASES if n not in OTHER_INPUTS and not n.startswith("torch_")])
def test_plans_do_not_depend_on_the_batch(name: str) -> None:
    first = what_is_done(ltp.infer_plan(*case(name, PRIMES)[:2], tp=2))
    plans = {batch: ltp.infer_plan(*case(name, batch)[:2], tp=2) for batch in BATCHES}
    assert {batch: what_is_done(plan) for batch, plan in plans.items()} == dict.fromkeys(BATCHES, first)
    jobs = {f"{made} {batch}": ("case", (name, batch), plan) for made, plan in plans.items() for batch in (PRIMES, *BATCHES)}
    assert not any(run_ranks(_on_ranks, 2, jobs)[0].values())
