"""`parallelize` against one process: losses, gradients, weights after some steps, what crosses the ranks, what a rank holds."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils._python_dispatch import TorchDispatchMode

import lightning_tp as ltp
from examples.llama import PLAN, Llama, LlamaConfig
from lightning_tp._compat import local_tensor
from lightning_tp.core.comm.mesh import DATA_PARALLEL, make_mesh
from lightning_tp.testing import assert_trees_close, randomize_, run_ranks

# Nothing here divides by 2 or 4 but the heads.
ODD = dict(vocab_size=1003, dim=64, num_layers=2, num_heads=8, num_kv_heads=4, hidden_dim=341, bias=True)


@dataclass(frozen=True)
class Case:
    """One comparison; `model` are arguments of the Llama, `how` of `parallelize`."""

    dp: int
    tp: int
    model: dict[str, Any] = field(default_factory=dict)
    how: dict[str, Any] = field(default_factory=dict)
    seq: int = 17
    micro: int = 1  # micro-batches whose gradients are accumulated
    dtype: torch.dtype = torch.float32

    def build(self) -> Llama:
        return randomize_(Llama(LlamaConfig(**{**ODD, **self.model})).to(self.dtype))

    def batches(self) -> list[list[Tensor]]:
        """For each of 3 steps, the micro-batches: (4, seq + 1) tokens each."""
        random = torch.Generator().manual_seed(1)
        vocab = {**ODD, **self.model}["vocab_size"]
        draw = lambda: torch.randint(0, vocab, (4, self.seq + 1), generator=random)  # noqa: E731
        return [[draw() for _ in range(self.micro)] for _ in range(3)]


@dataclass
class Run:
    losses: list[float]
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def train(model: nn.Module, batches: list[list[Tensor]], mesh: Any = None) -> Run:
    """Three steps; the gradients are those of the first. On a mesh each data-parallel rank works on its own part of each batch."""
    # eps is not small beside the gradients: a sign of one that is all rounding must not decide about a whole step
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3)
    losses, gradients = [], {}
    for step, micro_batches in enumerate(batches):
        total = 0.0
        for tokens in micro_batches:
            if mesh is not None:
                tokens = tokens.chunk(mesh[DATA_PARALLEL].size())[mesh.get_local_rank(DATA_PARALLEL)]
            loss = loss_of(model, tokens) / len(micro_batches)
            loss.backward()
            total += loss.item()
        if mesh is not None:
            mean = torch.tensor(total, dtype=torch.float64)
            dist.all_reduce(mean)
            total = mean.item() / dist.get_world_size()
        losses.append(total)
        if step == 0:
            gradients = {n: g.clone() for n, g in ltp.full_gradients(model).items()}
        optimizer.step()
        optimizer.zero_grad()
    return Run(losses, gradients, ltp.full_state_dict(model))


_references: dict[Any, Run] = {}


def reference(case: Case) -> Run:
    """What one process gets, once for all cases with the same model and data."""
    key = (repr(sorted(case.model.items())), case.seq, case.micro, case.dtype)
    if key not in _references:
        _references[key] = train(case.build(), case.batches())
    return _references[key]


def assert_same_run(got: Run, ref: Run, rtol: float) -> None:
    torch.testing.assert_close(torch.tensor(got.losses), torch.tensor(ref.losses), rtol=rtol, atol=0)
    assert_trees_close(got.gradients, ref.gradients, rtol=rtol, name="gradients")
    assert_trees_close(got.weights, ref.weights, rtol=rtol, name="weights")


MESHES = {"tp2": (1, 2), "tp4": (1, 4), "2x2": (2, 2), "dp2": (2, 1)}
NO_SP, NO_LP = dict(sequence_parallel=False), dict(loss_parallel=False)
NEITHER, BLOCK = {**NO_SP, **NO_LP}, dict(activation_checkpointing="block")
CASES = {
    "tp2": Case(1, 2),
    "tp4": Case(1, 4),
    "2x2": Case(2, 2),
    "dp2": Case(2, 1),
    "tp2, whole activations": Case(1, 2, how=NO_SP),
    "tp2, whole logits": Case(1, 2, how=NO_LP),
    "tp4, whole activations, 1 kv head": Case(1, 4, model=dict(num_kv_heads=1), how=NO_SP),
    "2x2, whole activations, 2 kv heads": Case(2, 2, model=dict(num_kv_heads=2), how=NO_SP),
    "2x2, whole logits": Case(2, 2, how=NO_LP),
    "tp2, tied": Case(1, 2, model=dict(tied=True)),
    "tp4, tied, neither": Case(1, 4, model=dict(tied=True), how=NEITHER),
    "2x2, tied": Case(2, 2, model=dict(tied=True)),
    "dp2, tied": Case(2, 1, model=dict(tied=True)),
    "tp4, 2 kv heads": Case(1, 4, model=dict(num_kv_heads=2)),
    "tp2, 1 kv head": Case(1, 2, model=dict(num_kv_heads=1)),
    "tp4, 1 kv head": Case(1, 4, model=dict(num_kv_heads=1)),
    "2x2, 1 kv head": Case(2, 2, model=dict(num_kv_heads=1)),
    "tp2, 197 tokens": Case(1, 2, seq=197),
    "tp4, 197 tokens, 1 kv head": Case(1, 4, seq=197, model=dict(num_kv_heads=1)),
    "2x2, 197 tokens, tied": Case(2, 2, seq=197, model=dict(tied=True, num_layers=1)),
    "tp2, 2 micro-batches, tied": Case(1, 2, micro=2, model=dict(tied=True)),
    "tp4, 2 micro-batches, 1 kv head": Case(1, 4, micro=2, model=dict(num_kv_heads=1)),
    "2x2, 2 micro-batches, 1 kv head": Case(2, 2, micro=2, model=dict(num_kv_heads=1)),
    "tp2, checkpointed, 2 micro-batches": Case(1, 2, micro=2, how=BLOCK),
    "tp4, checkpointed, neither, tied": Case(1, 4, model=dict(tied=True), how={**NEITHER, **BLOCK}),
    "2x2, checkpointed, 1 kv head": Case(2, 2, model=dict(num_kv_heads=1), how=BLOCK),
    "tp2, float64, 2 kv heads": Case(1, 2, dtype=torch.float64, model=dict(num_kv_heads=2)),
    "tp2, float64, checkpointed, tied": Case(1, 2, dtype=torch.float64, model=dict(tied=True), how=BLOCK),
    "tp4, float64, 2 kv heads": Case(1, 4, dtype=torch.float64, model=dict(num_kv_heads=2)),
    "tp4, float64, 3 tokens": Case(1, 4, dtype=torch.float64, seq=3),
    "tp4, float64, 5 words": Case(1, 4, dtype=torch.float64, model=dict(vocab_size=5)),
    "2x2, float64, 2 kv heads": Case(2, 2, dtype=torch.float64, model=dict(num_kv_heads=2)),
    "2x2, float64, neither": Case(2, 2, dtype=torch.float64, how=NEITHER),
}


@contextmanager
def case_named(name: str) -> Iterator[None]:
    """Say which one it was, of the many cases that run in one launch."""
    try:
        yield
    except Exception as error:
        raise AssertionError(f"{name}: {error}") from error


@pytest.mark.parametrize("mesh", MESHES.values(), ids=list(MESHES))
def test_three_steps_as_in_one_process(mesh: tuple[int, int]) -> None:
    cases = {name: case for name, case in CASES.items() if (case.dp, case.tp) == mesh}
    for case in cases.values():
        reference(case)

    def body() -> None:
        device_mesh = make_mesh("cpu", *mesh)
        for name, case in cases.items():
            with case_named(name):
                model = ltp.parallelize(case.build(), device_mesh, PLAN, **case.how)
                got = train(model, case.batches(), device_mesh)
                assert_same_run(got, reference(case), 1e-10 if case.dtype == torch.float64 else 1e-4)

    run_ranks(body, mesh[0] * mesh[1])


# ------------------------------------------------------------------------------------- other ways to call the same model


def gradients_of(model: nn.Module, *batches: Tensor) -> dict[str, Tensor]:
    """Of the mean loss of all batches: one backward after as many forwards."""
    torch.stack([loss_of(model, tokens) for tokens in batches]).mean().backward()
    gradients = {n: g.clone() for n, g in ltp.full_gradients(model).items()}
    model.zero_grad()
    return gradients


@pytest.mark.parametrize("mesh", [(1, 2), (2, 2)], ids=["tp2", "2x2"])
def test_two_forwards_before_one_backward(mesh: tuple[int, int]) -> None:
    """With sequences of several lengths; each of the shards has to be put together to its own."""
    case = Case(*mesh, dtype=torch.float64)
    random = torch.Generator().manual_seed(3)
    batches = [torch.randint(0, 1003, (2, length), generator=random) for length in (18, 6, 11)]
    ref = gradients_of(case.build(), *batches)

    def body() -> None:
        device_mesh = make_mesh("cpu", *mesh)
        for how in ({}, BLOCK, NEITHER):
            with case_named(str(how)):
                model = ltp.parallelize(case.build(), device_mesh, PLAN, **how)
                for _ in range(2):
                    assert_trees_close(gradients_of(model, *batches), ref, rtol=1e-10)

    run_ranks(body, mesh[0] * mesh[1])


@pytest.mark.parametrize("mesh", [(1, 2), (2, 2)], ids=["tp2", "2x2"])
def test_forwards_without_gradients_in_between(mesh: tuple[int, int]) -> None:
    case = Case(*mesh, dtype=torch.float64)
    first, second = (torch.randint(0, 1003, (2, n), generator=torch.Generator().manual_seed(n)) for n in (18, 6))
    whole = case.build()
    logits, ref = whole(second).detach(), gradients_of(whole, first)

    def body() -> None:
        model = ltp.parallelize(case.build(), make_mesh("cpu", *mesh), PLAN)
        for context in (torch.no_grad, torch.inference_mode, torch.no_grad):
            loss = loss_of(model, first)
            with context():
                torch.testing.assert_close(model(second) + 0, logits, rtol=1e-10, atol=1e-10)
            loss.backward()
            assert_trees_close(ltp.full_gradients(model), ref, rtol=1e-10)
            model.zero_grad()

    run_ranks(body, mesh[0] * mesh[1])


def test_outputs_are_those_of_one_process() -> None:
    """Whatever a user does with the logits: look at them, or take another loss of them, outside of the model."""
    case = Case(1, 2, dtype=torch.float64, model=dict(num_kv_heads=1))
    tokens = case.batches()[0][0]

    def other_loss(model: nn.Module) -> Tensor:
        log_p = model(tokens[:, :-1]).log_softmax(-1)
        return -log_p.gather(-1, tokens[:, 1:, None]).mean() + log_p.square().mean()

    whole = case.build()
    logits = whole(tokens[:, :-1]).detach()
    other_loss(whole).backward()
    ref = ltp.full_gradients(whole)

    def body(dp: int) -> None:
        model = ltp.parallelize(case.build(), make_mesh("cpu", dp, 2), PLAN)
        out = model(tokens[:, :-1])
        assert out.shape == logits.shape
        assert torch.equal(out.argmax(-1), logits.argmax(-1))
        torch.testing.assert_close(out.mean().item(), logits.mean().item())
        for _ in range(2):
            other_loss(model).backward()
            assert_trees_close(ltp.full_gradients(model), ref, rtol=1e-10)
            model.zero_grad()

    run_ranks(body, 2, 1)
    run_ranks(body, 4, 2)


def test_a_copy_runs_the_same_and_by_itself() -> None:
    case = Case(1, 2, model=dict(num_kv_heads=1, tied=True))
    ref = reference(case)

    def body() -> None:
        mesh = make_mesh("cpu", 1, 2)
        model = ltp.parallelize(case.build(), mesh, PLAN)
        loss_of(model, case.batches()[2][0]).backward()  # what the model has on it, its copy must not mix up
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        twin = copy.deepcopy(model)
        twin.zero_grad()
        assert_same_run(train(twin, case.batches(), mesh), ref, 1e-4)
        assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
        model.zero_grad()
        del twin
        assert_same_run(train(model, case.batches(), mesh), ref, 1e-4)
        assert_same_run(train(ltp_copy_of_copy(case, mesh), case.batches(), mesh), ref, 1e-4)

    run_ranks(body, 2)


def ltp_copy_of_copy(case: Case, mesh: Any) -> nn.Module:
    """The original is gone when the copy is used."""
    return copy.deepcopy(copy.deepcopy(ltp.parallelize(case.build(), mesh, PLAN)))


def test_a_mapping_a_plan_and_a_file_are_the_same_plan(tmp_path: Any) -> None:
    (tmp_path / "plan.json").write_text(ltp.Plan(PLAN).to_json())
    case = Case(1, 2)

    def body() -> list[list[tuple[int, ...]]]:
        mesh = make_mesh("cpu", 1, 2)
        plans = [PLAN, ltp.Plan(PLAN), tmp_path / "plan.json", str(tmp_path / "plan.json")]
        return [[p._tp_shard.local_shape for p in ltp.parallelize(case.build(), mesh, plan).parameters()] for plan in plans]

    for shapes in run_ranks(body, 2):
        assert all(s == shapes[0] for s in shapes[1:])
        assert shapes[0][0] in ((502, 64), (501, 64))


# ------------------------------------------------------------------------------------------------- what crosses the ranks


class Sent(TorchDispatchMode):
    """[(name of the collective, bytes that it hands over)] while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.all: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func.overloadpacket.__name__
            given = args[1] if name in ("_allgather_base_", "_reduce_scatter_base_") else args[0]
            given = given if isinstance(given, (list, tuple)) else [given]
            self.all.append((name.strip("_"), sum(t.numel() * t.itemsize for t in given)))
        return func(*args, **(kwargs or {}))


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Collectives while it is on, by name: filled in at the end."""
    counts: dict[str, int] = {}
    with CommDebugMode() as comm:
        yield counts
    counts.update({str(op).rpartition(".")[2].strip("_"): n for op, n in comm.get_comm_counts().items() if n})


AG, RS, AR = "allgather_base", "reduce_scatter_base", "allreduce"


@pytest.mark.parametrize("tp", [2, 4])
def test_collectives_of_a_block(tp: int) -> None:
    """With sequence parallelism: Megatron-LM's pair at the attention and at the MLP, and nothing else."""

    def body() -> dict[str, dict[str, int]]:
        mesh = make_mesh("cpu", 1, tp)
        tokens = torch.randint(0, 1003, (2, 18), generator=torch.Generator().manual_seed(0))
        of: dict[int, dict[str, dict[str, int]]] = {}
        for layers in (2, 3):
            model = ltp.parallelize(Case(1, tp, model=dict(num_layers=layers)).build(), mesh, PLAN)
            loss_of(model, tokens).backward()  # in the first pass gradients are compared, too
            model.zero_grad()
            with counted() as forward:
                loss = loss_of(model, tokens)
            with counted() as backward:
                loss.backward()
            of[layers] = {"forward": forward, "backward": backward}
        block = {k: {op: n - of[2][k].get(op, 0) for op, n in of[3][k].items()} for k in of[3]}
        rest = {f"{k}, rest": {op: of[2][k].get(op, 0) - 2 * n for op, n in block[k].items()} for k in block}
        return {**block, **rest}

    for counts in run_ranks(body, tp):
        assert counts["forward"] == {AG: 2, RS: 2, AR: 0}
        assert counts["backward"] == {AG: 2, RS: 2, AR: 0}
        # the embedding's reduce-scatter, the head's all-gather, the loss' two small all-reduces
        assert counts["forward, rest"] == {AG: 1, RS: 1, AR: 2}
        # their conjugates, and one all-reduce for the gradients of all norms and biases together
        assert counts["backward, rest"] == {AG: 1, RS: 1, AR: 1}


