"""Rewrite single calls in the methods of a class: `x.view(..)` becomes `self._local_call(k, x.view, ..)`.

The functions are made from their source at the places that a plan names, with the same globals, closure, file and line numbers. A function
mode could intercept the same calls, but would see all others as well, at a microsecond or two for each; this costs nothing but where a call
changes. Code whose source does not say enough is left to the mode.
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
from typing import TypeAlias

from torch import nn

from lightning_tp.core.modules.call_site import CallSite

CallEnd: TypeAlias = "tuple[str, int, int]"  # the name of a torch function, and line and column where its call ends in the file

_FUTURE_FLAGS = sum(getattr(__future__, name).compiler_flag for name in __future__.all_feature_names)
# a function mode is given what the code writes for these; functions of torch that are written in Python get their arguments rearranged
AS_WRITTEN = frozenset({"view", "reshape", "expand", "repeat", "size", "__get__", "split", "chunk", "conv1d", "conv2d", "conv3d"})


def rewrite_methods(cls: type, calls: Iterable[tuple[str, CallSite]], handler: str) -> dict[str, types.FunctionType] | None:
    """Return the methods of a class that make these calls, each call handed to a method of the module instead.

    Args:
        cls: the class of the module.
        calls: (name of the torch function, its call site) of each; "__get__" is a read of `.shape`.
        handler: the name of that method. It gets the number of the call, the function, and the arguments.

    Returns:
        Name -> function; None if the source of one of them can't be read, or shows no such call at its place.
    """
    numbers: dict[str, dict[CallEnd, int]] = {}  # method -> end of a call -> its number
    callers: dict[str, str] = {"forward": ""}
    for number, (name, site) in enumerate(calls):
        found = _locate(cls, name, site, callers)
        if found is None:
            return None
        method, end = found
        if numbers.setdefault(method, {}).setdefault(end, number) != number:
            return None  # two calls at one place, in turn
    methods = {method: _rewrite(_function_of(cls, method), ends, handler) for method, ends in numbers.items()}
    return None if None in methods.values() else methods  # type: ignore[return-value]


def _locate(cls: type, name: str, site: CallSite, callers: dict[str, str]) -> tuple[str, CallEnd] | None:
    """Return the method that makes a call, and where the call ends; None if it can't be told apart. `callers`: who calls each method."""
    chain = [function for function, _ in site if not function.startswith("<")]
    is_readable = name in AS_WRITTEN and bool(site) and not any(function.startswith("<lambda") for function, _ in site)
    if not is_readable or chain[-1] != "forward":
        return None
    for inner, outer in itertools.pairwise(chain):
        if callers.setdefault(inner, outer) != outer or not _is_called_once(cls, inner, outer):
            return None  # called from two places: what it calls may change in one only
    method = chain[0]
    end = _end_of_call(cls, method, site[: [function for function, _ in site].index(method) + 1])
    return None if end is None else (method, (name, *end))


def _is_called_once(cls: type, method: str, by: str) -> bool:
    """Whether one place in the code of a class names the method, and that is in `by`."""
    caller = _function_of(cls, by)
    source = None if caller is None else _source(caller)
    if source is None or len(re.findall(rf"\.{method}\b", source[0])) != 1:
        return False
    attributes = (f for c in cls.__mro__ if c is not nn.Module for f in vars(c).values())
    others = (f for f in attributes if isinstance(f, types.FunctionType) and f is not caller)
    return not any(method in names for f in others for names in _names_in(f.__code__))


def _names_in(code: types.CodeType) -> Iterator[tuple[str, ...]]:
    yield code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names_in(constant)


def _function_of(cls: type, method: str) -> types.FunctionType | None:
    """The plain function that a class has under this name."""
    found = inspect.getattr_static(cls, method, None)
    return found if isinstance(found, types.FunctionType) and found.__code__.co_name == method else None


def _end_of_call(cls: type, method: str, site: CallSite) -> tuple[int, int] | None:
    """Line and column where a call ends that a method makes, or a function that is nested in it (a comprehension)."""
    function = _function_of(cls, method)
    if function is None:
        return None
    codes = [function.__code__]
    for nested, _ in site[-2::-1]:
        codes = [c for code in codes for c in code.co_consts if isinstance(c, types.CodeType) and c.co_name == nested]
    if len({code.co_firstlineno for code in codes}) != 1 or ":" not in site[0][1]:
        return None
    line, column = site[0][1].rpartition("-")[2].split(":")
    return codes[0].co_firstlineno + int(line), int(column)


