"""`FabricTPStrategy` in real processes, a loop of the user's own, against the same loop in one process."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.fabric import Fabric
from lightning.fabric.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

import lightning_tp as ltp
from examples.llama import PLAN, Llama, LlamaConfig
from lightning_tp import errors
from lightning_tp.testing import assert_trees_close, randomize_, run_ranks
from lightning_tp.trainer.adapt.precision import MeshGradScaler
from tests.device import ON

CONFIG = LlamaConfig(vocab_size=103, dim=64, num_layers=2, num_heads=8, num_kv_heads=4, hidden_dim=90, max_seq_len=32, bias=True)
TP2, MESH_2X2 = (1, 2), (2, 2)
both = pytest.mark.parametrize("mesh", [pytest.param(TP2, id="tp2"), pytest.param(MESH_2X2, id="2x2", marks=pytest.mark.slow)])
INPUTS = (torch.zeros(2, 12, dtype=torch.long),)


def build() -> Llama:
    return randomize_(Llama(CONFIG))


class Net(L.LightningModule):
    """Fabric takes LightningModules, too: their steps are called as methods."""

    def __init__(self) -> None:
        super().__init__()
        self.model = build()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens)

    def training_step(self, tokens: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.model(tokens).flatten(0, 1), targets.flatten())


def fabric_of(mesh: tuple[int, int] | None, precision: Any = None, plugins: Any = None, **options: Any) -> Fabric:
    world = int(os.environ["WORLD_SIZE"])
    if mesh is None:
        strategy: Any = "auto"
    else:
        options = {"inputs": INPUTS, **options} if "plan" not in options else options
        strategy = ltp.FabricTPStrategy(tp=mesh[1], **options)
    fabric = Fabric(accelerator="cpu", devices=world, strategy=strategy, precision=precision, plugins=plugins)
    fabric.launch()
    return fabric


def optimizer_of(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3, **options)


def loader(fabric: Fabric, dp: int = 1) -> Any:
    return fabric.setup_dataloaders(DataLoader(ltp.RandomTokens(12, 12, 103, seed=0), batch_size=4 // dp))


def loop(
    fabric: Fabric, model: Any, optimizer: Any, dp: int = 1, clip: dict[str, float] | None = None, accumulate: int = 1
) -> list[float]:
    """One epoch of three batches; what it sees on the way, losses and norms."""
    seen: list[float] = []
    for i, batch in enumerate(loader(fabric, dp)):
        last = (i + 1) % accumulate == 0
        with fabric.no_backward_sync(model, enabled=not last):
            if isinstance(model.module, Net):
                loss = model.training_step(batch["tokens"], batch["targets"])
            else:
                loss = F.cross_entropy(model(batch["tokens"]).flatten(0, 1), batch["targets"].flatten())
            fabric.backward(loss)
        seen.append(float(fabric.all_reduce(loss.detach().clone())))
        if last:
            if clip is not None:
                norm = fabric.clip_gradients(model, optimizer, **clip)
                seen += [float(norm)] if norm is not None else []
            optimizer.step()
            optimizer.zero_grad()
    return seen


Result = tuple[list[float], dict[str, Tensor]]


def train(mesh: tuple[int, int] | None, make: Callable[[], nn.Module] = build, joint: bool = True, **options: Any) -> Result:
    of_loop = {name: options.pop(name) for name in ("clip", "accumulate") if name in options}
    fabric = fabric_of(mesh, **options)
    model = make()
    if joint:
        model, optimizer = fabric.setup(model, optimizer_of(model))
    else:
        model = fabric.setup_module(model)
        optimizer = fabric.setup_optimizers(optimizer_of(model))
    seen = loop(fabric, model, optimizer, mesh[0] if mesh else 1, **of_loop)
    return seen, ltp.full_state_dict(model.module)


def on(world: int, body: Callable[[], Any]) -> list[Any]:
    return run_ranks(body, world, init=False, timeout=100)


def assert_same(results: list[Result], ref: Result, rtol: float = 1e-4, what: str = "") -> None:
    for seen, weights in results:
        assert seen == pytest.approx(ref[0], rel=rtol), what
        assert_trees_close(weights, ref[1], rtol=rtol, name=what)


# ----------------------------------------------------------------------------------------------------------------- train


@both
def test_loops_as_in_one_process(mesh: tuple[int, int]) -> None:
    cases: dict[str, dict[str, Any]] = {
        "inferred": {},
        "given": {"plan": PLAN, "joint": False},
        "module with steps": {"make": Net},
        "clipped by norm": {"clip": {"max_norm": 0.3}},
        "clipped by value": {"clip": {"clip_val": 0.01}},
        "accumulated": {"accumulate": 3},
        "64-true": {"precision": "64-true"},
        "compiled": {"compile": "aot_eager"},
    }

    def body(mesh: tuple[int, int] | None) -> list[Result]:
        unknown = () if mesh else ("plan", "compile")
        return [train(mesh, **{k: v for k, v in case.items() if k not in unknown}) for case in cases.values()]

    references = on(1, lambda: body(None))[0]
    results = on(mesh[0] * mesh[1], lambda: body(mesh))
    assert references[0][0] != references[3][0]
    for i, name in enumerate(cases):
        assert_same([r[i] for r in results], references[i], what=name)


def test_one_rank_is_a_mesh_too() -> None:
    assert_same(on(1, lambda: train((1, 1))), on(1, lambda: train(None))[0])


@both
def test_half_precision(mesh: tuple[int, int]) -> None:
    """Mixed, and with a scaler whose first scale is so large that a step is skipped: on all ranks."""

    def body(mesh: tuple[int, int] | None) -> list[Any]:
        scaler = torch.amp.GradScaler(ON, init_scale=2.0**30)
        plugin = MixedPrecision("16-mixed", ON, scaler)
        half = train(mesh, plugins=plugin)
        assert mesh is None or isinstance(plugin.scaler, MeshGradScaler)
        return [train(mesh, precision="bf16-mixed"), half, plugin.scaler.get_scale()]

    ((bf16, half, scale),) = on(1, lambda: body(None))
    assert scale < 2.0**30
    for got_bf16, got_half, got_scale in on(mesh[0] * mesh[1], lambda: body(mesh)):
        assert got_bf16[0] == pytest.approx(bf16[0], rel=2e-2)
        assert got_half[0] == pytest.approx(half[0], rel=2e-2) and got_scale == scale


class Dropping(Net):
    def __init__(self) -> None:
        super().__init__()
        for layer in self.model.layers:
            layer.feed_forward.w2 = nn.Sequential(nn.Dropout(0.5), layer.feed_forward.w2)


def test_dropout_in_steps_and_in_forwards() -> None:
    """The masks of one process, by the model's forward and by a LightningModule's step."""

    def body(mesh: tuple[int, int] | None, make: Any) -> Result:
        torch.manual_seed(5)
        return train(mesh, make, **({"dropout": "exact"} if mesh else {}))

    for make in (Dropping, lambda: Dropping().model):
        assert_same(on(2, partial(body, TP2, make)), on(1, partial(body, None, make))[0])


def test_built_on_meta() -> None:
    def body(mesh: tuple[int, int] | None) -> Result:
        torch.manual_seed(3)
        fabric = fabric_of(mesh)
        with nullcontext() if mesh is None else fabric.init_module(empty_init=True):  # the weights of a construction on the CPU
            model = Llama(CONFIG)
        model = fabric.setup(model)
        optimizer = fabric.setup_optimizers(optimizer_of(model))
        return loop(fabric, model, optimizer), ltp.full_state_dict(model.module)

    assert_same(on(2, lambda: body(TP2)), on(1, lambda: body(None))[0])


def test_a_model_that_declares_its_plan() -> None:
    transformers = pytest.importorskip("transformers")

    def body(mesh: tuple[int, int] | None) -> Result:
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=103, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4
        )
        fabric = fabric_of(mesh, **({"inputs": None} if mesh else {}))
        model = transformers.LlamaForCausalLM(config)
        model, optimizer = fabric.setup(model, optimizer_of(model))
        seen = []
        for batch in loader(fabric):
            loss = model(input_ids=batch["tokens"], labels=batch["tokens"]).loss
            fabric.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            seen.append(loss.item())
        return seen, ltp.full_state_dict(model.module)

    assert_same(on(2, lambda: body(TP2)), on(1, lambda: body(None))[0])


# ------------------------------------------------------------------------------------------------------------ checkpoints


@pytest.mark.parametrize("distributed", [True, False], ids=["folder", "file"])
@pytest.mark.parametrize(
    ("source", "target"), [(TP2, MESH_2X2), pytest.param(MESH_2X2, TP2, marks=pytest.mark.slow), ((1, 1), TP2)], ids=str
)
def test_save_and_load_on_another_mesh(source: tuple[int, int], target: tuple[int, int], distributed: bool, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"

    def run(mesh: tuple[int, int] | None, load: bool) -> Any:
        fabric = fabric_of(mesh, **({"save_distributed_checkpoint": distributed} if mesh else {}))
        model = build() if not load else randomize_(Llama(CONFIG), 7)
        model, optimizer = fabric.setup(model, optimizer_of(model))
        state = {"model": model, "optimizer": optimizer, "step": 0}
        if load:
            assert fabric.load(path, state) == {} and state["step"] == 3
        else:
            loop(fabric, model, optimizer, mesh[0] if mesh else 1)
            fabric.save(path, {**state, "step": 3})
        return loop(fabric, model, optimizer, mesh[0] if mesh else 1), ltp.full_state_dict(model.module)

    ref = on(source[0] * source[1], lambda: run(source, load=False))[0]
    assert_same(on(target[0] * target[1], lambda: run(target, load=True)), ref)
    if not distributed:
        assert_same(on(1, lambda: run(None, load=True)), ref)  # Lightning's own strategy reads it, too


def test_what_one_process_saved(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"

    def run(mesh: tuple[int, int] | None) -> Any:
        fabric = fabric_of(mesh)
        model = build()
        model, optimizer = fabric.setup(model, optimizer_of(model))
        state = {"model": model, "optimizer": optimizer}
        if mesh is None:
            loop(fabric, model, optimizer)
            fabric.save(path, state)
            torch.save(model.state_dict(), tmp_path / "raw")
        else:
            fabric.load(path, state)
            before = ltp.full_state_dict(model.module)
            fabric.load_raw(tmp_path / "raw", model)
            assert_trees_close(ltp.full_state_dict(model.module), before, rtol=0)
        return loop(fabric, model, optimizer), ltp.full_state_dict(model.module)

    ref = on(1, lambda: run(None))[0]
    assert_same(on(2, lambda: run(TP2)), ref)


# ------------------------------------------------------------------------------------------------------------------ data


class Noisy(Dataset):
    """Augments at random, as the worker is seeded."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> Tensor:
        return torch.rand(3)


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter(range(13))


