"""Checkpoints that Lightning's own strategies write: they are resumed under `TPStrategy`, validated, consolidated."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel

import lightning_tp as ltp
from lightning_tp.checkpoint.weights.dcp_folder import DcpFolder, model_key
from lightning_tp.testing import assert_trees_close, run_ranks
from tests.checkpoint.lit import Lit, loader, ours, train, train_alone, trainer


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


MARKS: dict[str, Any] = {
    "model_parallel_whole": pytest.mark.slow,
    "ddp": pytest.mark.only_on_cpu("writes with DDP, whose timers a pretended GPU lacks; what is read is the same"),
    "fsdp_sharded": pytest.mark.only_on_cpu("writes with FSDPStrategy on the CPU"),
}


@pytest.mark.parametrize("kind", [pytest.param(k, marks=MARKS.get(k, ())) for k in STRATEGIES])
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
    if path.is_dir():
        assert model_key(DcpFolder(path).metadata.state_dict_metadata) == ("model" if kind == "fsdp_sharded" else "state_dict")


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
        return {name: v.detach().cpu().clone() for name, v in module.state_dict().items()}

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
