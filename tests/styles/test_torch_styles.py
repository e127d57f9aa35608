"""A plan in the styles of `torch.distributed.tensor.parallel` works as it stands."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
)

import lightning_tp as ltp
from examples.llama import Llama, LlamaConfig
from lightning_tp.plan.rule import Rule
from lightning_tp.styles import Colwise, PrepareInput, PrepareOutput, Rowwise, Sequence, VocabEmbedding, VocabHead
from lightning_tp.styles.torch_styles import from_torch, is_torch_style
from lightning_tp.testing import assert_trees_close, randomize_, run_ranks
from tests.harness import Collectives, gradients, mesh

CONFIG = LlamaConfig(vocab_size=61, dim=32, num_layers=2, num_heads=4, num_kv_heads=2, hidden_dim=36, max_seq_len=32, bias=True)
TOKENS = torch.randint(0, 61, (2, 17), generator=torch.Generator().manual_seed(0))

OURS: list[tuple[Any, tuple[Any, ...]]] = [
    (ColwiseParallel(), (Colwise(),)),
    (ColwiseParallel(input_layouts=Shard(1)), (Colwise(input="S(1)"),)),
    (ColwiseParallel(output_layouts=Replicate()), (Colwise(output="I"),)),
    (ColwiseParallel(input_layouts=Shard(1), use_local_output=False), (VocabHead(input="S(1)"),)),
    (ColwiseParallel(use_local_output=False), (VocabHead(),)),
    (RowwiseParallel(), (Rowwise(output="I"),)),
    (RowwiseParallel(input_layouts=Replicate()), (Rowwise(input="I", output="I"),)),
    (RowwiseParallel(output_layouts=Shard(1)), (Rowwise(output="S(1)"),)),
    (SequenceParallel(), (Sequence(),)),
    (
        PrepareModuleInput(input_layouts=(Shard(1), None), desired_input_layouts=(Replicate(), None)),
        (PrepareInput(arrives="S(1)", wanted="R", arg=0),),
    ),
    (
        PrepareModuleInput(
            input_layouts=(None, Replicate()),
            desired_input_layouts=(None, Shard(1)),
            input_kwarg_layouts={"mask": Shard(1)},
            desired_input_kwarg_layouts={"mask": Replicate()},
        ),
        (
            PrepareInput(arrives="I", wanted="S(1)", arg=1),
            PrepareInput(arrives="S(1)", wanted="R", arg="mask"),
        ),
    ),
    (
        PrepareModuleOutput(output_layouts=(Shard(1), Partial()), desired_output_layouts=(Replicate(), Shard(1))),
        (PrepareOutput(index=0), PrepareOutput(arrives="P", wanted="S(1)", index=1)),
    ),
]


@pytest.mark.parametrize("style, ours", OURS, ids=lambda v: type(v).__name__)
def test_each_is_one_or_more_of_ours(style: Any, ours: tuple[Any, ...]) -> None:
    assert is_torch_style(style) and from_torch(style, "x") == ours
    assert [rule.style for rule in ltp.Plan({"x": style}).rules] == list(ours)


@pytest.mark.parametrize("style, ours", OURS, ids=lambda v: type(v).__name__)
def test_ours_go_back(style: Any, ours: tuple[Any, ...]) -> None:
    """Each of ours, handed to torch, and read again, is what it was (the vocabulary's head gathers: torch's loss differs)."""
    module = nn.Linear(4, 4)
    for one in ours:
        again = from_torch(one.to_torch(module), "x")
        if isinstance(one, VocabHead):
            assert again == (Colwise(input=one.input, output="I"),)
        elif isinstance(one, PrepareOutput):
            assert again == (PrepareOutput(arrives=one.arrives, wanted=one.wanted),)
        else:
            assert again == (one,)


def test_row_wise_on_an_embedding_is_the_vocabulary() -> None:
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 4))
    plan = ltp.Plan({"0": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)), "1": ColwiseParallel()})
    embedding, up = plan.check(model, tp=2).entries
    assert embedding.style == VocabEmbedding(output="S(1)")
    assert up.style == Colwise(input="S(1)")  # torch's default layout says nothing: the plan knows


# ------------------------------------------------------------------------------------------------------ a whole model


def titan(loss_parallel: bool) -> dict[str, Any]:
    """As torchtitan writes it for Llama 3."""
    plan: dict[str, Any] = {
        "tok_embeddings": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "norm": SequenceParallel(),
        "output": ColwiseParallel(
            input_layouts=Shard(1),
            output_layouts=Shard(-1) if loss_parallel else Replicate(),
            use_local_output=not loss_parallel,
        ),
    }
    layer = {
        "attention_norm": SequenceParallel(),
        "attention": PrepareModuleInput(input_layouts=(Shard(1), None), desired_input_layouts=(Replicate(), None)),
        "attention.wq": ColwiseParallel(),
        "attention.wk": ColwiseParallel(),
        "attention.wv": ColwiseParallel(),
        "attention.wo": RowwiseParallel(output_layouts=Shard(1)),
        "ffn_norm": SequenceParallel(),
        "feed_forward": PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)),
        "feed_forward.w1": ColwiseParallel(),
        "feed_forward.w2": RowwiseParallel(output_layouts=Shard(1)),
        "feed_forward.w3": ColwiseParallel(),
    }
    return plan | {f"layers.*.{name}": style for name, style in layer.items()}


def whole_activations() -> dict[str, Any]:
    """The same model without sequence parallelism, as PyTorch's first tutorial has it; what is not named stays whole."""
    split = {"wq": ColwiseParallel(), "wk": ColwiseParallel(), "wv": ColwiseParallel(), "wo": RowwiseParallel()}
    mlp = {"w1": ColwiseParallel(), "w3": ColwiseParallel(), "w2": RowwiseParallel()}
    return {
        "tok_embeddings": RowwiseParallel(input_layouts=Replicate()),
        **{f"layers.*.attention.{name}": style for name, style in split.items()},
        **{f"layers.*.feed_forward.{name}": style for name, style in mlp.items()},
        "output": ColwiseParallel(output_layouts=Replicate()),
        "**": "replicate",
    }


