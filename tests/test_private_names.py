"""Private names of other packages stand in two places: torch's in `_compat/`, Lightning's in `trainer/patches/`.

Looked at are imports, attribute accesses, and names given as text to `getattr` and the like (`replaced` and `replace` take only those in the table
of patches). A name with a leading underscore that is defined
somewhere in this package (a function, a class, a variable, an attribute of `self`) is taken for its own.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import lightning_tp

ROOT = Path(lightning_tp.__file__).parent
SOURCES = {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text()) for path in sorted(ROOT.rglob("*.py"))}
ALLOWED = ("_compat/", "trainer/patches/")
# what the documentation of Python and of torch tells to use
DOCUMENTED = {"_exit", "_getframe", "_current_frames", "_replace", "_asdict", "_fields"}
PUBLIC_MODULES = {"torch.utils._pytree", "torch.utils._python_dispatch", "torch._ops"}
BY_TEXT = {"getattr", "hasattr", "setattr", "delattr", "patched"}
OUR_PREFIX = "_tp_"  # of attributes that this package sets on parameters and modules


def is_private(name: str) -> bool:
    own = name.startswith(("__", OUR_PREFIX)) or name == "_"
    return name.startswith("_") and not own and name not in DOCUMENTED


def defined(tree: ast.AST) -> Iterator[str]:
    """The names that a file defines: functions, classes, variables, attributes of `self` and `cls`."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) in ("self", "cls"):
            yield node.attr


def named(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, name) of each access: attributes, names as text, imports from other packages."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.lineno, node.attr
        elif isinstance(node, ast.Call) and len(node.args) > 1 and isinstance(node.args[1], ast.Constant):
            function = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            if function in BY_TEXT and isinstance(node.args[1].value, str):
                yield node.lineno, node.args[1].value
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            if module not in PUBLIC_MODULES and module.partition(".")[0] != "lightning_tp":
                yield from ((node.lineno, part) for name in (module, *(a.name for a in node.names)) for part in name.split("."))


OURS = {name for source, tree in SOURCES.items() if not source.startswith(ALLOWED) for name in defined(tree)}


def private_names(tree: ast.AST) -> list[str]:
    return [f"{line}: {name}" for line, name in named(tree) if is_private(name) and name not in OURS]


def test_private_names_of_others_stand_in_two_places() -> None:
    found = {s: names for s in SOURCES if not s.startswith(ALLOWED) and (names := private_names(SOURCES[s]))}
    assert not found, f"give each a function in _compat/ (torch) or trainer/patches/private.py (Lightning): {found}"


@pytest.mark.parametrize(
    "code",
    [
        "trainer._checkpoint_connector",
        "torch._C._get_tracing_state()",
        "getattr(loop, '_data_fetcher', None)",
        "undo = patched(owner, '_run_stage', wrap)",
        "from lightning.fabric.utilities.data import _set_sampler_epoch",
        "import torch._dynamo",
        "from torch._subclasses.fake_tensor import FakeTensorMode",
        "callback._average_model = 1",
    ],
)
def test_the_test_sees(code: str) -> None:
    assert private_names(ast.parse(code))


@pytest.mark.parametrize(
    "code", ["self._x = 1", "os._exit(1)", "p._tp_shard", "type(self).__name__", "from torch.utils._pytree import tree_map"]
)
def test_what_is_ones_own_or_documented(code: str) -> None:
    names = private_names(ast.parse(code))
    assert not [name for name in names if "_x" not in name]
