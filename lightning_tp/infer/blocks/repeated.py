"""Which repeated blocks do the same as an earlier one, and what follows for names and rules."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field

from lightning_tp.core.modules.blocks import copies_of_first
from lightning_tp.plan.rule import Rule
from lightning_tp.styles import PrepareInput, PrepareOutput


@dataclass(frozen=True)
class RepeatedBlocks:
    """Blocks that do the same as an earlier one, their representative, which is traced in their place.

    Args:
        copies: name of a block -> name of its representative. Representatives themselves are not in it.

    Example:
        >>> blocks = RepeatedBlocks({"layers.1": "layers.0"})
        >>> blocks.representative("layers.1.mlp.up")
        'layers.0.mlp.up'
    """

    copies: Mapping[str, str] = field(default_factory=dict)

    def representative(self, name: str) -> str:
        """Return the name of the same module or parameter in the block that is traced in place of this one's."""
        for block, traced in self.copies.items():
            if name == block or name.startswith(f"{block}."):
                return traced + name[len(block) :]
        return name

    def expand_to_copies(self, rules: Iterable[Rule]) -> list[Rule]:
        """Return the rules, and the same for the copies of traced blocks.

        What prepares the input or output of a block as a whole is not copied: it belongs to the first and last block of a stream.
        """
        rules = list(rules)
        copied = [
            Rule(block + rule.pattern[len(traced) :], rule.style, rule.reason)
            for block, traced in self.copies.items()
            for rule in rules
            if rule.pattern.startswith(f"{traced}.")
            or (rule.pattern == traced and not isinstance(rule.style, (PrepareInput, PrepareOutput)))
        ]
        return rules + copied

    def without(self, names: Iterable[str]) -> RepeatedBlocks:
        """Return the same, where these blocks are no copies: they are to be traced themselves."""
        traced = set(names)
        return RepeatedBlocks({block: first for block, first in self.copies.items() if block not in traced})

    def refined(self, kinds: Mapping[str, Hashable]) -> RepeatedBlocks:
        """Return the same, where copies have to be of one kind, too; blocks that are not in `kinds` stand alone."""
        blocks = [*dict.fromkeys(self.copies.values()), *self.copies]
        return RepeatedBlocks(copies_of_first({b: (self.copies.get(b, b), kinds[b]) for b in blocks if b in kinds}))
