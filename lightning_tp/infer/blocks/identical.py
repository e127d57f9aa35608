"""Find the blocks that do the same in one call of a model, by comparing their operations.

Not even this run goes through all blocks: of those with the same code, settings, shapes and inputs three run, the first two and the last.
They differ only in their own number, where they keep one. Code that decides or computes by that number is noticed (`WatchedNumber`),
as is a difference between the three; then all blocks run.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from lightning_tp.core.modules.blocks import block_settings, copies_of_first, find_blocks, own_numbers
from lightning_tp.infer.blocks.operation_log import OperationLog
from lightning_tp.infer.blocks.repeated import RepeatedBlocks, skip_copies
from lightning_tp.infer.follow.run import run

FEWEST = 4  # blocks of a model, below which all are traced
OPERATIONS = (
    "eq", "ne", "lt", "le", "gt", "ge", "hash", "bool", "int", "float", "str", "repr", "format", "index", "neg",
    "add", "radd", "sub", "rsub", "mul", "rmul", "mod", "rmod", "divmod", "pow", "floordiv", "rfloordiv", "truediv", "rtruediv",
    "and", "rand", "or", "xor", "lshift", "rshift",
)  # fmt: skip

Caller = Callable[[nn.Module, Any], Any]
Operations = dict[str, list[Any]]  # block -> what it did


def identical_blocks(model: nn.Module, call: Caller, inputs: Any) -> RepeatedBlocks:
    """Run `call(model, inputs)` and compare what the repeated blocks of the model do.

    Returns:
        The blocks that do the same as an earlier one; none in a model of few blocks, or one that can't be run.
    """
    blocks = dict(find_blocks(model))
    if len(blocks) < FEWEST:
        return RepeatedBlocks()
    operations = _operations_of_few(model, call, inputs, blocks)
    if operations is None:
        operations = _operations(model, call, inputs, blocks, RepeatedBlocks())
    if operations is None:  # it can't be run: the traces that follow say why
        return RepeatedBlocks()
    copies = copies_of_first({name: tuple(operations[name]) for name in blocks if name in operations})
    representatives: dict[Hashable, str] = {}
    for name in operations:
        representatives.setdefault(_shapes(name, blocks[name]), copies.get(name, name))
    for name, block in blocks.items():
        if name not in operations and _shapes(name, block) in representatives:  # it did not run, as by chance (layer drop)
            copies[name] = representatives[_shapes(name, block)]
    return RepeatedBlocks(copies)


def _operations_of_few(model: nn.Module, call: Caller, inputs: Any, blocks: Mapping[str, nn.Module]) -> Operations | None:
    """Return what each block does, from a run of three blocks of a kind; None if that does not tell what the others do."""
    copies = copies_of_first(block_settings(blocks))
    kinds: dict[str, list[str]] = {}
    for name, first in copies.items():
        kinds.setdefault(first, []).append(name)
    probes = {name: first for first, names in kinds.items() for name in (names[0], names[-1])}
    skipped = RepeatedBlocks(copies).without(probes)
    if not skipped.copies:
        return None
    numbers = own_numbers(blocks)
    places = [(block.get_submodule(n), k) for name, block in blocks.items() for n, k in numbers[name.rpartition(".")[0]]]
    with watch_numbers(places) as uses:
        operations = _operations(model, call, inputs, blocks, skipped)
    if operations is None or uses:  # code looks at a block's number, or for what each block leaves
        return None
    return operations if all(operations.get(name) == operations.get(first) for name, first in probes.items()) else None


def _operations(
    model: nn.Module, call: Caller, inputs: Any, blocks: Mapping[str, nn.Module], skipped: RepeatedBlocks
) -> Operations | None:
    """Return what each block does, where copies are skipped if they are given inputs like their representative's; None if it can't be run."""
    log = OperationLog(model, blocks)
    try:
        run(model, call, inputs, set(), {}, tracer_of=lambda *_: log, during=lambda tracer: skip_copies(model, skipped, tracer))
    except Exception:
        return None
    return log.entries


def _shapes(name: str, block: nn.Module) -> Hashable:
    return name.rpartition(".")[0], type(block), tuple((n, tuple(p.shape)) for n, p in block.named_parameters())


class WatchedNumber(int):
    """A block's number that notes the operations it takes part in: comparisons, arithmetic, hashing, printing.

    Used as the index of a list it goes unnoticed: what blocks store per layer, such as a cache of keys and values, is indexed by it.
    """

    uses: list[str]

    def __new__(cls, value: int, uses: list[str] | None = None) -> WatchedNumber:
        number = super().__new__(cls, value)
        number.uses = [] if uses is None else uses  # none where it is copied: its attributes follow
        return number


def _noting(name: str) -> Any:
    operation = getattr(int, name)

    def method(self: WatchedNumber, *args: Any) -> Any:
        self.uses.append(name)
        return operation(int.__int__(self), *args)

    return method


for _name in (f"__{operation}__" for operation in OPERATIONS):
    setattr(WatchedNumber, _name, _noting(_name))


@contextmanager
def watch_numbers(places: Iterable[tuple[nn.Module, str]]) -> Iterator[list[str]]:
    """Replace the numbers in these (module, attribute) by watched ones, and yield the list of what code does with them."""
    uses: list[str] = []
    numbers = [(module, name, module.__dict__[name]) for module, name in places]
    for module, name, value in numbers:
        module.__dict__[name] = WatchedNumber(value, uses)
    try:
        yield uses
    finally:
        for module, name, value in numbers:
            module.__dict__[name] = value
