"""Gradients of a split model: their norm and its clipping as in one process, shares summed, wrong plans found, optimizers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import lightning_tp as ltp
from examples.llama import PLAN, Llama, LlamaConfig
from lightning_tp._compat import local_tensor
from lightning_tp.core.comm.mesh import DATA_PARALLEL, TENSOR_PARALLEL, make_mesh
from lightning_tp.core.comm.state import I, R
from lightning_tp.shards import gradients as grad
from lightning_tp.shards.gradients import no_sync
from lightning_tp.shards.view import depth, local_view
from lightning_tp.styles import Colwise, FusedColwise, PrepareInput, Replicate, Rowwise
from lightning_tp.testing import assert_trees_close, randomize_, run_ranks

DIM, HEAD_DIM, VOCAB = 64, 8, 101
MESHES = {"tp2": (1, 2), "tp4": (1, 4), "2x2": (2, 2)}
each_mesh = pytest.mark.parametrize("mesh", MESHES.values(), ids=list(MESHES))


def llama(kv_heads: int = 1, dtype: torch.dtype = torch.float64, **other: Any) -> Llama:
    config = dict(vocab_size=VOCAB, dim=DIM, num_layers=2, num_heads=8, hidden_dim=90, bias=True)
    return randomize_(Llama(LlamaConfig(num_kv_heads=kv_heads, **{**config, **other})).to(dtype))


class FusedBlock(nn.Module):
    """Attention whose q, k and v are one layer; norms of q and k on each head; MLP whose gate and up are one layer."""

    def __init__(self, heads: int = 8, kv_heads: int = 1, hidden: int = 90) -> None:
        super().__init__()
        self.kv_heads = kv_heads
        self.norm = nn.LayerNorm(DIM)
        self.qkv = nn.Linear(DIM, (heads + 2 * kv_heads) * HEAD_DIM)
        self.q_norm = nn.RMSNorm(HEAD_DIM, eps=1e-5)
        self.out = nn.Linear(heads * HEAD_DIM, DIM)
        self.gate_up = nn.Linear(DIM, 2 * hidden)
        self.down = nn.Linear(hidden, DIM)

    def forward(self, x: Tensor) -> Tensor:
        y = self.qkv(self.norm(x)).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)  # (B, H + 2 K, T, F)
        q, k, v = y.split([y.shape[1] - 2 * self.kv_heads, self.kv_heads, self.kv_heads], 1)
        y = F.scaled_dot_product_attention(self.q_norm(q), k, v, is_causal=True, enable_gqa=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(x).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class FusedNet(nn.Module):
    def __init__(self, kv_heads: int = 1) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, DIM)
        self.blocks = nn.ModuleList(FusedBlock(kv_heads=kv_heads) for _ in range(2))
        self.head = nn.Linear(DIM, VOCAB)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def fused_plan(kv_heads: int, tp: int, **other: Any) -> dict[str, Any]:
    local = max(1, kv_heads // tp)
    return {
        "embed": "vocab_embedding",
        "blocks.*": PrepareInput(arrives="I", wanted="I", attributes=(("kv_heads", local),)),
        "blocks.*.norm": "replicate",
        "blocks.*.qkv": FusedColwise(parts=(8 * HEAD_DIM, kv_heads * HEAD_DIM, kv_heads * HEAD_DIM), heads=(8, kv_heads, kv_heads)),
        "blocks.*.q_norm": Replicate(state="R"),
        "blocks.*.out": "rowwise",
        "blocks.*.gate_up": FusedColwise(parts=2),
        "blocks.*.down": "rowwise",
        "head": "vocab_head",
        **other,
    }


def fused(kv_heads: int = 1, dtype: torch.dtype = torch.float64) -> FusedNet:
    return randomize_(FusedNet(kv_heads).to(dtype))


def batch(seed: int = 0) -> Tensor:
    return torch.randint(0, VOCAB, (4, 10), generator=torch.Generator().manual_seed(seed))


def backward(model: nn.Module, tokens: Tensor, mesh: Any = None) -> Tensor:
    if mesh is not None:
        tokens = tokens.chunk(mesh[DATA_PARALLEL].size())[mesh.get_local_rank(DATA_PARALLEL)]
    loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    return loss.detach()


# ------------------------------------------------------------------------------------------------- shares of gradients


@each_mesh
def test_gradients_of_fused_and_shared_heads(mesh: tuple[int, int]) -> None:
    refs = {}
    for kv_heads in (1, 2):
        whole = fused(kv_heads)
        backward(whole, batch())
        refs[kv_heads] = ltp.full_gradients(whole)

    def body() -> None:
        device_mesh = make_mesh("cpu", *mesh)
        for kv_heads, ref in refs.items():
            model = ltp.parallelize(fused(kv_heads), device_mesh, fused_plan(kv_heads, mesh[1]))
            for _ in range(2):
                backward(model, batch(), device_mesh)
                assert_trees_close(ltp.full_gradients(model), ref, rtol=1e-9, name=f"{kv_heads} key/value heads")
                model.zero_grad()

    run_ranks(body, mesh[0] * mesh[1])


@each_mesh
def test_gradients_that_are_there_already_are_added_to(mesh: tuple[int, int]) -> None:
    """Several backward passes, by one graph or by several, zeros left behind by `zero_grad`: each share is summed once."""
    whole = llama()
    backward(whole, batch())
    backward(whole, batch(1))
    ref = ltp.full_gradients(whole)

    def body() -> None:
        device_mesh = make_mesh("cpu", *mesh)
        model = ltp.parallelize(llama(), device_mesh, PLAN)
        for set_to_none in (True, False, True):
            backward(model, batch(), device_mesh)
            backward(model, batch(1), device_mesh)
            assert_trees_close(ltp.full_gradients(model), ref, rtol=1e-9)
            model.zero_grad(set_to_none=set_to_none)
        if mesh[0] == 1:  # FSDP2 frees what it gathered
            loss = F.cross_entropy(model(batch()[:, :-1]).flatten(0, 1), batch()[:, 1:].flatten())
            loss.backward(retain_graph=True)
            once = {n: g.clone() for n, g in ltp.full_gradients(model).items()}
            loss.backward()
            twice = {n: g / 2 for n, g in ltp.full_gradients(model).items()}
            assert_trees_close(twice, once, rtol=1e-9)

    run_ranks(body, mesh[0] * mesh[1])


@each_mesh
def test_sums_that_are_put_off(mesh: tuple[int, int]) -> None:
    """Any order of passes that sum and that don't, gradients thrown away in between: right after each pass that sums."""

    def passes(model: nn.Module, order: str, device_mesh: Any = None) -> list[dict[str, Tensor]]:
        found = []
        model.zero_grad()
        for i, what in enumerate(order):
            if what in "zZ":
                model.zero_grad(set_to_none=what == "Z")
                continue
            with grad.no_sync(model) if what == "." else nullcontext():
                backward(model, batch(i), device_mesh)
            if what == "+":
                found.append({n: g.clone() for n, g in ltp.full_gradients(model).items()})
        return found

    orders = ("..+", "+.+", "..Z+", "..Z.+", "+..+.+") + (("..z+", "+z.+") if mesh[0] == 1 else ())
    refs = {order: passes(llama(), order) for order in orders}

    def body() -> None:
        device_mesh = make_mesh("cpu", *mesh)
        for order, ref in refs.items():
            if mesh[0] > 1 and "Z" in order:
                continue  # FSDP2 keeps what it has not reduced, whatever `zero_grad` does
            model = ltp.parallelize(llama(), device_mesh, PLAN)
            for i, (got, there) in enumerate(zip(passes(model, order, device_mesh), ref, strict=True)):
                assert_trees_close(got, there, rtol=1e-9, name=f"{order}, {i}")

    run_ranks(body, mesh[0] * mesh[1])


