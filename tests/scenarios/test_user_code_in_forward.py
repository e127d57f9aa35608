"""Code of users in a forward that a split has to leave right: `autograd.Function`s, checkpointed methods, executed source, own embeddings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.utils.checkpoint import checkpoint

import lightning_tp as ltp
from lightning_tp.core.comm.mesh import make_mesh
from lightning_tp.testing import assert_trees_close, randomize_, run_ranks

D, WORDS = 16, 256


class Own(Function):
    """A function with the identity as its forward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *_: Any) -> Tensor:
        return x.view_as(x)


class UnitNorm(Own):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad / grad.norm()


class Shrunk(Own):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 0.5


class WithLoss(Own):
    """The second input has a gradient that comes from nowhere."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        return grad, torch.ones(())


class Product(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w.t() + b

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        x, w = ctx.saved_tensors
        flat = grad.flatten(0, -2)
        return grad @ w, flat.t() @ x.flatten(0, -2), flat.sum(0)


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return Product.apply(x, self.weight, self.bias)


class Mlp(nn.Module):
    def __init__(self, at_input: Any = None, at_hidden: Any = None, layer: type = nn.Linear) -> None:
        super().__init__()
        self.up, self.down = layer(D, 4 * D), layer(4 * D, D)
        self.at_input, self.at_hidden = at_input, at_hidden

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.at_input is None else self.at_input(x)
        h = F.gelu(self.up(x))
        return self.down(h if self.at_hidden is None else self.at_hidden(h))


class Balanced(Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(D, 4)

    def forward(self, x: Tensor) -> Tensor:
        shares = self.gate(x).softmax(-1)
        weight = WithLoss.apply(shares.amax(-1, keepdim=True), shares.square().mean())
        return super().forward(x) * weight


class Attention(nn.Module):
    def __init__(self, reentrant: bool | None = False) -> None:
        super().__init__()
        self.qkv, self.o, self.reentrant = nn.Linear(D, 3 * D, bias=False), nn.Linear(D, D), reentrant

    def attend(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (y.view(b, t, 4, 4).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, D))

    def forward(self, x: Tensor) -> Tensor:
        if self.reentrant is None and not torch.is_grad_enabled():
            return self.attend(x)
        return checkpoint(self.attend, x, use_reentrant=bool(self.reentrant))


class SlopeOfHeads(Attention):
    """A bias of each head is written into a slice of zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        bias = torch.zeros(4, t, t)
        bias[:, 1:, 0] = self.slope.view(4, 1)
        q, k, v = (y.view(b, t, 4, 4).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        return self.o(((q @ k.transpose(-1, -2) + bias).softmax(-1) @ v).transpose(1, 2).reshape(b, t, D))


class OneHead(nn.Module):
    """Keys that every rank has, values in shards, from one weight; queries and keys meet in an einsum."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.o = nn.Linear(D, D), nn.Linear(D, 2 * D, bias=False), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        k, v = self.kv(x).chunk(2, -1)
        return self.o(torch.einsum("bij,bjd->bid", torch.einsum("bid,bjd->bij", self.q(x), k).softmax(-1), v))


class Executed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, 4 * D), nn.Linear(4 * D, D)


names: dict[str, Any] = {"D": D, "F": F}
exec("def forward(self, x):\n    return self.down(F.gelu(self.up(x)).view(*x.shape[:2], 4, D).flatten(2))", names)
Executed.forward = names["forward"]  # type: ignore[method-assign]


class ReversibleHalf(Function):
    """x + f(x), whose backward runs f again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, f: nn.Module, *weights: Tensor) -> Tensor:
        ctx.f = f
        ctx.save_for_backward(x)
        return x + f(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            torch.autograd.backward(ctx.f(x), grad)
        assert x.grad is not None
        return grad + x.grad, *[None] * (len(ctx.needs_input_grad) - 1)


class Reversible(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = Mlp()

    def forward(self, x: Tensor) -> Tensor:
        return ReversibleHalf.apply(x, self.f, *self.f.parameters())


class NormedEmbedding(nn.Embedding):
    def __init__(self) -> None:
        super().__init__(WORDS, D)
        self.norm = nn.LayerNorm(D)

    def forward(self, ids: Tensor) -> Tensor:
        return self.norm(super().forward(ids))


class IndexedEmbedding(nn.Embedding):
    def __init__(self) -> None:
        super().__init__(WORDS, D)
        self.scale = nn.Parameter(torch.ones(D))

    def forward(self, ids: Tensor) -> Tensor:
        return self.weight[ids] * self.scale


class Model(nn.Module):
    def __init__(
        self,
        part: Callable[[], nn.Module],
        embedding: Callable[[], nn.Module] = lambda: nn.Embedding(WORDS, D),
        penalty: float = 0.0,
    ) -> None:
        super().__init__()
        self.embed, self.penalty = embedding(), penalty
        self.blocks, self.norms = nn.ModuleList(part() for _ in range(2)), nn.ModuleList(nn.LayerNorm(D) for _ in range(2))
        self.head = nn.Linear(D, WORDS)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for norm, block in zip(self.norms, self.blocks, strict=True):
            x = x + block(norm(x))
        loss = F.cross_entropy(self.head(x).flatten(0, 1), ids.flatten())
        if self.penalty:
            loss = loss + self.penalty * sum(p.norm() for p in self.blocks.parameters())
        return loss


class Followed(nn.Module):
    """A slow copy that follows its model in each forward."""

    def __init__(self) -> None:
        super().__init__()
        self.fast, self.slow = Mlp(), Mlp().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            for slow, fast in zip(self.slow.parameters(), self.fast.parameters(), strict=True):
                slow.data = slow.data * 0.5 + fast.data * 0.5
        return self.fast(x) - self.slow(x)


MODELS: dict[str, tuple[Callable[[], Model], set[str]]] = {  # and some of the weights that are split
    "gradient of unit norm, over shards": (lambda: Model(lambda: Mlp(at_hidden=UnitNorm.apply)), set()),
    "gradient of unit norm, beside shards": (lambda: Model(lambda: Mlp(at_input=UnitNorm.apply)), {"blocks.0.up.weight"}),
    "gradient times a number": (
        lambda: Model(lambda: Mlp(Shrunk.apply, Shrunk.apply)),
        {"blocks.0.up.weight", "blocks.0.down.weight"},
    ),
    "loss that comes from nowhere": (lambda: Model(Balanced), {"blocks.0.up.weight"}),
    "linear function with a bias": (lambda: Model(lambda: Mlp(layer=Linear)), set()),
    "function that runs modules": (lambda: Model(Reversible), {"blocks.0.f.up.weight"}),
    "checkpointed method": (lambda: Model(Attention), {"blocks.0.qkv.weight"}),
    "checkpointed method, reentrant": (lambda: Model(lambda: Attention(True)), {"blocks.0.qkv.weight"}),
    "checkpointed where gradients are on": (lambda: Model(lambda: Attention(None)), {"blocks.0.qkv.weight"}),
    "write into a slice": (lambda: Model(SlopeOfHeads), {"blocks.0.qkv.weight"}),
    "one head": (lambda: Model(OneHead), {"blocks.0.kv.weight"}),
    "executed source": (lambda: Model(Executed), {"blocks.0.up.weight"}),
    "embedding with a norm": (lambda: Model(Mlp, NormedEmbedding), {"embed.weight"}),
    "embedding by an index": (lambda: Model(Mlp, IndexedEmbedding), {"head.weight"}),
    "slow copy": (lambda: Model(Followed), {"blocks.0.slow.up.weight", "blocks.0.fast.up.weight"}),
    "norms of weights": (lambda: Model(Mlp, penalty=0.1), {"blocks.0.up.weight", "blocks.0.up.bias"}),
}


def _ids() -> Tensor:
    return torch.randint(0, WORDS, (2, 6), generator=torch.Generator().manual_seed(0))


def _of_ranks() -> dict[str, Any]:
    results = {}
    for name, (make, _) in MODELS.items():
        model = randomize_(make())
        plan = ltp.infer_plan(model, (_ids(),), tp=2)
        split = {n for n, s in plan.check(model, 2).splits.items() if s.dim is not None}
        ltp.parallelize(model, make_mesh("cpu", 1, 2), plan)
        loss = model(_ids())
        loss.backward()
        results[name] = {"numbers": {"loss": loss.detach(), **ltp.full_gradients(model)}, "split": split}
    return results


@pytest.fixture(scope="module")
def of_ranks() -> dict[str, Any]:
    result: dict[str, Any] = run_ranks(_of_ranks, 2)[0]
    return result


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_those_of_one_process(name: str, of_ranks: dict[str, Any]) -> None:
    make, split = MODELS[name]
    model = randomize_(make())
    loss = model(_ids())
    loss.backward()
    ref = {"loss": loss.detach(), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}
    assert_trees_close(of_ranks[name]["numbers"], ref, rtol=2e-4)
    assert split <= of_ranks[name]["split"]
