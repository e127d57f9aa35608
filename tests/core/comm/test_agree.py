"""Ranks that agree, and one process that agrees with itself."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from lightning_tp.core.comm.agree import Peers
from lightning_tp.errors import TPError
from lightning_tp.testing import run_ranks


def test_one_process() -> None:
    alone = Peers()
    assert (alone.rank, alone.size) == (0, 1)
    assert alone.gather(3) == [3] and alone.from_first(lambda: "done") == "done"
    assert alone.first_message(None) is None and alone.first_message("why") == "why"
    with pytest.raises(ZeroDivisionError):  # nobody else waits: the error as it is
        alone.from_first(lambda: 1 / 0)


def test_ranks() -> None:
    def body() -> None:
        rank = dist.get_rank()
        peers = Peers()
        assert (peers.rank, peers.size) == (rank, 3)
        assert peers.gather(rank * 2) == [0, 2, 4]
        called = []
        assert peers.from_first(lambda: called.append(rank) or f"of {rank}") == "of 0"
        assert called == ([0] if rank == 0 else [])
        assert peers.first_message(None) is None
        assert peers.first_message(f"from {rank}" if rank else None) == "from 1"

        def refuse() -> None:
            raise TPError("`x`: 3 of 4. Use 4.")

        with pytest.raises(TPError, match=r"^`x`: 3 of 4\. Use 4\.$"):
            peers.from_first(refuse)
        with pytest.raises(TPError, match=r"^ZeroDivisionError: division by zero$"):
            peers.from_first(lambda: 1 / 0)
        assert Peers(alone=True).gather(rank) == [rank]

        group = dist.new_group([1, 2])
        if rank:
            some = Peers(group)
            assert (some.rank, some.size) == (rank - 1, 2)
            assert some.gather(rank) == [1, 2] and some.from_first(lambda: rank) == 1

    run_ranks(body, 3)
