"""A module's own functions, with single calls in them handed to the module itself: `x.view(..)` becomes `self._local_call(k, x.view, ..)`.

Made from the source of the function at the place that a plan names, with the same globals, closure, file and line numbers. A function mode
sees the same calls, and all others as well, at a microsecond or two for each; this costs nothing but where a call changes. Code whose
source does not say enough is left to the mode.
"""

from __future__ import annotations
import __future__

import ast
import inspect
import itertools
import re
import types
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any

from torch import nn

AT = tuple[tuple[str, str], ...]  # see `call_site`
_FUTURE = sum(getattr(__future__, name).compiler_flag for name in __future__.all_feature_names)
# what a function mode is given of these is what the code writes; functions of torch that are written in Python get theirs rearranged
AS_WRITTEN = frozenset({"view", "reshape", "expand", "repeat", "size", "__get__", "split", "chunk", "conv1d", "conv2d", "conv3d"})


def rewritten(cls: type, calls: Iterable[tuple[str, AT]], to: str) -> dict[str, types.FunctionType] | None:
    """The methods of `cls` that make these calls, where each is handed to the method `to` of the module: (which, what, arguments).

    Args:
        cls: the class of the module.
        calls: (name of the torch function, its place in the code) of each; "__get__" is a read of `.shape`.
        to: the name of the method that is called instead.

    Returns:
        Name -> function; None if the source of one of them can't be had, or does not show the call just there.
    """
    wanted: dict[str, dict[tuple[str, int, int], int]] = {}  # method -> (name, line and column where it ends) -> number of the call
    outer: dict[str, str] = {"forward": ""}
    for number, (name, at) in enumerate(calls):
        methods = [(m, where) for m, where in at if not m.startswith("<")]
        if name not in AS_WRITTEN or not at or any(m.startswith("<lambda") for m, _ in at) or methods[-1][0] != "forward":
            return None
        inner = methods[0][0]
        for (a, _), (b, _) in itertools.pairwise(methods):
            if outer.setdefault(a, b) != b or not _called_once(cls, a, b):
                return None  # called from two places: what it calls may change in one only
        end = _end(cls, inner, at[: [m for m, _ in at].index(inner) + 1])
        if end is None or wanted.setdefault(inner, {}).setdefault((name, *end), number) != number:
            return None
    made = {m: _rewrite(_plain(cls, m), where, to) for m, where in wanted.items()}
    return None if None in made.values() else made  # type: ignore[return-value]


def _called_once(cls: type, method: str, by: str) -> bool:
    """Whether one place in the code of this class names the method, and it is in `by`."""
    caller = _plain(cls, by)
    source = None if caller is None else _source(caller)
    if source is None or len(re.findall(rf"\.{method}\b", source[0])) != 1:
        return False
    others = (
        f
        for c in cls.__mro__
        if c is not nn.Module
        for f in vars(c).values()
        if isinstance(f, types.FunctionType) and f is not caller
    )
    return not any(method in names for f in others for names in _names(f.__code__))


def _names(code: types.CodeType) -> Iterator[tuple[str, ...]]:
    yield code.co_names
    for c in code.co_consts:
        if isinstance(c, types.CodeType):
            yield from _names(c)


def _plain(cls: type, method: str) -> types.FunctionType | None:
    """The plain function that `cls` has under this name."""
    found = inspect.getattr_static(cls, method, None)
    return found if isinstance(found, types.FunctionType) and found.__code__.co_name == method else None


def _end(cls: type, method: str, at: AT) -> tuple[int, int] | None:
    """Line and column where the call ends, in a function or in what is nested in it (a comprehension)."""
    function = _plain(cls, method)
    if function is None:
        return None
    codes = [function.__code__]
    for nested, _ in at[-2::-1]:
        codes = [c for code in codes for c in code.co_consts if isinstance(c, types.CodeType) and c.co_name == nested]
    if len({code.co_firstlineno for code in codes}) != 1 or ":" not in at[0][1]:
        return None
    line, column = at[0][1].rpartition("-")[2].split(":")
    return codes[0].co_firstlineno + int(line), int(column)


