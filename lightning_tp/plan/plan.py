"""The plan: which weight is split how, and what crosses the ranks around it. Everything else in the package reads it.

A `Plan` is made of rules (pattern -> style, with a reason), by hand, from what the model declares, or by inference. `check`
holds it against a model and a tp and returns it with its `entries`: one for each module, with every parameter's `Split`. It
needs sizes only, so the model may be on the meta device, and nothing is sent or changed.

Patterns are dotted module (or parameter) names. `*` stands for one name, or part of one; `**` for any number of them. The rules
are relative: a plan written for a transformer finds it inside a LightningModule.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from lightning_tp.errors import TPError
from lightning_tp.plan.rule import Entry, Rule, rule_with
from lightning_tp.styles import (
    Colwise,
    FusedColwise,
    PrepareInput,
    PrepareOutput,
    Replicate,
    RewrittenCalls,
    Rowwise,
    Sequence,
    Split,
    VocabEmbedding,
    VocabHead,
    make_style,
)


@dataclass(frozen=True)
class Plan:
    """For every parameter of a model, how it is split over the tensor-parallel axis; immutable.

    Args:
        rules: a mapping pattern -> style (its name, a style with options, or one of torch's), or a sequence of `Rule`.
        source: where it comes from: "given", "declared by ..", "inferred".

    `entries`, `tp` and `tied` (the later names of parameters that have several) are filled in by `check`.

    Raises:
        TPError: for something that is no style.

    Example:
        >>> plan = Plan({"blocks.*.up": "colwise", "blocks.*.down": "rowwise", "**": "replicate"})
        >>> Plan.from_json(plan.to_json()) == plan
        True
    """

    rules: tuple[Rule, ...]
    source: str = "given"
    entries: tuple[Entry, ...] = field(default=(), compare=False, repr=False)
    tp: int | None = field(default=None, compare=False)
    tied: frozenset[str] = field(default=frozenset(), compare=False, repr=False)

    def __init__(
        self,
        rules: Mapping[str, Any] | Iterable[Rule],
        source: str = "given",
        entries: tuple[Entry, ...] = (),
        tp: int | None = None,
        tied: frozenset[str] = frozenset(),
    ) -> None:
        if isinstance(rules, Mapping):
            rules = [Rule(p, s) for p, value in rules.items() for s in make_style(value, p)]
        object.__setattr__(self, "rules", tuple(rules))
        object.__setattr__(self, "source", source)
        object.__setattr__(self, "entries", entries)
        object.__setattr__(self, "tp", tp)
        object.__setattr__(self, "tied", tied)

    @classmethod
    def of(cls, plan: Plan | Mapping[str, Any] | str | Path) -> Plan:
        """A plan from a plan, a mapping, or the path of a JSON file."""
        if isinstance(plan, Plan):
            return plan
        if isinstance(plan, Mapping):
            return cls(plan)
        choice = "Give a Plan, a dict of rules, or the path of a plan's JSON."
        if not isinstance(plan, (str, Path)):
            raise TPError(f"`plan={plan!r}`: a {type(plan).__name__} is no plan. {choice}")
        if not Path(plan).is_file():
            raise TPError(f"`plan={str(plan)!r}`: there is no such file. {choice}")
        return cls.from_json(Path(plan).read_text())

    @property
    def sequence_parallel(self) -> bool:
        """Whether any module runs on this rank's tokens only."""
        return any(
            isinstance(rule.style, Sequence) or "sequence" in (getattr(rule.style, option, None) for option in ("output", "wanted"))
            for rule in self.rules
        )

    def without_sequence_parallel(self) -> Plan:
        """The same plan with whole activations between the split modules: `sequence` becomes `replicate`."""
        return Plan([r for rule in self.rules if (r := _without_sequence(rule)) is not None], self.source)

    # ------------------------------------------------------------------------------------------------ against a model

    def check(self, model: nn.Module, tp: int) -> Plan:
        """This plan with its entries: what every rank of `tp` holds of every parameter of `model`. Nothing is changed.

        Raises:
            TPError: for a rule that matches nothing, a parameter that no rule or two rules cover, a style that a module can't take,
                sizes that don't fit tp, tied weights split in two ways, or a plan that somebody wrote and that splits
                nothing.
        """
        from lightning_tp.plan.check import check_plan

        entries = check_plan(self, model, tp)
        first = {name for name, _ in model.named_parameters()}
        tied = frozenset(name for name, _ in model.named_parameters(remove_duplicate=False) if name not in first)
        return Plan(self.rules, self.source, tuple(entries), tp, tied)

    @cached_property
    def splits(self) -> dict[str, Split]:
        """Of a checked plan: parameter name -> how it is split. Tied parameters under each of their names."""
        return {name: split for entry in self.entries for name, split in entry.splits.items()}

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of a checked plan: parameter name -> its whole shape."""
        return {name: shape for entry in self.entries for name, shape in entry.shapes.items()}

    # ------------------------------------------------------------------------------------------------- as plain data

    def to_json(self) -> str:
        """The rules as JSON; `from_json` reads it back.

        Raises:
            TPError: for a style with an option that is no plain data.
        """
        for rule in self.rules:
            try:
                json.dumps(rule.style.options())
            except TypeError as e:
                raise TPError(f"`{rule.pattern}`: `{rule.style}` can't be written as JSON: {e}.") from None
        return json.dumps({"version": 1, "source": self.source, "rules": list(self._plain())}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """A plan from what `to_json` wrote.

        Raises:
            TPError: if it is something else.
        """
        try:
            data = json.loads(text)
            rules = [Rule(r["pattern"], {"style": r["style"], **r.get("options", {})}, r.get("reason", "")) for r in data["rules"]]
        except (json.JSONDecodeError, KeyError, TypeError) as e:
            raise TPError(f"This is no plan: {type(e).__name__}: {e}. A plan is what `Plan.to_json` writes.") from None
        return cls(rules, data.get("source", "given"))

    def _plain(self) -> Iterator[dict[str, Any]]:
        for rule in self.rules:
            yield {
                "pattern": rule.pattern,
                "style": rule.style.name,
                "options": rule.style.options(),
                "reason": rule.reason,
            }

    @cached_property
    def digest(self) -> str:
        """A hash of the rules, and of the entries of a checked plan: ranks compare it before they go on."""
        entries = [(e.where, str(e.style), sorted((n, repr(s)) for n, s in e.splits.items())) for e in self.entries]
        shapes = sorted(self.shapes.items())
        return hashlib.sha256(json.dumps([list(self._plain()), entries, shapes, self.tp], default=str).encode()).hexdigest()[:16]

    def to_torch(self, model: nn.Module) -> dict[str, Any]:
        """The same plan for `torch.distributed.tensor.parallel.parallelize_module(model, tp_mesh, plan)`.

        Raises:
            TPError: for what torch has no counterpart of (`fused_colwise`, heads that ranks share, a share of a gradient outside
                `sequence`), or a plan that is not checked yet.

        Example:
            >>> from torch import nn
            >>> model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8))
            >>> plan = Plan({"0": "colwise", "1": "rowwise"}).check(model, tp=2)
            >>> {name: type(style).__name__ for name, style in plan.to_torch(model).items()}
            {'0': 'ColwiseParallel', '1': 'RowwiseParallel'}
        """
        if not self.entries:
            raise TPError("`to_torch` needs the sizes of a model: call `plan.check(model, tp)` first, it returns the plan to use.")
        plan: dict[str, Any] = {}
        modules = dict(model.named_modules(remove_duplicate=False))
        for entry in self.entries:
            try:
                style = entry.style.to_torch(modules[entry.where]) if entry.where in modules else None
            except TPError as e:
                raise TPError(f"`{entry.where}`: {e}") from None
            why = _not_in_torch(entry, entry.where in plan and style is not None)
            if why:
                raise TPError(f"`{entry.where}`: {why} Use `backend='local'`.")
            if style is not None:
                plan[entry.where] = style
        return plan

    # ---------------------------------------------------------------------------------------------------- for reading

    def __str__(self) -> str:
        from lightning_tp.plan.table import rules_table, shapes_table

        return shapes_table(self) if self.entries else rules_table(self)


def _not_in_torch(entry: Entry, second: bool) -> str:
    """Why a plan for `parallelize_module` would compute something else without a word; empty if it would not."""
    if second:
        return "it has two styles, and torch's plan takes one for a module."
    if not all(split.is_even_chunks for split in entry.splits.values()):
        return "ranks share its heads, and torch's styles would cut through them."
    if isinstance(entry.style, Replicate) and any(split.sum_over > 1 for split in entry.splits.values()):
        return "each rank sees its share of its gradient, and torch's styles do not sum it."
    return ""


def _without_sequence(rule: Rule) -> Rule | None:
    """A rule for whole activations: `sequence` is `replicate` in it, and what only moved between the two is gone."""
    style = rule.style
    if isinstance(style, Sequence):
        return Rule(rule.pattern, Replicate(partial_grad=False), rule.reason)
    if isinstance(style, RewrittenCalls):
        calls = tuple(replace(c, to="replicate") if c.to == "sequence" else c for c in style.calls)
        calls = tuple(replace(c, sizes=()) if any(den == -1 for of in c.sizes for _, _, den in of) else c for c in calls)
        return rule_with(rule, calls=calls)
    if isinstance(style, PrepareOutput):
        left, read = ("replicate" if state == "sequence" else state for state in (style.arrives, style.wanted))
        return None if left == read else rule_with(rule, arrives=left, wanted=read)
    if isinstance(style, PrepareInput):
        arrives = None if style.arrives in ("sequence", "replicate") else style.arrives
        wanted = "replicate" if style.wanted == "sequence" else style.wanted
        moves = wanted != "replicate" or arrives is not None
        return rule_with(rule, arrives=arrives, wanted=wanted) if moves or style.attributes else None
    if isinstance(style, (Colwise, FusedColwise, VocabHead)) and style.input == "sequence":
        return rule_with(rule, input="replicate")
    if isinstance(style, (Rowwise, VocabEmbedding)) and style.output == "sequence":
        return rule_with(rule, output="replicate")
    return rule
