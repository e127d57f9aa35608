"""The length of the sequence that activations are shards of.

Shards are padded to equal size, since every rank has to send as much, and a shard does not say how much of the last one is padding. So
the axis remembers the length of the sequence that was last sharded.
"""

from __future__ import annotations

import math

from torch import Tensor

from lightning_tp.core.comm.axis import SEQUENCE_DIM, Axis
from lightning_tp.errors import TPError


def note_sharded(x: Tensor, axis: Axis) -> int:
    """Remember the length of the full sequence `x` (B, S, ..), which is about to be sharded, and return it."""
    before, axis.seq_len = axis.seq_len, x.shape[SEQUENCE_DIM]
    if before is not None and before != axis.seq_len and math.ceil(before / axis.size) == math.ceil(axis.seq_len / axis.size):
        axis.seq_len_changed = True
    return axis.seq_len


def full_length(shard: Tensor, axis: Axis) -> int:
    """Return the length S of the sequence of which `shard` (B, ceil(S / tp), ..) is this rank's part.

    Raises:
        TPError: if no sequence of such shards was sharded, or two of different lengths whose shards are as long.
    """
    seq_len, tokens = axis.seq_len, shard.shape[SEQUENCE_DIM]
    if seq_len is None or math.ceil(seq_len / axis.size) != tokens:
        raise TPError(
            f"A tensor of shape {tuple(shard.shape)} arrives where a sequence shard is expected, but "
            + (
                "no sequence was sharded before"
                if seq_len is None
                else f"the sequence that was last sharded over tp={axis.size} ranks has {seq_len} tokens, {math.ceil(seq_len / axis.size)} per rank"
            )
            + ". A module in between changed the sequence (dim 1), or never sharded it: give that module the style `replicate`, or turn "
            "sequence parallelism off (`sequence_parallel=False`)."
        )
    if axis.seq_len_changed and (own := _length_in_graph(shard)) not in (None, seq_len):
        raise TPError(
            f"A shard of a sequence of {own} tokens is gathered after another sequence of {seq_len} tokens was sharded over tp={axis.size} ranks "
            f"({tokens} tokens per rank in both): those of an encoder and a decoder, say. One sequence can be sharded at a time: let the "
            "first one leave its last module in full (`output='I'`), or turn sequence parallelism off (`sequence_parallel=False`)."
        )
    return seq_len


def _length_in_graph(shard: Tensor) -> int | None:
    """The length of what this shard was cut from, from the nearest node of its autograd graph that knows; None without a graph."""
    nodes, seen = [shard.grad_fn], set()
    for node in nodes:  # grows: breadth first
        length = getattr(node, "sharded_length", None)  # set by the transitions to S(1)
        if length is not None:
            return int(length)
        for earlier, _ in () if node is None else node.next_functions:
            if earlier is not None and earlier not in seen:
                seen.add(earlier)
                nodes.append(earlier)
    return None
