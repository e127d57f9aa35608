"""FLOPs and matmuls of a micro-batch."""

from __future__ import annotations

from lightning_tp.estimate import estimate
from lightning_tp.estimate.cost.flops import Flops, Product, flops_of, ops_of, products_of
from tests.estimate.by_hand import block_tape, model_of, op, outside
from tests.estimate.models import TOKENS, meta_llama


def test_flops_are_those_that_are_counted_by_hand() -> None:
    found = estimate(meta_llama(4), TOKENS, (1, 1))
    d, ff, v, s, heads, kv = 128, 344, 512, 64, 8, 4
    weights = 4 * (d * d * 2 + 2 * d * kv * (d // heads) + 3 * d * ff) + v * d
    assert found.flops.model == 6 * weights * 2 * s + 4 * 14 * s * s * d * 2  # attention: 4 forward, 10 backward
    again = estimate(meta_llama(4), TOKENS, (1, 1), activation_checkpointing="block")
    assert again.flops.model == found.flops.model and again.flops.rank > found.flops.rank


ATTENTION = op("sdpa", "layers.1.attn", flops=100, work=50, shape=(4, 8, 8, 2))
UP = op("mm", "layers.1.up", flops=16, shape=(1, 2, 2, 2))
AGAIN = UP._replace(phase="recompute")
TAPES = [
    outside("forward", op("mm", "head", flops=7, shape=(1, 1, 1, 1))),
    block_tape("layers.0", "forward", [op("mm", "layers.0.up", flops=16, shape=(1, 2, 2, 2)), op("add")]),
    block_tape("layers.1", "forward", [ATTENTION, UP, UP]),
    block_tape("layers.2", "forward", representative="layers.1"),
    outside("forward", UP, duplicate=True),
    block_tape("layers.1", "backward", [AGAIN]),
]
FOLLOWED = {"layers.0": "layers.0", "layers.1": "layers.1", "layers.2": "layers.1"}


def test_blocks_that_did_not_run_count_and_duplicates_do_not() -> None:
    model = model_of(TAPES, FOLLOWED)
    counted = dict.fromkeys(["up", "attn", "head"], 0)
    for kernel, n in ops_of(model):
        if kernel.kind != "other":
            counted[kernel.module.rpartition(".")[2]] += n
    assert counted == {"up": 1 + 2 + 2 + 1, "attn": 2, "head": 1}
    flops = 7 + 16 + 2 * (100 + 32)
    assert flops_of(model, model) == Flops(
        flops, flops - 2 * 50 + 16
    )  # attention computes half; what is recomputed is not of the model


def test_matmuls_of_blocks_are_folded_and_sorted() -> None:
    attention, up, again, head = products_of(model_of(TAPES, FOLLOWED))
    assert attention == Product(4, 8, 8, 2, 2, "layers.*.attn", "forward", "attention", "float32", 200, 1, 100)
    assert (up.module, up.count, up.flops) == ("layers.*.up", 5, 5 * 16)
    assert (again.phase, again.count) == ("recompute", 1)
    assert (head.module, head.count, head.flops) == ("head", 1, 7)