def test_autograd_grad_as_in_one_process() -> None:
    """Of what is sharded, and of what every rank has a term of; what `backward` left in `.grad` stays."""
    whole = llama()
    backward(whole, batch())
    ref = ltp.full_gradients(whole)

    def loss(model: Llama) -> Tensor:
        return F.cross_entropy(model(batch()[:, :-1]).flatten(0, 1), batch()[:, 1:].flatten())

    def body() -> None:
        model = ltp.parallelize(llama(), make_mesh("cpu", 1, 2), PLAN)
        norm, column = model.layers[1].attention_norm.weight, model.layers[0].feed_forward.w1.weight
        backward(model, batch())
        names = ("layers.1.attention_norm.weight", "layers.0.feed_forward.w1.weight")
        for asked in ([0], [1, 0]):
            found = torch.autograd.grad(loss(model), [(norm, column)[i] for i in asked])
            for i, got in zip(asked, found, strict=True):
                torch.testing.assert_close(got.full_tensor(), ref[names[i]], rtol=1e-9, atol=1e-12)
        assert_trees_close(ltp.full_gradients(model), ref, rtol=1e-9)  # what was there before has stayed
        model.zero_grad()
        loss(model).backward(inputs=[norm, column])
        asked = {name: g for name, g in ltp.full_gradients(model).items() if g is not None}
        assert asked.keys() == {"layers.1.attention_norm.weight", "layers.0.feed_forward.w1.weight"}
        assert_trees_close(asked, {name: ref[name] for name in asked}, rtol=1e-9)

    run_ranks(body, 2)


