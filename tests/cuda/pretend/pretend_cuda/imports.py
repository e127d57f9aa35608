"""Do something just before or just after a module is run for the first time."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, ClassVar


class Imports:
    """A finder that finds nothing by itself, and runs what it was asked to around modules that others find."""

    before: ClassVar[dict[str, Callable[[], Any]]] = {}
    after: ClassVar[dict[str, Callable[[Any], Any]]] = {}

    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: Any = None) -> Any:
        """Return the spec of the next finder, whose loader runs what was asked for as well."""
        before, after = cls.before.pop(name, None), cls.after.pop(name, None)
        if before is None and after is None:
            return None
        for finder in sys.meta_path:
            spec = finder.find_spec(name, path, target) if finder is not cls else None
            if spec is not None and spec.loader is not None:
                spec.loader.exec_module = _between(before, spec.loader.exec_module, after)  # type: ignore[method-assign]
                return spec
        return None


def _between(
    before: Callable[[], Any] | None, run: Callable[[Any], Any], after: Callable[[Any], Any] | None
) -> Callable[[Any], None]:
    def exec_module(module: Any) -> None:
        if before is not None:
            before()
        run(module)
        if after is not None:
            after(module)

    return exec_module


sys.meta_path.insert(0, Imports)  # type: ignore[arg-type]


def once_imported(name: str, do: Callable[[Any], Any]) -> None:
    """Call `do` with a module: now if it is imported already, else when it is."""
    if name in sys.modules:
        do(sys.modules[name])
    else:
        Imports.after[name] = do
