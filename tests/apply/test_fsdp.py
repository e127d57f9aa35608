"""Which modules are blocks, which are FSDP2's units, in what precision they run, and when shards are let go."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

import lightning_tp as ltp
from examples.llama import PLAN, Llama, LlamaConfig
from lightning_tp.apply.fsdp import apply_fsdp
from lightning_tp.core.comm.mesh import make_mesh
from lightning_tp.core.modules.blocks import find_blocks
from lightning_tp.shards.view import local_view
from lightning_tp.testing import run_ranks


class MLP(nn.Module):
    def __init__(self, width: int, hidden: int = 8) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).relu())


class Experts(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.router = nn.Linear(width, 4)
        self.experts = nn.ModuleList(MLP(width) for _ in range(4))


def named(**children: Any) -> nn.Module:
    """A module with these children."""
    module = nn.Module()
    for name, child in children.items():
        module.add_module(name, child)
    return module


def model_like(kind: str) -> nn.Module:
    def stage(width: int, depth: int) -> nn.Module:
        return named(down=nn.Linear(4, width), blocks=nn.ModuleList(MLP(width) for _ in range(depth)))

    models = {
        "llama": lambda: Llama(LlamaConfig(num_layers=3)),
        "gpt": lambda: named(transformer=nn.ModuleDict({"wte": nn.Embedding(4, 4), "h": nn.ModuleList([MLP(4), MLP(4)])})),
        "experts": lambda: named(layers=nn.ModuleList([Experts(4), Experts(4)]), head=nn.Linear(4, 4)),
        "swin": lambda: named(stages=nn.Sequential(stage(4, 2), stage(8, 3), stage(16, 1))),
        "encoder-decoder": lambda: named(
            encoder=nn.ModuleList([MLP(4), MLP(4)]), decoder=nn.ModuleList([MLP(4, 16), MLP(4, 16), MLP(4, 16)])
        ),
        "alternating": lambda: nn.Sequential(MLP(4), Experts(4), MLP(4), Experts(4), nn.LayerNorm(4)),
        "other shapes": lambda: nn.ModuleList([MLP(4), MLP(4, 16)]),
        "one block": lambda: named(layers=nn.ModuleList([named(up=nn.Linear(4, 8), down=nn.Linear(8, 4))])),
        "dictionary": lambda: nn.ModuleDict({"first": MLP(4), "second": MLP(4), "act": nn.ReLU()}),
        "no parameters": lambda: nn.Sequential(nn.ReLU(), nn.ReLU()),
        "bare": lambda: nn.Linear(2, 2),
    }
    return models[kind]()


@pytest.mark.parametrize(
    "kind, blocks",
    [
        ("llama", ["layers.0", "layers.1", "layers.2"]),
        ("gpt", ["transformer.h.0", "transformer.h.1"]),
        ("experts", ["layers.0", "layers.1"]),
        ("swin", ["stages.0.blocks.0", "stages.0.blocks.1", "stages.1.blocks.0", "stages.1.blocks.1", "stages.1.blocks.2"]),
        ("encoder-decoder", ["encoder.0", "encoder.1", "decoder.0", "decoder.1", "decoder.2"]),
        ("alternating", ["0", "1", "2", "3"]),
        ("other shapes", []),
        ("one block", []),
        ("dictionary", ["first", "second"]),
        ("no parameters", []),
        ("bare", []),
    ],
)
def test_blocks_are_the_outermost_repeated_modules(kind: str, blocks: list[str]) -> None:
    model = model_like(kind)
    found = find_blocks(model)
    assert [name for name, _ in found] == blocks
    assert all(model.get_submodule(name) is module for name, module in found)


def test_blocks_inside_another_module() -> None:
    assert [name for name, _ in find_blocks(named(model=model_like("llama")))] == [f"model.layers.{i}" for i in range(3)]


def units(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, FSDPModule)]


@pytest.mark.parametrize("mesh", [(2, 1), (2, 2)], ids=["dp2", "2x2"])
def test_units_are_the_blocks_and_the_root(mesh: tuple[int, int]) -> None:
    def body() -> None:
        model = ltp.parallelize(Llama(LlamaConfig(num_layers=2)), make_mesh("cpu", *mesh), PLAN)
        assert units(model) == ["", "layers.0", "layers.1"]
        assert all(isinstance(p, DTensor) for p in model.parameters())
        outer = named(model=Llama(LlamaConfig(num_layers=2)))
        ltp.parallelize(outer, make_mesh("cpu", *mesh), PLAN, fsdp_root=outer.model)
        assert units(outer) == ["model", "model.layers.0", "model.layers.1"]

    run_ranks(body, mesh[0] * mesh[1])


def test_no_units_without_a_data_parallel_axis() -> None:
    def body() -> None:
        model = ltp.parallelize(Llama(LlamaConfig(num_layers=2)), make_mesh("cpu", 1, 2), PLAN)
        assert units(model) == []
        assert not any(isinstance(p, DTensor) for p in model.parameters())

    run_ranks(body, 2)


def test_a_block_that_shares_a_weight_with_something_outside_is_no_unit() -> None:
    """FSDP2 would gather it for the one and let it go under the other."""

    def body() -> list[str]:
        blocks, head = nn.ModuleList(MLP(4) for _ in range(4)), nn.Linear(8, 4)
        head.weight = blocks[0].down.weight  # with something outside
        blocks[1].down.weight = blocks[2].down.weight  # with each other
        blocks[3].up.bias = blocks[3].up.extra = nn.Parameter(torch.zeros(8))  # inside: no matter
        model = named(blocks=blocks, head=head)
        apply_fsdp(model, list(blocks), init_device_mesh("cpu", (2,)))
        assert head.weight is blocks[0].down.weight
        return units(model)

    assert run_ranks(body, 2)[0] == ["", "blocks.3"]


def test_precision_of_a_policy() -> None:
    """Computed in bfloat16, kept and summed in float32."""
    seen: dict[str, torch.dtype] = {}

    def body() -> None:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.float32)
        model = ltp.parallelize(Llama(LlamaConfig(num_layers=2)), make_mesh("cpu", 2, 2), PLAN, precision=policy)
        for name in ("layers.0.attention.wq", "layers.1.feed_forward.w2", "output"):
            with local_view():  # of the split model's own modules
                model.get_submodule(name).register_forward_hook(
                    lambda module, inputs, out, name=name: seen.update({name: module.weight.dtype})
                )
        with torch.autocast("cpu", torch.bfloat16):
            out = model(torch.zeros(2, 8, dtype=torch.long))
        assert len(seen) == 3 and set(seen.values()) == {torch.bfloat16}
        assert out.dtype == torch.float32
        out.sum().backward()
        assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())

    run_ranks(body, 4)


def test_when_shards_are_let_go() -> None:
    """Blocks right after their forward; what the root holds only after the backward, which begins with it."""

    def sharded(model: nn.Module) -> dict[str, bool]:
        names = {"block": "layers.0.attention.wq.weight", "last block": "layers.1.ffn_norm.weight", "root": "output.weight"}
        # the parameters that a module would compute with now
        return {k: isinstance(dict(model.named_parameters())[n], DTensor) for k, n in names.items()}

    def body() -> None:
        model = ltp.parallelize(Llama(LlamaConfig(num_layers=2)), make_mesh("cpu", 2, 2), PLAN)
        assert all(sharded(model).values())
        loss = model(torch.zeros(2, 8, dtype=torch.long)).sum()
        assert sharded(model) == {"block": True, "last block": True, "root": False}
        loss.backward()
        assert all(sharded(model).values())
        for p in model.parameters():
            assert p.grad is not None and p.grad.placements == p.placements and p.grad.device_mesh.size() == 2
        assert dist.get_world_size() == 4

    run_ranks(body, 4)
