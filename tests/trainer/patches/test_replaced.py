"""Patches are made and undone as the table says, and left out, or refused, when the other package has changed."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

from lightning_tp import TPError
from lightning_tp.trainer.patches import replaced as module
from lightning_tp.trainer.patches.replaced import change_of, is_usable, original_of, patch_of, replace, replaced
from lightning_tp.trainer.patches.table import PATCHES, Patch, Scope


class Loop:
    def run(self, state: int, limit: int = 3) -> str:
        return f"own {state} {limit}"

    @staticmethod
    def helper(x: int) -> int:
        return x


def function(a: int, b: int) -> int:
    return a + b


@pytest.fixture
def other(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A package that the table has rows for: `other:Loop.run(self, state)`, `other:function(a, b)` and `other:Loop.helper(x)`."""
    package: Any = ModuleType("other")
    package.function, package.Loop = function, type("Loop", (Loop,), {"__module__": "other", "__qualname__": "Loop", **vars(Loop)})
    package.Loop.__module__ = "other"
    monkeypatch.setitem(sys.modules, "other", package)
    for target, signature, needed in (
        ("other:Loop.run", "(self, state)", False),
        ("other:function", "(a, b)", True),
        ("other:Loop.helper", "(x)", False),
    ):
        monkeypatch.setattr(module, "PATCHES", [*module.PATCHES, Patch(target, signature, Scope.RUN, "x.py", "a reason", needed)])
    module._warn_once.cache_clear()
    yield package


def test_an_object_a_class_and_a_module(other: Any) -> None:
    loop, second = other.Loop(), other.Loop()
    with replaced(loop, "run", lambda own: lambda *args: f"mine around {own(*args)}"):
        assert (loop.run(1), second.run(1)) == ("mine around own 1 3", "own 1 3")
    assert "run" not in vars(loop)
    with replaced(other.Loop, "run", lambda own: lambda self, *args: f"mine {own(self, *args)}"):
        assert second.run(2, 4) == "mine own 2 4"
    with replaced(other.Loop, "helper", lambda own: staticmethod(lambda x: -own(x))):
        assert second.helper(3) == -3 and original_of(patch_of(other.Loop, "helper"))(3) == 3
    with replaced(other, "function", lambda own: lambda a, b: own(a, b) * 10):
        assert other.function(1, 2) == 30 and original_of(patch_of(other, "function")) is function
    assert second.helper(3) == 3 and second.run(2) == "own 2 3" and other.function is function


def test_it_is_undone_after_an_error(other: Any) -> None:
    with pytest.raises(RuntimeError), replaced(other, "function", lambda own: lambda a, b: 0):
        raise RuntimeError
    assert other.function is function


def test_for_good_once(other: Any) -> None:
    for _ in range(2):
        replace(other, "function", lambda own: lambda a, b: own(a, b) + 1)
    assert other.function(1, 2) == 4 and other.function.__name__ == "function"
    assert original_of(patch_of(other, "function")) is function


def test_a_new_parameter_with_a_default_is_passed_on(other: Any) -> None:
    other.Loop.run = lambda self, state, limit=3, new=None: f"{state} {new}"
    assert change_of(patch_of(other.Loop, "run")) is None
    with replaced(other.Loop, "run", lambda own: lambda self, *args, **kwargs: own(self, *args, **kwargs)):
        assert other.Loop().run(1, new=2) == "1 2"


@pytest.mark.parametrize(
    "changed, shown",
    [
        (lambda self, limit, state: "new", "(self, limit, state)"),
        (lambda self, state, limit, extra: "new", "(self, state, limit, extra)"),
        (lambda self, *states: "new", "(self, *states)"),
    ],
    ids=["order", "required", "gone"],
)
def test_what_changed_is_named_and_the_original_stays(other: Any, changed: Any, shown: str) -> None:
    other.Loop.run = changed
    with pytest.warns(UserWarning) as caught, replaced(other.Loop, "run", lambda own: lambda *args: "mine"):
        assert other.Loop.run is changed
    (message,) = [str(w.message) for w in caught]
    assert f"other changed `Loop.run(self, state)` to `Loop.run{shown}`. Its own version stays in place" in message
    assert "this is missing: a reason" in message
    with warnings.catch_warnings():  # once is enough
        warnings.simplefilter("error")
        assert not is_usable(patch_of(other.Loop, "run"))


def test_what_is_gone_is_named(other: Any) -> None:
    patch = patch_of(other, "function")
    del other.function
    assert change_of(patch) == "other has no `other.function` any more."


def test_what_is_needed_is_refused(other: Any) -> None:
    other.function = lambda b, a: 0
    with (
        pytest.raises(TPError, match=r"other changed `function\(a, b\)` to `function\(b, a\)`\. This is needed for: a reason"),
        replaced(other, "function", lambda own: own),
    ):
        raise AssertionError


def test_only_what_is_listed() -> None:
    with pytest.raises(KeyError, match="is not in PATCHES"), replaced(Loop(), "run", lambda own: own):
        raise AssertionError
    assert patch_of(sys, "excepthook") in PATCHES