def test_a_backward_that_failed_is_forgotten() -> None:
    """Out of memory in the middle, caught by the user, who goes on with the next batch."""
    whole = llama()
    backward(whole, batch())
    ref = ltp.full_gradients(whole)

    depths = []

    def fail(_: Tensor) -> None:
        depths.append(depth())
        raise MemoryError("out of memory")

    def body() -> None:
        model = ltp.parallelize(llama(), make_mesh("cpu", 1, 2), PLAN)
        backward(model, batch(1))
        weight: Any = model.layers[0].feed_forward.w2.weight
        at_end, inside = weight.register_hook, partial(local_view()(Tensor.register_hook), weight)
        for register in (at_end, inside):
            handle = register(fail)
            with pytest.raises(MemoryError):
                backward(model, batch(2))
            handle.remove()
            assert depth() == 0
            model.zero_grad()
            backward(model, batch())
            assert depth() == 0
            assert_trees_close(ltp.full_gradients(model), ref, rtol=1e-9)
        assert depths == [-1, 1]

    run_ranks(body, 2)


def test_frozen_parameters() -> None:
    frozen = ("norm", "bias", "wk")

    def freeze(model: nn.Module) -> nn.Module:
        for name, p in model.named_parameters():
            p.requires_grad_(not any(word in name for word in frozen))
        return model

    whole = freeze(llama())
    backward(whole, batch())
    ref = ltp.full_gradients(whole)
    assert set(ref) == {n for n, p in whole.named_parameters() if p.requires_grad} and len(ref) == 14

    def body(dp: int) -> None:
        mesh = make_mesh("cpu", dp, 2)
        model = ltp.parallelize(freeze(llama()), mesh, PLAN)
        backward(model, batch(), mesh)
        assert_trees_close(ltp.full_gradients(model), ref, rtol=1e-9)
        assert {n for n, p in model.named_parameters() if p.requires_grad} == set(ref)

    run_ranks(body, 2, 1)
    run_ranks(body, 4, 2)


# ------------------------------------------------------------------------------------------------ a plan that is wrong


@pytest.mark.parametrize("mesh", [(1, 2), (2, 2)], ids=["tp2", "2x2"])
def test_a_share_that_the_plan_calls_whole_is_found(mesh: tuple[int, int]) -> None:
    def body() -> str:
        device_mesh = make_mesh("cpu", *mesh)
        plan = fused_plan(1, 2, **{"blocks.*.q_norm": Replicate(state="I")})
        model = ltp.parallelize(fused(dtype=torch.float32), device_mesh, plan)
        with pytest.raises(ltp.TPError) as info:
            backward(model, batch(), device_mesh)
        return str(info.value)

    for message in run_ranks(body, mesh[0] * mesh[1], timeout=60):
        assert message.startswith("`blocks.0.q_norm.weight` is replicated, but its gradient is not the same")
        assert "Replicate(state='R')" in message


