"""A world of any size in one process, which is gone afterwards."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from lightning_tp.core.comm.fake_world import fake_world
from lightning_tp.errors import TPError


def test_fake_world_pretends_and_cleans_up() -> None:
    with pytest.raises(RuntimeError, match="from the body"), fake_world(1024, rank=7):
        assert (dist.get_world_size(), dist.get_rank()) == (1024, 7)
        dist.all_reduce(torch.ones(2))
        raise RuntimeError("from the body")
    assert not dist.is_initialized()
    with fake_world(2):
        assert dist.get_world_size() == 2
        with pytest.raises(TPError, match="found a process group of 2 ranks"), fake_world(4):
            pass
    with pytest.raises(TPError, match="has ranks 0 to 1"), fake_world(2, rank=2):
        pass
