"""Sharded checkpoints: what one run wrote is read by another, on its mesh or on another one, and what does not fit is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn

import lightning_tp as ltp
from examples.llama import PLAN, Llama, LlamaConfig
from lightning_tp.checkpoint import (
    Peers,
    SaveContent,
    StoragePath,
    load_model,
    load_optimizer,
    save_folder,
    to_bytes,
    with_dtensors,
    without_dtensors,
)
from lightning_tp.core.comm.mesh import DATA_PARALLEL, make_mesh
from lightning_tp.shards import optimizer_state
from lightning_tp.testing import randomize_, run_ranks

CONFIG = dict(vocab_size=103, dim=64, num_layers=2, num_heads=8, num_kv_heads=1, hidden_dim=90, bias=True)


def split(mesh: Any, seed: int = 0, **other: Any) -> nn.Module:
    return ltp.parallelize(randomize_(Llama(LlamaConfig(**{**CONFIG, **other})), seed), mesh, PLAN)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, mesh: Any, seed: int) -> None:
    tokens = torch.randint(0, 103, (4, 9), generator=torch.Generator().manual_seed(seed))
    tokens = tokens.chunk(mesh[DATA_PARALLEL].size())[mesh.get_local_rank(DATA_PARALLEL)]
    F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
    optimizer.step()
    optimizer.zero_grad()


def save(model: nn.Module, optimizer: torch.optim.Optimizer, path: Path) -> None:
    """In the layout that Lightning uses."""
    dcp.save({"state_dict": model.state_dict(), "optimizer_0": optimizer_state.optimizer_state(optimizer)}, checkpoint_id=path)


def adamw(model: nn.Module, lr: float = 1e-2) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=lr, eps=1e-3)


def assert_equal(got: dict[str, Tensor], ref: dict[str, Tensor]) -> None:
    assert set(got) == set(ref)
    for name, t in ref.items():
        assert torch.equal(got[name], t), name


@pytest.mark.parametrize(
    "source, target",
    [((1, 2), (2, 2)), ((2, 2), (1, 2)), pytest.param((2, 2), (1, 4), marks=pytest.mark.slow)],
    ids=str,
)
def test_a_run_goes_on(source: tuple[int, int], target: tuple[int, int], tmp_path: Path) -> None:
    """Bitwise on the same mesh, with a fresh optimizer that has no state yet; with the same weights and state on another."""

    def first() -> tuple[dict[str, Tensor], Any]:
        mesh = make_mesh("cpu", *source)
        model = split(mesh)
        optimizer = adamw(model)
        for i in range(2):
            step(model, optimizer, mesh, i)
        save(model, optimizer, tmp_path)
        saved = ltp.full_state_dict(model), optimizer_state.full_optimizer_state(optimizer)["state"]
        step(model, optimizer, mesh, 2)
        end = ltp.full_state_dict(model)

        again = split(mesh, seed=1)
        load_model(again, StoragePath(tmp_path))
        other = adamw(again, lr=1.0)
        load_optimizer(other, StoragePath(tmp_path), "optimizer_0")
        assert other.param_groups[0]["lr"] == 1e-2 and other.param_groups[0]["eps"] == 1e-3
        step(again, other, mesh, 2)
        assert_equal(ltp.full_state_dict(again), end)
        return saved

    weights, states = run_ranks(first, source[0] * source[1])[0]

    def second() -> None:
        mesh = make_mesh("cpu", *target)
        model = split(mesh, seed=1)
        load_model(model, StoragePath(tmp_path))
        assert_equal(ltp.full_state_dict(model), weights)
        optimizer = adamw(model, lr=1.0)
        load_optimizer(optimizer, StoragePath(tmp_path), "optimizer_0")
        loaded = optimizer_state.full_optimizer_state(optimizer)["state"]
        assert set(loaded) == set(states)
        for name, of in states.items():
            assert_equal(loaded[name], of)
        step(model, optimizer, mesh, 2)

    run_ranks(second, target[0] * target[1])


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    def body() -> None:
        mesh = make_mesh("cpu", 1, 2)
        model = split(mesh)
        save(model, adamw(model), tmp_path)

        with pytest.raises(ltp.TPError, match=r"has no `optimizer_1`.*saved with weights only, or with fewer optimizers"):
            load_optimizer(adamw(model), StoragePath(tmp_path), "optimizer_1")

        deeper = split(mesh, seed=1, num_layers=3)
        with pytest.raises(ltp.TPError, match=r"has no `layers\.2\.attention_norm\.weight`.*strict_loading = False"):
            load_model(deeper, StoragePath(tmp_path))
        before = ltp.full_state_dict(deeper)["layers.2.attention.wq.weight"]
        load_model(deeper, StoragePath(tmp_path), strict=False)
        whole, ref = ltp.full_state_dict(deeper), ltp.full_state_dict(model)
        assert_equal({n: t for n, t in whole.items() if "layers.2" not in n}, ref)
        assert torch.equal(whole["layers.2.attention.wq.weight"], before)

        shallower = split(mesh, num_layers=1)
        with pytest.raises(ltp.TPError, match=r"has `layers\.1\.attention\.wq\.weight`.*the model lacks"):
            load_model(shallower, StoragePath(tmp_path))
        load_model(shallower, StoragePath(tmp_path), strict=False)
        with pytest.raises(ltp.TPError, match=r"`layers\.0\.feed_forward\.w1\.weight`.*has shape \(90, 64\), the model \(92, 64\)"):
            load_model(split(mesh, hidden_dim=92), StoragePath(tmp_path))

    run_ranks(body, 2)


def test_an_optimizer_without_state_yet(tmp_path: Path) -> None:
    """Saved before the first step: nothing to read, and the first step is taken as ever."""

    def body() -> None:
        mesh = make_mesh("cpu", 1, 2)
        model = split(mesh)
        save(model, adamw(model), tmp_path)
        optimizer = adamw(model, lr=1.0)
        load_optimizer(optimizer, StoragePath(tmp_path), "optimizer_0")
        assert not optimizer.state and optimizer.param_groups[0]["lr"] == 1e-2
        step(model, optimizer, mesh, 0)

    run_ranks(body, 2)


def test_a_scheduler_may_have_come_since(tmp_path: Path) -> None:
    """Schedulers add to an optimizer's groups what the checkpoint has not."""

    def body() -> None:
        mesh = make_mesh("cpu", 1, 2)
        model = split(mesh)
        save(model, adamw(model), tmp_path)
        optimizer = adamw(model, lr=1.0)
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 0.5)
        load_optimizer(optimizer, StoragePath(tmp_path), "optimizer_0")
        assert optimizer.param_groups[0]["lr"] == 1e-2

    run_ranks(body, 2)