def test_streams_are_dealt_out() -> None:
    """Each item once over the data-parallel axis, the same inside a group, in each pass; what makes no last step of all ranks is left out."""

    def body() -> Any:
        fabric = fabric_of(MESH_2X2)
        loader = fabric.setup_dataloaders(DataLoader(Stream(), batch_size=2))
        return [[batch.tolist() for batch in loader] for _ in range(2)]

    results = on(4, body)
    assert results[0] == results[1] == [[[0, 1], [4, 5], [8, 9]]] * 2
    assert results[2] == results[3] == [[[2, 3], [6, 7], [10, 11]]] * 2


def test_saving_beside_training(tmp_path: Path) -> None:
    """What is saved is what was there when it was asked for; an error comes out at the next call."""

    def body() -> Any:
        fabric = fabric_of(TP2, async_checkpoint=True)
        model = build()
        model, optimizer = fabric.setup(model, optimizer_of(model))
        loop(fabric, model, optimizer)
        fabric.save(tmp_path / "checkpoint", {"model": model, "optimizer": optimizer, "step": 3})
        saved = {name: t.clone() for name, t in ltp.full_state_dict(model.module).items()}
        after = loop(fabric, model, optimizer)
        fabric.load(tmp_path / "checkpoint", state := {"model": model, "optimizer": optimizer, "step": 0})
        loaded = ltp.full_state_dict(model.module)
        (tmp_path / "a file").touch()
        fabric.save(tmp_path / "a file" / "checkpoint", {"model": model})
        with pytest.raises(ltp.TPError, match="background"):
            fabric.strategy.finish_saving()
        return saved, loaded, state["step"], after, loop(fabric, model, optimizer)

    for saved, loaded, step, after, again in on(2, body):
        assert step == 3 and after == again
        assert all(torch.equal(t, loaded[name]) for name, t in saved.items())


