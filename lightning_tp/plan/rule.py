"""A rule of a plan: a pattern of names, the style of the modules that it matches, and why.

Patterns are dotted names of modules or parameters. `*` stands for one name, or a part of one; `**` for any number of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

from lightning_tp.core.comm.state import SEQUENCE
from lightning_tp.errors import TPError
from lightning_tp.styles import Sequence, Style, make_style

CATCH_ALL = "**"
USER_PROVIDED = "user-provided"  # the source of a plan that somebody wrote
INFERRED = "inferred"  # how the source of an inferred plan begins: such a plan may rightly shard nothing


@dataclass(frozen=True)
class Rule:
    """A pattern, the style of the modules that it matches, and why.

    Args:
        pattern: a dotted name, with `*` and `**`.
        style: the name of a style, a style with options, or one of torch's.
        reason: why, for the table of the plan.

    Raises:
        TPError: for something that is not one style.

    Example:
        >>> print(Rule("layers.*.mlp.up", "colwise", "output feeds the row-parallel `down`").style)
        colwise
    """

    pattern: str
    style: Style
    reason: str = ""

    def __init__(self, pattern: str, style: Any, reason: str = "") -> None:
        styles = make_style(style, pattern)
        if len(styles) != 1:  # torch's PrepareModuleInput for several arguments, or for none
            raise TPError(
                f"`{pattern}`: {type(style).__name__} is {len(styles)} styles here. Put it in a plan's dict, or write a rule for each."
            )
        object.__setattr__(self, "pattern", pattern)
        object.__setattr__(self, "style", styles[0])
        object.__setattr__(self, "reason", reason)

    def matches(self, name: str) -> bool:
        """Return whether the pattern stands for this dotted name."""
        return _regex(self.pattern).fullmatch(name) is not None

    def without_sequence(self) -> Rule | None:
        """Return the rule for a plan without sequence parallelism; None if nothing is left of it."""
        style = self.style.without_sequence()
        return None if style is None else self if style is self.style else Rule(self.pattern, style, self.reason)


def is_sequence_parallel(rules: Iterable[Rule]) -> bool:
    """Return whether any module runs on this rank's shard of the sequence."""
    return any(
        isinstance(rule.style, Sequence) or SEQUENCE in (getattr(rule.style, option, None) for option in ("output", "wanted"))
        for rule in rules
    )


@cache
def _regex(pattern: str) -> re.Pattern[str]:
    parts = []
    for part in pattern.split("."):
        parts.append("**" if part == CATCH_ALL else "".join("[^.]*" if c == "*" else re.escape(c) for c in part))
    text = r"\.".join(parts)
    text = text.replace(r"**\.", r"(?:[^.]+\.)*").replace(r"\.**", r"(?:\.[^.]+)*").replace("**", ".*")
    return re.compile(text)
