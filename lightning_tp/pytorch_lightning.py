"""The same for `import pytorch_lightning as pl`: `from lightning_tp.pytorch_lightning import TPStrategy`.

`pytorch_lightning` and `lightning.pytorch` are one code under two names, and each refuses the other's classes. So are these: what the package
has for a Trainer, with the names of the other one (Lightning's own copy is made in the same way). What knows no Trainer (`Plan`, `parallelize`,
`RandomTokens`, ..) is in `lightning_tp` for both.

Example:
    >>> import pytorch_lightning as pl
    >>> from lightning_tp.pytorch_lightning import TPStrategy
    >>> pl.Trainer(accelerator="cpu", devices=2, strategy=TPStrategy(tp=2), logger=False).strategy.sizes
    (1, 2)
"""

from __future__ import annotations

import re
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from lightning_tp.errors import TPError

TWINS = ("callbacks", "trainer")  # folders that know a Trainer
NAMES = {
    r"\blightning\.pytorch\b": "pytorch_lightning",
    r"\blightning\.fabric\b": "lightning_fabric",
    r"\bimport lightning as L\b": "import pytorch_lightning as L",
    rf"\blightning_tp\.({'|'.join(TWINS)})\b": rf"{__name__}.\1",
    rf"\bfrom lightning_tp import ({'|'.join(TWINS)})\b": rf"from {__name__} import \1",
}
__path__: list[str] = []  # modules can be imported from here


class _Twins(MetaPathFinder, Loader):
    """Finds `lightning_tp.pytorch_lightning.<name>`: the source of `lightning_tp.<name>`, run with the other package's names."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        name = fullname.removeprefix(f"{__name__}.")
        if name == fullname or name.partition(".")[0] not in TWINS:
            return None
        source = Path(__file__).parent / name.replace(".", "/")
        folder = [str(source)] if source.is_dir() else None
        file = source / "__init__.py" if folder else source.with_suffix(".py")
        return spec_from_file_location(fullname, file, loader=self, submodule_search_locations=folder) if file.exists() else None

    def create_module(self, spec: ModuleSpec) -> None:
        return None  # an ordinary one

    def exec_module(self, module: ModuleType) -> None:
        assert module.__file__ is not None
        text = Path(module.__file__).read_text(encoding="utf-8")
        for ours, theirs in NAMES.items():
            text = re.sub(ours, theirs, text)
        exec(compile(text, module.__file__, "exec"), module.__dict__)


if find_spec("pytorch_lightning") is None:
    raise TPError("`lightning_tp.pytorch_lightning` is for the package `pytorch_lightning`, which is not installed here.")
sys.meta_path.insert(0, _Twins())  # before the one that would find the sources as they are

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
