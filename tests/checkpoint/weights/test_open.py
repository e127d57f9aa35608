"""Looking into checkpoints of all kinds: what they hold is found and read, what is broken is named, and nothing is executed."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import lightning as L
import pytest
import torch
import torch.distributed.checkpoint as dcp
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel

import lightning_tp as ltp
from lightning_tp.checkpoint.safe import read_metadata
from lightning_tp.checkpoint.storage import StoragePath
from lightning_tp.checkpoint.weights.dcp_folder import Folder
from lightning_tp.checkpoint.weights.open import open_checkpoint
from lightning_tp.checkpoint.weights.safetensors_file import open_safetensors
from lightning_tp.checkpoint.weights.stored import Stored
from lightning_tp.testing import assert_trees_close, run_ranks
from tests.checkpoint.lit import Lit, loader, ours, train, train_alone, trainer


def read(tensors: dict[str, Stored]) -> dict[str, Tensor]:
    return {name: s.read() for name, s in tensors.items()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """A folder of 2 x 2 ranks, and what it should hold."""
    path = tmp_path_factory.mktemp("saved") / "a.ckpt"
    return path, run_ranks(train, 4, 2, 4, 2, save=path, init=False)[0]


def test_a_folder_of_a_mesh(saved: tuple[Path, dict[str, Tensor]]) -> None:
    """FSDP2's uneven rows, a shared key/value head, an uneven width: whole, bitwise, and any box of it."""
    path, weights = saved
    contents = open_checkpoint(path)
    got = read(contents.model)
    assert set(got) == set(weights) and contents.kind == "folder" and contents.by == "lightning_tp"
    assert all(torch.equal(got[n], w) for n, w in weights.items())
    name = "model.layers.0.feed_forward.w1.weight"
    stored, whole = contents.model[name], weights[name]
    assert torch.equal(stored.read(((40, 3), (11, 5))), whole[40:51, 3:8])
    assert stored.cast(torch.bfloat16).read().dtype == torch.bfloat16
    (state,) = contents.optimizers
    assert state["param_groups"][0]["params"][0] == "model.tok_embeddings.weight" and state["param_groups"][0]["lr"] == 1e-2
    assert state["state"][name]["exp_avg"].shape == tuple(whole.shape) and state["state"][name]["step"].read() == 2
    assert contents.rest["global_step"] == 2 and contents.rest["hyper_parameters"]["seed"] == 0


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch /tmp/should-not-be-there",)


