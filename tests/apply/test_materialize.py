"""Models built on the meta device get the weights of an ordinary construction, on any mesh."""

from __future__ import annotations

import re
from collections.abc import Callable
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
from lightning_tp.testing import run_ranks

MESHES = {"tp2": (1, 2), "tp4": (1, 4), "2x2": (2, 2)}
each_mesh = pytest.mark.parametrize("mesh", MESHES.values(), ids=list(MESHES))
CONFIG = dict(vocab_size=103, dim=64, num_layers=2, num_heads=8, hidden_dim=90, bias=True)


def llama(**other: Any) -> Llama:
    torch.manual_seed(4)
    return Llama(LlamaConfig(**{**CONFIG, **other}))


def assert_equal(got: dict[str, Tensor], ref: dict[str, Tensor]) -> None:
    assert list(got) == list(ref)
    for name, t in ref.items():
        assert torch.equal(got[name], t) and got[name].dtype == t.dtype, name


def memory(model: nn.Module) -> int:
    return sum(local_tensor(p).untyped_storage().nbytes() for p in model.parameters())


@each_mesh
@pytest.mark.parametrize("other", [dict(num_kv_heads=1), dict(tied=True)], ids=["1 kv head", "tied"])
def test_weights_of_an_ordinary_construction(other: dict[str, Any], mesh: tuple[int, int]) -> None:
    ref, rope = dict(llama(**other).state_dict()), llama(**other).rope

    def body() -> None:
        device_mesh = make_mesh("cpu", *mesh)
        with ltp.init_on_meta():
            model = llama(**other)
        assert all(t.is_meta for t in (*model.parameters(), model.rope))
        ltp.parallelize(model, device_mesh, PLAN)
        assert not any(t.is_meta for t in (*model.parameters(), model.rope))
        assert_equal(ltp.full_state_dict(model), ref)
        assert torch.equal(model.rope, rope)
        assert (model.output.weight is model.tok_embeddings.weight) == other.get("tied", False)
        again = ltp.parallelize(llama(**other), device_mesh, PLAN)
        for (name, a), (_, b) in zip(model.named_parameters(), again.named_parameters()):
            assert type(a) is type(b) and torch.equal(local_tensor(a), local_tensor(b)), name
        # and it trains: shares of gradients are summed, the state dict is there
        tokens = torch.randint(0, 103, (2, 9), generator=torch.Generator().manual_seed(0))
        tokens = tokens.chunk(mesh[0])[device_mesh.get_local_rank(DATA_PARALLEL)]
        for m in (model, again):
            F.cross_entropy(m(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
        assert_equal(ltp.full_gradients(model), ltp.full_gradients(again))
        assert_equal(ltp.full_state_dict(model), ref)

    run_ranks(body, mesh[0] * mesh[1])


@pytest.mark.parametrize("mesh", [(1, 2), (2, 2)], ids=["tp2", "2x2"])
def test_ranks_seeded_differently_get_the_weights_of_the_first(mesh: tuple[int, int]) -> None:
    def body() -> dict[str, Tensor]:
        device_mesh = make_mesh("cpu", *mesh)
        torch.manual_seed(dist.get_rank())
        with ltp.init_on_meta():
            model = Llama(LlamaConfig(**CONFIG, num_kv_heads=1))
            model.norm.weight = nn.Parameter(torch.randn(64))
        ltp.parallelize(model, device_mesh, PLAN)
        group = device_mesh.get_group(TENSOR_PARALLEL)
        for name in ("norm.weight", "layers.0.attention.wk.weight"):  # whole on all, and shared
            mine = local_tensor(model.get_parameter(name).detach())
            every = [torch.empty_like(mine) for _ in range(group.size())]
            dist.all_gather(every, mine, group=group)
            assert all(torch.equal(t, mine) for t in every), name
        return ltp.full_state_dict(model)

    torch.manual_seed(0)
    ref = Llama(LlamaConfig(**CONFIG, num_kv_heads=1))
    ref.norm.weight = nn.Parameter(torch.randn(64))
    for weights in run_ranks(body, mesh[0] * mesh[1]):
        assert_equal(weights, dict(ref.state_dict()))


def test_no_rank_holds_the_whole_model() -> None:
    def body() -> None:
        with ltp.init_on_meta():
            model = llama(num_kv_heads=4)
        whole = sum(p.numel() * 4 for p in model.parameters())
        ltp.parallelize(model, make_mesh("cpu", 1, 4), PLAN)
        assert memory(model) < 0.3 * whole

    run_ranks(body, 4)


def test_several_models_at_once() -> None:
    """Built one after the other, and split in another order. Building on meta leaves the random state as it was."""
    refs = [dict(llama(num_kv_heads=k).state_dict()) for k in (1, 4)]

    def body() -> None:
        mesh = make_mesh("cpu", 1, 2)
        models = []
        for k in (1, 4):
            with ltp.init_on_meta():
                models.append(llama(num_kv_heads=k))
        for model, ref in list(zip(models, refs))[::-1]:
            assert_equal(ltp.full_state_dict(ltp.parallelize(model, mesh, PLAN)), ref)

    run_ranks(body, 2)


def test_a_model_of_which_only_a_part_is_on_meta() -> None:
    """A pretrained body, and a new head."""
    torch.manual_seed(0)
    head = nn.Linear(64, 103, bias=False)
    ref = {**dict(llama().state_dict()), "output.weight": head.weight.detach()}

    def body() -> None:
        model = llama()
        torch.manual_seed(0)
        with ltp.init_on_meta():
            model.output = nn.Linear(64, 103, bias=False)
        if dist.get_rank() == 1:
            model.norm.weight.data += 1  # what is real already is made equal, as ever
        ltp.parallelize(model, make_mesh("cpu", 1, 2), PLAN)
        assert_equal(ltp.full_state_dict(model), ref)

    run_ranks(body, 2)


# ---------------------------------------------------------------------------------- on meta, and nobody knows from where


class Scaled(nn.Module):
    """A weight, a whole vector and a buffer, and how to initialize them."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.empty(8))
        self.register_buffer("steps", torch.empty(3))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.shift)
        nn.init.constant_(self.steps, 2.0)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift * self.steps[0]


def small() -> nn.Module:
    return nn.Sequential(nn.Embedding(11, 8), nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8), Scaled(), nn.Linear(8, 11))


SMALL = {"0": "vocab_embedding", "1": "replicate", "2": "colwise", "3": "rowwise", "4": "replicate", "5": "vocab_head"}


def test_reset_parameters_gives_the_same_on_any_mesh() -> None:
    def body(*mesh: int) -> dict[str, Tensor]:
        torch.manual_seed(7)
        with torch.device("meta"):
            model = small()
        before = torch.get_rng_state()
        ltp.parallelize(model, make_mesh("cpu", *mesh), SMALL)
        assert torch.equal(torch.get_rng_state(), before)
        assert model(torch.zeros(1, 4, dtype=torch.long)).isfinite().all()
        return ltp.full_state_dict(model)

    ref, *others = [w for mesh in ((1, 1), (1, 2), (2, 1), (1, 4), (2, 2)) for w in run_ranks(body, mesh[0] * mesh[1], *mesh)]
    for weights in others:
        assert_equal(weights, ref)
    assert torch.equal(ref["4.steps"], torch.full((3,), 2.0)) and torch.equal(ref["1.weight"], torch.ones(8))
    assert ref["2.weight"].std() > 0.1 and ref["4.shift"].std() > 0.1 and ref["0.weight"].std() > 0.5


def test_modules_that_cannot_be_initialized_are_named() -> None:
    def no_reset(make: Callable[[], nn.Module]) -> str:
        def body() -> str:
            with torch.device("meta"):
                model = make()
            with pytest.raises(ltp.TPError) as info:
                ltp.parallelize(model, make_mesh("cpu", 1, 2), {"0": "colwise", "1": "rowwise", "**": "replicate"})
            assert model[0].weight.shape == (16, 8)  # nothing is changed
            return str(info.value)

        return run_ranks(body, 2)[0]

    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(8))

    message = no_reset(lambda: nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8), Bare()))
    assert re.match(r"1 modules are on the meta device .* `2` \(Bare\) have no `reset_parameters`", message)
    assert "init_on_meta" in message


def test_the_dtensor_backend_takes_no_model_on_meta() -> None:
    def body() -> None:
        with ltp.init_on_meta():
            model = llama()
        with pytest.raises(ltp.TPError, match="stays there"):
            ltp.parallelize(model, make_mesh("cpu", 1, 2), PLAN, backend="dtensor")

    run_ranks(body, 2)
