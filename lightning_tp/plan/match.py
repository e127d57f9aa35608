"""Match the patterns of a plan against the names of a model."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from lightning_tp.errors import TPError
from lightning_tp.styles import Replicate, Rowwise, Sequence, Style, VocabEmbedding

if TYPE_CHECKING:
    from lightning_tp.plan.plan import Plan
    from lightning_tp.plan.rule import Rule


class Names:
    """A model's modules and parameters by their names from the root; shared ones under each name."""

    def __init__(self, model: nn.Module) -> None:
        self.modules: dict[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
        self.parameters: dict[str, nn.Parameter] = dict(model.named_parameters(remove_duplicate=False))
        self.everything = [*self.modules, *self.parameters]
        self.is_sequential = type(model) is nn.Sequential

    def slot(self, parameter: str) -> tuple[int, str]:
        """The one place in a module where a parameter sits, whatever the names that lead there."""
        where, _, leaf = parameter.rpartition(".")
        return id(self.modules[where]), leaf

    def anchors(self) -> Iterator[str]:
        """Where a relative plan may begin: the root, then what it holds, breadth first."""
        holders = [n for n, m in self.modules.items() if next(m.children(), None) is not None]
        yield from sorted(holders or [""], key=lambda n: (n.count(".") + bool(n), n))


@dataclass(frozen=True)
class Match:
    """A module, or parameter, that a rule matches."""

    where: str
    style: Style
    reason: str
    rule: int | None  # None: found, not given


def _match(plan: Plan, names: Names) -> list[Match]:
    rules = [(i, rule) for i, rule in enumerate(plan.rules) if rule.pattern != "**"]
    best: tuple[int, str, dict[int, list[str]]] | None = None
    for anchor in names.anchors():
        prefix = f"{anchor}." if anchor else ""
        inside = [n for n in names.everything if n.startswith(prefix)] if prefix else names.everything
        found = {i: [n for n in inside if rule.matches(n.removeprefix(prefix))] for i, rule in rules}
        hits = sum(map(bool, found.values()))
        if best is None or hits > best[0]:
            best = (hits, anchor, found)
        if hits == len(rules):
            break
    assert best is not None
    _, anchor, found = best
    for i, rule in rules:
        if not found[i]:
            raise TPError(_nothing_matches(rule, anchor, names))
    for i, rule in rules:
        if isinstance(rule.style, (Replicate, Sequence)):  # these take all that lies below a module, so `head.**` is one match
            every = set(found[i])
            found[i] = [n for n in found[i] if not _is_inside(n, every)]
    matches = [Match(where, plan.rules[i].style, plan.rules[i].reason, i) for i, wheres in found.items() for where in wheres]
    return matches + list(_caught(plan, matches, names))


def _is_inside(name: str, modules: set[str]) -> bool:
    """Whether one of these modules holds what has this name."""
    while name:
        name = name.rpartition(".")[0]
        if name in modules:
            return True
    return False


def _nothing_matches(rule: Rule, anchor: str, names: Names) -> str:
    prefix = f"{anchor}." if anchor else ""
    there = [n.removeprefix(prefix) for n in names.everything if n.startswith(prefix) and n != anchor]
    generic = list(dict.fromkeys(".".join("*" if p.isdigit() else p for p in n.split(".")) for n in there))
    leaf = rule.pattern.rpartition(".")[2]
    alike = difflib.get_close_matches(rule.pattern, [n for n in generic if n.rpartition(".")[2] == leaf], n=3, cutoff=0.0)
    near = [*alike, *difflib.get_close_matches(rule.pattern, generic, n=3, cutoff=0.3)] or generic
    near = list(dict.fromkeys(near))[:3]
    return (
        f"The rule `{rule.pattern}` -> `{rule.style}` matches no module and no parameter"
        + (f" of `{anchor}`" if anchor else "")
        + f" ({len(there)} names). Nearest: {', '.join(f'`{n}`' for n in near)}. Correct the pattern, or take the rule out."
    )


def _caught(plan: Plan, matches: list[Match], names: Names) -> Iterator[Match]:
    """What the catch-all rule covers: the parameters of each module that no other rule names."""
    catch = next(((i, r) for i, r in enumerate(plan.rules) if r.pattern == "**"), None)
    if catch is None:
        return
    i, rule = catch
    if not isinstance(rule.style, Replicate):
        raise TPError(f"The catch-all rule `**` can only be `replicate`, not `{rule.style}`: name the modules that are split.")
    claimed = [m.where for m in matches if m.style.splits_parameters]
    named = [n for n in names.parameters if any(n == c or n.startswith(f"{c}.") or not c for c in claimed)]
    tied = {id(names.parameters[n]) for n in named}
    for name, p in names.parameters.items():
        if id(p) not in tied:
            yield Match(name, rule.style, rule.reason or "no other rule names it", i)


def _for_module(style: Style, module: nn.Module | None) -> Style:
    """torch calls both ends of a row-wise split `RowwiseParallel`; on an embedding it is ours over the vocabulary."""
    if isinstance(style, Rowwise) and isinstance(module, nn.Embedding):
        return VocabEmbedding(output=style.output)
    return style
