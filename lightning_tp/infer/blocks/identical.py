"""Find the blocks that do the same in one call of a model, by comparing their operations.

Not even this run goes through all blocks: of those with the same code, settings, shapes and inputs three run, the first two and the last.
They differ only in their own number, where they keep one. Code that decides or computes by that number is noticed (`block_number.py`),
as is a difference between the three; then all blocks run.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any

from torch import nn

from lightning_tp.core.modules.blocks import block_settings, copies_of_first, find_blocks, own_numbers
from lightning_tp.infer.blocks.block_number import watch_numbers
from lightning_tp.infer.blocks.operation_log import OperationLog
from lightning_tp.infer.blocks.repeated import RepeatedBlocks
from lightning_tp.infer.blocks.skip_copies import skip_copies
from lightning_tp.infer.follow.run import run

FEWEST = 4  # blocks of a model, below which all are traced

Operations = dict[str, list[Any]]  # block -> what it did


def identical_blocks(model: nn.Module, call: Callable[[nn.Module, Any], Any], inputs: Any) -> RepeatedBlocks:
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


def _operations_of_few(
    model: nn.Module, call: Callable[[nn.Module, Any], Any], inputs: Any, blocks: Mapping[str, nn.Module]
) -> Operations | None:
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
    model: nn.Module, call: Callable[[nn.Module, Any], Any], inputs: Any, blocks: Mapping[str, nn.Module], skipped: RepeatedBlocks
) -> Operations | None:
    """Return what each block does, where copies are skipped if they are given inputs like their representative's; None if it can't be run."""
    logs: list[OperationLog] = []

    def log(model: nn.Module, whole: Any, shared: Any) -> OperationLog:
        logs.append(OperationLog(model, blocks))
        return logs[-1]

    try:
        run(model, call, inputs, set(), {}, tracer_of=log, during=lambda tracer: skip_copies(model, skipped, tracer))
    except Exception:
        return None
    finally:
        for one in logs:
            one.close()
    return logs[0].entries


def _shapes(name: str, block: nn.Module) -> Hashable:
    return name.rpartition(".")[0], type(block), tuple((n, tuple(p.shape)) for n, p in block.named_parameters())