@lru_cache(maxsize=1024)
def _source(function: types.FunctionType) -> tuple[str, int] | None:
    try:
        lines, first = inspect.getsourcelines(function)
    except (OSError, TypeError):
        return None
    return "".join(lines), first


def _rewrite(function: types.FunctionType | None, where: Mapping[tuple[str, int, int], int], to: str) -> types.FunctionType | None:
    source = None if function is None else _source(function)
    if function is None or source is None:
        return None
    code = function.__code__
    text, first = source
    if text[:1].isspace():  # the columns stay
        text, first = f"if 1:\n{text}", first - 1
    try:
        tree = ast.increment_lineno(ast.parse(text), first - 1)
    except SyntaxError:
        return None
    body: Any = tree.body[0].body if isinstance(tree.body[0], ast.If) else tree.body
    definition = body[0]
    arguments = [*definition.args.posonlyargs, *definition.args.args] if isinstance(definition, ast.FunctionDef) else []
    mangled = any(n.startswith("__") and not n.endswith("__") for n in (*code.co_names, *code.co_varnames, *code.co_freevars))
    if not arguments or definition.name != code.co_name or mangled or "__class__" in code.co_freevars:
        return None
    swap = _Swap(dict(where), arguments[0].arg, to)
    definition.body = [swap.visit(statement) for statement in definition.body]
    if swap.left or arguments[0].arg in swap.stored:
        return None
    definition.decorator_list = []
    ast.fix_missing_locations(tree)
    cells = dict(zip(code.co_freevars, function.__closure__ or (), strict=True))
    around = ast.parse(f"def around({', '.join(cells)}): pass")
    around.body[0].body = [definition]  # type: ignore[attr-defined]  # its free variables are the arguments of this one
    compiled = compile(around, code.co_filename, "exec", flags=code.co_flags & _FUTURE, dont_inherit=True)
    inner = next(
        c for a in compiled.co_consts if isinstance(a, types.CodeType) for c in a.co_consts if isinstance(c, types.CodeType)
    )
    if inner.co_name != code.co_name or not set(inner.co_freevars) <= set(cells):
        return None
    closure = tuple(cells[name] for name in inner.co_freevars)
    made = types.FunctionType(inner, function.__globals__, function.__name__, function.__defaults__, closure)
    made.__kwdefaults__ = function.__kwdefaults__
    made.__qualname__, made.__module__, made.__doc__ = function.__qualname__, function.__module__, function.__doc__
    made.__annotations__ = function.__annotations__
    return made


class _Swap(ast.NodeTransformer):
    def __init__(self, left: dict[tuple[str, int, int], int], self_name: str, to: str) -> None:
        self.left, self.self_name, self.to = left, self_name, to
        self.stored: set[str] = set()

    def visit_Name(self, node: ast.Name) -> ast.AST:
        if not isinstance(node.ctx, ast.Load):
            self.stored.add(node.id)
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        number = self.left.pop((name, node.end_lineno or 0, node.end_col_offset or 0), None)
        return node if number is None else self._call(number, [node.func, *node.args], node.keywords, node)

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        self.generic_visit(node)
        if node.attr != "shape" or not isinstance(node.ctx, ast.Load):
            return node
        number = self.left.pop(("__get__", node.end_lineno or 0, node.end_col_offset or 0), None)
        return node if number is None else self._call(number, [ast.Constant(None), node.value], [], node)

    def _call(self, number: int, args: list[ast.expr], keywords: list[ast.keyword], node: ast.expr) -> ast.AST:
        method = ast.Attribute(ast.Name(self.self_name, ast.Load()), self.to, ast.Load())
        return ast.copy_location(ast.Call(method, [ast.Constant(number), *args], keywords), node)