def test_dtensors_of_callbacks(tmp_path: Path) -> None:
    """What a callback puts into a checkpoint is kept whole, in what nesting ever; what holds none is handed on as it is."""
    ends: dict[str, Tensor] = {}

    def write() -> dict[str, Tensor]:
        mesh = make_mesh("cpu", 2, 2)
        model = split(mesh)
        state = dict(model.state_dict())
        plain = {"a": (1, [2, torch.ones(3)])}
        tree = {"mine": {"state": state, "rest": [plain, (state["output.weight"],)]}, "plain": plain}
        found: dict[str, Any] = {}
        left = without_dtensors(tree, found)
        assert left["plain"] is plain and left["mine"]["rest"][0] is plain and len(found) == len(state) + 1
        assert tree["mine"]["state"] is state and not any(isinstance(v, dict) for v in state.values())  # the user's own
        rest = to_bytes(left) if torch.distributed.get_rank() == 0 else None
        save_folder(StoragePath(tmp_path), SaveContent({"state_dict": {}}, apart=found, rest=rest), Peers())
        return ltp.full_state_dict(model)

    ends.update(run_ranks(write, 4)[0])

    def read() -> None:
        mesh = make_mesh("cpu", 1, 2)
        model = split(mesh, seed=1)
        tree = with_dtensors(torch.load(tmp_path / "meta.pt"), StoragePath(tmp_path), model)
        assert tree["plain"]["a"][0] == 1
        model.load_state_dict(tree["mine"]["state"])
        assert_equal(ltp.full_state_dict(model), ends)
        assert torch.equal(tree["mine"]["rest"][1][0], ends["output.weight"])  # nobody knows whose shape it has: whole

    run_ranks(read, 2)
