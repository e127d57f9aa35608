"""Find embeddings whose code needs the full table: of a subclass with a forward of its own that a vocabulary-parallel lookup does not fit."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_tp.core.comm.axis import Axis, even_shard
from lightning_tp.core.comm.fake_world import FakeGroup
from lightning_tp.core.trees import tensors_in
from lightning_tp.styles import VocabEmbedding
from lightning_tp.styles.base import BindContext

TRIED = 64  # ids


def needs_full_table(module: nn.Embedding, tp: int) -> bool:
    """Return whether the forward of an embedding's class does something with the weight but look up rows by `nn.Embedding.forward`.

    Its forward is tried on the shards of each rank, where the lookup returns what all ranks together would.
    """
    if getattr(type(module).forward, "__code__", None) is nn.Embedding.forward.__code__:
        return False
    generator = torch.Generator().manual_seed(0)
    rows, width = module.num_embeddings, module.embedding_dim
    table = torch.rand(rows + width, generator=generator).as_strided((rows, width), (1, 1))  # without memory for each element
    ids = torch.randint(rows, (2, TRIED), generator=generator)
    ends = [shard.start for r in range(tp) if len(shard := even_shard(rows, r, tp))]
    ids[0, : len(ends)] = torch.tensor(ends[:TRIED])
    if module.padding_idx is not None:
        ids[1, 0] = module.padding_idx
    try:
        with torch.no_grad():
            expected = _output(_with_table(module, table), ids)
            for rank in range(tp):
                shard = even_shard(rows, rank, tp)
                twin = _with_table(module, table[shard.start : shard.stop].clone())
                VocabEmbedding().bind(twin, BindContext("", Axis(FakeGroup(rank, tp))))
                twin.__dict__.update(_vocab=rows, _start=shard.start, _leave=lambda y, axis: F.embedding(ids, table))
                if not torch.allclose(_output(twin, ids), expected, atol=1e-5):
                    return True
    except Exception:  # its forward takes more than ids, or does not run on a shard
        return True
    return False


def _with_table(module: nn.Embedding, table: Tensor) -> nn.Embedding:
    """Return a copy of an embedding with another table; parameters on the meta device have random values in it."""
    twin = copy.deepcopy(module, {id(module.weight): nn.Parameter(table, requires_grad=False)})
    generator = torch.Generator().manual_seed(1)
    for m in twin.modules():
        for name, p in list(m.named_parameters(recurse=False)):
            if p.is_meta:
                setattr(m, name, nn.Parameter(torch.rand(p.shape, generator=generator).to(p.dtype), requires_grad=False))
        for name, b in list(m.named_buffers(recurse=False)):
            if b.is_meta:
                setattr(m, name, getattr(b, "_tp_value", torch.ones(b.shape, dtype=b.dtype)))
    return twin


def _output(module: nn.Embedding, ids: Tensor) -> Tensor:
    """Return all that a module returns, as one vector."""
    return torch.cat([t.flatten().float() for t in tensors_in(module(ids))])
