"""Every row of the table of patches still fits the installed packages, and the file that it names."""

from __future__ import annotations

import ast
import importlib.util
import inspect
from importlib import import_module
from pathlib import Path

import pytest

import lightning_tp
from lightning_tp.trainer.patches.replaced import change_of, original_of
from lightning_tp.trainer.patches.table import PATCHES, TESTED, Patch, Scope

ROOT = Path(lightning_tp.__file__).parent
rows = pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.target)


def skip_without(patch: Patch) -> None:
    if importlib.util.find_spec(patch.package) is None:
        pytest.skip(f"{patch.package} is not installed")


@rows
def test_the_target_has_this_signature(patch: Patch) -> None:
    skip_without(patch)
    assert change_of(patch) is None
    if patch.signature is None:  # an attribute: of the module, of the class, or assigned in the class's source
        module, _, path = patch.target.partition(":")
        owner, _, name = path.rpartition(".")
        holder = getattr(import_module(module), owner) if owner else import_module(module)
        assigned = f"self.{name}" in "".join(inspect.getsource(cls) for cls in inspect.getmro(holder)[:-1]) if owner else False
        assert hasattr(holder, name) or assigned


@rows
def test_the_file_replaces_it(patch: Patch) -> None:
    """A row whose patch is gone would mislead."""
    text = (ROOT / patch.by).read_text()
    name = patch.target.replace(":", ".").rpartition(".")[2]
    assert name in text
    if patch.scope is Scope.SUBCLASS and patch.signature is not None:
        assert any(isinstance(n, ast.FunctionDef) and n.name == name for n in ast.walk(ast.parse(text)))


def test_rows_are_unique_and_say_why() -> None:
    targets = [patch.target for patch in PATCHES]
    assert len(set(targets)) == len(targets)
    assert all(patch.reason and not patch.reason.endswith(".") for patch in PATCHES)


def test_versions_are_those_of_its_package() -> None:
    for patch in PATCHES:
        expected = TESTED.get(patch.target.partition(":")[0].partition(".")[0], ())
        assert patch.versions_tested == expected and (expected or patch.package in ("builtins", "signal", "sys", "warnings"))


@pytest.mark.parametrize("name", ["_parse_ckpt_path", "gather_all_tensors", "_get_total_norm"])
def test_the_original_is_found(name: str) -> None:
    (patch,) = [patch for patch in PATCHES if patch.target.endswith(name)]
    assert getattr(original_of(patch), "__module__", "").startswith(patch.package)
