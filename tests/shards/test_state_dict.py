"""State dicts of a split model: whole tensors and DTensors, there and back, on any mesh; the same for an optimizer's state."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import lightning_tp as ltp
from lightning_tp._compat import is_in_pieces, pieces_of_dtensor
from lightning_tp.core.comm.mesh import DATA_PARALLEL, TENSOR_PARALLEL, make_mesh
from lightning_tp.shards import optimizer_state
from lightning_tp.styles import FusedColwise, PrepareInput
from lightning_tp.testing import assert_trees_close, randomize_, run_ranks

DIM, HEAD_DIM, VOCAB, HIDDEN = 48, 8, 83, 45  # 83 words and 45 features cut evenly over nothing
MESHES = {"tp2": (1, 2), "dp2": (2, 1), "2x2": (2, 2), "tp4": (1, 4)}
each_mesh = pytest.mark.parametrize("mesh", MESHES.values(), ids=list(MESHES))


class Block(nn.Module):
    """Fused q, k, v with one key/value head for 4 query heads; fused gate and up."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(DIM)
        self.qkv = nn.Linear(DIM, 6 * HEAD_DIM)
        self.out = nn.Linear(4 * HEAD_DIM, DIM)
        self.gate_up = nn.Linear(DIM, 2 * HIDDEN)
        self.down = nn.Linear(HIDDEN, DIM)
        self.up = nn.Linear(DIM, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.qkv(self.norm(x)).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)
        q, k, v = y.split([y.shape[1] - 2, 1, 1], 1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(x).chunk(2, -1)
        return x + self.down(F.silu(gate) * up * self.up(x))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, DIM)
        self.register_buffer("scale", torch.tensor(1.5))
        self.register_buffer("table", torch.arange(3.0), persistent=False)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm = nn.LayerNorm(DIM)
        self.norm.bias.requires_grad_(False)
        self.head = nn.Linear(DIM, VOCAB, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) * self.scale
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


PLAN: dict[str, Any] = {
    "embed": "vocab_embedding",
    "blocks.*": PrepareInput(arrives="I", wanted="I"),
    "blocks.*.norm": "replicate",
    "blocks.*.qkv": FusedColwise(parts=(4 * HEAD_DIM, HEAD_DIM, HEAD_DIM), heads=(4, 1, 1)),
    "blocks.*.out": "rowwise",
    "blocks.*.gate_up": FusedColwise(parts=2),
    "blocks.*.up": "colwise",
    "blocks.*.down": "rowwise",
    "norm": "replicate",
    "head": "vocab_head",
}


def build(seed: int = 0) -> Net:
    return randomize_(Net(), seed)


def split(mesh: Any, seed: int = 0) -> nn.Module:
    return ltp.parallelize(build(seed), mesh, PLAN)


def backward(model: nn.Module, mesh: Any = None, seed: int = 0) -> None:
    tokens = torch.randint(0, VOCAB, (4, 9), generator=torch.Generator().manual_seed(seed))
    if mesh is not None:
        tokens = tokens.chunk(mesh[DATA_PARALLEL].size())[mesh.get_local_rank(DATA_PARALLEL)]
    F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()


def on(mesh: tuple[int, int], body: Callable[[Any], Any]) -> list[Any]:
    return run_ranks(lambda: body(make_mesh("cpu", *mesh)), mesh[0] * mesh[1])


def assert_equal(got: dict[str, Any], ref: dict[str, Any]) -> None:
    assert list(got) == list(ref)
    for name, t in ref.items():
        assert type(got[name]) is type(t) and torch.equal(got[name], t) and got[name].dtype == t.dtype, name


# ------------------------------------------------------------------------------------------------------- whole tensors


@each_mesh
def test_full_state_dict_is_that_of_the_whole_model(mesh: tuple[int, int]) -> None:
    ref = build().state_dict()

    def body(device_mesh: Any) -> None:
        model = split(device_mesh)
        whole = ltp.full_state_dict(model)
        assert_equal(whole, ref)
        assert whole["embed.weight"] is whole["head.weight"]
        assert "table" not in whole
        build().load_state_dict(whole)
        assert_equal(ltp.full_state_dict(nn.ModuleDict({"model": model})), {f"model.{n}": t for n, t in ref.items()})

    on(mesh, body)


@each_mesh
def test_full_gradients_are_those_of_the_whole_model(mesh: tuple[int, int]) -> None:
    whole = build()
    backward(whole)
    ref = ltp.full_gradients(whole)
    assert set(ref) == {n for n, p in whole.named_parameters(remove_duplicate=False) if n != "norm.bias"}
    assert ref["head.weight"] is ref["embed.weight"]

    def body(device_mesh: Any) -> None:
        model = split(device_mesh)
        assert ltp.full_gradients(model) == {}
        backward(model, device_mesh)
        gradients = ltp.full_gradients(model)
        assert list(gradients) == list(ref)
        assert gradients["head.weight"] is gradients["embed.weight"]
        assert_trees_close(gradients, ref, rtol=1e-4)

    on(mesh, body)


