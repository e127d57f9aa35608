"""Match the patterns of a plan against the names of a model."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from lightning_tp.errors import TPError
from lightning_tp.plan.rule import CATCH_ALL, Rule
from lightning_tp.styles import Replicate, Rowwise, Style, VocabEmbedding
from lightning_tp.styles import Sequence as SequenceStyle


class Names:
    """The modules and parameters of a model by their names from the root; shared ones under each name."""

    def __init__(self, model: nn.Module) -> None:
        self.modules: dict[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
        self.parameters: dict[str, nn.Parameter] = dict(model.named_parameters(remove_duplicate=False))
        self.everything = [*self.modules, *self.parameters]
        self.is_sequential = type(model) is nn.Sequential

    def slot(self, parameter: str) -> tuple[int, str]:
        """Return the one place in a module where a parameter sits, whatever the names that lead there."""
        where, _, leaf = parameter.rpartition(".")
        return id(self.modules[where]), leaf

    def anchors(self) -> Iterator[str]:
        """Yield where a relative plan may begin: the root, then the modules with children, breadth first."""
        holders = [n for n, m in self.modules.items() if next(m.children(), None) is not None]
        yield from sorted(holders or [""], key=lambda n: (n.count(".") + bool(n), n))


@dataclass(frozen=True)
class Match:
    """A module, or parameter, and the style that a rule gives it."""

    where: str
    style: Style
    reason: str


def is_below(name: str, module: str) -> bool:
    """Return whether what has this name lies inside the module; everything lies inside the root, ""."""
    return not module or name.startswith(f"{module}.")


def match_rules(rules: Sequence[Rule], names: Names) -> list[Match]:
    """Match every rule against the model, from the anchor at which most of them match something.

    Raises:
        TPError: for a rule that matches nothing; it names the nearest names.
    """
    named = [rule for rule in rules if rule.pattern != CATCH_ALL]
    anchor, found = _best_anchor(named, names)
    prefix = f"{anchor}." if anchor else ""
    for rule, wheres in zip(named, found, strict=True):
        if not wheres:
            raise TPError(_nothing_matches(rule, anchor, prefix, names))
    matches = []
    for rule, wheres in zip(named, found, strict=True):
        if isinstance(rule.style, (Replicate, SequenceStyle)):  # these take all that lies below a module: `head.**` is one match
            every = set(wheres)
            wheres = [n for n in wheres if not _is_inside(n, every)]
        matches += [Match(where, _for_module(rule.style, names.modules.get(where)), rule.reason) for where in wheres]
    return matches + list(_caught(rules, matches, names))


def _best_anchor(rules: Sequence[Rule], names: Names) -> tuple[str, list[list[str]]]:
    """(the anchor, for each rule the names that it matches from there)."""
    best: tuple[int, str, list[list[str]]] | None = None
    for anchor in names.anchors():
        prefix = f"{anchor}." if anchor else ""
        inside = [n for n in names.everything if n.startswith(prefix)] if prefix else names.everything
        found = [[n for n in inside if rule.matches(n.removeprefix(prefix))] for rule in rules]
        hits = sum(map(bool, found))
        if best is None or hits > best[0]:
            best = (hits, anchor, found)
        if hits == len(rules):
            break
    assert best is not None
    return best[1], best[2]


def _is_inside(name: str, modules: set[str]) -> bool:
    """Whether one of these modules holds what has this name."""
    while name:
        name = name.rpartition(".")[0]
        if name in modules:
            return True
    return False


def _nothing_matches(rule: Rule, anchor: str, prefix: str, names: Names) -> str:
    there = [n.removeprefix(prefix) for n in names.everything if n.startswith(prefix) and n != anchor]
    generic = list(dict.fromkeys(".".join("*" if p.isdigit() else p for p in n.split(".")) for n in there))
    leaf = rule.pattern.rpartition(".")[2]
    same_leaf = difflib.get_close_matches(rule.pattern, [n for n in generic if n.rpartition(".")[2] == leaf], n=3, cutoff=0.0)
    near = [*same_leaf, *difflib.get_close_matches(rule.pattern, generic, n=3, cutoff=0.3)] or generic
    near = list(dict.fromkeys(near))[:3]
    return (
        f"The rule `{rule.pattern}` -> `{rule.style}` matches no module or parameter"
        + (f" of `{anchor}`" if anchor else "")
        + f" ({len(there)} names). Did you mean {' or '.join(f'`{n}`' for n in near)}? Otherwise remove the rule."
    )


def _caught(rules: Iterable[Rule], matches: list[Match], names: Names) -> Iterator[Match]:
    """What the catch-all rule covers: the parameters of each module that no other rule names."""
    rule = next((r for r in rules if r.pattern == CATCH_ALL), None)
    if rule is None:
        return
    if not isinstance(rule.style, Replicate):
        raise TPError(f"The catch-all rule `**` can only be `replicate`, not `{rule.style}`: name the modules that are split.")
    claimed = [m.where for m in matches if m.style.splits_parameters]
    named = [n for n in names.parameters if any(n == c or is_below(n, c) for c in claimed)]
    tied = {id(names.parameters[n]) for n in named}
    for name, p in names.parameters.items():
        if id(p) not in tied:
            yield Match(name, rule.style, rule.reason or "no other rule names it")


def _for_module(style: Style, module: nn.Module | None) -> Style:
    """torch calls both ends of a row-wise split `RowwiseParallel`; on an embedding it is ours over the vocabulary."""
    if isinstance(style, Rowwise) and isinstance(module, nn.Embedding):
        return VocabEmbedding(output=style.output)
    return style
