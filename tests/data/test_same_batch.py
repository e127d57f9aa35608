"""Batches of one tensor-parallel group are compared: what differs is found and named, on every rank."""

from __future__ import annotations

from collections import UserDict, namedtuple
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
import torch.distributed as dist

from lightning_tp import TPError
from lightning_tp.data.same_batch import check_same_batch
from lightning_tp.testing import run_ranks

Pair = namedtuple("Pair", ["image", "text"])


def check(make: Callable[[int], Any], world: int = 2) -> list[str | None]:
    """What `check_same_batch` says on each rank of the batch `make(rank)`."""

    def body() -> str | None:
        try:
            check_same_batch(make(dist.get_rank()), dist.group.WORLD, torch.device("cpu"), "`training_step`, batch 0")
        except TPError as error:
            return str(error)
        return None

    return run_ranks(body, world, timeout=30)


ALIKE: dict[str, Callable[[int], Any]] = {
    "tensor": lambda rank: torch.arange(7),
    "nested": lambda rank: {"a": [torch.ones(2), (torch.zeros(0), torch.tensor(True))], "b": Pair(torch.tensor(1.0), None)},
    "dtypes": lambda rank: [
        torch.ones(5, dtype=d) for d in (torch.bool, torch.bfloat16, torch.int8, torch.complex64, torch.float64)
    ],
    "not contiguous": lambda rank: torch.arange(12).view(3, 4).t() if rank else torch.arange(12).view(3, 4).t().contiguous(),
    "nan": lambda rank: torch.full((3,), torch.nan),
    "no tensors": lambda rank: {"text": "a text", "number": 3, "array": numpy.arange(4)},
    "objects": lambda rank: [object(), {"a", "b", "c"}, print],
    "sparse": lambda rank: torch.eye(3).to_sparse(),
    "nothing": lambda rank: None,
}


@pytest.mark.parametrize("kind", ALIKE)
def test_equal_batches_pass(kind: str) -> None:
    assert check(ALIKE[kind]) == [None, None]


DIFFERENT: dict[str, tuple[Callable[[int], Any], str]] = {
    "values": (lambda rank: {"x": torch.zeros(3), "y": torch.full((2, 2), rank)}, r"`\['y'\]` \(2, 2\) differs"),
    "order": (lambda rank: [torch.tensor([1, 2, 3, 4]), torch.arange(4).roll(2 * rank)], r"`\[1\]` \(4,\) differs"),
    "bool": (lambda rank: torch.tensor([rank == 0, rank == 1]), r"`batch` \(2,\) differs"),
    "shape": (lambda rank: (torch.zeros(2 + rank),), r"`\[0\]` \(.,\) differs .* the shape or dtype on"),
    "view": (lambda rank: torch.arange(6).view(2 + rank, 3 - rank), "the shape or dtype on"),
    "dtype": (lambda rank: Pair(torch.zeros(2, dtype=torch.int32 if rank else torch.float32), None), r"`\.image` \(2,\) differs"),
    "sign of zero": (lambda rank: torch.tensor([-0.0 if rank else 0.0]), "the values on"),
    "other mapping": (lambda rank: UserDict(x=torch.tensor(rank)), r"\['x'\]` \(\) differs"),
    "object": (lambda rank: [SimpleNamespace(a="b", inner=UserDict(x=torch.tensor(rank)))], r"\['inner'\]\['x'\]` \(\) differs"),
    "text": (lambda rank: ["a", f"rank {rank}"], r"`\[1\]` \(str\) differs .* the values on"),
    "a number": (lambda rank: {"id": rank, "x": torch.ones(1)}, r"`\['id'\]` \(int\) differs"),
    "array": (lambda rank: [numpy.arange(3) + rank], r"`\[0\]` \(ndarray\) differs"),
    "flipped": (lambda rank: torch.tensor([[1.0, 2.0], [2.0, 1.0]]).roll(rank, 1), "`batch` .* the values on"),
    "permuted in halves": (
        lambda rank: torch.tensor([1, 2, 3, 4]).view(2, 2).flip(1) if rank else torch.tensor([[1, 2], [3, 4]]),
        "the values",
    ),
    "number": (lambda rank: [torch.zeros(1)] * (1 + rank), r"have \[1, 2\] tensors and other values in their batches"),
    "some and none": (lambda rank: torch.zeros(1) if rank else None, "`batch` .* the shape or dtype on"),
}


@pytest.mark.parametrize("kind", DIFFERENT)
def test_different_batches_are_named_on_every_rank(kind: str) -> None:
    import re

    make, message = DIFFERENT[kind]
    for said in check(make):
        assert said is not None and said.startswith("`training_step`, batch 0: ") and re.search(message, said), said
        assert "on_after_batch_transfer" in said


def test_says_which_ranks() -> None:
    for said in check(lambda rank: torch.tensor([float(rank == 2)]), 4):
        assert said is not None and "the values on ranks [2] of 4 differ from those on rank 0" in said
