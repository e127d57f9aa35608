"""Logits, full and sharded by the vocabulary, and what is done with them: cases for the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_tp.core.comm.axis import Axis, even_shard
from lightning_tp.core.ops.logits_rules import split_logits
from lightning_tp.core.ops.split_logits import SplitLogits

V = 11
Use = Callable[[Tensor, Tensor], Any]  # of logits (2, 5, V) and targets (2, 5)
SCALE = nn.Parameter(torch.tensor(1.5))
MASK = torch.tensor([[True, False, True, True, False], [False, False, True, False, True]])
PER_TOKEN = nn.Parameter(torch.linspace(0.5, 2, 10).view(2, 5, 1))
PER_WORD = nn.Parameter(torch.linspace(-1, 2, V))
WHOLE = nn.Parameter(torch.linspace(-3, 2, 10 * V).view(2, 5, V))
NO_WORDS = torch.arange(V) % 3 == 0


class Recorder:
    """A process group that notes what it is asked for, in `sent`: [(name, bytes of the tensors given)]."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.sent = group, []

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.group, name)

        def call(*args: Any) -> Any:
            tensors = args[0] if isinstance(args[0], list) else [args[0]]
            self.sent.append((name, sum(t.numel() * t.itemsize for t in tensors)))
            return method(*args)

        return method if name in ("rank", "size") else call


