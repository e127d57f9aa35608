"""`import pytorch_lightning as pl`: the same strategy and callbacks under the other package's Trainer, and one error for the wrong ones."""

from __future__ import annotations

import ast
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

import lightning_tp as ltp
from examples.llama import Llama, LlamaConfig
from lightning_tp.testing import assert_trees_close, randomize_, run_ranks

pl: Any = pytest.importorskip("pytorch_lightning")
import lightning_tp.pytorch_lightning as twin  # noqa: E402

CONFIG = LlamaConfig(vocab_size=103, dim=32, num_layers=2, num_heads=8, num_kv_heads=4, hidden_dim=48, max_seq_len=32, bias=True)


class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = randomize_(Llama(CONFIG))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self.model(batch["tokens"]).flatten(0, 1), batch["targets"].flatten())
        self.log("loss", loss, on_step=False, on_epoch=True, sync_dist=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2, eps=1e-3)


class Mixed(ltp.TensorParallel, Net):
    pass


def fit(make: Any, strategy: Any, folder: Path, dp: int = 1, **options: Any) -> tuple[float, dict[str, Tensor], str]:
    module = make()
    callbacks = [twin.Throughput(), twin.ShardSummary(), pl.callbacks.ModelCheckpoint(folder, filename="{epoch}")]
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=int(os.environ["WORLD_SIZE"]),
        strategy=strategy,
        max_epochs=2,
        callbacks=callbacks,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        gradient_clip_val=0.5,
        **options,
    )
    items = list(ltp.RandomTokens(12, 12, 103, seed=0))
    if dp > 1:  # dealt out in turn, in whole batches: those of all ranks together are the batch of one process
        rank = int(os.environ["RANK"]) // (len(os.environ["WORLD_SIZE"]) and int(os.environ["WORLD_SIZE"]) // dp)
        items = items[rank::dp]
        options["use_distributed_sampler"] = False
    trainer.fit(module, DataLoader(items, batch_size=4 // dp))
    return trainer.callback_metrics["loss"].item(), ltp.full_state_dict(module), type(trainer.precision_plugin).__module__


def test_fit_as_in_one_process(tmp_path: Path) -> None:
    ref = run_ranks(fit, 1, Net, "auto", tmp_path / "ref", init=False)[0]
    for name, make, strategy in (("instance", Net, twin.TPStrategy(tp=2)), ("name and mixin", Mixed, "tp")):
        for loss, weights, _ in run_ranks(fit, 2, make, strategy, tmp_path / name, init=False):
            assert loss == pytest.approx(ref[0], rel=1e-4), name
            assert_trees_close(weights, ref[1], rtol=1e-4, name=name)


def test_precision_is_the_other_packages(tmp_path: Path) -> None:
    ref = run_ranks(fit, 1, Net, "auto", tmp_path / "ref", precision="bf16-mixed", init=False)[0]
    for loss, _, module in run_ranks(fit, 2, Net, twin.TPStrategy(tp=2), tmp_path / "tp", precision="bf16-mixed", init=False):
        assert loss == pytest.approx(ref[0], rel=2e-2) and module == "lightning_tp.pytorch_lightning.trainer.adapt.precision"


@pytest.mark.slow
def test_on_a_mesh_of_two_by_two(tmp_path: Path) -> None:
    ref = run_ranks(fit, 1, Net, "auto", tmp_path / "ref", init=False)[0]
    for loss, weights, _ in run_ranks(
        fit, 4, Net, twin.TPStrategy(tp=2), tmp_path / "tp", dp=2, use_distributed_sampler=False, init=False
    ):
        assert loss == pytest.approx(ref[0], rel=1e-4)
        assert_trees_close(weights, ref[1], rtol=1e-4)


def test_forked() -> None:
    module = Net()
    before = {name: t.clone() for name, t in module.state_dict().items()}
    strategy = twin.TPStrategy(tp=2, launcher="fork")
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=strategy,
        max_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(module, DataLoader(ltp.RandomTokens(4, 12, 103), batch_size=4))
    assert {n: t.shape for n, t in module.state_dict().items()} == {n: t.shape for n, t in before.items()}
    assert not torch.equal(module.state_dict()["model.output.weight"], before["model.output.weight"])


def test_the_other_packages_strategy_is_refused_with_one_error() -> None:
    with pytest.raises(ltp.TPError, match=r"from lightning_tp\.pytorch_lightning import TPStrategy"):
        pl.Trainer(accelerator="cpu", devices=2, strategy=ltp.TPStrategy(tp=2))


def test_all_that_knows_a_trainer_has_a_twin() -> None:
    """A new file that imports Lightning has to be named in `TWINS`, or here."""
    root = Path(ltp.__file__).parent
    without = {"pytorch_lightning", "cli", "__init__"}
    known = set()
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = (
                [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            if any(name.partition(".")[0] == "lightning" for name in names) and not _for_types_only(path, node):
                known.add(path.relative_to(root).parts[0].removesuffix(".py"))
    assert known - without - {"testing"} <= set(twin.TWINS)


def _for_types_only(path: Path, node: ast.AST) -> bool:
    tree = ast.parse(path.read_text())
    blocks = [n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test)]
    return any(block.lineno <= node.lineno <= (block.end_lineno or 0) for block in blocks)  # type: ignore[attr-defined]