@pytest.mark.parametrize("what", [Evil(), eval, {"a": os.system}, torch.nn.Linear], ids=["call", "builtin", "function", "class"])
def test_metadata_names_nothing_else(what: Any, tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(pickle.dumps(what))
    with pytest.raises(ltp.TPError, match="has no place in the metadata"):
        read_metadata(StoragePath(tmp_path))
    with pytest.raises(ltp.TPError, match="no place"):
        open_checkpoint(tmp_path)
    assert not Path("/tmp/should-not-be-there").exists()


def test_metadata_is_as_torch_reads_it(saved: tuple[Path, dict[str, Tensor]]) -> None:
    theirs = dcp.FileSystemReader(saved[0]).read_metadata()
    mine = read_metadata(StoragePath(saved[0]))
    assert mine.state_dict_metadata == theirs.state_dict_metadata and mine.storage_data == theirs.storage_data
    assert mine.planner_data == theirs.planner_data


def test_what_is_broken_is_named(saved: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"

    def again() -> Path:
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(saved[0], path)
        return path

    shards = sorted(f.name for f in again().glob("*.distcp"))
    (path / shards[1]).unlink()
    with pytest.raises(ltp.TPError, match=rf"lacks the file {shards[1]}, which has `.*`. The checkpoint is not complete"):
        read(open_checkpoint(path).model)
    (again() / shards[1]).write_bytes((path / shards[1]).read_bytes()[:3000])
    with pytest.raises(ltp.TPError, match=rf"{shards[1]}` can't be read at `.*`: the file is broken or cut off"):
        read(open_checkpoint(path).model)
    (again() / ".metadata").write_bytes((path / ".metadata").read_bytes()[:500])
    with pytest.raises(ltp.TPError, match=r"\.metadata` is damaged"):
        open_checkpoint(path)
    (again() / ".metadata").unlink()
    with pytest.raises(ltp.TPError, match=r"shards but no `\.metadata`, which is written last: its save did not come to its end"):
        open_checkpoint(path)
    (again() / "meta.pt").write_bytes(b"nonsense")
    with pytest.raises(ltp.TPError, match=r"meta\.pt` is no checkpoint that `torch\.load` can read"):
        open_checkpoint(path)


def test_what_is_none_is_described(tmp_path: Path) -> None:
    for make, text in (
        (lambda: None, "there is no such file or folder"),
        (lambda: (tmp_path / "x").mkdir(), "it is empty"),
        (lambda: (tmp_path / "x" / "a.ckpt").write_text(""), "the folder has a.ckpt in it. Name one of these"),
    ):
        make()
        with pytest.raises(ltp.TPError, match=text):
            open_checkpoint(tmp_path / "x")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(ltp.TPError, match=r"no checkpoint that `torch\.load` can read"):
        open_checkpoint(tmp_path / "text")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ltp.TPError, match="has a list in it"):
        open_checkpoint(tmp_path / "list.pt")


class Mine:
    pass


def test_files_of_torch_save(tmp_path: Path) -> None:
    """Views, tied weights, empty and scalar tensors, the old format; classes only where they are trusted."""
    base = torch.randn(6, 4)
    tensors = {
        "a": base,
        "tied": base,
        "t": base.t(),
        "rows": base[2:4, 1:],
        "scalar": torch.tensor(3),
        "none": torch.empty(0, 4),
        "b": torch.ones(3, dtype=torch.bool),
    }
    torch.save({"state_dict": tensors, "epoch": 3}, tmp_path / "new.ckpt")
    torch.save({"state_dict": tensors, "epoch": 3}, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    for name in ("new.ckpt", "old.ckpt"):
        contents = open_checkpoint(tmp_path / name)
        got = read(contents.model)
        assert all(torch.equal(got[n], t) for n, t in tensors.items()) and contents.rest == {"epoch": 3}
        assert torch.equal(contents.model["t"].read(((1, 0), (2, 3))), base.t()[1:3, :3])
        assert contents.model["a"].key == contents.model["tied"].key != contents.model["rows"].key
    torch.save({"state_dict": tensors, "hyper_parameters": {"x": Mine()}}, tmp_path / "mine.ckpt")
    with pytest.raises(ltp.TPError, match=r"has the class \S*Mine in it, which is no plain data.*weights_only=False"):
        open_checkpoint(tmp_path / "mine.ckpt")
    assert isinstance(open_checkpoint(tmp_path / "mine.ckpt", weights_only=False).rest["hyper_parameters"]["x"], Mine)


def test_safetensors(tmp_path: Path) -> None:
    """As the package `safetensors` writes them; a box is read alone, and counted."""
    from safetensors.torch import save_file

    tensors = {
        "a": torch.randn(7, 5),
        "b": torch.ones((), dtype=torch.bfloat16),
        "c": torch.arange(6).view(2, 3),
        "e": torch.empty(0, 3),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    count: list[int] = []
    stored = open_safetensors(tmp_path, count.append)
    assert all(torch.equal(s.read(), tensors[n]) for n, s in stored.items()) and set(stored) == set(tensors)
    count.clear()
    assert torch.equal(stored["a"].read(((2, 1), (3, 2))), tensors["a"][2:5, 1:3]) and count == [3 * 2 * 4]
    whole = (tmp_path / "model.safetensors").read_bytes()
    for broken, text in (
        (whole[:-1], "cut off or broken"),
        (whole[:5], "no safetensors file"),
        (b"\xff" * 80, "no safetensors file, or cut off"),
    ):
        (tmp_path / "model.safetensors").write_bytes(broken)
        with pytest.raises(ltp.TPError, match=text):
            open_safetensors(tmp_path)


# --------------------------------------------------------------------------------------------- what Lightning's strategies write


class OnTwo(Lit):
    """As Lightning's ModelParallelStrategy asks for it: FSDP2 and torch's styles by hand."""

    def configure_model(self) -> None:
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

        if self.device_mesh["tensor_parallel"].size() > 1:
            for block in self.model.layers:  # type: ignore[union-attr]
                styles = {"w1": ColwiseParallel(), "w3": ColwiseParallel(), "w2": RowwiseParallel()}
                parallelize_module(block.feed_forward, self.device_mesh["tensor_parallel"], styles)
        for block in self.model.layers:  # type: ignore[union-attr]
            fully_shard(block, mesh=self.device_mesh["data_parallel"])
        fully_shard(self.model, mesh=self.device_mesh["data_parallel"])


class CPUShards(FullyShardedDataParallel):
    def __init__(self, *args: Any, device_id: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, device_id=torch.device("cpu"), **kwargs)


class FSDPOnCPU(FSDPStrategy):
    """Lightning refuses `FSDPStrategy` itself without GPUs, and torch wants to be told that it is meant; the rest is theirs."""

    def _setup_model(self, model: Any) -> Any:
        with mock.patch("torch.distributed.fsdp.FullyShardedDataParallel", CPUShards):
            return super()._setup_model(model)


STRATEGIES: dict[str, Any] = {
    "ddp": lambda: DDPStrategy(),
    "model_parallel": lambda: ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
    "model_parallel_tp": lambda: ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=2),
    "model_parallel_whole": lambda: ModelParallelStrategy(2, 1, save_distributed_checkpoint=False),
    "fsdp_sharded": lambda: FSDPOnCPU(state_dict_type="sharded", auto_wrap_policy={nn.Linear}),
}


def by_lightning(kind: str, path: Path) -> None:
    t = trainer(STRATEGIES[kind](), 2, 2)
    t.fit(OnTwo() if kind.startswith("model_parallel") else Lit(), loader())
    t.save_checkpoint(path)


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=pytest.mark.slow) if k == "model_parallel_whole" else k for k in STRATEGIES]
)
def test_what_lightnings_strategies_write(kind: str, tmp_path: Path) -> None:
    """A run of Lightning's own goes on under `TPStrategy` to the weights of one process, its optimizer too; weights alone are read for a validation.

    Those of FSDPStrategy in one file are made by hand, below.
    """
    path = tmp_path / "theirs.ckpt"
    run_ranks(by_lightning, 2, kind, path, init=False)
    assert_trees_close(run_ranks(train, 2, 2, 2, 4, resume=path, init=False)[0], train_alone(4), rtol=1e-4)

    def validate() -> float:
        t = trainer(ours(2), 2, 1)
        return t.validate(Lit(seed=5), loader(), ckpt_path=path, verbose=False, weights_only=True)[0]["val_loss"]

    alone = L.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    ref = alone.validate(ltp.load_from_checkpoint(Lit, path, seed=5, weights_only=True), loader(), verbose=False)[0]["val_loss"]
    assert run_ranks(validate, 2, init=False)[0] == pytest.approx(ref, rel=1e-5)
    assert Folder(path).model_key == ("model" if kind == "fsdp_sharded" else "state_dict") if path.is_dir() else True


