"""Imports go one way: a lower layer never imports a higher one, and only the top knows Lightning.

Read from the sources, at module level (an import inside a function waits until it is needed, and `TYPE_CHECKING` is for readers).
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lightning_tp

ROOT = Path(lightning_tp.__file__).parent

# From the bottom up; a unit may import what stands in its own row or in one before. A folder is one unit.
LAYERS: list[set[str]] = [
    {"errors"},
    {"_compat", "mesh", "meeting", "comm"},
    {"loss", "logits", "deferred", "rng", "fsdp"},
    {"styles"},
    {"plan", "plan_check", "plan_table"},
    {"border", "grad", "declared", "dropout", "infer", "materialize", "compiled", "recompute"},  # what reads a plan
    {"apply", "checkpoint", "choose", "estimate", "data", "optimizers"},
    {
        "testing",
        "averaging",
        "callbacks",
        "example",
        "first_batch",
        "global_batch",
        "module",
        "numbers",
        "precision",
        "launch",
        "strategy",
        "thawing",
        "fabric",
        "parity",
        "tuner",
        "watch",
    },
    {"pytorch_lightning", "cli", "cli_parser", "cli_checkpoint", "cli_estimate", "cli_script", "cli_shapes", "__main__"},
    {"__init__"},
]
KNOWS_LIGHTNING = {
    "averaging",
    "tuner",
    "watch",
    "callbacks",
    "fabric",
    "global_batch",
    "launch",
    "module",
    "numbers",
    "precision",
    "pytorch_lightning",
    "strategy",
    "thawing",
    "cli",
    "__init__",
}
IMPORTED_LATE = {"transformers", "timm", "safetensors", "matplotlib", "rich", "jsonargparse", "numpy", "pytest"}
PYTEST_ONLY = "testing/fixtures.py"

SOURCES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py"))


def unit(path: str) -> str:
    """`styles/base.py` -> `styles`."""
    return path.partition("/")[0].removesuffix(".py")


def layer(name: str) -> int:
    return next(i for i, row in enumerate(LAYERS) if name in row)


def at_module_level(path: Path) -> Iterator[str]:
    """The dotted modules that a file imports when it is imported; `from a import b` gives `a.b`."""

    def walk(body: list[ast.stmt]) -> Iterator[ast.stmt]:
        for node in body:
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                yield from walk(node.orelse)
            elif isinstance(node, (ast.If, ast.Try, ast.With)):
                for part in ("body", "orelse", "finalbody"):
                    yield from walk(getattr(node, part, []))
                for handler in getattr(node, "handlers", []):
                    yield from walk(handler.body)
            elif isinstance(node, ast.ClassDef):
                yield from walk(node.body)
            else:
                yield node

    for node in walk(ast.parse(path.read_text()).body):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own(path: Path) -> Iterator[str]:
    """The units of this package that a file imports; `from lightning_tp import apply, Plan` is `apply` and `__init__`."""
    units = {unit(source) for source in SOURCES}
    for name in at_module_level(path):
        package, _, rest = name.partition(".")
        if package == "lightning_tp":
            first = rest.partition(".")[0]
            yield first if first in units else "__init__"


def test_every_file_has_a_layer() -> None:
    known = set().union(*LAYERS)
    new = sorted({unit(source) for source in SOURCES} - known)
    assert not new, f"{new}: say in LAYERS (tests/test_layers.py) what these may import, and DESIGN.md section 4 with it"


@pytest.mark.parametrize("source", SOURCES)
def test_lower_layers_do_not_import_higher_ones(source: str) -> None:
    above = sorted(name for name in set(own(ROOT / source)) if layer(name) > layer(unit(source)))
    assert not above, (
        f"{source} imports {above}, which stand above it; import them inside the function that needs them, or move the code"
    )


@pytest.mark.parametrize("source", SOURCES)
def test_only_the_top_knows_lightning(source: str) -> None:
    packages = {name.partition(".")[0] for name in at_module_level(ROOT / source)}
    if unit(source) not in KNOWS_LIGHTNING:
        assert not packages & {"lightning", "pytorch_lightning", "lightning_utilities", "torchmetrics"}
    late = packages & IMPORTED_LATE - ({"pytest"} if source == PYTEST_ONLY else set())
    assert not late, f"{source} imports {late} when it is imported; they are extras, or slow"


@pytest.mark.parametrize("source", [s for s in SOURCES if unit(s) != "_compat"])
def test_private_parts_of_torch_are_named_in_one_file(source: str) -> None:
    """Whatever may move with the next version of torch: modules and names with an underscore."""
    names = [name for name in at_module_level(ROOT / source) if name.startswith("torch.")]
    private = [name for name in names if any(part.startswith("_") for part in name.split("."))]
    assert [name for name in private if not name.startswith(PUBLIC_IN_ALL_BUT_NAME)] == []


# what torch's own notes on extending it tell to import
PUBLIC_IN_ALL_BUT_NAME = ("torch.utils._pytree.", "torch.utils._python_dispatch.", "torch._ops.OpOverload")


def test_there_are_no_cycles() -> None:
    """Not even inside a layer: files that import each other can only be read together."""
    modules = {"lightning_tp." + s.removesuffix(".py").replace("/", ".").removesuffix(".__init__"): s for s in SOURCES}
    edges: dict[str, set[str]] = {}
    for module, source in modules.items():
        found = set()
        for name in at_module_level(ROOT / source):
            found |= {name, name.rpartition(".")[0]} & modules.keys()
        edges[module] = found - {module}
    left = dict(edges)
    while ends := [m for m, to in left.items() if not to & left.keys()]:
        for m in ends:
            del left[m]
    cycle = {m: sorted(to & left.keys()) for m, to in left.items()}
    assert not cycle, f"import cycle among {cycle}"


def test_the_core_runs_without_lightning() -> None:
    """In a process of its own: no file below the top brings Lightning in through the back door."""
    core = sorted({f"lightning_tp.{unit(s)}" for s in SOURCES if unit(s) not in KNOWS_LIGHTNING})
    code = (
        "import sys, types\n"
        f"package = types.ModuleType('lightning_tp'); package.__path__ = [{str(ROOT)!r}]\n"
        "sys.modules['lightning_tp'] = package\n"  # without running its __init__
        f"for name in {core!r}: __import__(name)\n"
        "assert 'lightning' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
