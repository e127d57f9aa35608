"""Replace an attribute of another package that `PATCHES` lists, after a check that it is still what the table says.

If the other package has changed the signature, the original stays in place and a warning names what changed; a patch without which results
would be wrong raises `TPError` instead. Either way only Trainers with this package's strategy are affected.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_tp._compat import patched, version_of
from lightning_tp.errors import TPError
from lightning_tp.trainer.patches.table import PATCHES, Patch

ORIGINAL = "_tp_original"  # the attribute by which a replacement knows what it replaces


def patch_of(owner: Any, name: str) -> Patch:
    """Find the row of `PATCHES` for an attribute of a module, a class or an object."""
    if isinstance(owner, ModuleType):
        targets = [f"{owner.__name__}:{name}"]
    else:
        classes = inspect.getmro(owner if isinstance(owner, type) else type(owner))
        targets = [f"{cls.__module__}:{cls.__qualname__}.{name}" for cls in classes]
    found = next((patch for patch in PATCHES if patch.target in targets), None)
    if found is None:
        raise KeyError(f"{targets[0]} is not in PATCHES of trainer/patches/table.py")
    return found


def original_of(patch: Patch) -> Any:
    """Look up what a patch replaces, as the other package defines it, also where it is replaced at the moment; ImportError or AttributeError."""
    module, _, path = patch.target.partition(":")
    found: Any = import_module(module)
    for name in path.split("."):
        found = inspect.getattr_static(found, name) if isinstance(found, type) else getattr(found, name)
    found = found.__func__ if isinstance(found, (staticmethod, classmethod)) else found
    return getattr(found, ORIGINAL, found)


def change_of(patch: Patch) -> str | None:
    """Say in a sentence how the installed package's signature differs from the one that a patch relies on; None if it does not.

    Further parameters with a default value make no difference: replacements pass on what they do not know.
    """
    if patch.signature is None:
        return None
    package = f"{patch.package} {version_of(patch.package) or ''}".strip()
    try:
        found = inspect.signature(original_of(patch))
    except (ImportError, AttributeError):
        return f"{package} has no `{patch.target.replace(':', '.')}` any more."
    listed = [p for p in patch.signature.strip("()").split(", ") if p and not p.startswith(("*", "/"))]
    named = [p for p in found.parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    same = [p.name for p in named[: len(listed)]] == listed
    if same and all(p.default is not p.empty for p in named[len(listed) :]):
        return None
    shown = ", ".join({"VAR_POSITIONAL": "*", "VAR_KEYWORD": "**"}.get(p.kind.name, "") + p.name for p in found.parameters.values())
    name = patch.target.partition(":")[2]
    return f"{package} changed `{name}{patch.signature}` to `{name}({shown})`."


def is_usable(patch: Patch) -> bool:
    """Whether a patch still fits the installed package; a warning if it does not, and `TPError` if results would be wrong without it."""
    change = change_of(patch)
    if change is None:
        return True
    tested = f"lightning_tp was tested with {patch.package} {', '.join(patch.versions_tested)}."
    if patch.needed:
        raise TPError(
            f"{change} This is needed for: {patch.reason}. {tested} Install one of these versions, or a newer lightning_tp."
        )
    _warn_once(f"{change} Its own version stays in place, so this is missing: {patch.reason}. {tested}")
    return False


@functools.cache
def _warn_once(message: str) -> None:
    rank_zero_warn(message)


@contextmanager
def replaced(owner: Any, name: str, instead: Callable[..., Any]) -> Iterator[None]:
    """While this lasts, `instead(own, *args, **kwargs)` runs where a function `own` of a module, class or object is called."""
    if not is_usable(patch_of(owner, name)):
        yield
        return
    undo = patched(owner, name, _replacement(owner, name, instead))
    try:
        yield
    finally:
        undo()


def replace(owner: Any, name: str, instead: Callable[..., Any]) -> None:
    """Replace a function for good, likewise; once. `instead` has to run the original for everybody else."""
    if not hasattr(getattr(owner, name), ORIGINAL) and is_usable(patch_of(owner, name)):
        setattr(owner, name, _replacement(owner, name, instead))


def _replacement(owner: Any, name: str, instead: Callable[..., Any]) -> Any:
    own = getattr(owner, name)

    @functools.wraps(own)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        return instead(own, *args, **kwargs)

    setattr(replacement, ORIGINAL, own)
    return staticmethod(replacement) if isinstance(inspect.getattr_static(owner, name), staticmethod) else replacement