class Case:
    """Random logits, whole and as this rank holds them, both leaves of autograd."""

    def __init__(self, vocab: int, tokens: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        self.comm = Recorder(dist.group.WORLD)
        self.axis, self.vocab = Axis(self.comm), vocab
        random = torch.Generator().manual_seed(seed)
        self.whole = (torch.randn(*tokens, vocab, generator=random) * 3).to(dtype).requires_grad_()
        self.target = torch.randint(0, vocab, tokens, generator=random)
        self.class_weight = torch.rand(vocab, generator=random)
        self.mine = even_shard(vocab, self.axis.rank, self.axis.size)
        self.local = self.columns(self.whole.detach()).clone().requires_grad_()

    def columns(self, whole: Tensor) -> Tensor:
        return whole[..., self.mine.start : self.mine.stop]

    def split(self) -> SplitLogits:
        return split_logits(self.local, self.axis, self.vocab)

    def compare(self, loss_fn: Callable[[Tensor, Tensor], Tensor], rtol: float = 1e-5, what: str = "") -> list[Any]:
        """`loss_fn(logits, target)` on whole and on split logits: same value and gradient. Returns what was sent."""
        self.whole.grad = self.local.grad = None
        expected = loss_fn(self.whole, self.target)
        upstream = torch.linspace(1, 2, expected.numel()).view(expected.shape).to(expected.dtype)
        expected.backward(upstream)
        self.comm.sent.clear()
        loss = loss_fn(self.split(), self.target)
        loss.backward(upstream)
        close(loss, expected, rtol, f"{what}: value")
        close(self.local.grad, self.columns(self.whole.grad), rtol, f"{what}: gradient")
        return self.comm.sent


def close(got: Tensor, expected: Tensor, rtol: float, what: str) -> None:
    """Close relative to each value, with a floor relative to the largest; NaN where NaN is expected."""
    assert type(got) is Tensor and got.dtype == expected.dtype, f"{what}: {type(got)} {got.dtype}, not {expected.dtype}"
    top = expected.detach().double().abs().nan_to_num().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(got, expected, rtol=rtol, atol=rtol * top, equal_nan=True, msg=lambda m: f"{what}: {m}")


# What gives SplitLogits again, without communication, forward and backward.
STAYS_SPLIT: dict[str, Use] = {
    "float": lambda x, t: x.float(),
    "double": lambda x, t: x.double(),
    "to dtype": lambda x, t: x.to(torch.float64),
    "to device": lambda x, t: x.to("cpu"),
    "to other": lambda x, t: x.to(t.double()),
    "type": lambda x, t: x.type(torch.float64),
    "type_as": lambda x, t: x.type_as(torch.ones(3, dtype=torch.float64)),
    "bfloat16": lambda x, t: x.bfloat16(),
    "contiguous": lambda x, t: x.contiguous(),
    "clone": lambda x, t: x.clone(),
    "view": lambda x, t: x.view(-1, V),
    "view -1": lambda x, t: x.view(10, -1),
    "view size": lambda x, t: x.view(-1, x.size(-1)),
    "view list": lambda x, t: x.view([5, 2, V]),
    "view more": lambda x, t: x.view(1, 2, 5, 1, V, 1),
    "view_as": lambda x, t: x.view_as(torch.ones(5, 2, V)),
    "reshape": lambda x, t: x.reshape(2 * 5, x.shape[-1]),
    "torch.reshape": lambda x, t: torch.reshape(x, (10, V)),
    "flatten": lambda x, t: x.flatten(0, 1),
    "flatten keyword": lambda x, t: x.flatten(end_dim=1),
    "reshape keyword": lambda x, t: torch.reshape(x, shape=(10, V)),
    "unflatten": lambda x, t: x.unflatten(0, (1, -1)),
    "unsqueeze": lambda x, t: x.unsqueeze(0),
    "unsqueeze last": lambda x, t: x.unsqueeze(-1),
    "squeeze": lambda x, t: x[:1].squeeze(),
    "squeeze dim": lambda x, t: x[:1].squeeze(0),
    "squeeze nothing": lambda x, t: x.squeeze(-1),
    "squeeze keyword": lambda x, t: x[:, :1].squeeze(dim=1),
    "transpose": lambda x, t: x.transpose(1, 2),
    "transpose keywords": lambda x, t: x.transpose(dim0=1, dim1=2),
    "swapaxes": lambda x, t: x.swapaxes(0, 1),
    "permute": lambda x, t: x.permute(2, 0, 1),
    "movedim": lambda x, t: torch.movedim(x, -1, 0),
    "t": lambda x, t: x[0].t(),
    "T": lambda x, t: x[0].T,
    "mT": lambda x, t: x.mT,
    "select": lambda x, t: x.select(1, -1),
    "narrow": lambda x, t: x.narrow(1, 1, 3),
    "split": lambda x, t: x.split(2, 1)[1],
    "chunk": lambda x, t: x.chunk(2)[1],
    "unbind": lambda x, t: x.unbind(0)[1],
    "iterate": lambda x, t: next(iter(x)),
    "shifted": lambda x, t: x[..., :-1, :],
    "shifted short": lambda x, t: x[:, 1:],
    "last": lambda x, t: x[:, -1],
    "first": lambda x, t: x[0],
    "one token": lambda x, t: x[0, 1],
    "step": lambda x, t: x[:, ::2, :],
    "none": lambda x, t: x[None, :, None],
    "all the vocabulary": lambda x, t: x[..., :V],
    "mask": lambda x, t: x[MASK],
    "mask of a dim": lambda x, t: x[:, MASK[0]],
    "rows": lambda x, t: x[torch.arange(2), torch.tensor([4, 2])],
    "rows of one": lambda x, t: x[1, torch.tensor([[4, 2], [0, 0]])],
    "list": lambda x, t: x[:, [0, 3]],
    "0-dim index": lambda x, t: x[:, torch.tensor(2)],
    "index transposed": lambda x, t: x.transpose(1, 2)[1, :, 2:],
    "mul": lambda x, t: x * 2,
    "rmul": lambda x, t: 2 * x,
    "div": lambda x, t: x / 2.5,
    "rdiv": lambda x, t: 2.5 / x,
    "rsub": lambda x, t: 1 - x,
    "neg": lambda x, t: -x,
    "pow": lambda x, t: x**2,
    "softcap": lambda x, t: 3 * torch.tanh(x / 3),
    "sigmoid": lambda x, t: x.sigmoid(),
    "gelu": lambda x, t: F.gelu(x),
    "clamp": lambda x, t: x.clamp(-1, max=1.0),
    "by a tensor": lambda x, t: x * torch.tensor(2.0),
    "tensor first": lambda x, t: torch.tensor(2.0) * x,
    "by a parameter": lambda x, t: x * SCALE.exp(),
    "by a parameter per token": lambda x, t: PER_TOKEN * x,
    "parameter per word": lambda x, t: x + PER_WORD,
    "whole parameter": lambda x, t: x * WHOLE,
    "parameter, transposed": lambda x, t: x.transpose(1, 2) + PER_WORD[:, None],
    "two of them": lambda x, t: x * x.sigmoid() + x,
    "masked_fill": lambda x, t: x.masked_fill(NO_WORDS, -5.0),
    "masked_fill tokens": lambda x, t: x.masked_fill(MASK[..., None], 0.0),
    "where": lambda x, t: torch.where(NO_WORDS, x, -5.0),
    "detach": lambda x, t: x.detach() + x,
    "data": lambda x, t: x.data * 1,
}

# What gathers once, in forward; backward is local.
GATHERS: dict[str, Use] = {
    "full_tensor": lambda x, t: x.full_tensor() if isinstance(x, SplitLogits) else x,
    "argmax": lambda x, t: x.argmax(-1),
    "argmax, then softmax": lambda x, t: x.softmax(-1) * F.one_hot(x.argmax(-1), V),
    "softmax": lambda x, t: F.softmax(x, dim=-1),
    "log_softmax": lambda x, t: torch.log_softmax(x, -1).gather(-1, t[..., None]),
    "logsumexp": lambda x, t: x.logsumexp(-1),
    "topk": lambda x, t: x.topk(3)[0],
    "topk indices": lambda x, t: torch.topk(x, 3).indices,
    "max": lambda x, t: x.max(-1).values,
    "sort": lambda x, t: x.sort(dim=-1, descending=True)[0],
    "sum": lambda x, t: x.sum(),
    "mean of tokens": lambda x, t: x.mean(1),
    "norm": lambda x, t: x.norm(),
    "slice of words": lambda x, t: x[..., 3:8],
    "a word": lambda x, t: x[:, :, 4],
    "words": lambda x, t: x[..., [1, 7]],
    "negative step": lambda x, t: x[..., ::2],
    "mask of words": lambda x, t: x[..., NO_WORDS],
    "whole mask": lambda x, t: x[WHOLE > 0],
    "apart": lambda x, t: x[torch.tensor([0, 1]), :, torch.tensor([3, 3])],
    "two masks": lambda x, t: x[torch.tensor([True, False]), MASK[0].index_fill(0, torch.tensor([0, 2]), False)],
    "apart leading": lambda x, t: x.unsqueeze(0)[torch.tensor([0, 0]), :, torch.tensor([3, 3])],
    "own mask": lambda x, t: x[x > 0],
    "compare": lambda x, t: (x > 0) & (x == x),
    "view across": lambda x, t: x.view(2, -1),
    "view dtype": lambda x, t: x.detach().view(torch.int32),
    "flat": lambda x, t: x.flatten(),
    "ravel": lambda x, t: x.ravel(),
    "keyword": lambda x, t: torch.softmax(input=x, dim=-1),
    "keywords": lambda x, t: torch.mul(input=x, other=2),
    "cat": lambda x, t: torch.cat([x, x], 1),
    "stack": lambda x, t: torch.stack((x, x)),
    "as many words as there are": lambda x, t: x.narrow(-1, 0, V),
    "pieces of as many words": lambda x, t: x.split(V, -1)[0],
    "chunk words": lambda x, t: x.chunk(2, -1)[1],
    "split words": lambda x, t: x.split([4, 7], dim=-1)[0],
    "gather": lambda x, t: x.gather(-1, t.unsqueeze(-1)),
    "expand": lambda x, t: x.expand(3, -1, -1, -1),
    "matmul": lambda x, t: x @ torch.ones(V, 2),
    "einsum": lambda x, t: torch.einsum("btv,v->bt", x, torch.arange(V).float()),
    "linear": lambda x, t: F.linear(x, torch.ones(2, V)),
    "broadcast over": lambda x, t: x[:1, :1, :1].view(-1) * torch.ones(4, V)[:, :1],
    "more dims": lambda x, t: x + torch.ones(3, 1, 1, 1),
    "kl_div": lambda x, t: F.kl_div(x.log_softmax(-1), WHOLE.softmax(-1), reduction="batchmean"),
    "dropout of nothing": lambda x, t: F.dropout(x, 0.0),
    "layer_norm": lambda x, t: F.layer_norm(x, (V,)),
    "cpu": lambda x, t: x.cpu(),
    "tolist": lambda x, t: torch.tensor(x.detach().tolist()),
    "numpy": lambda x, t: torch.from_numpy(x.detach().numpy().copy()),
    "array": lambda x, t: torch.from_numpy(__import__("numpy").asarray(x.detach()) + 1),
    "item": lambda x, t: torch.tensor(x[0, 1, 2].item()),
    "float()": lambda x, t: torch.tensor(float(x[0, 1].max())),
    "nonzero": lambda x, t: torch.where(x)[2],
    "allclose": lambda x, t: torch.tensor(torch.allclose(x, x)),
    "isfinite": lambda x, t: torch.isfinite(x).all(),
    "copy to plain": lambda x, t: torch.zeros(2, 5, V).copy_(x),
    "set in plain": lambda x, t: set_in_plain(x),
    "add to plain": lambda x, t: torch.zeros(2, 5, V).add_(x),
    "checkpoint": lambda x, t: torch.utils.checkpoint.checkpoint(lambda y: y.softmax(-1), x, use_reentrant=False),
}


def set_in_plain(x: Tensor) -> Tensor:
    out = torch.zeros(2, 5, V)
    out[:, 1:] = x[:, 1:]
    return out


def compare(use: Use, name: str, **kwargs: Any) -> tuple[list[str], list[str], Any]:
    """Same value and gradients, of the parameters too. Returns the collectives of forward and backward, and the result."""
    parameters = [SCALE, PER_TOKEN, PER_WORD, WHOLE]
    case = Case(V, (2, 5), **kwargs)
    expected = use(case.whole, case.target)
    logits = case.split()
    out = use(logits, case.target)
    forward = [op for op, _ in case.comm.sent]
    got = out.full_tensor() if isinstance(out, SplitLogits) else out
    assert out.shape == expected.shape and out.dtype == expected.dtype, f"{name}: {out.shape} {out.dtype}"
    if torch.is_grad_enabled():
        assert out.requires_grad == expected.requires_grad, name
    close(got, expected, 1e-5, name)
    case.comm.sent.clear()
    if out.requires_grad and expected.requires_grad:
        upstream = torch.linspace(-1, 2, expected.numel()).view(expected.shape).to(expected.dtype)
        used = [p for p in (case.whole, *parameters) if p is case.whole or reaches(expected, p)]
        grads = torch.autograd.grad(expected, used, upstream)
        ours = torch.autograd.grad(out, [case.local, *used[1:]], upstream)
        close(ours[0], case.columns(grads[0]).contiguous(), 1e-5, f"{name}: gradient")
        for i, (mine, theirs) in enumerate(zip(ours[1:], grads[1:])):
            close(mine, theirs, 1e-4, f"{name}: gradient of parameter {i}")
    return forward, [op for op, _ in case.comm.sent], out


def reaches(out: Tensor, parameter: Tensor) -> bool:
    return torch.autograd.grad(out.sum(), parameter, retain_graph=True, allow_unused=True)[0] is not None