@pytest.mark.parametrize("outer", [False, True], ids=["", "inside another module"])
def test_after_a_forward_without_backward(outer: bool) -> None:
    """FSDP2 leaves the root's parameters whole then; neither reading nor writing may be fooled."""
    ref, other = dict(build().state_dict()), dict(build(1).state_dict())

    def body(device_mesh: Any) -> None:
        module = nn.ModuleDict({"model": build()})
        prefix = "model." if outer else ""
        target = module if outer else module["model"]
        ltp.parallelize(target, device_mesh, {f"{prefix}{n}": s for n, s in PLAN.items()}, fsdp_root=module["model"])
        tokens = torch.arange(8).view(2, 4)
        renamed = lambda tree: {f"{prefix}{n}": t for n, t in tree.items()}  # noqa: E731
        for weights, after in ((ref, other), (other, ref)):
            module["model"](tokens)
            assert_equal(ltp.full_state_dict(target), renamed(weights))
            module["model"](tokens)
            assert all(isinstance(t, DTensor) for n, t in target.state_dict().items() if "scale" not in n)
            module["model"](tokens)
            target.load_state_dict(renamed(after))
            assert_equal(ltp.full_state_dict(target), renamed(after))

    on((2, 2), body)


def test_what_is_not_split_is_there_as_it_is() -> None:
    layer = nn.BatchNorm1d(3)
    assert_equal(ltp.full_state_dict(layer), dict(layer.state_dict()))
    assert ltp.full_state_dict(layer)["weight"].data_ptr() != layer.weight.data_ptr()


def test_integers_scalars_and_other_dtypes() -> None:
    """A parameter without a dim (tensor-parallel only: FSDP2 takes none), one of integers, one in bfloat16."""

    def build() -> nn.Module:
        model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))
        model[0].temperature = nn.Parameter(torch.tensor(0.5))
        model[0].counts = nn.Parameter(torch.arange(3), requires_grad=False)
        model[1].rounded = nn.Parameter(torch.arange(3).bfloat16())
        return randomize_(model)

    plan = {"0": "colwise", "1": "rowwise", "0.temperature": "replicate", "0.counts": "replicate", "1.rounded": "replicate"}
    ref = dict(build().state_dict())

    def body(mesh: Any) -> None:
        model = ltp.parallelize(build(), mesh, plan)
        assert_equal(ltp.full_state_dict(model), ref)
        state = model.state_dict()
        assert state["0.temperature"].shape == () and state["0.counts"].dtype == torch.int64
        assert torch.equal(state["0.temperature"].full_tensor(), ref["0.temperature"])
        model.load_state_dict(ref)
        model.load_state_dict(state)
        assert_equal(ltp.full_state_dict(model), ref)

    on((1, 2), body)


# ------------------------------------------------------------------------------------------------------------ DTensors


@each_mesh
def test_state_dict_shows_dtensors_over_the_mesh(mesh: tuple[int, int]) -> None:
    ref = build().state_dict()

    def body(device_mesh: Any) -> dict[str, Any]:
        model = split(device_mesh)
        state = model.state_dict()
        assert list(state) == list(ref)
        assert type(state["scale"]) is Tensor
        gathered = 0
        for name, p in model.named_parameters(remove_duplicate=False):
            value, whole = state[name], ref[name]
            assert isinstance(value, DTensor) and value.device_mesh == device_mesh and not value.requires_grad
            assert value.shape == whole.shape and value.stride() == whole.stride() and value.dtype == whole.dtype
            for offset, box in pieces_of_dtensor(value):
                there = whole[tuple(slice(o, o + n) for o, n in zip(offset, box.shape))]
                assert torch.equal(there, box), name
            if p._tp_shard.placements() is not None:
                assert torch.equal(value.full_tensor(), whole), name
                gathered += 1
        assert gathered >= 10
        return {n: [(o, tuple(b.shape)) for o, b in pieces_of_dtensor(state[n])] for n in ref if n != "scale"}

    held = on(mesh, body)
    for name in held[0]:  # the ranks together hold every element
        covered = torch.zeros(ref[name].shape, dtype=torch.bool)
        for pieces in held:
            for offset, shape in pieces[name]:
                covered[tuple(slice(o, o + n) for o, n in zip(offset, shape))] = True
        assert covered.all(), name


@each_mesh
def test_loading_whole_tensors_and_dtensors(mesh: tuple[int, int]) -> None:
    ref, other = dict(build().state_dict()), dict(build(1).state_dict())

    def body(device_mesh: Any) -> None:
        model = split(device_mesh)
        parameters = list(model.parameters())
        model.load_state_dict(other)
        assert_equal(ltp.full_state_dict(model), other)
        model.load_state_dict(split(device_mesh).state_dict())
        assert_equal(ltp.full_state_dict(model), ref)
        assert all(p is q for p, q in zip(parameters, model.parameters()))
        backward(model, device_mesh)  # and it still runs
        outer = nn.ModuleDict({"model": model})
        outer.load_state_dict({f"model.{n}": t for n, t in other.items()})
        assert_equal(ltp.full_state_dict(model), other)
        missing = model.load_state_dict({"norm.weight": ref["norm.weight"]}, strict=False).missing_keys
        assert len(missing) == len(ref) - 1 and "norm.weight" not in missing
        assert_equal(ltp.full_state_dict(model), {**other, "norm.weight": ref["norm.weight"]})
        with pytest.raises(RuntimeError, match="Missing key"):
            model.load_state_dict({})

    on(mesh, body)


