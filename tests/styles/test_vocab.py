"""The two ends of a language model, split over 1003 words: look-up, logits, loss; tied or not."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import lightning_tp as ltp
from lightning_tp._compat import local_tensor
from lightning_tp.core.comm.axis import even_shard
from lightning_tp.core.ops.split_logits import SplitLogits
from lightning_tp.shards.view import local_view
from lightning_tp.styles import VocabEmbedding, VocabHead
from lightning_tp.testing import assert_trees_close, randomize_, run_ranks
from tests.harness import Alone, Collectives, alone, gradients, held, mesh, whole_gradient_of

AR, AG, RS = "all-reduce", "all-gather", "reduce-scatter"
V = 1003
ROWS = {2: (502, 501), 4: (251, 251, 251, 250)}
IDS = torch.randint(0, V, (2, 17), generator=torch.Generator().manual_seed(0))
X = torch.randn(2, 17, 24, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("tp", [2, 4])
def test_embedding(tp: int) -> None:
    shapes = {"weight": tuple((n, 24) for n in ROWS[tp])}
    ids = IDS.clone()
    ids[0, :8] = torch.tensor([0, 250, 251, 501, 502, 752, 753, 1002])  # where shards begin and end

    def body() -> None:
        for padding in (None, 0, 501, 502, 1002, -1):
            make = lambda padding=padding: nn.Embedding(V, 24, padding_idx=padding)  # noqa: E731
            alone(make, VocabEmbedding(), ids, shapes=shapes, forward=[AR], backward=[], what=f"padding {padding}")
            alone(make, "vocab_embedding", ids[0], shapes=shapes, forward=[AR], backward=[], what="(T,) ids")
            style = VocabEmbedding(output="S(1)")
            alone(make, style, ids, leaves="S(1)", shapes=shapes, forward=[RS], backward=[AG])

    run_ranks(body, tp)


def test_rows_of_a_padding_index_get_no_gradient() -> None:
    """On the rank that has the row, and no other row on another rank that happens to have its local number."""

    def body() -> None:
        rank = dist.get_rank()
        ids = torch.arange(8)[None]
        model = Alone(nn.Embedding(8, 4, padding_idx=5))
        ltp.parallelize(model, mesh(), {"m": "vocab_embedding", "other": "colwise"})
        model(ids).sum().backward()
        got = local_tensor(model.m.weight.grad).sum(1).tolist()
        assert got == ([4.0] * 4 if rank == 0 else [4.0, 0.0, 4.0, 4.0])
        with local_view():  # outside of it, full sizes are shown
            assert (model.m.num_embeddings, model.m.embedding_dim, model.m.padding_idx) == (4, 4, (None, 1)[rank])

    run_ranks(body, 2)


def test_more_ranks_than_rows() -> None:
    ids = torch.tensor([[0, 4, 2, 4, 1, 3]])

    def body() -> None:
        shapes = {"weight": ((2, 4), (2, 4), (1, 4), (0, 4))}
        alone(lambda: nn.Embedding(5, 4, padding_idx=4), VocabEmbedding(), ids, shapes=shapes, forward=[AR], backward=[])
        shapes = {"weight": ((2, 24), (2, 24), (1, 24), (0, 24)), "bias": ((2,), (2,), (1,), (0,))}
        alone(lambda: nn.Linear(24, 5), VocabHead(), X, shapes=shapes, forward=[AG], backward=[AR], loss_parallel=False)

    run_ranks(body, 4)


def test_a_row_that_no_rank_has_raises() -> None:
    """As in one process; to look nothing up would go unnoticed."""

    def body() -> None:
        model = Alone(nn.Embedding(10, 4))
        ltp.parallelize(model, mesh(), {"m": "vocab_embedding", "other": "colwise"})
        for wrong in (10, -1):
            with pytest.raises((ltp.TPError, IndexError), match=f"{wrong}.*10"):
                model(torch.tensor([[1, wrong]]))

    run_ranks(body, 2)


@pytest.mark.parametrize("tp", [2, 4])
def test_head_with_gathered_logits(tp: int) -> None:
    shapes = {"weight": tuple((n, 24) for n in ROWS[tp]), "bias": tuple((n,) for n in ROWS[tp])}
    transposed = {**shapes, "weight": tuple((24, n) for n in ROWS[tp])}

    def body() -> None:
        for arrives, before, after in (("I", [], [AR]), ("S(1)", [AG], [RS]), ("R", [], [])):
            for make, of in (
                (lambda: nn.Linear(24, V), shapes),
                (lambda: nn.Linear(24, V, bias=False), shapes),
                (lambda: pytest.importorskip("transformers.pytorch_utils").Conv1D(V, 24), transposed),
            ):
                style = VocabHead(input=arrives)  # type: ignore[arg-type]
                kwargs: Any = dict(arrives=arrives, shapes=of, forward=[*before, AG], backward=after)
                alone(make, style, X, loss_parallel=False, **kwargs)

    run_ranks(body, tp)


@pytest.mark.parametrize("tp", [2, 4])
def test_head_with_split_logits(tp: int) -> None:
    """The logits have the whole shape and are never whole: the loss sends a few numbers a token."""
    targets = torch.randint(0, V, (2, 17), generator=torch.Generator().manual_seed(1))

    def loss_of(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), label_smoothing=0.1)

    def body() -> None:
        rank = dist.get_rank()
        for arrives, before, after in (("I", [], [AR]), ("S(1)", [AG], [RS])):
            whole = randomize_(Alone(nn.Linear(24, V)))
            model = copy.deepcopy(whole)
            style = VocabHead(input=arrives)  # type: ignore[arg-type]
            ltp.parallelize(model, mesh(), {"m": style, "other": "colwise"})
            model._tp_registry.gradients.axis.seq_len = 17
            x_whole, x = X.clone().requires_grad_(), held(X, arrives, rank, tp).requires_grad_()
            with Collectives() as forward:
                logits = model(x)
            assert forward.kinds == before and isinstance(logits, SplitLogits)
            assert logits.shape == (2, 17, V) and logits.local.shape == (2, 17, ROWS[tp][rank])
            with local_view():  # outside of it, full sizes are shown
                assert model.m.out_features == ROWS[tp][rank]
            with Collectives() as in_loss:
                loss = loss_of(logits)
            assert in_loss.sent == [(AR, 34 * 4), (AR, 3 * 34 * 4)]
            with Collectives() as backward:
                loss.backward()
            assert backward.kinds == after
            want = loss_of(whole(x_whole))
            want.backward()
            assert x.grad is not None and x_whole.grad is not None
            assert_trees_close({"loss": loss, "x": whole_gradient_of(x.grad, arrives, X.shape)}, {"loss": want, "x": x_whole.grad})
            assert_trees_close(ltp.full_gradients(model), gradients(whole))
            assert_trees_close({"logits": model(x).full_tensor()}, {"logits": whole(X)})

    run_ranks(body, tp)


class Tied(nn.Module):
    def __init__(self, conv: bool = False) -> None:
        super().__init__()
        self.tok = nn.Embedding(V, 24, padding_idx=7)
        self.norm = nn.LayerNorm(24)
        self.head = nn.Linear(24, V, bias=False)
        self.head.weight = self.tok.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.tok(ids)))


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("loss_parallel", [True, False])
def test_tied_embedding_and_head(tp: int, loss_parallel: bool) -> None:
    """One parameter before and after, its gradient from both ends, through a step."""

    def body() -> None:
        for norm in ("sequence", "replicate"):
            whole = randomize_(Tied())
            model = copy.deepcopy(whole)
            plan = {"tok": "vocab_embedding", "head": "vocab_head", "norm": norm}
            ltp.parallelize(model, mesh(), plan, loss_parallel=loss_parallel)
            assert model.head.weight is model.tok.weight and len(list(model.parameters())) == 3
            optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (whole, model)]
            for _ in range(2):
                losses = {}
                for name, m in (("whole", whole), ("split", model)):
                    m.zero_grad()
                    loss = F.cross_entropy(m(IDS).view(-1, V), IDS.roll(-1, 1).view(-1))
                    loss.backward()
                    losses[name] = loss.detach()
                assert_trees_close({"loss": losses["split"]}, {"loss": losses["whole"]}, name=norm)
                assert_trees_close(ltp.full_gradients(model), gradients(whole), name=norm)
                for optimizer in optimizers:
                    optimizer.step()
            assert_trees_close(ltp.full_state_dict(model), whole.state_dict(), name=norm)

    run_ranks(body, tp)


def test_splits() -> None:
    split = VocabEmbedding().splits(nn.Embedding(V, 8), "tok", 4)["weight"]
    assert [split.length(r) for r in range(4)] == [len(even_shard(V, r, 4)) for r in range(4)] == [251, 251, 251, 250]
    assert VocabHead().splits(nn.Linear(8, V, bias=False), "head", 4) == {"weight": split}


@pytest.mark.parametrize("option", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}, {"sparse": True}], ids=str)
def test_embedding_options_that_look_at_whole_tables_are_refused(option: Any) -> None:
    with pytest.raises(ltp.TPError, match=f"`tok`.*`{next(iter(option))}=.*`replicate`"):
        VocabEmbedding().splits(nn.Embedding(8, 8, **option), "tok", 2)


def test_the_wrong_module_and_the_wrong_states() -> None:
    with pytest.raises(ltp.TPError, match=r"`x`: the style `vocab_embedding` splits an nn.Embedding, and this is a Linear"):
        VocabEmbedding().splits(nn.Linear(8, 8), "x", 2)
    with pytest.raises(ltp.TPError, match=r"`x`: the style `vocab_head` splits a linear layer, and this is a Embedding"):
        VocabHead().splits(nn.Embedding(8, 8), "x", 2)
    with pytest.raises(ltp.TPError, match=r"`vocab_embedding\(output=S\(-1\)\)`: output can be I or S\(1\)"):
        VocabEmbedding(output="S(-1)")
    with pytest.raises(ltp.TPError, match=r"`vocab_head\(input=S\(-1\)\)`: input can be R or I or S\(1\)"):
        VocabHead(input="S(-1)")
