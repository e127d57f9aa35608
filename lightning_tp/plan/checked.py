"""A plan that was checked against a model: for each module its style, and for each parameter its split.

Only this one is applied, estimated and exported. `Plan.check` makes it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import nn

from lightning_tp.core.comm.state import I
from lightning_tp.errors import TPError
from lightning_tp.plan.rule import INFERRED, Rule, is_sequence_parallel
from lightning_tp.plan.serialize import plain_rules, rules_to_json
from lightning_tp.plan.table import Row, fold_rows, rows_table, shapes_of
from lightning_tp.styles import Replicate, Split, Style


@dataclass(frozen=True)
class Entry:
    """One module of a checked plan.

    Args:
        where: the module's name from the root.
        style: its style, every option filled in.
        reason: why.
        splits: parameter name from the root -> how it is split.
        shapes: parameter name from the root -> its full shape.
    """

    where: str
    style: Style
    reason: str
    splits: Mapping[str, Split] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def to_torch(self, module: nn.Module) -> Any:
        """Return the style for `torch.distributed.tensor.parallel.parallelize_module`; None where it needs none.

        Raises:
            TPError: if torch's styles would compute something else.
        """
        try:
            style = self.style.to_torch(module)
        except TPError as e:
            raise TPError(f"`{self.where}`: {e}") from None
        if not all(split.is_even_chunks for split in self.splits.values()):
            raise TPError(
                f"`{self.where}`: ranks share its heads, and torch's styles would cut through them. Use `backend='local'`."
            )
        if isinstance(self.style, Replicate) and any(split.state != I for split in self.splits.values()):
            raise TPError(f"`{self.where}`: its gradient is partial, and torch's styles do not sum it. Use `backend='local'`.")
        return style


@dataclass(frozen=True)
class CheckedPlan:
    """What every rank of `tp` holds of every parameter of one model, and the style of every module; immutable.

    Args:
        rules: as they were written.
        source: where they come from.
        entries: one for each module that has a style, in the order of the model's modules.
        tp: ranks that share the model.
        tied: the later names of parameters that have several.

    Example:
        >>> from lightning_tp import Plan
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8))
        >>> checked = Plan({"0": "colwise", "1": "rowwise"}).check(model, tp=2)
        >>> checked.splits["0.weight"].local_shape((16, 8), rank=0)
        (8, 8)
    """

    rules: tuple[Rule, ...]
    source: str
    entries: tuple[Entry, ...]
    tp: int
    tied: frozenset[str] = frozenset()

    @cached_property
    def splits(self) -> dict[str, Split]:
        """Parameter name -> how it is split. Tied parameters under each of their names."""
        return {name: split for entry in self.entries for name, split in entry.splits.items()}

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Parameter name -> its full shape."""
        return {name: shape for entry in self.entries for name, shape in entry.shapes.items()}

    @property
    def sequence_parallel(self) -> bool:
        """Whether any module runs on this rank's shard of the sequence."""
        return is_sequence_parallel(self.rules)

    @property
    def shards_anything(self) -> bool:
        """Whether a rank holds less than all of any parameter."""
        return any(split.dim is not None for split in self.splits.values())

    def why_nothing_is_sharded(self, model: nn.Module) -> str:
        """Return what is wrong with a plan that keeps every parameter in full on every rank."""
        if self.source.startswith(INFERRED):
            reasons = "; ".join(f"`{rule.pattern}`: {rule.reason}" for rule in self.rules[:3])
            remedy = f"Nothing in its forward can be sharded ({reasons}). Pass a plan (`plan=`), or use tp=1."
        else:
            remedy = "Give linear layers the styles `colwise` and `rowwise`, or use tp=1."
        return (
            f"The plan ({self.source}) would replicate every parameter of {type(model).__name__} on tp={self.tp} ranks, so tensor parallelism "
            f"brings nothing. {remedy}"
        )

    @cached_property
    def numel(self) -> int:
        """Elements of all parameters, tied ones once."""
        return sum(math.prod(self.shapes[name]) for name in self.splits if name not in self.tied)

    def local_numel(self, rank: int) -> int:
        """Return how many elements this rank holds, tied ones once."""
        return sum(
            math.prod(split.local_shape(self.shapes[name], rank)) for name, split in self.splits.items() if name not in self.tied
        )

    @cached_property
    def digest(self) -> str:
        """A hash of rules, styles, splits and shapes: ranks compare it before they apply the plan."""
        entries = [(e.where, str(e.style), sorted((n, repr(s)) for n, s in e.splits.items())) for e in self.entries]
        data = [plain_rules(self.rules), entries, sorted(self.shapes.items()), self.tp]
        return hashlib.sha256(json.dumps(data, default=str).encode()).hexdigest()[:16]

    def to_json(self) -> str:
        """Return the rules as JSON, as they were written; `Plan.from_json` reads it.

        Raises:
            TPError: for a style with an option that is no plain data.
        """
        return rules_to_json(self.rules, self.source)

    def to_torch(self, model: nn.Module) -> dict[str, Any]:
        """Return the same plan for `torch.distributed.tensor.parallel.parallelize_module(model, tp_mesh, plan)`.

        Raises:
            TPError: for what torch has no counterpart of (`fused_colwise`, heads that ranks share, a partial gradient outside `sequence`).

        Example:
            >>> from lightning_tp import Plan
            >>> model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8))
            >>> plan = Plan({"0": "colwise", "1": "rowwise"}).check(model, tp=2)
            >>> {name: type(style).__name__ for name, style in plan.to_torch(model).items()}
            {'0': 'ColwiseParallel', '1': 'RowwiseParallel'}
        """
        plan: dict[str, Any] = {}
        modules = dict(model.named_modules(remove_duplicate=False))
        for entry in self.entries:
            if entry.where not in modules:  # a parameter
                continue
            style = entry.to_torch(modules[entry.where])
            if style is not None and entry.where in plan:
                raise TPError(
                    f"`{entry.where}`: it has two styles, and torch's plan takes one for a module. Use `backend='local'`."
                )
            if style is not None:
                plan[entry.where] = style
        return plan

    def __str__(self) -> str:
        held = max(map(self.local_numel, range(self.tp)))
        head = (
            f"Plan ({self.source}), tp={self.tp}: {self.numel:,} parameters, up to {held:,} per rank ({held / max(self.numel, 1):.1%}); "
            f"sequence parallelism {'on' if self.sequence_parallel else 'off'}"
        )
        return f"{head}\n{rows_table(self.rows)}"

    @property
    def rows(self) -> list[Row]:
        """(modules, style, full shape -> local shard, reason) of each kind of module, repeated blocks folded."""
        return fold_rows((e.where, str(e.style), shapes_of(e.splits, e.shapes, self.tp), e.reason) for e in self.entries)
