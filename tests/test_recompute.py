"""Activation checkpointing against a run without it and against one process: gradients, what is kept, what is sent again."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import lightning_tp as ltp
from examples.llama import PLAN, Llama, LlamaConfig
from lightning_tp.mesh import make_mesh
from lightning_tp.recompute import Recompute
from lightning_tp.testing import run_ranks
from tests.test_apply import AG, AR, NO_SP, RS, Case, Sent, assert_same_run, loss_of, reference, train

KINDS: dict[str, Recompute] = {
    "block": "block",
    "selective": "selective",
    "attention": lambda name, module: name.endswith(".attention"),
    "first block and its attention": lambda name, module: name in ("layers.0", "layers.0.attention"),
}


@pytest.mark.parametrize(
    "case",
    [Case(1, 2), Case(1, 2, how=NO_SP, micro=2), Case(2, 2, model=dict(num_kv_heads=1))],
    ids=["tp2", "whole activations", "2x2"],
)
def test_runs_as_in_one_process(case: Case) -> None:
    def body() -> dict[str, Any]:
        runs = {}
        for name, how in KINDS.items():
            mesh = make_mesh("cpu", case.dp, case.tp)
            model = ltp.parallelize(case.build(), mesh, PLAN, **{**case.how, "activation_checkpointing": how})
            assert not [key for key in model.state_dict() if "checkpoint" in key]
            runs[name] = train(model, case.batches(), mesh)
        return runs

    for runs in run_ranks(body, case.dp * case.tp):
        for run in runs.values():
            assert_same_run(run, reference(case), rtol=2e-4)


class AllSent(Sent):
    """Also the sums that are one operator, so that they can be kept."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "lightning_tp":
            self.all.append((RS if args[2] else AR, args[0].numel() * args[0].itemsize))
        return super().__torch_dispatch__(func, types, args, kwargs)


@pytest.mark.parametrize(
    "how, again",
    [
        # a block has two gathers and two scatters; of the second sum nobody asks for the result
        (dict(activation_checkpointing="block"), {AG: 4, RS: 2}),
        (dict(activation_checkpointing="selective"), {AG: 4}),
        (dict(activation_checkpointing=KINDS["attention"]), {AG: 2}),  # of its sum nobody asks for the result
        (dict(activation_checkpointing=KINDS["first block and its attention"]), {AG: 3, RS: 1}),  # the attention's twice
        (dict(activation_checkpointing="block", **NO_SP), {AR: 2}),
        (dict(activation_checkpointing="selective", **NO_SP), {}),
    ],
)
def test_collectives_that_run_again(how: dict[str, Any], again: dict[str, int]) -> None:
    plain = {k: v for k, v in how.items() if k != "activation_checkpointing"}

    def body() -> Counter[str]:
        sent = []
        for of in (plain, how):
            model = ltp.parallelize(Case(1, 2).build(), make_mesh("cpu", 1, 2), PLAN, **of)
            tokens = torch.randint(0, 1003, (2, 18), generator=torch.Generator().manual_seed(0))
            loss_of(model, tokens).backward()
            with AllSent() as forward:
                loss = loss_of(model, tokens)
            with AllSent() as back:
                loss.backward()
            sent.append([Counter(op for op, _ in of.all) for of in (forward, back)])
        (forward, back), (forward_again, back_again) = sent
        assert forward_again == forward
        back_again.subtract(back)
        return +back_again

    for more in run_ranks(body, 2):
        assert more == again


def kept(make: Callable[[], Tensor]) -> int:
    """Bytes of the storages that a forward leaves alive for its backward."""
    import weakref

    alive: dict[int, int] = {}

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            for t in torch.utils._pytree.tree_leaves(out):
                if isinstance(t, Tensor):
                    storage = t.untyped_storage()
                    if storage._cdata not in alive:
                        alive[storage._cdata] = storage.nbytes()
                        weakref.finalize(storage, alive.pop, storage._cdata, None)
            return out

    with Watch():
        loss = make()
    gc.collect()
    total = sum(alive.values())
    loss.backward()
    return total


def test_fewer_bytes_are_kept() -> None:
    config = LlamaConfig(vocab_size=64, dim=128, num_layers=4, num_heads=8, num_kv_heads=8, hidden_dim=344)

    def body() -> dict[str, int]:
        mesh, bytes_of = make_mesh("cpu", 1, 2), {}
        for name, how in {"": None, **KINDS}.items():
            model = ltp.parallelize(Llama(config), mesh, PLAN, activation_checkpointing=how)
            tokens = torch.randint(0, 64, (2, 65), generator=torch.Generator().manual_seed(0))
            loss_of(model, tokens).backward()
            bytes_of[name] = kept(lambda model=model, tokens=tokens: loss_of(model, tokens))
        return bytes_of

    for got in run_ranks(body, 2):
        print(got)
        shard = 2 * 64 * 128 * 4 // 2
        assert got["block"] < got["selective"] < 0.6 * got[""]
        assert got["block"] < got["attention"] < got[""]
        assert got[""] - got["block"] > 4 * 8 * shard
