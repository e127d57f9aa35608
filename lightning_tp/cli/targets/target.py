"""`Target`: a model with its inputs and its loss, wherever they came from; and code of the user, which is run and imported to get it.

An error in that code becomes one line that names the file and the line.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from lightning_tp.errors import TPError
from lightning_tp.plan.plan import Plan
from lightning_tp.verify.training import Inputs

THIS_PACKAGE, FOLDERS_OF_OTHERS = Path(__file__).parents[2], {"importlib", "site-packages"}


@dataclass(frozen=True)
class Target:
    """A model to plan, estimate or verify."""

    build: Callable[[], nn.Module]  # builds the model anew
    model: nn.Module  # one such model, possibly on the meta device
    inputs: Inputs  # what its forward is called with
    loss_fn: Callable[..., Tensor]  # a scalar from its output, or from (output, inputs)
    plan: Any = None  # of the script's strategy or of the model, if there is one
    batch: int | None = None  # the batch size of the script's loader, if it is known


def plan_of_module(model: nn.Module) -> Any:
    """Return the attribute `plan` of a module, as a LightningModule may have it, if it can be one."""
    plan = getattr(model, "plan", None)
    return plan if isinstance(plan, (Plan, Mapping, str, Path)) else None


def call_user_code(function: Callable[[], Any], target: str) -> Any:
    """Call a function of the user, named by a TARGET; any error in it, and `sys.exit`, is a TPError."""
    try:
        return function()
    except TPError:
        raise
    except SystemExit as error:
        raise TPError(f"`{target}`: its code called sys.exit({error.code!r}).") from error
    except Exception as error:
        where, traceback = "", error.__traceback__
        while traceback is not None:
            file = traceback.tb_frame.f_code.co_filename
            if not is_of_others(file):
                where = f" ({file}, line {traceback.tb_lineno})"
            traceback = traceback.tb_next
        raise TPError(f"`{target}`: {type(error).__name__}: {error}{where}") from error


def is_of_others(file: str) -> bool:
    """Return whether a file is one of this package, of an installed one, or of Python's import; what a user's folders are called does not matter."""
    path = Path(file)
    return file.startswith("<frozen") or THIS_PACKAGE in path.parents or not FOLDERS_OF_OTHERS.isdisjoint(path.parts)


def import_user_module(name: str, target: str) -> ModuleType:
    """Import `package.module` or `path/to/file.py`, with the folders on `sys.path` that `python` would have."""
    if not name.endswith(".py"):
        if "" not in sys.path and str(Path.cwd()) not in sys.path:  # as with `python -m`; not so for a console script
            sys.path.insert(0, str(Path.cwd()))
        module: ModuleType = call_user_code(lambda: importlib.import_module(name), target)
        return module
    path = Path(name).resolve()
    if not path.is_file():
        raise TPError(f"`{target}`: there is no file {name}.")
    if str(path.parent) not in sys.path:  # as with `python file.py`
        sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module, loader = importlib.util.module_from_spec(spec), spec.loader
    before = sys.modules.get(path.stem)
    sys.modules[path.stem] = module  # dataclasses look for it there
    try:
        call_user_code(lambda: loader.exec_module(module), target)
    except TPError:
        sys.modules.pop(path.stem)
        if before is not None:
            sys.modules[path.stem] = before
        raise
    return module
