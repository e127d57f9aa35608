"""Rules of a plan as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from lightning_tp.errors import TPError
from lightning_tp.plan.rule import USER_PROVIDED, Rule

VERSION = 1


def rules_to_json(rules: Iterable[Rule], source: str) -> str:
    """Write the rules of a plan as JSON; `rules_from_json` reads it back.

    Raises:
        TPError: for a style with an option that is no plain data.
    """
    rules = list(rules)
    for rule in rules:
        try:
            json.dumps(rule.style.options())
        except TypeError as e:
            raise TPError(f"`{rule.pattern}`: `{rule.style}` can't be written as JSON: {e}.") from None
    return json.dumps({"version": VERSION, "source": source, "rules": plain_rules(rules)}, indent=1)


def rules_from_json(text: str) -> tuple[list[Rule], str]:
    """Read (rules, source) from what `rules_to_json` wrote.

    Raises:
        TPError: if it is something else.
    """
    try:
        data = json.loads(text)
        rules = [Rule(r["pattern"], {"style": r["style"], **r.get("options", {})}, r.get("reason", "")) for r in data["rules"]]
    except (json.JSONDecodeError, KeyError, TypeError) as e:
        raise TPError(f"This is not a plan: {type(e).__name__}: {e}. A plan is what `Plan.to_json` writes.") from None
    return rules, data.get("source", USER_PROVIDED)


def plain_rules(rules: Iterable[Rule]) -> list[dict[str, Any]]:
    """Return the rules as plain data."""
    return [
        {"pattern": rule.pattern, "style": rule.style.name, "options": rule.style.options(), "reason": rule.reason}
        for rule in rules
    ]