@pytest.mark.parametrize(
    "how, forward, backward",
    [
        # two of each a block, one at the embedding and the head, two all-reduces of the loss; the conjugates, and the norms'
        ({}, {AG: 5, RS: 5, AR: 2}, {AG: 5, RS: 5, AR: 1}),
        # runs the two blocks again, less the last reduce-scatter of each, whose result nobody asks for
        (BLOCK, {AG: 5, RS: 5, AR: 2}, {AG: 9, RS: 7, AR: 1}),
        # two a block, one at the embedding, the loss; two a block, one at the head, and no gradients of norms to sum
        (NO_SP, {AR: 7}, {AR: 5}),
        ({**NO_SP, **BLOCK}, {AR: 7}, {AR: 7}),
        # the logits are gathered, and so the loss is everyone's own
        (NEITHER, {AR: 5, AG: 1}, {AR: 5}),
    ],
    ids=["", "checkpointed", "whole activations", "whole activations, checkpointed", "neither"],
)
def test_collectives_of_a_model(how: dict[str, Any], forward: dict[str, int], backward: dict[str, int]) -> None:
    def body() -> list[Counter[str]]:
        model = ltp.parallelize(Case(1, 2).build(), make_mesh("cpu", 1, 2), PLAN, **how)
        tokens = torch.randint(0, 1003, (2, 18), generator=torch.Generator().manual_seed(0))
        loss_of(model, tokens).backward()
        with Sent() as there:
            loss = loss_of(model, tokens)
        with Sent() as back:
            loss.backward()
        return [Counter(op for op, _ in there.all), Counter(op for op, _ in back.all)]

    for there, back in run_ranks(body, 2):
        assert there == forward
        assert back == backward