class Groups(Lit):
    """Weight decay for matrices alone, as most do it: the groups' parameters are not in the order of the model's."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        matrices = [p for p in self.parameters() if p.ndim > 1]
        others = [p for p in self.parameters() if p.ndim < 2]
        groups = [{"params": others, "weight_decay": 0.0, "lr": 2e-2}, {"params": matrices}]
        return torch.optim.AdamW(groups, lr=1e-2, eps=1e-3, weight_decay=0.1)


def as_fsdp_writes_it(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """A plain Trainer's checkpoint as Lightning's `FSDPStrategy(state_dict_type="full")` lays it out.

    Writing one on CPUs ends in torch with a segmentation fault. By `FSDPStrategy.lightning_module_state_dict` and `optimizer_state`, that is
    FSDP's full state dicts on rank 0 and the CPU, with `FullyShardedDataParallel.rekey_optim_state_dict(.., OptimStateKeyType.PARAM_ID, model)`: a
    parameter's number is its place among `model.parameters()`, whatever its group, and each group's numbers are sorted.
    """
    order = {name: i for i, name in enumerate(dict(Groups().named_parameters()))}
    module = Groups()
    names = {id(p): name for name, p in module.named_parameters()}
    own = module.configure_optimizers()
    by_number = [names[id(p)] for g in own.param_groups for p in g["params"]]
    (state,) = checkpoint["optimizer_states"]
    values = {by_number[i]: of for i, of in state["state"].items()}
    groups = [{**g, "params": sorted(order[by_number[i]] for i in g["params"])} for g in state["param_groups"]]
    assert [i for g in groups for i in g["params"]] != sorted(order.values())
    state = {"state": {order[name]: values[name] for name in sorted(values)}, "param_groups": groups}
    return {**checkpoint, "optimizer_states": [state]}


@pytest.mark.parametrize("fsdp", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_one_file_with_groups_of_parameters(fsdp: bool, tmp_path: Path) -> None:
    """Of a plain Trainer, and as FSDPStrategy writes it: each parameter gets its own state back."""

    def alone(steps: int, path: Path | None = None) -> dict[str, Tensor]:
        t = trainer("auto", 1, steps)
        t.fit(module := Groups(), loader())
        if path is not None:
            t.save_checkpoint(path)
        return {name: v.detach().clone() for name, v in module.state_dict().items()}

    def split() -> dict[str, Tensor]:
        t = trainer(ours(2), 2, 4)
        t.fit(module := Groups(seed=1), loader(), ckpt_path=path, weights_only=True)
        return ltp.full_state_dict(module)

    path = tmp_path / "theirs.ckpt"
    alone(2, path)
    if fsdp:
        torch.save(as_fsdp_writes_it(torch.load(path, weights_only=True)), path)
    ref = alone(4)
    assert_trees_close(run_ranks(split, 2, init=False)[0], ref, rtol=1e-4)
    whole = ltp.consolidate(path, tmp_path / "one.ckpt")
    t = trainer("auto", 1, 4)
    t.fit(module := Groups(seed=1), loader(), ckpt_path=whole, weights_only=True)
    assert_trees_close(dict(module.state_dict()), ref, rtol=1e-6)
