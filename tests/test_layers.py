"""Imports go one way: `FLOORS` is the order, and all imports of all files are held against it. And `tests/` mirrors the package, file by file.

All means: at the top of a file, inside functions, and under `TYPE_CHECKING`. An import inside a function is as much of a circle as any other.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning_tp

ROOT = Path(lightning_tp.__file__).parent
TESTS = Path(__file__).parent

# The one place where the order of the package is written down, from the ground up: what stands in a row may import from the rows before it.
# Where a row names several, none of them imports another. docs/architecture.md shows the same as a picture.
FLOORS: list[set[str]] = [
    {"errors", "_compat"},
    {"core"},
    {"styles", "data"},
    {"plan", "shards"},
    {"checkpoint"},
    {"apply"},
    {"infer"},
    {"estimate", "verify"},
    {"trainer", "callbacks", "testing", "cli"},
    {"pytorch_lightning", "__main__", "__init__"},
]
# The same inside of folders that have folders. A folder's own files stand above its subfolders, or where "." is; its `__init__` above all.
SUBFOLDERS: dict[str, list[str]] = {
    "core": [".", "comm", "modules", "ops"],
    "styles": [".", "calls"],
    "checkpoint": ["storage", "weights"],
    "infer": ["follow", "calls", "blocks", "sequence"],
    "estimate": ["trace", "rank", "cost", "report", "drawn"],
    "trainer": ["patches", "launch", "adapt"],
    "cli": ["targets"],
}
KNOWS_LIGHTNING = {"trainer", "callbacks", "cli", "pytorch_lightning", "__init__"}
IMPORTED_LATE = {
    "transformers",
    "timm",
    "safetensors",
    "huggingface_hub",
    "matplotlib",
    "jinja2",
    "rich",
    "jsonargparse",
    "numpy",
    "pytest",
}
PYTEST_ONLY = "testing/fixtures.py"
# what torch's own notes on extending it tell to import
PUBLIC_IN_ALL_BUT_NAME = ("torch.utils._pytree.", "torch.utils._python_dispatch.", "torch._ops.OpOverload")

# Tests of the package as a whole; what crosses files stands in tests/scenarios/.
OF_THE_WHOLE = {"test_layers.py", "test_private_names.py"}

SOURCES = {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text()) for path in sorted(ROOT.rglob("*.py"))}


def module_of(source: str) -> str:
    """`styles/base.py` -> `styles.base`, `styles/__init__.py` -> `styles`, `__init__.py` -> ``."""
    return source.removesuffix(".py").replace("/", ".").removesuffix("__init__").removesuffix(".")


MODULES = {module_of(source): source for source in SOURCES}


def imports(tree: ast.AST, *, late: bool = True) -> Iterator[str]:
    """The dotted names that a file imports; `from a import b` gives `a.b`. Without `late`, only those at the top that run on import."""
    for node in ast.walk(tree) if late else _at_the_top(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _at_the_top(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from (child for other in node.orelse for child in (other, *_at_the_top(other)))
            continue
        yield node
        yield from _at_the_top(node)


def own_imports(source: str) -> set[str]:
    """The modules of this package that a file imports, without the leading `lightning_tp.`; itself left out."""
    found = set()
    for name in imports(SOURCES[source]):
        package, _, rest = name.partition(".")
        if package == "lightning_tp":
            while rest and rest not in MODULES:
                rest = rest.rpartition(".")[0]
            found.add(rest)
    return found - {module_of(source)}


IMPORTS = {module_of(source): own_imports(source) for source in SOURCES}
# a folder's `__init__` that only lists names is the face of the folder, and no file of its own
FACES = {
    module
    for module, source in MODULES.items()
    if source.endswith("__init__.py") and not any(isinstance(n, (ast.FunctionDef, ast.ClassDef)) for n in SOURCES[source].body)
}


def floor_of(module: str) -> int:
    unit = module.partition(".")[0] or "__init__"
    return next((i for i, row in enumerate(FLOORS) if unit in row), -1)


def test_every_file_and_folder_has_a_floor() -> None:
    homeless = sorted({source for source in SOURCES if floor_of(module_of(source)) < 0})
    assert not homeless, f"{homeless}: say in FLOORS what these may import, and docs/architecture.md with it"
    folders = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("*/*/") if (path / "__init__.py").exists()}
    assert folders == {f"{folder}/{sub}" for folder, subs in SUBFOLDERS.items() for sub in subs if sub != "."}


def of_all(look: Callable[[str], Any], sources: Iterable[str] = SOURCES) -> None:
    """Look at all files, and fail with what is found in any: {file: what}. A test for each file would take a minute."""
    found = {source: what for source in sources if (what := look(source))}
    assert not found, found


def test_lower_floors_do_not_import_higher_ones() -> None:
    def above(source: str) -> list[str]:
        module = module_of(source)
        unit, floor = module.partition(".")[0], floor_of(module)
        others = {m for m in IMPORTS[module] if m.partition(".")[0] != unit}
        return sorted(m or "lightning_tp" for m in others if floor_of(m) >= floor)

    of_all(above)  # imports of what stands beside or above: move the code to where it belongs


def test_subfolders_do_not_import_what_stands_above_them() -> None:
    def level(module: str, folder: str) -> int:
        parts, names = module.split("."), SUBFOLDERS[folder]
        sub = "" if len(parts) == 1 else parts[1] if parts[1] in names else "."
        return names.index(sub) if sub in names else len(names)

    def above(source: str) -> list[str]:
        module = module_of(source)
        folder = module.partition(".")[0]
        inside = {m for m in IMPORTS[module] if m.partition(".")[0] == folder and m not in FACES}
        return [] if module in FACES else sorted(m for m in inside if level(m, folder) > level(module, folder))

    of_all(above, [s for s in SOURCES if s.count("/") and s.partition("/")[0] in SUBFOLDERS])


def circles(graph: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """What is left of a graph when all that leads out of every circle is taken away; empty without a circle."""
    left = {node: set(to) & graph.keys() for node, to in graph.items()}
    while True:
        ends = {n for n, to in left.items() if not to & left.keys()}
        ends |= {n for n in left if not any(n in to for m, to in left.items() if m != n)}
        if not ends:
            return {n: to & left.keys() for n, to in left.items()}
        left = {n: to for n, to in left.items() if n not in ends}


def test_no_files_import_each_other() -> None:
    """Not even inside a folder: files that import each other can only be read together."""
    assert not circles({m: {to for to in found if to not in FACES} for m, found in IMPORTS.items() if m not in FACES})


def test_no_folders_import_each_other() -> None:
    folders: dict[str, set[str]] = {}
    for module, found in IMPORTS.items():
        if module not in FACES:
            folder = module.partition(".")[0]
            folders.setdefault(folder, set()).update(to.partition(".")[0] for to in found)
    assert not circles({folder: to - {folder} for folder, to in folders.items()})


def test_only_the_top_knows_lightning() -> None:
    def lightning(source: str) -> set[str]:
        packages = {name.partition(".")[0] for name in imports(SOURCES[source])}
        at_top = (module_of(source).partition(".")[0] or "__init__") in KNOWS_LIGHTNING
        return set() if at_top else packages & {"lightning", "pytorch_lightning", "lightning_utilities", "torchmetrics"}

    of_all(lightning)


def test_extras_and_slow_packages_are_imported_late() -> None:
    def at_once(source: str) -> set[str]:
        found = {name.partition(".")[0] for name in imports(SOURCES[source], late=False)}
        return found & IMPORTED_LATE - ({"pytest"} if source == PYTEST_ONLY else set())

    of_all(at_once)


def test_private_parts_of_torch_are_named_in_one_folder() -> None:
    """Whatever may move with the next version of torch: modules and names with an underscore."""

    def private(source: str) -> list[str]:
        names = [name for name in imports(SOURCES[source]) if name.startswith("torch.")]
        names = [name for name in names if any(part.startswith("_") for part in name.split("."))]
        return [name for name in names if not name.startswith(PUBLIC_IN_ALL_BUT_NAME)]

    of_all(private, [s for s in SOURCES if not s.startswith("_compat/")])


def counterparts() -> dict[str, str]:
    """What the mirror asks for: a file of the package -> its test, a test -> its file; both relative to the root of the repository."""
    files = [source for source in SOURCES if not source.endswith("__init__.py")]
    tests = [path.relative_to(TESTS).as_posix() for path in sorted(TESTS.rglob("test_*.py"))]
    tests = [test for test in tests if test not in OF_THE_WHOLE and not test.startswith(("scenarios/", "cuda/"))]
    asked = {f"lightning_tp/{file}": f"tests/{_in_same_folder(file, 'test_' + Path(file).name)}" for file in files}
    return asked | {
        f"tests/{test}": f"lightning_tp/{_in_same_folder(test, Path(test).name.removeprefix('test_'))}" for test in tests
    }


def _in_same_folder(path: str, name: str) -> str:
    return Path(path).with_name(name).as_posix()


def test_tests_mirror_the_package() -> None:
    missing = {here: there for here, there in counterparts().items() if not (ROOT.parent / there).is_file()}
    tests = {here: there for here, there in missing.items() if here.startswith("tests/")}
    assert not tests, (
        f"these test no file of this name: move their tests to the files that they test, or to tests/scenarios/ or tests/cuda/: {tests}"
    )
    assert not missing, f"these have no test: {missing}"


def test_the_core_runs_without_lightning() -> None:
    """In a process of its own: no file below the top brings Lightning in through the back door."""
    core = sorted(
        f"lightning_tp.{m}" for m in MODULES if m and (m.partition(".")[0]) not in KNOWS_LIGHTNING | {"testing", "__main__"}
    )
    code = (
        "import sys, types\n"
        f"package = types.ModuleType('lightning_tp'); package.__path__ = [{str(ROOT)!r}]\n"
        "sys.modules['lightning_tp'] = package\n"  # without running its __init__
        f"for name in {core!r}: __import__(name)\n"
        "assert 'lightning' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
