"""`torch.compile` of the blocks against the same run without it; what a compiler can't do; what users have compiled themselves."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_tp as ltp
from examples.llama import PLAN
from lightning_tp.apply.compile import compile_blocks
from lightning_tp.core.comm.axis import Axis
from lightning_tp.core.comm.mesh import make_mesh
from lightning_tp.core.comm.transitions import outside
from lightning_tp.core.ops.intercept import PerRankCall, intercept_call
from lightning_tp.core.ops.random_numbers import RandomCallPolicy, policy_of
from lightning_tp.styles import BindContext
from lightning_tp.styles.calls.call import Call
from lightning_tp.styles.calls.rewritten_calls import RewrittenCalls
from lightning_tp.testing import assert_trees_close, fake_world, randomize_, run_ranks
from tests.apply.test_parallelize import BLOCK, NO_SP, Case, assert_same_run, reference, train

QUIET = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)


class Counting:
    """A backend that counts the pieces that it is given, and runs them as they are."""

    def __init__(self, error: Exception | None = None) -> None:
        self.pieces, self.error = 0, error

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.pieces += 1
        if self.error is not None:
            raise self.error
        return graph.forward


def past_observation(model: nn.Module) -> nn.Module:
    """The first steps are observed and not compiled: begin at the 10th, behind which none is until the 17th."""
    policy = policy_of(model)
    if policy is not None:
        policy.steps = 9
    return model


@pytest.mark.parametrize(
    "case",
    [pytest.param(Case(1, 2), id="tp2"), pytest.param(Case(2, 2, model=dict(num_kv_heads=1)), id="2x2", marks=pytest.mark.slow)],
)
def test_runs_as_in_one_process(case: Case) -> None:
    hows = [{}, BLOCK] if case.dp > 1 else [{}, BLOCK, NO_SP, {**NO_SP, **BLOCK}]

    def body() -> Any:
        mesh, runs = make_mesh("cpu", case.dp, case.tp), []
        for how in hows:
            backend = Counting()
            model = ltp.parallelize(case.build(), mesh, PLAN, compile=backend, **how)
            keys = sorted(model.state_dict())
            past_observation(model)
            runs.append((train(model, case.batches(), mesh), backend.pieces))
            assert keys == sorted(ltp.full_state_dict(model))
        backend = "aot_eager"
        runs.append((train(past_observation(ltp.parallelize(case.build(), mesh, PLAN, compile=backend)), case.batches(), mesh), 1))
        return runs

    for runs in run_ranks(body, case.dp * case.tp, timeout=200):
        for run, pieces in runs:
            assert pieces > 0
            assert_same_run(run, reference(case), rtol=2e-4)


@pytest.mark.slow
def test_with_inductor() -> None:
    case = Case(1, 2, model=dict(num_layers=1))

    def body() -> Any:
        model = ltp.parallelize(case.build(), make_mesh("cpu", 1, 2), PLAN, compile=True)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            return train(past_observation(model), case.batches(), make_mesh("cpu", 1, 2))

    for run in run_ranks(body, 2, timeout=300):
        assert_same_run(run, reference(case), rtol=2e-4)


def test_a_compiler_that_fails_is_left_out_with_one_line() -> None:
    case = Case(1, 2)

    def body() -> Any:
        backend = Counting(RuntimeError("no compiler\nand much more"))
        model = ltp.parallelize(case.build(), make_mesh("cpu", 1, 2), PLAN, compile=backend)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run = train(past_observation(model), case.batches(), make_mesh("cpu", 1, 2))
        return run, backend.pieces, [str(w.message) for w in caught if "compile" in str(w.message) and "jit" not in str(w.message)]

    for rank, (run, pieces, lines) in enumerate(run_ranks(body, 2)):
        assert pieces == 1
        assert lines == [f"`compile`: failed, runs uncompiled on rank {rank}: RuntimeError: no compiler"]
        assert_same_run(run, reference(case), rtol=2e-4)


@pytest.mark.parametrize("collectives", [0, 1])
def test_what_torch_cannot_cut_into_pieces_runs_once(collectives: int) -> None:
    """As it is, if nothing has run yet; else it must not run again on this rank alone."""
    blocks = nn.ModuleList(nn.Sequential(nn.Linear(2, 2)) for _ in range(2))
    compiler = compile_blocks(blocks, "eager")

    def fails(*args: Any) -> Any:
        for _ in range(collectives):
            outside(max, 1, 2)
        raise torch._dynamo.exc.InternalTorchDynamoError("lost")

    compiler.compiled = lambda forward: fails  # type: ignore[method-assign]
    if collectives:
        with pytest.raises(ltp.TPError, match="in the middle of a block"):
            blocks[0](torch.ones(1, 2))
    else:
        with pytest.warns(UserWarning, match="runs uncompiled"):
            assert torch.equal(blocks[0](torch.ones(1, 2)), blocks[0][0](torch.ones(1, 2)))


def test_blocks_run_uncompiled_where_calls_are_intercepted() -> None:
    """In an observed step; inside of a module whose calls are intercepted or changed; and where they have such calls themselves."""
    block = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
    compiler, compiled = compile_blocks([block], "eager"), []
    own = nn.Sequential.forward

    def count(forward: Any) -> Any:
        compiled.append(forward)
        return own

    compiler.compiled = count  # type: ignore[method-assign]
    outer, x = nn.Sequential(block), torch.ones(1, 2)
    outer(x)
    assert compiled == [own]
    with fake_world(2):
        policy = RandomCallPolicy(Axis(dist.group.WORLD))
    with policy.all_calls():
        policy.run_random_call = lambda call, frame: call.run()  # type: ignore[method-assign]
        outer(x)
    assert len(compiled) == 1
    intercept_call(outer, ("dropout", ()), PerRankCall("dropout"), policy)
    outer(x)
    assert len(compiled) == 1
    block(x)
    assert len(compiled) == 2
    intercept_call(block, ("dropout", ()), PerRankCall("dropout"), policy)
    block(x)
    assert len(compiled) == 2
    other = nn.Sequential(nn.Linear(2, 2))
    compile_blocks([other], "eager")._compiled[own] = lambda *args: compiled.append(args) or own(*args)
    RewrittenCalls(calls=(Call("view", (("forward", "0"),)),)).bind(holder := nn.Sequential(other), BindContext("x", None))  # type: ignore[arg-type]
    holder(x)
    assert len(compiled) == 2
    other(x)
    assert len(compiled) == 3


def gpt2(dropout: float) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=96, n_positions=32, n_embd=32, n_layer=2, n_head=4, resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout
    )
    return randomize_(GPT2LMHeadModel(config))


def steps(model: nn.Module, tokens: Tensor, count: int = 5) -> list[float]:
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.1), []
    for _ in range(count):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.slow
def test_a_hugging_face_model_with_dropout() -> None:
    """The same masks with and without, whole ones and those of shards; a copy of the model is compiled for itself."""
    tokens = torch.randint(0, 96, (2, 13), generator=torch.Generator().manual_seed(0))

    def body() -> Any:
        runs, pieces = [], []
        for dropout in (0.0, 0.3):
            for how in ({}, dict(compile=True), dict(compile=True, **BLOCK)):
                model = gpt2(dropout).train()
                plan = ltp.infer_plan(model, {"input_ids": tokens}, tp=2)
                if how:
                    how = {**how, "compile": Counting()}
                ltp.parallelize(model, make_mesh("cpu", 1, 2), plan, **how)
                torch.manual_seed(5)
                losses = steps(model, tokens, 7)
                if how:
                    pieces.append(how["compile"].pieces)
                twin = copy.deepcopy(model)
                losses += steps(twin, tokens, 2)
                runs.append((losses, ltp.full_state_dict(model), ltp.full_state_dict(twin)))
        return runs, pieces

    for runs, pieces in run_ranks(body, 2, timeout=200):
        assert all(pieces)
        for plain, *others in (runs[:3], runs[3:]):
            for other in others:
                torch.testing.assert_close(torch.tensor(other[0]), torch.tensor(plain[0]), rtol=1e-5, atol=0)
                assert_trees_close(other[1], plain[1], rtol=1e-4)
                assert_trees_close(other[2], plain[2], rtol=1e-4)
        whole = steps(gpt2(0.0), tokens, 7)
        torch.testing.assert_close(torch.tensor(runs[0][0][:7]), torch.tensor(whole), rtol=1e-4, atol=0)


# ------------------------------------------------------------------------------------------------ compiled by the user


class Net(L.LightningModule):
    """Compiles nothing; those below do."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[float] = []
        self.model = self.make()

    def make(self) -> nn.Module:
        return Case(1, 2).build()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(outputs["loss"].item())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Wrapped(Net):
    def make(self) -> nn.Module:
        return torch.compile(Case(1, 2).build(), backend="eager")  # type: ignore[return-value]