def loss_of(model: nn.Module) -> Tensor:
    return F.cross_entropy(model(TOKENS[:, :-1]).flatten(0, 1), TOKENS[:, 1:].flatten())


@pytest.mark.parametrize("tp", [2, 4])
def test_a_plan_for_torch_trains_as_one_process(tp: int) -> None:
    ar, ag, rs = "all-reduce", "all-gather", "reduce-scatter"
    block = [ag, rs, ag, rs]

    def body() -> None:
        for plan, forward in (
            (titan(loss_parallel=True), [rs, *block, *block, ag, ar, ar]),  # the last two: the loss
            (titan(loss_parallel=False), [rs, *block, *block, ag, ag]),
            (whole_activations(), [ar, ar, ar, ar, ar, ag]),
        ):
            torch.manual_seed(0)
            whole = randomize_(Llama(CONFIG))
            model = copy.deepcopy(whole)
            ltp.parallelize(model, mesh(), plan)
            optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (whole, model)]
            for _ in range(2):
                for m in (whole, model):
                    m.zero_grad()
                    with Collectives() as comm:
                        loss = loss_of(m)
                    loss.backward()
                assert comm.kinds == forward, comm.kinds
                assert_trees_close({"loss": loss_of(model)}, {"loss": loss_of(whole)})
                assert_trees_close(ltp.full_gradients(model), gradients(whole), rtol=5e-5)
                for optimizer in optimizers:
                    optimizer.step()
            assert_trees_close(ltp.full_state_dict(model), whole.state_dict())

    run_ranks(body, tp)


def test_the_plan_in_our_words_splits_alike() -> None:
    model = Llama(CONFIG)
    ours = {
        "tok_embeddings": "vocab_embedding",
        "layers.*.attention_norm": "sequence",
        "layers.*.ffn_norm": "sequence",
        **{f"layers.*.attention.{n}": "colwise" for n in ("wq", "wk", "wv")},
        **{f"layers.*.feed_forward.{n}": "colwise" for n in ("w1", "w3")},
        "layers.*.attention.wo": "rowwise",
        "layers.*.feed_forward.w2": "rowwise",
        "norm": "sequence",
        "output": "vocab_head",
    }
    a, b = (ltp.Plan(rules).check(model, tp=2) for rules in (ours, titan(loss_parallel=True)))
    assert a.splits == b.splits
    styles = [{e.where: e.style for e in p.entries if e.style.splits_parameters} for p in (a, b)]
    assert styles[0] == styles[1]


# -------------------------------------------------------------------------------------------------------------- errors


class Own(ParallelStyle):
    def _apply(self, module: nn.Module, device_mesh: Any) -> nn.Module:
        return module


@pytest.mark.parametrize(
    "style, message",
    [
        (RowwiseParallel(output_layouts=Shard(0)), r"Shard\(0\)|S\(0\)"),
        (ColwiseParallel(input_layouts=Shard(0)), r"Shard\(0\)|S\(0\)"),
        (SequenceParallel(sequence_dim=0), r"SequenceParallel\(sequence_dim=0\): only dim 1"),
        (Own(), "no counterpart for Own.*ColwiseParallel, .*PrepareModuleOutput.*`backend='dtensor'`"),
    ],
    ids=lambda v: type(v).__name__,
)
def test_what_has_no_counterpart(style: Any, message: str) -> None:
    for make in (lambda: ltp.Plan({"layers.*.x": style}), lambda: Rule("layers.*.x", style)):
        with pytest.raises(ltp.TPError, match=r"`layers.\*.x`: .*" + message):
            make()


@pytest.mark.parametrize(
    "style, message",
    [
        (ColwiseParallel(input_layouts=Shard(-1)), r"`colwise\(input=S\(-1\)\)`: input can be R or I or S\(1\)"),
        (ColwiseParallel(output_layouts=Shard(1)), r"`colwise\(output=S\(1\)\)` is not for a linear layer"),
        (RowwiseParallel(input_layouts=Shard(1)), r"`rowwise\(input=S\(1\)\)`: input can be S\(-1\) or I"),
        (RowwiseParallel(output_layouts=Shard(-1)), r"`rowwise\(output=S\(-1\)\)`: output can be I or S\(1\) or P"),
        (PrepareModuleInput(input_layouts=Shard(2), desired_input_layouts=Shard(1)), r"from S\(-1\) to S\(1\)"),
        (PrepareModuleOutput(output_layouts=Shard(2), desired_output_layouts=Shard(1)), r"from S\(-1\) to S\(1\)"),
    ],
    ids=lambda v: type(v).__name__,
)
def test_placements_that_ours_do_not_have(style: Any, message: str) -> None:
    with pytest.raises(ltp.TPError, match=f"`0`: .*{message}"):
        ltp.Plan({"0": style, "1": "colwise", "**": "replicate"}).check(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), tp=2)


def test_one_rule_takes_one_style() -> None:
    two = PrepareModuleInput(input_layouts=(Shard(1), Shard(1)), desired_input_layouts=(Replicate(), Replicate()))
    with pytest.raises(ltp.TPError, match=r"`x`: PrepareModuleInput is 2 styles here. Put it in a plan's dict"):
        Rule("x", two)
    assert len(ltp.Plan({"x": two}).rules) == 2