def test_loaders_and_sums_go_over_the_data_parallel_axis() -> None:
    def body() -> tuple[list[int], float, list[list[float]]]:
        L.seed_everything(1, workers=True, verbose=False)
        fabric = fabric_of(MESH_2X2)
        model = fabric.setup(build())
        rows = [int(x) for batch in fabric.setup_dataloaders(DataLoader(range(8), batch_size=2)) for x in batch]
        noise = fabric.setup_dataloaders(DataLoader(Noisy(), batch_size=2, num_workers=1))
        del model
        return rows, float(fabric.all_reduce(torch.tensor(float(len(rows))), reduce_op="sum")), [b.tolist() for b in noise]

    results = on(4, body)
    assert [r[0] for r in results] == [[0, 2, 4, 6]] * 2 + [[1, 3, 5, 7]] * 2
    assert [r[1] for r in results] == [8.0] * 4  # each item once
    assert results[0][2] == results[1][2] and results[2][2] == results[3][2] != results[0][2]


# ---------------------------------------------------------------------------------------------------------------- errors


def message_of(body: Callable[[], Any], world: int = 2) -> str:
    def caught() -> str:
        with pytest.raises((ltp.TPError, SystemExit)) as info:
            body()
        return str(info.value)

    return on(world, caught)[0]