class InPlace(Net):
    def make(self) -> nn.Module:
        model = Case(1, 2).build()
        for layer in model.layers:
            layer.compile(backend="eager")
        return model


class Step(Net):
    training_step = torch.compile(Net.training_step, backend="eager")  # type: ignore[assignment]


def with_compiled_step() -> Net:
    module = Net()
    module.training_step = torch.compile(module.training_step, backend="eager")  # type: ignore[method-assign]
    return module


def fit(module: Any, world: int, **how: Any) -> tuple[list[float], dict[str, Tensor], list[str]]:
    data = torch.randint(0, 1003, (24, 18), generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        strategy = ltp.TPStrategy(tp=2, **how) if world > 1 else "auto"
        trainer = L.Trainer(accelerator="cpu", devices=world, strategy=strategy, max_epochs=1, **QUIET)
        trainer.fit(module, DataLoader(data, batch_size=4))
    module = getattr(module, "_orig_mod", module)
    weights = {n.replace("_orig_mod.", ""): t for n, t in ltp.full_state_dict(module).items()}
    return module.losses, weights, [str(w.message) for w in caught if "compile" in str(w.message) and "jit" not in str(w.message)]


@pytest.mark.slow
def test_what_users_compile_themselves() -> None:
    ref = fit(Net(), 1)
    backend_all = lambda: dict(plan={f"model.{k}": v for k, v in PLAN.items()})  # noqa: E731
    makes: dict[str, Any] = {
        "ours": lambda: fit(Net(), 2, compile="eager", **backend_all()),
        "wrapped": lambda: fit(Wrapped(), 2, **backend_all()),
        "wrapped, plan inferred": lambda: fit(Wrapped(), 2),
        "in place": lambda: fit(InPlace(), 2, **backend_all()),
        "the LightningModule": lambda: fit(torch.compile(Net(), backend="eager"), 2, **backend_all()),
        "the step": lambda: fit(Step(), 2, **backend_all()),
        "the step, on the instance": lambda: fit(with_compiled_step(), 2, **backend_all()),
    }
    for rank, results in enumerate(run_ranks(lambda: {name: make() for name, make in makes.items()}, 2, init=False, timeout=300)):
        for name, (losses, weights, lines) in results.items():
            torch.testing.assert_close(
                torch.tensor(losses), torch.tensor(ref[0]), rtol=1e-4, atol=0, msg=lambda m, name=name: f"{name}: {m}"
            )
            assert_trees_close(weights, ref[1], rtol=1e-4, name=name)
            assert len(lines) == (0 if rank or name == "ours" else 1), (name, lines)


def test_what_does_not_go_together() -> None:
    for how, message in [
        (dict(compile="nothing"), "unknown backend.*aot_eager"),
        (dict(compile=True, activation_checkpointing="selective"), "selective"),
        (dict(compile=True, dropout="exact"), "exact"),
        (dict(compile=True, backend="dtensor"), "dtensor"),
    ]:
        with pytest.raises(ltp.TPError, match=message):
            ltp.TPStrategy(**how)  # type: ignore[arg-type]
