"""The same strategy and callbacks for `import pytorch_lightning as pl`: `from lightning_tp.pytorch_lightning import TPStrategy`.

`pytorch_lightning` and `lightning.pytorch` are one code base under two names, and each refuses the other's classes. So the files of this package
that know a Trainer are run a second time, with the names of the other package in their source (Lightning makes its own copy in the same
way). Everything else (`Plan`, `parallelize`, `RandomTokens`, ..) is in `lightning_tp` for both.

Example:
    >>> import pytorch_lightning as pl
    >>> from lightning_tp.pytorch_lightning import TPStrategy
    >>> pl.Trainer(accelerator="cpu", devices=2, strategy=TPStrategy(tp=2), logger=False).strategy.sizes
    (1, 2)
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_tp.errors import TPError

TWINS = ("callbacks", "trainer")  # the folders that know a Trainer
NAMES = {
    r"\blightning\.pytorch\b": "pytorch_lightning",
    r"\blightning\.fabric\b": "lightning_fabric",
    r"\bimport lightning as L\b": "import pytorch_lightning as L",
    rf"\blightning_tp\.({'|'.join(TWINS)})\b": rf"{__name__}.\1",
    rf"\bfrom lightning_tp import ({'|'.join(TWINS)})\b": rf"from {__name__} import \1",
}
__path__: list[str] = []  # a package: its modules are made here, none is found in a folder


def _load(name: str) -> None:
    """Make the module `lightning_tp.pytorch_lightning.<name>` from the source of `lightning_tp.<name>`, after those that it imports."""
    twin = f"{__name__}.{name}"
    source = Path(__file__).parent / name.replace(".", "/")
    folder = [str(source)] if source.is_dir() else None
    file = source / "__init__.py" if folder else source.with_suffix(".py")
    if twin in sys.modules or not file.exists():
        return
    spec = spec_from_file_location(twin, file, submodule_search_locations=folder)
    assert spec is not None
    module = sys.modules[twin] = module_from_spec(spec)
    text = file.read_text(encoding="utf-8")
    for ours, theirs in NAMES.items():
        text = re.sub(ours, theirs, text)
    for needed in _imports(text):
        _load(needed)
    exec(compile(text, file, "exec"), module.__dict__)
    parent, _, last = twin.rpartition(".")
    setattr(sys.modules[parent], last, module)


def _imports(text: str) -> Iterator[str]:
    """The modules that a source imports from here, and the folders that they are in."""
    for node in ast.walk(ast.parse(text)):
        names = [f"{node.module}.{alias.name}" for alias in node.names] if isinstance(node, ast.ImportFrom) else []
        for name in names:
            parts = name.removeprefix(f"{__name__}.").split(".") if name.startswith(f"{__name__}.") else []
            yield from (".".join(parts[:n]) for n in range(1, len(parts) + 1))


if find_spec("pytorch_lightning") is None:
    raise TPError("`lightning_tp.pytorch_lightning` is for the package `pytorch_lightning`, which is not installed here.")
for _name in TWINS:
    _load(_name)
for _name in ("trainer.mixin", "trainer.strategy"):
    _load(_name)

if TYPE_CHECKING:
    from lightning_tp.callbacks import ShardSummary as ShardSummary
    from lightning_tp.callbacks import Throughput as Throughput
    from lightning_tp.trainer.mixin import TensorParallel as TensorParallel
    from lightning_tp.trainer.strategy import TPStrategy as TPStrategy
else:
    from lightning_tp.pytorch_lightning.callbacks import ShardSummary as ShardSummary
    from lightning_tp.pytorch_lightning.callbacks import Throughput as Throughput
    from lightning_tp.pytorch_lightning.trainer.mixin import TensorParallel as TensorParallel
    from lightning_tp.pytorch_lightning.trainer.strategy import TPStrategy as TPStrategy
