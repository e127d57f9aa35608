"""Patches that stay: only once they are needed, and everybody else gets what Lightning does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies import ModelParallelStrategy as FabricModelParallelStrategy
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.tuner import tuning
from lightning.pytorch.utilities import grad_norm

import lightning_tp as ltp
from lightning_tp.trainer.patches.replaced import ORIGINAL, original_of
from lightning_tp.trainer.patches.table import PATCHES, Scope

QUIET: dict[str, Any] = dict(accelerator="cpu", devices=2, logger=False)

# prints which of the patches are in place; what is replaced has its original in an attribute
LOOK = """
import lightning as L, warnings, sys
filters, finders, hook = list(warnings.filters), list(sys.meta_path), sys.excepthook
import lightning_tp as ltp
from lightning_tp.trainer.patches.replaced import ORIGINAL
from lightning_tp.trainer.patches.table import PATCHES, Scope
from importlib import import_module

def in_place():
    found = []
    for patch in PATCHES:
        module, _, path = patch.target.partition(":")
        if patch.signature is None or patch.scope is Scope.SUBCLASS or not module.startswith(("lightning", "torch")):
            continue
        now = import_module(module)
        for name in path.split("."):
            now = getattr(now, name)
        found += [path] if hasattr(now, ORIGINAL) else []
    return found

print(in_place())
ltp.TPStrategy(tp=2)
print(in_place())
ltp.FabricTPStrategy(tp=2)
print(in_place(), [f for f in warnings.filters if "LeafSpec" in str(f)], [f for f in sys.meta_path if f not in finders], sys.excepthook is hook)
"""


def test_nothing_is_patched_before_a_strategy_is_made() -> None:
    """But for `load_from_checkpoint`, which has no strategy."""
    done = subprocess.run([sys.executable, "-c", LOOK], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    imported, trainers, fabrics = done.stdout.splitlines()[-3:]
    at_import = ["_load_from_checkpoint"]
    ours = ["_AcceleratorConnector._validate_precision_choice", "grad_norm", "_check_scale_batch_size_configuration"]
    assert imported == str(at_import) and trainers == str(at_import + ours)
    both = [*at_import, ours[0], "_Connector._check_and_init_precision", *ours[1:]]
    assert fabrics == f"{both} [] [] True"


@pytest.fixture(autouse=True)
def patched() -> None:
    ltp.TPStrategy(tp=2)
    ltp.FabricTPStrategy(tp=2)


@pytest.mark.parametrize("precision", ["16-mixed", "64-true"])
def test_precisions(precision: Any) -> None:
    trainer = L.Trainer(strategy=ltp.TPStrategy(tp=2), precision=precision, **QUIET)
    assert trainer.precision == ("bf16-mixed" if precision == "16-mixed" else precision)  # Lightning's choice on a CPU
    with pytest.raises(ValueError, match="does not support"):
        L.Trainer(strategy=ModelParallelStrategy(), precision=precision, **QUIET)
    with pytest.raises(ValueError, match="transformer-engine"):
        L.Trainer(strategy=ltp.TPStrategy(tp=2), precision="transformer-engine", **QUIET)
    assert L.Trainer(accelerator="cpu", devices=1, precision=precision, logger=False).strategy.precision_plugin is not None


@pytest.mark.parametrize("precision", ["16-mixed", "64-true"])
def test_precisions_of_fabric(precision: Any) -> None:
    strategy = ltp.FabricTPStrategy(tp=2)
    fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy, precision=precision)
    assert fabric.strategy is strategy and fabric.strategy.precision.precision in (precision, "bf16-mixed")
    other = FabricModelParallelStrategy(lambda model, mesh: model)
    with pytest.raises(ValueError, match="does not support"):
        Fabric(accelerator="cpu", devices=2, strategy=other, precision=precision)


def test_norms_of_a_module_that_is_not_split() -> None:
    """Lightning's own, bitwise, and its own error."""
    model = torch.nn.Linear(3, 2)
    model(torch.ones(1, 3)).sum().backward()
    assert hasattr(grad_norm, ORIGINAL)
    for norm_type in (1, 2.0, "inf"):
        own = getattr(grad_norm, ORIGINAL)(model, norm_type)
        assert grad_norm(model, norm_type) == own and len(own) == 3
    with pytest.raises(ValueError, match="must be a positive number"):
        grad_norm(model, -1)


def test_batch_sizes_of_other_strategies() -> None:
    with pytest.raises(ltp.TPError, match="one short run for each size"):
        tuning._check_scale_batch_size_configuration(L.Trainer(strategy=ltp.TPStrategy(tp=2), **QUIET))
    with pytest.raises(ValueError, match="not supported with distributed strategies"):
        tuning._check_scale_batch_size_configuration(L.Trainer(strategy="ddp", **QUIET))
    tuning._check_scale_batch_size_configuration(L.Trainer(accelerator="cpu", devices=1, logger=False))


def test_checkpoints_that_are_files_are_lightnings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = BoringModel()
    path = tmp_path / "a.ckpt"
    torch.save({"state_dict": model.state_dict(), "pytorch-lightning_version": L.__version__}, path)
    loaded = BoringModel.load_from_checkpoint(path, map_location="cpu", weights_only=True)
    assert torch.equal(loaded.layer.weight, model.layer.weight)
    (tmp_path / "folder").mkdir()  # without a checkpoint in it: Lightning's error
    with pytest.raises(IsADirectoryError):
        BoringModel.load_from_checkpoint(tmp_path / "folder")


def test_the_originals_can_be_found() -> None:
    for patch in PATCHES:
        if patch.scope in (Scope.IMPORT, Scope.PROCESS) and patch.by.startswith("trainer/patches"):
            assert not hasattr(original_of(patch), ORIGINAL)
