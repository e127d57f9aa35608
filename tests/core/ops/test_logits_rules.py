"""Functions on vocab-parallel logits: the values and gradients of the full tensor, and which of them all-gather."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_tp import TPError
from lightning_tp.core.comm.axis import Axis
from lightning_tp.core.ops.logits_rules import split_logits
from lightning_tp.core.ops.split_logits import SplitLogits
from lightning_tp.testing import run_ranks
from tests.core.ops.logits import GATHERS, STAYS_SPLIT, V, compare


@pytest.mark.parametrize("tp", [2, 4, 8])  # 8 ranks: 2, 2, 2, 2, 2, 1, 0, 0 columns
def test_what_stays_split(tp: int) -> None:
    def body() -> None:
        for name, use in STAYS_SPLIT.items():
            forward, backward, out = compare(use, name)
            assert isinstance(out, SplitLogits), f"{name} gave {type(out)}"
            assert forward == [], f"{name}: {forward}"
            assert "parameter" in name or backward == [], f"{name}: {backward}"

    run_ranks(body, tp)


@pytest.mark.parametrize("tp", [2, 4])
def test_what_gathers(tp: int) -> None:
    def body() -> None:
        for name, use in GATHERS.items():
            forward, backward, out = compare(use, name)
            assert type(out) is Tensor, f"{name} gave {type(out)}"
            assert forward == ["_allgather_base"] and backward == [], f"{name}: {forward} {backward}"

    run_ranks(body, tp)


def test_local_logits_of_a_wrong_size_raise() -> None:
    def body() -> None:
        with pytest.raises(TPError, match=r"rank \d of 2 has \d columns of a vocabulary of 11"):
            split_logits(torch.zeros(3, V), Axis(dist.group.WORLD), V)
        dist.barrier()

    run_ranks(body, 2)