@pytest.mark.parametrize("mesh", [(1, 2), (2, 2)], ids=["tp2", "2x2"])
def test_loading_a_wrong_shape(mesh: tuple[int, int]) -> None:
    """Above all that of one rank's shard, saved by somebody who took it for the whole."""

    def body(device_mesh: Any) -> str:
        model = split(device_mesh)
        state = build().state_dict()
        state["blocks.1.up.weight"] = state["blocks.1.up.weight"][:23]
        with pytest.raises(ltp.TPError) as info:
            model.load_state_dict(state)
        return str(info.value)

    for message in on(mesh, body):
        assert message.startswith("`blocks.1.up.weight`: the checkpoint has the shape (23, 48), the model (45, 48).")


def test_loading_dtensors_of_another_mesh() -> None:
    """What torch has placements for is gathered, and by all ranks or by none: some hold by chance what they need."""
    ref = dict(build().state_dict())

    def body() -> None:
        meshes = [make_mesh("cpu", *mesh) for mesh in ((1, 4), (2, 2), (4, 1))]
        for of in meshes:
            state = split(of).state_dict()
            for to in meshes:
                model = split(to, seed=1)
                plain = {n: t for n, t in state.items() if not isinstance(t, DTensor) or not is_in_pieces(t)}
                model.load_state_dict(plain, strict=False)
                whole = ltp.full_state_dict(model)
                assert_equal({n: whole[n] for n in plain}, {n: ref[n] for n in plain})
                if of is not to and len(plain) < len(state):
                    with pytest.raises(ltp.TPError, match="in pieces of another plan or mesh"):
                        model.load_state_dict(state)

    run_ranks(body, 4)


@pytest.mark.parametrize("source", [m if m in ("tp2", "2x2") else pytest.param(m, marks=pytest.mark.slow) for m in MESHES])
def test_distributed_checkpoint_on_every_mesh(source: str, tmp_path: Path) -> None:
    """Weights and the state of AdamW after two steps, written on one mesh and read on each."""
    target = lambda model: torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)  # noqa: E731

    def write(mesh: Any) -> tuple[Any, Any]:
        model = split(mesh, seed=1)
        optimizer = target(model)
        for step in range(2):
            backward(model, mesh, step)
            optimizer.step()
            optimizer.zero_grad()
        dcp.save({"model": model.state_dict(), "optimizer": optimizer_state.optimizer_state(optimizer)}, checkpoint_id=tmp_path)
        return ltp.full_state_dict(model), optimizer_state.full_optimizer_state(optimizer)

    weights, states = on(MESHES[source], write)[0]
    assert set(states["state"]) == {n for n, p in build().named_parameters() if p.requires_grad}
    assert all(states["state"][n]["exp_avg"].shape == weights[n].shape for n in states["state"])

    def read(mesh: Any) -> None:
        model = split(mesh)
        optimizer = target(model)
        for p in model.parameters():
            p.grad = torch.zeros_like(p) if p.requires_grad else None
        optimizer.step()  # so that there is a state to read into
        optimizer.zero_grad()
        state = {"model": model.state_dict(), "optimizer": optimizer_state.optimizer_state(optimizer)}
        dcp.load(state, checkpoint_id=tmp_path)
        model.load_state_dict(state["model"])
        optimizer_state.load_optimizer_state(optimizer, state["optimizer"])
        assert_equal(ltp.full_state_dict(model), weights)
        loaded = optimizer_state.full_optimizer_state(optimizer)
        for name, of in states["state"].items():
            assert_equal(loaded["state"][name], of)
        backward(model, mesh)  # goes on
        optimizer.step()

    for world in (2, 4):

        def reads(meshes: list[tuple[int, int]]) -> None:
            for mesh in meshes:
                read(make_mesh("cpu", *mesh))

        run_ranks(reads, world, [mesh for mesh in MESHES.values() if mesh[0] * mesh[1] == world])


# ---------------------------------------------------------------------------------------------------------- optimizers


def test_collectives_of_whole_tensors_are_few() -> None:
    """One all-gather a split parameter, and none for a whole one."""
    from torch.distributed.tensor.debug import CommDebugMode

    def body(mesh: Any) -> None:
        model = split(mesh)
        with CommDebugMode() as comm:
            ltp.full_state_dict(model)
        split_ones = sum(p._tp_shard.split.dim is not None for p in model.parameters())
        assert comm.get_total_counts() == split_ones
        with CommDebugMode() as comm:
            model.state_dict()
        assert comm.get_total_counts() == 0
        assert mesh.get_group(TENSOR_PARALLEL).size() == dist.get_world_size()

    on((1, 2), body)
