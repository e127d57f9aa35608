"""The plan: which weight is split how, and what crosses the ranks around it. Everything else in the package reads it.

A `Plan` is what was written: rules (pattern -> style, with a reason) by hand, from what the model declares, or by inference.
`Plan.check` holds it against a model and a tp and returns a `CheckedPlan`, which is what is applied. It needs sizes only, so the
model may be on the meta device, and nothing is sent or changed.

Rules are relative: a plan written for a transformer finds it inside a LightningModule.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from lightning_tp.errors import TPError
from lightning_tp.plan.check import check_rules
from lightning_tp.plan.checked import CheckedPlan
from lightning_tp.plan.rule import USER_PROVIDED, Rule, is_sequence_parallel
from lightning_tp.plan.serialize import plain_rules, rules_from_json, rules_to_json
from lightning_tp.plan.table import rules_table
from lightning_tp.styles import make_style


@dataclass(frozen=True)
class Plan:
    """For every parameter of a model, how it is split over the tensor-parallel axis, as it was written; immutable.

    Args:
        rules: a mapping pattern -> style (its name, a style with options, or one of torch's), or a sequence of `Rule`.
        source: where it comes from: "user-provided", "declared by ..", "inferred".

    Raises:
        TPError: for something that is no style.

    Example:
        >>> plan = Plan({"blocks.*.up": "colwise", "blocks.*.down": "rowwise", "**": "replicate"})
        >>> Plan.from_json(plan.to_json()) == plan
        True
    """

    rules: tuple[Rule, ...]
    source: str = USER_PROVIDED

    def __init__(self, rules: Mapping[str, Any] | Iterable[Rule], source: str = USER_PROVIDED) -> None:
        if isinstance(rules, Mapping):
            rules = [Rule(p, s) for p, value in rules.items() for s in make_style(value, p)]
        object.__setattr__(self, "rules", tuple(rules))
        object.__setattr__(self, "source", source)

    @classmethod
    def of(cls, plan: Plan | CheckedPlan | Mapping[str, Any] | str | Path) -> Plan:
        """Return a plan from a plan, a mapping, or the path of a JSON file.

        Raises:
            TPError: for something else, or if there is no such file.
        """
        if isinstance(plan, Plan):
            return plan
        if isinstance(plan, CheckedPlan):
            return cls(plan.rules, plan.source)
        if isinstance(plan, Mapping):
            return cls(plan)
        choice = "Pass a Plan, a dict of rules, or the path of a plan's JSON file."
        if not isinstance(plan, (str, Path)):
            raise TPError(f"`plan={plan!r}`: a {type(plan).__name__} is not a plan. {choice}")
        if not Path(plan).is_file():
            raise TPError(f"`plan={str(plan)!r}`: there is no such file. {choice}")
        return cls.from_json(Path(plan).read_text())

    @property
    def sequence_parallel(self) -> bool:
        """Whether any module runs on this rank's shard of the sequence."""
        return is_sequence_parallel(self.rules)

    def without_sequence_parallel(self) -> Plan:
        """Return the same plan with full activations between the split modules: `sequence` becomes `replicate`."""
        return Plan([r for rule in self.rules if (r := rule.without_sequence()) is not None], self.source)

    def check(self, model: nn.Module, tp: int) -> CheckedPlan:
        """Hold the plan against a model: what every rank of `tp` holds of every parameter. Nothing is changed.

        Raises:
            TPError: for a rule that matches nothing, a parameter that no rule or two rules cover, a style that a module can't take,
                sizes that don't fit tp, tied weights split in two ways, or a plan that somebody wrote and that shards nothing.

        Example:
            >>> model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8))
            >>> print(Plan({"0": "colwise", "1": "rowwise"}).check(model, tp=2))
            Plan (user-provided), tp=2: 280 parameters, up to 144 per rank (51.4%); sequence parallelism off
              modules  style              full shape -> local shard         reason
              0        colwise(input=I)   (16, 8) -> (8, 8); (16,) -> (8,)
              1        rowwise(output=I)  (8, 16) -> (8, 8); (8,)
        """
        return check_rules(self.rules, self.source, model, tp)

    def to_json(self) -> str:
        """Return the rules as JSON; `from_json` reads it back.

        Raises:
            TPError: for a style with an option that is no plain data.
        """
        return rules_to_json(self.rules, self.source)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Return the plan of which `to_json` wrote this text.

        Raises:
            TPError: if it is something else.
        """
        return cls(*rules_from_json(text))

    @cached_property
    def digest(self) -> str:
        """A hash of the rules."""
        return hashlib.sha256(json.dumps(plain_rules(self.rules), default=str).encode()).hexdigest()[:16]

    def __str__(self) -> str:
        return f"Plan ({self.source}): {len(self.rules)} rules\n{rules_table(self.rules)}"