@lru_cache(maxsize=1024)
def _source(function: types.FunctionType) -> tuple[str, int] | None:
    """The source of a function, and its first line in the file."""
    try:
        lines, first = inspect.getsourcelines(function)
    except (OSError, TypeError):
        return None
    return "".join(lines), first


def _rewrite(function: types.FunctionType | None, numbers: Mapping[CallEnd, int], handler: str) -> types.FunctionType | None:
    """Return a function with these calls handed over; None if its source does not show them."""
    definition = None if function is None else _definition(function)
    if function is None or definition is None:
        return None
    self_name = [*definition.args.posonlyargs, *definition.args.args][0].arg
    swap = _HandOver(dict(numbers), self_name, handler)
    definition.body = [swap.visit(statement) for statement in definition.body]
    if swap.missing or self_name in swap.assigned:
        return None
    definition.decorator_list = []
    return _compiled(definition, function)


def _definition(function: types.FunctionType) -> ast.FunctionDef | None:
    """Parse a method; None if compiling it again would give another function, as it uses private names of a class or `super()`."""
    code, source = function.__code__, _source(function)
    mangled = any(n.startswith("__") and not n.endswith("__") for n in (*code.co_names, *code.co_varnames, *code.co_freevars))
    if source is None or mangled or "__class__" in code.co_freevars:
        return None
    text, first = source
    if text[:1].isspace():  # the columns stay
        text, first = f"if 1:\n{text}", first - 1
    try:
        tree = ast.increment_lineno(ast.parse(text), first - 1)
    except SyntaxError:
        return None
    statement = tree.body[0]
    found = statement.body[0] if isinstance(statement, ast.If) else statement
    if not isinstance(found, ast.FunctionDef) or found.name != code.co_name:
        return None
    return found if found.args.posonlyargs or found.args.args else None


def _compiled(definition: ast.FunctionDef, original: types.FunctionType) -> types.FunctionType | None:
    """Compile a changed definition of a function, with the globals, closure, defaults and names of the original."""
    code = original.__code__
    cells = dict(zip(code.co_freevars, original.__closure__ or (), strict=True))
    around = ast.parse(f"def around({', '.join(cells)}): pass")
    around.body[0].body = [definition]  # type: ignore[attr-defined]  # its free variables are the arguments of this one
    ast.fix_missing_locations(around)
    outer = compile(around, code.co_filename, "exec", flags=code.co_flags & _FUTURE_FLAGS, dont_inherit=True)
    inner = outer
    for _ in range(2):
        inner = next(c for c in inner.co_consts if isinstance(c, types.CodeType))
    if inner.co_name != code.co_name or not set(inner.co_freevars) <= set(cells):
        return None
    closure = tuple(cells[name] for name in inner.co_freevars)
    made = types.FunctionType(inner, original.__globals__, original.__name__, original.__defaults__, closure)
    made.__kwdefaults__, made.__annotations__ = original.__kwdefaults__, original.__annotations__
    made.__qualname__, made.__module__, made.__doc__ = original.__qualname__, original.__module__, original.__doc__
    return made


class _HandOver(ast.NodeTransformer):
    """Replaces the calls that end at given places."""

    def __init__(self, numbers: dict[CallEnd, int], self_name: str, handler: str) -> None:
        self.missing, self.self_name, self.handler = numbers, self_name, handler  # `missing`: not found so far
        self.assigned: set[str] = set()  # names that the code assigns to

    def visit_Name(self, node: ast.Name) -> ast.AST:
        if not isinstance(node.ctx, ast.Load):
            self.assigned.add(node.id)
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        return self._handed_over(name, [node.func, *node.args], node.keywords, node)

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        self.generic_visit(node)
        if node.attr != "shape" or not isinstance(node.ctx, ast.Load):
            return node
        return self._handed_over("__get__", [ast.Constant(None), node.value], [], node)

    def _handed_over(self, name: str, args: list[ast.expr], keywords: list[ast.keyword], node: ast.expr) -> ast.AST:
        number = self.missing.pop((name, node.end_lineno or 0, node.end_col_offset or 0), None)
        if number is None:
            return node
        method = ast.Attribute(ast.Name(self.self_name, ast.Load()), self.handler, ast.Load())
        return ast.copy_location(ast.Call(method, [ast.Constant(number), *args], keywords), node)
