"""What a rank holds of a parameter: boxes, rows, sizes that add up."""

from __future__ import annotations

import torch

from lightning_tp.core.comm.mesh import make_mesh
from lightning_tp.core.comm.state import R, S
from lightning_tp.shards import shard as shard_module


def test_boxes_and_rows_add_up_for_any_sizes() -> None:
    """Each element of a parameter is on some rank, at the place that the box says; without a process group."""
    from lightning_tp.styles.split import Split, even_split, head_split
    from lightning_tp.testing import fake_world

    shape = (10, 6)
    splits = [
        Split(),
        Split(R),
        *(even_split(10, 0, tp=4), even_split(6, 1, tp=4)),
        *(head_split(10, 0, 4, heads=2), head_split(6, 1, 4, heads=1)),
        Split(S(0), tuple(((r, r + 1), (4 + r, 5 + r)) for r in range(4))),  # a fused one, without rows 8 and 9
    ]
    whole = torch.arange(60.0).view(shape)
    for fsdp in (False, True):
        for one in splits:
            seen = torch.zeros(shape, dtype=torch.bool)
            for rank in range(8):
                with fake_world(8, rank):
                    shard = shard_module.ParamShard("w", one, shape, make_mesh("cpu", 2, 4), fsdp)
                    local = shard.take(whole)
                    assert tuple(local.shape) == shard.local_shape
                    elements = 0
                    for (offset, size), (here, _) in shard.boxes():
                        there = tuple(slice(o, o + n) for o, n in zip(offset, size))
                        assert torch.equal(whole[there], local[tuple(slice(o, o + n) for o, n in zip(here, size))])
                        seen[there] = True
                        elements += whole[there].numel()
                    assert elements == local.numel()
            assert seen[:8].all() and (seen.all() or one is splits[-1])
