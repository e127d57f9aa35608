"""A rule of a plan, and the entry that it becomes for one module of a model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

from lightning_tp.errors import TPError
from lightning_tp.styles import Split, Style, make_style

CATCH_ALL = "**"


@dataclass(frozen=True)
class Rule:
    """A pattern, the style of the modules that it matches, and why.

    Example:
        >>> print(Rule("layers.*.mlp.up", "colwise", "read by down on its split dim").style)
        colwise
    """

    pattern: str
    style: Style
    reason: str = ""

    def __init__(self, pattern: str, style: Any, reason: str = "") -> None:
        styles = make_style(style, pattern)
        if len(styles) != 1:  # torch's PrepareModuleInput for several arguments, or for none
            raise TPError(
                f"`{pattern}`: {type(style).__name__} is {len(styles)} styles here. Put it in a plan's dict, or write a rule "
                "for each."
            )
        object.__setattr__(self, "pattern", pattern)
        object.__setattr__(self, "style", styles[0])
        object.__setattr__(self, "reason", reason)

    def matches(self, name: str) -> bool:
        """Whether the pattern stands for this dotted name."""
        return _regex(self.pattern).fullmatch(name) is not None


@dataclass(frozen=True)
class Entry:
    """One module of a checked plan.

    Args:
        where: the module's name from the root.
        style: its style, every option filled in.
        reason: why.
        splits: parameter name from the root -> how it is split.
        shapes: parameter name from the root -> its whole shape.
    """

    where: str
    style: Style
    reason: str
    splits: Mapping[str, Split] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


@cache
def _regex(pattern: str) -> re.Pattern[str]:
    parts = []
    for part in pattern.split("."):
        parts.append("**" if part == CATCH_ALL else "".join("[^.]*" if c == "*" else re.escape(c) for c in part))
    text = r"\.".join(parts)
    text = text.replace(r"**\.", r"(?:[^.]+\.)*").replace(r"\.**", r"(?:\.[^.]+)*").replace("**", ".*")
    return re.compile(text)


def rule_with(rule: Rule, **options: Any) -> Rule:
    """The rule with other options of its style."""
    return Rule(rule.pattern, replace(rule.style, **options), rule.reason)
