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
    """Find the row of `PATCHES` for an attribute of a module, a class or an object.

    Example:
        >>> import torch
        >>> patch_of(torch, "seed").by
        'core/ops/random_numbers.py'
    """
    rows = {patch.target: patch for patch in PATCHES}
    if isinstance(owner, ModuleType):
        return rows[f"{owner.__name__}:{name}"]
    classes = inspect.getmro(owner if isinstance(owner, type) else type(owner))
    targets = [f"{cls.__module__}:{cls.__qualname__}.{name}" for cls in classes]
    found = next((rows[target] for target in targets if target in rows), None)
    if found is None:
        raise KeyError(f"{targets[0]} is not in PATCHES of trainer/patches/table.py")
    return found


def original_of(patch: Patch) -> Any:
    """Look up what a patch replaces, as the other package defines it, also where it is replaced at the moment.

    Raises:
        ImportError: If there is no such module.
        AttributeError: If there is no such name in it.
    """
    module, _, path = patch.target.partition(":")
    found: Any = import_module(module)
    for name in path.split("."):
        found = inspect.getattr_static(found, name) if isinstance(found, type) else getattr(found, name)
    found = found.__func__ if isinstance(found, (staticmethod, classmethod)) else found
    return getattr(found, ORIGINAL, found)


def change_of(patch: Patch) -> str | None:
    """Compare the signature that a patch relies on with the installed package's.

    Further parameters with a default value are not a change: replacements pass on what they do not know.

    Returns:
        What has changed, as a sentence; None if nothing has.
    """
    if patch.signature is None:
        return None
    name = patch.target.partition(":")[2]
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
    return f"{package} changed `{name}{patch.signature}` to `{name}({shown})`."


def is_usable(patch: Patch) -> bool:
    """Whether a patch still fits the installed package; warns if it does not.

    Raises:
        TPError: If results would be wrong without the patch.
    """
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
def replaced(owner: Any, name: str, wrap: Callable[[Any], Any]) -> Iterator[None]:
    """Replace an attribute of a module, class or object while this lasts, if its signature is still the one that `PATCHES` lists.

    Args:
        owner: The module, class or object.
        name: The attribute.
        wrap: Makes the replacement from the original (of an object's method: the bound one).
    """
    if not is_usable(patch_of(owner, name)):
        yield
        return
    own = getattr(owner, name)
    replacement = wrap(own)
    if isinstance(owner, (type, ModuleType)):
        setattr(replacement.__func__ if isinstance(replacement, staticmethod) else replacement, ORIGINAL, own)
    undo = patched(owner, name, replacement)
    try:
        yield
    finally:
        undo()


def replace(owner: Any, name: str, wrap: Callable[[Any], Callable[..., Any]]) -> None:
    """Replace a function for good, likewise; once. The replacement has to run the original for everybody else."""
    own = getattr(owner, name)
    if hasattr(own, ORIGINAL) or not is_usable(patch_of(owner, name)):
        return
    replacement = functools.wraps(own)(wrap(own))
    setattr(replacement, ORIGINAL, own)
    setattr(owner, name, replacement)
