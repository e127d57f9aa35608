"""Activation checkpointing against a run without it and against one process: gradients, what is kept, what is sent again."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy

import lightning_tp as ltp
from examples.llama import PLAN, Llama, LlamaConfig
from lightning_tp.apply.activation_checkpointing import ActivationCheckpointing, _policy
from lightning_tp.core.comm.mesh import make_mesh
from lightning_tp.shards.view import local_view
from lightning_tp.testing import assert_trees_close, randomize_, run_ranks
from tests.apply.test_parallelize import AG, AR, NO_SP, RS, Case, Sent, assert_same_run, loss_of, reference, train

KINDS: dict[str, ActivationCheckpointing] = {
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


def kept(model: nn.Module, make: Callable[[], Tensor]) -> int:
    """Bytes of the storages that a forward leaves alive for its backward, beside the parameters."""
    with local_view():
        parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    import weakref

    alive: dict[int, int] = {}

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            for t in torch.utils._pytree.tree_leaves(out):
                if isinstance(t, Tensor):
                    storage = t.untyped_storage()
                    if storage._cdata not in alive and storage._cdata not in parameters:
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
            bytes_of[name] = kept(model, lambda model=model, tokens=tokens: loss_of(model, tokens))
        return bytes_of

    for got in run_ranks(body, 2):
        shard = 2 * 64 * 128 * 4 // 2
        assert got["block"] < got["selective"] < 0.62 * got[""], got
        assert got["block"] < got["attention"] < got[""]
        assert got[""] - got["block"] > 4 * 8 * shard


def hf_llama(dropout: float = 0.0) -> nn.Module:
    from transformers import LlamaConfig as Config
    from transformers import LlamaForCausalLM

    config = Config(
        vocab_size=96, hidden_size=32, intermediate_size=44, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64, attention_dropout=dropout,
    )  # fmt: skip
    assert config.use_cache
    model: nn.Module = randomize_(LlamaForCausalLM(config))
    return model.train()


def test_a_decoder_that_keeps_its_keys_and_values() -> None:
    """`use_cache=True` is the default of Hugging Face: a block that is run again must not find its own keys; a filled cache is used."""
    from transformers import DynamicCache

    tokens = torch.randint(0, 96, (2, 12), generator=torch.Generator().manual_seed(0))

    def gradients(model: nn.Module, of: Any) -> tuple[list[int], dict[str, Tensor]]:
        lengths = []
        for filled in (False, True):
            cache = DynamicCache(config=model.config)
            if filled:
                with torch.no_grad():
                    model(input_ids=tokens[:, :5], past_key_values=cache, use_cache=True)
            out = model(input_ids=tokens[:, 5 * filled :], labels=tokens[:, 5 * filled :], past_key_values=cache, use_cache=True)
            out.loss.backward()
            lengths += [out.past_key_values.get_seq_length(), cache.get_seq_length()]
        model(input_ids=tokens, labels=tokens).loss.backward()  # makes a cache of its own
        return lengths, {n: g for n, g in of(model).items() if g is not None}

    ref = gradients(hf_llama(), ltp.full_gradients)

    def body() -> Any:
        runs = []
        for how in ("block", "selective", lambda name, module: name.endswith("self_attn")):
            model = hf_llama()
            plan = ltp.infer_plan(model, {"input_ids": tokens}, tp=2)
            runs.append(
                gradients(ltp.parallelize(model, make_mesh("cpu", 1, 2), plan, activation_checkpointing=how), ltp.full_gradients)
            )
        return runs

    for runs in run_ranks(body, 2, timeout=120):
        for lengths, got in runs:
            assert lengths == ref[0] == [12, 12, 12, 12]
            assert_trees_close(got, ref[1], rtol=1e-3)


def test_dropout_is_replayed() -> None:
    """The same steps as without, masks of whole activations and of shards; in half precision as well."""
    tokens = torch.randint(0, 96, (2, 12), generator=torch.Generator().manual_seed(0))

    def body() -> Any:
        runs: dict[bool, list[list[float]]] = {False: [], True: []}
        for half in (False, True):
            for how in (None, "block", "selective"):
                model = hf_llama(0.3)
                plan = ltp.infer_plan(model, {"input_ids": tokens}, tp=2)
                ltp.parallelize(model, make_mesh("cpu", 1, 2), plan, activation_checkpointing=how)
                torch.manual_seed(3)
                optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.3), []
                for _ in range(6):
                    with torch.autocast("cpu", torch.bfloat16, enabled=half):
                        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
                    loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    losses.append(loss.item())
                runs[half].append(losses)
        return runs

    for runs in run_ranks(body, 2, timeout=120):
        for half, (plain, *others) in runs.items():
            for losses in others:
                torch.testing.assert_close(torch.tensor(losses), torch.tensor(plain), rtol=2e-2 if half else 1e-5, atol=0)


def test_a_backward_pass_that_is_repeated() -> None:
    def body() -> None:
        case = Case(1, 2)
        model = ltp.parallelize(case.build(), make_mesh("cpu", 1, 2), PLAN, activation_checkpointing="block")
        loss = loss_of(model, case.batches()[0][0])
        loss.backward(retain_graph=True)
        once = {n: g.clone() for n, g in ltp.full_gradients(model).items()}
        loss.backward()
        assert_trees_close(ltp.full_gradients(model), {n: 2 * g for n, g in once.items()}, rtol=1e-5)

    run_ranks(body, 2)


def test_attention_that_drops_out_is_run_again() -> None:
    """Else later draws of a block would be other ones. Kernels of GPUs, asked for what "selective" does with them."""
    aten, mode = torch.ops.aten, CheckpointPolicy
    query = torch.empty(1, 2, 4, 8, device="meta")
    for kernel, before in [
        (aten._scaled_dot_product_flash_attention.default, ()),
        (aten._scaled_dot_product_efficient_attention.default, (None, False)),
        (aten._scaled_dot_product_cudnn_attention.default, (None, False)),
    ]:
        policy = partial(_policy, SimpleNamespace(summing=False), None, kernel, query, query, query, *before)
        assert policy() is policy(0.0, True) is mode.MUST_SAVE
        assert policy(0.1, True) is policy(dropout_p=0.1) is mode.PREFER_RECOMPUTE


def test_what_can_not_be_run_again_is_refused() -> None:
    def body() -> None:
        mesh = make_mesh("cpu", 1, 2)
        for how, message in [
            (lambda name, module: False, r"chose no module.*'tok_embeddings', 'layers', 'layers\.0'"),
            (lambda name, module: name == "layers", "ModuleList, which is never called"),
        ]:
            with pytest.raises(ltp.TPError, match=message):
                ltp.parallelize(Case(1, 2).build(), mesh, PLAN, activation_checkpointing=how)
        with pytest.raises(ltp.TPError, match="no repeated blocks"):
            whole = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))
            ltp.parallelize(whole, mesh, {"0": "colwise", "1": "rowwise"}, activation_checkpointing="block")
        with pytest.raises(ltp.TPError, match="dtensor"):
            ltp.parallelize(Case(1, 2).build(), mesh, PLAN, activation_checkpointing="block", backend="dtensor")

    run_ranks(body, 2)