@pytest.mark.parametrize("mesh", [(1, 2), (2, 2)], ids=["tp2", "2x2"])
def test_a_whole_gradient_that_the_plan_calls_a_share_is_found(mesh: tuple[int, int]) -> None:
    def body() -> str:
        device_mesh = make_mesh("cpu", *mesh)
        plan = fused_plan(1, 2, **{"blocks.*.norm": Replicate(state="R")})
        model = ltp.parallelize(fused(dtype=torch.float32), device_mesh, plan)
        with pytest.raises(ltp.TPError) as info:
            backward(model, batch(), device_mesh)
        return str(info.value)

    for message in run_ranks(body, mesh[0] * mesh[1], timeout=60):
        assert message.startswith("`blocks.0.norm.weight`: the plan says that its gradient is partial")
        assert "2 times too large" in message and "Replicate(state='I')" in message


@each_mesh
def test_what_the_plan_leaves_open_is_found_in_the_first_pass(mesh: tuple[int, int]) -> None:
    """Beside split layers, one norm stands before them and one between: the first has equal gradients, the second partial ones."""
    reference = fused()
    ref_loss = backward(reference, batch())
    ref = {n: p.grad for n, p in reference.named_parameters()}
    frozen = fused().requires_grad_(False)
    frozen.blocks[1].q_norm.requires_grad_(True)

    def body() -> None:
        device_mesh = make_mesh("cpu", *mesh)
        plan = {n: s for n, s in fused_plan(1, mesh[1]).items() if "norm" not in n} | {"**": "replicate"}
        for accumulate in (False, True):
            model = ltp.parallelize(fused(), device_mesh, plan)
            states = {n: p._tp_shard.split.state for n, p in model.named_parameters() if "norm" in n}
            assert set(states.values()) == {None}
            with no_sync(model) if accumulate else nullcontext():
                loss = backward(model, batch(), device_mesh)
            if accumulate:  # nothing is summed, so nothing is decided: the next pass does both
                assert {p._tp_shard.split.state for n, p in model.named_parameters() if "norm" in n} == {None}
                loss = backward(model, batch(), device_mesh)
            dist.all_reduce(loss, group=device_mesh.get_group(DATA_PARALLEL))
            torch.testing.assert_close(loss / mesh[0], ref_loss)
            states = {n: p._tp_shard.split.state for n, p in model.named_parameters() if "norm" in n}
            assert states == {n: R if "q_norm" in n else I for n in states}
            got = ltp.full_gradients(model)
            assert_trees_close(got, {n: g * (2 if accumulate else 1) for n, g in ref.items()}, rtol=1e-9)
        model = ltp.parallelize(copy.deepcopy(frozen), device_mesh, plan)  # only one of them has a gradient
        backward(model, batch(), device_mesh)
        assert_trees_close(ltp.full_gradients(model), {"blocks.1.q_norm.weight": ref["blocks.1.q_norm.weight"]}, rtol=1e-9)

    run_ranks(body, mesh[0] * mesh[1])


def test_a_gradient_of_zeros_decides_nothing() -> None:
    def body() -> None:
        device_mesh = make_mesh("cpu", 1, 2)
        plan = {n: s for n, s in fused_plan(1, 2).items() if "norm" not in n} | {"**": "replicate"}
        model = ltp.parallelize(fused(), device_mesh, plan)
        (model(batch()) * 0).sum().backward()
        assert model.blocks[0].q_norm.weight._tp_shard.split.state is None
        model.zero_grad()
        backward(model, batch(), device_mesh)
        assert model.blocks[0].q_norm.weight._tp_shard.split.state == R

    run_ranks(body, 2)


# ------------------------------------------------------------------------------------------------------------ optimizers

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, eps=1e-3),
    "AdamW, foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, eps=1e-3, foreach=True),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, lr=1e-2, eps=1e-3, fused=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-1, momentum=0.9, nesterov=True, weight_decay=0.1),
}


def steps(model: nn.Module, make: Callable[[Any], torch.optim.Optimizer], mesh: Any = None) -> dict[str, Tensor]:
    optimizer = make(model.parameters())
    for step in range(3):
        backward(model, batch(step), mesh)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    return ltp.full_state_dict(model)


@each_mesh
def test_optimizers_step_as_in_one_process(mesh: tuple[int, int]) -> None:
    tried = {n: make for n, make in OPTIMIZERS.items() if mesh != (1, 4) or n == "SGD"}
    refs = {name: steps(fused(), make) for name, make in tried.items()}

    def body() -> None:
        device_mesh = make_mesh("cpu", *mesh)
        for name, make in tried.items():
            model = ltp.parallelize(fused(), device_mesh, fused_plan(1, mesh[1]))
            assert_trees_close(steps(model, make, device_mesh), refs[name], rtol=1e-8, name=name)

    run_ranks(body, mesh[0] * mesh[1])