def test_mistakes_end_with_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors, "HEAD_START", 0.0)

    def setup(model: Any = None, **options: Any) -> Callable[[], Any]:
        return lambda: fabric_of(TP2, **options).setup(model or build())

    assert "Fabric has no batch from which one could be inferred" in message_of(setup(inputs=None))
    assert "Could not infer a plan: tracing `Llama.forward` raised" in message_of(setup(inputs=(torch.zeros(2, 12),)))
    assert "`inputs` is a Tensor" in message_of(setup(inputs=INPUTS[0]))
    assert "matches no module" in message_of(setup(plan={"nope": "colwise"}))
    assert "tp=2 needs a multiple of 2 devices, but the Fabric has 3" in message_of(lambda: fabric_of(TP2), 3)
    assert "`launcher='thread'`" in message_of(setup(launcher="thread"))

    def stepped() -> None:
        fabric, model = fabric_of(TP2), build()
        optimizer = optimizer_of(model)
        model(INPUTS[0]).sum().backward()
        optimizer.step()
        fabric.setup(model, optimizer)

    assert "AdamW has stepped already" in message_of(stepped)

    def other_batches() -> None:
        fabric = fabric_of(TP2)
        fabric.setup(build())(torch.full((2, 12), dist.get_rank()))

    assert "differs inside a tensor-parallel group" in message_of(other_batches)

    def nothing_there() -> None:
        fabric = fabric_of(TP2)
        fabric.load("/nowhere", {"model": fabric.setup(build())})

    assert "`/nowhere` is no checkpoint" in message_of(nothing_there)


# ------------------------------------------------------------------------------------------------------------- launchers


def in_processes(fabric: Fabric) -> tuple[float, dict[str, Tensor]]:
    model = build()
    model, optimizer = fabric.setup(model, optimizer_of(model))
    return loop(fabric, model, optimizer), ltp.full_state_dict(model.module)


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_forked_by_launch() -> None:
    ref = on(1, lambda: train(None))[0]
    strategy = ltp.FabricTPStrategy(tp=2, inputs=INPUTS, launcher="fork")
    got = Fabric(accelerator="cpu", devices=2, strategy=strategy).launch(in_processes)
    assert_same([got], ref)
    bad = Fabric(accelerator="cpu", devices=2, strategy=ltp.FabricTPStrategy(plan={"nope": "colwise"}, launcher="fork"))
    with pytest.raises(ltp.TPError, match="matches no module"):
        bad.launch(in_processes)