@pytest.mark.parametrize("tp, kv", [(2, 4), (4, 4), (4, 2)])
def test_bytes_moved(tp: int, kv: int) -> None:
    """Forward and backward against the formulas; 17 tokens are padded to the next multiple of tp."""
    batch, seq, dim, layers, head_dim = 2, 17, 64, 2, 8
    padded = -(-seq // tp) * tp

    def body() -> list[list[tuple[str, int]]]:
        model = ltp.parallelize(Case(1, tp, model=dict(num_kv_heads=kv)).build(), make_mesh("cpu", 1, tp), PLAN)
        tokens = torch.randint(0, 1003, (batch, seq + 1), generator=torch.Generator().manual_seed(0))
        loss_of(model, tokens).backward()
        with Sent() as forward:
            loss = loss_of(model, tokens)
        with Sent() as backward:
            loss.backward()
        return [forward.all, backward.all]

    shard, whole = batch * padded // tp * dim * 4, batch * padded * dim * 4
    for rank, (forward, backward) in enumerate(run_ranks(body, tp)):
        gathers, scatters = [(AG, shard)] * (2 * layers + 1), [(RS, whole)] * (2 * layers + 1)
        loss = [(AR, batch * seq * 4), (AR, batch * seq * 2 * 4)]
        assert sorted(forward) == sorted([*gathers, *scatters, *loss]), rank
        sums = [(AR, (4 * layers + 1) * dim * 4)]  # 2 norms and 2 biases a block, the last norm
        if kv < tp:  # weights and biases of k and v of the one head on a rank, over the ranks that share it
            sums.append((AR, 2 * layers * head_dim * (dim + 1) * 4))
        assert sorted(backward) == sorted([*gathers, *scatters, *sums]), rank


# ------------------------------------------------------------------------------------------------------ what a rank holds


def held(tensors: Iterable[Tensor]) -> int:
    """Bytes that these keep alive: of the storages, of which several may have one."""
    storages = [local_tensor(t).untyped_storage() for t in tensors]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


@pytest.mark.parametrize("mesh", [(1, 2), (1, 4), (2, 2)], ids=["tp2", "tp4", "2x2"])
def test_memory_of_a_rank(mesh: tuple[int, int]) -> None:
    """Parameters, gradients and the optimizer's state: 1 / (tp * dp) of what is split, 1 / dp of what is whole."""
    dp, tp = mesh
    config = LlamaConfig(vocab_size=1000, dim=128, num_layers=2, num_heads=8, num_kv_heads=4, hidden_dim=344, bias=True)
    whole = Llama(config)
    plan = ltp.Plan(PLAN).check(whole, tp)
    split = sum(p.numel() for n, p in whole.named_parameters() if plan.splits[n].dim is not None)
    kept = sum(p.numel() for n, p in whole.named_parameters() if plan.splits[n].dim is None)
    assert kept < 0.01 * split and split + kept == sum(p.numel() for p in whole.parameters())

    def body() -> tuple[int, int, int]:
        model = ltp.parallelize(Llama(config), make_mesh("cpu", dp, tp), PLAN)
        optimizer = torch.optim.AdamW(model.parameters())
        loss_of(model, torch.randint(0, 1000, (2, 9), generator=torch.Generator().manual_seed(0))).backward()
        optimizer.step()
        states = [t for of in optimizer.state.values() for t in of.values() if t.ndim]
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        assert len(gradients) == len(list(model.parameters()))
        return held(model.parameters()), held(gradients), held(states)

    should = 4 * (split / tp + kept) / dp
    for parameters, gradients, states in run_ranks(body, dp * tp):
        assert parameters == pytest.approx(should, rel=0.01)
        assert gradients == pytest.approx(should, rel=0.01)
        assert states == pytest.approx(2 * should, rel=0.01)


# --------------------------------------------------------------------------------------------------------------- mistakes


def test_a_plan_is_applied_once() -> None:
    def body() -> None:
        mesh = make_mesh("cpu", 1, 2)
        model = ltp.parallelize(Case(1, 2).build(), mesh, PLAN)
        with pytest.raises(ltp.TPError, match="split already"):
            ltp.parallelize(model, mesh, PLAN)

    run_ranks(body, 2)


def test_no_plan_no_checkpointing_of_another_kind_no_other_mesh() -> None:
    def body() -> None:
        mesh = make_mesh("cpu", 1, 2)
        with pytest.raises(ltp.TPError, match=r"There is no plan for Llama.*layers\.0"):
            ltp.parallelize(Case(1, 2).build(), mesh)
        with pytest.raises(ltp.TPError, match=r"activation_checkpointing='all'.*selective"):
            ltp.parallelize(Case(1, 2).build(), mesh, PLAN, activation_checkpointing="all")  # type: ignore[arg-type]
        with pytest.raises(ltp.TPError, match="data_parallel"):
            ltp.parallelize(Case(1, 2).build(), torch.distributed.init_device_mesh("cpu", (2,), mesh_dim_names=("x",)), PLAN)

    run_ranks(body, 2)