def test_adafactor_runs_and_keeps_replicas_equal() -> None:
    """On the tensor-parallel axis; torch's own can't step on FSDP2's shards (see test_strategy)."""
    mesh = (1, 2)

    def body() -> None:
        device_mesh = make_mesh("cpu", *mesh)
        model = ltp.parallelize(llama(dtype=torch.float32), device_mesh, PLAN)
        before = ltp.full_state_dict(model)
        optimizer = torch.optim.Adafactor(model.parameters(), lr=1e-2)
        losses = []
        for _ in range(5):
            losses.append(backward(model, batch(), device_mesh).item())
            optimizer.step()
            optimizer.zero_grad()
        assert losses[-1] < losses[0]
        after = ltp.full_state_dict(model)
        assert all(not torch.equal(after[n], t) for n, t in before.items())
        assert all(t.isfinite().all() for t in after.values())
        for name, p in model.named_parameters():
            if p._tp_shard.split.dim is None:
                group, mine = device_mesh.get_group(TENSOR_PARALLEL), local_tensor(p.detach())
                every = [torch.empty_like(mine) for _ in range(mesh[1])]
                dist.all_gather(every, mine, group=group)
                assert all(torch.equal(t, mine) for t in every), name

    run_ranks(body, mesh[0] * mesh[1])


@each_mesh
def test_bfloat16_parameters(mesh: tuple[int, int]) -> None:
    """As far from float64 as one process in bfloat16 is, give or take a half."""
    exact, rounded = llama(), llama(dtype=torch.bfloat16)
    exact.load_state_dict(rounded.state_dict())
    loss = backward(exact, batch()).item()
    backward(rounded, batch())
    ref = ltp.full_gradients(exact)

    def off(gradients: dict[str, Tensor]) -> dict[str, float]:
        return {n: ((g.double() - ref[n]).norm() / ref[n].norm()).item() for n, g in gradients.items() if ".wk.bias" not in n}

    single = off(ltp.full_gradients(rounded))

    def body() -> None:
        device_mesh = make_mesh("cpu", *mesh)
        model = ltp.parallelize(llama(dtype=torch.bfloat16), device_mesh, PLAN)
        assert backward(model, batch(), device_mesh).item() == pytest.approx(loss, rel=0.05)
        gradients = ltp.full_gradients(model)
        assert all(g.dtype == torch.bfloat16 for g in gradients.values())
        for name, error in off(gradients).items():
            assert error < 1.5 * single[name] + 0.01, name
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
        ltp.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        assert all(p.dtype == torch.bfloat16 for p in model.parameters())

    run_ranks(body, mesh[0] * mesh[1])


# ---------------------------------------------------------------------------------------------------- whole over all ranks


def test_gradients_of_a_model_with_rules_of_other_kinds() -> None:
    """Column-wise with gathered output, row-wise on whole input, an embedding split by its width."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(VOCAB, DIM)
            self.blocks = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(2))
            self.extra = nn.Parameter(torch.zeros(DIM))
            self.head = nn.Linear(DIM, VOCAB)

        def forward(self, tokens: Tensor) -> Tensor:
            x = self.embed(tokens) + self.extra
            return self.head(self.blocks[1](F.gelu(self.blocks[0](x))))

    plan = {
        "embed": Colwise(output="I"),
        "blocks.0": Colwise(output="I"),
        "blocks.1": Rowwise(input="I"),
        "head": Colwise(output="I"),
        "**": "replicate",
    }
    build = lambda: randomize_(Net().double())  # noqa: E731
    whole = build()
    backward(whole, batch())
    ref = ltp.full_gradients(whole)

    def body(dp: int) -> None:
        mesh = make_mesh("cpu", dp, 2)
        model = ltp.parallelize(build(), mesh, plan)
        backward(model, batch(), mesh)
        assert_trees_close(ltp.full_gradients(model), ref, rtol=1e-9)

    run_ranks(body, 2, 1)
    run_ranks(body, 4, 2)
