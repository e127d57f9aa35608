"""Cross entropy of logits that stay sharded by the vocabulary (loss parallelism), with two small all-reduces and no all-gather.

A vocabulary-parallel head over tp ranks leaves each rank the logits of its columns. `vocab_parallel_cross_entropy` is
`torch.nn.functional.cross_entropy` of them, for N tokens, V words and this rank's `V_local = len(even_shard(V, rank, tp))`:

| tensor | shape on a rank | full on |
|---|---|---|
| logits, their gradient | (N, V_local) | no rank |
| largest logit of a token | (N, 1) | all ranks, after all-reduce 1 (max) |
| sum of exp, logit of the target [, sum of logits] | (N, 2) [(N, 3)] | all ranks, after all-reduce 2 (sum) |
| target, loss, gradient of the loss | (N,), () or (N,) | all ranks, equal |

Backward is local: the gradient of a logit is `softmax - one_hot`, and both are known for this rank's columns. Sums are taken in float32 at
least. One tensor (N, V_local) is saved for backward, which turns it into the gradient in place. The method is that of Megatron-LM (Shoeybi et
al. 2019, arXiv 1909.08053). Users call no function of this file: the head returns `SplitLogits`, and `F.cross_entropy` finds its way here.

Not covered, and computed on all-gathered logits instead: targets that are class probabilities, the old `size_average` and `reduce` arguments,
`nll_loss(log_softmax(..))`. Second derivatives raise.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from lightning_tp._compat import all_reduce_into, graph_is_retained
from lightning_tp.core.comm.axis import Axis, even_shard
from lightning_tp.core.comm.collectives import all_reduce
from lightning_tp.core.ops.split_logits import SplitLogits, to_local
from lightning_tp.errors import TPError


def vocab_parallel_cross_entropy(
    logits_local: Tensor, target: Tensor, axis: Axis, vocab: int, *, weight: Tensor | None = None, ignore_index: int = -100,
    reduction: str = "mean", label_smoothing: float = 0.0,
) -> Tensor:  # fmt: skip
    """Compute `F.cross_entropy` of (N, V_local) logits and (N,) targets, equal on all ranks: () or, with reduction "none", (N,).

    Args:
        logits_local: this rank's columns, `even_shard(vocab, axis.rank, axis.size)`.
        target: class indices in [0, vocab), or `ignore_index`; the same on all ranks.
        axis: the tensor-parallel axis.
        vocab: number of classes.
        weight: of each class, (vocab,); this and the others as in `F.cross_entropy`.

    Raises:
        TPError: if a target is out of range. Not on a GPU, which would have to synchronize with the host.
    """
    if target.device.type == "cpu":
        _check_range(target, vocab, ignore_index)
    device = logits_local.device.type
    autocast = device != "meta" and torch.is_autocast_enabled(device) and logits_local.dtype != torch.float64
    dtype = torch.float32 if autocast else logits_local.dtype  # as F.cross_entropy
    ignored = target == ignore_index
    if weight is None and label_smoothing == 0:
        log_p = _LogProbability.apply(logits_local, target, axis, vocab, None, False)
        # one class, and a token is of that class or ignored: torch's own reductions do the rest
        return F.nll_loss(log_p, ignored.long(), ignore_index=1, reduction=reduction).to(dtype)

    weight = None if weight is None else weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    of_target = 1 if weight is None else weight[target.masked_fill(ignored, 0)]
    if label_smoothing == 0:
        log_p = _LogProbability.apply(logits_local, target, axis, vocab, weight, False)
        loss = log_p.squeeze(1) * -of_target  # (N,)
    else:
        log_p, log_p_all = _LogProbability.apply(logits_local, target, axis, vocab, weight, True)
        loss = log_p.squeeze(1) * of_target * (label_smoothing - 1) - log_p_all.squeeze(1) * (label_smoothing / vocab)
    loss = loss.masked_fill(ignored, 0)
    if reduction == "sum":
        loss = loss.sum()
    elif reduction == "mean":
        loss = loss.sum() / ((~ignored) * of_target).sum()
    elif reduction != "none":
        raise TPError(f"`reduction={reduction!r}`: valid reductions of cross entropy are 'mean', 'sum' and 'none'.")
    return loss.to(dtype)


class _LogProbability(Function):
    """(N, V_local) logits, (N,) targets -> log-probability of the target (N, 1); with `smooth` also the weighted sum over classes (N, 1)."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, axis: Axis, vocab: int, weight: Tensor | None, smooth: bool
    ) -> Tensor | tuple[Tensor, Tensor]:
        mine = even_shard(vocab, axis.rank, axis.size)
        ctx.dtype, ctx.empty = logits.dtype, len(mine) == 0
        if ctx.empty:  # more ranks than columns: this one contributes nothing to the sums
            logits = logits.new_full((logits.shape[0], 1), -torch.inf)

        top = logits.amax(1, keepdim=True)  # (N, 1)
        if top.dtype.itemsize < 4:
            top = top.float()
        all_reduce_into(top, axis.group, largest=True)
        x = logits - top  # (N, V_local)

        column = target.unsqueeze(1) - mine.start
        nearest = column.clamp(0, x.shape[1] - 1)
        elsewhere = column != nearest
        sums = [x.gather(1, nearest).masked_fill_(elsewhere, 0)]
        if smooth:
            ctx.weight = None if weight is None else weight[mine.start : mine.stop]
            if ctx.empty:
                sums.append(torch.zeros_like(top))
            else:
                sums.append(x.sum(1, keepdim=True) if weight is None else (x @ ctx.weight).unsqueeze(1))
        exp = x.exp_()
        sums.append(exp.sum(1, keepdim=True))
        x_target, *x_all, total = all_reduce(torch.cat(sums, 1), axis).split(1, 1)  # (N, 1) each

        ctx.save_for_backward(exp, total, nearest, elsewhere)
        log_total = total.log()
        if not smooth:
            return x_target - log_total
        ctx.weights = vocab if weight is None else weight.sum()
        return x_target - log_total, x_all[0] - ctx.weights * log_total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_target: Tensor, d_all: Tensor | None = None) -> tuple[Tensor | None, ...]:
        exp, total, nearest, elsewhere = ctx.saved_tensors
        d_sum = d_target if d_all is None else d_target + d_all * ctx.weights
        scale = d_sum.neg() / total
        # the softmax becomes the gradient in place, unless the graph is kept for another backward pass
        grad = exp * scale if graph_is_retained() else exp.mul_(scale)
        grad.scatter_add_(1, nearest, d_target.masked_fill(elsewhere, 0))
        if ctx.empty:
            grad = grad[:, :0]
        elif d_all is not None:
            grad.add_(d_all if ctx.weight is None else d_all * ctx.weight)
        return grad.to(ctx.dtype), None, None, None, None, None


def cross_entropy_of_split(
    input: Tensor, target: Tensor, weight: Tensor | None = None, size_average: bool | None = None, ignore_index: int = -100,
    reduce: bool | None = None, reduction: str = "mean", label_smoothing: float = 0.0,
) -> Any:  # fmt: skip
    """`F.cross_entropy` of `SplitLogits` (V,), (N, V) or (N, V, d1, ..); NotImplemented where it has to all-gather them."""
    if not isinstance(input, SplitLogits) or any(isinstance(other, SplitLogits) for other in (target, weight)):
        return NotImplemented
    local, dim = input.local, input.vocab_dim
    tokens = (*local.shape[:dim], *local.shape[dim + 1 :])
    if dim != min(local.ndim - 1, 1) or target.dtype != torch.int64 or target.shape != tokens:
        return NotImplemented
    if size_average is not None or reduce is not None:
        return NotImplemented
    local = to_local(input)
    if local.ndim != 2:  # (N, V_local, d1, ..) -> (N d1 .., V_local)
        local = local.movedim(dim, -1).reshape(target.numel(), local.shape[dim])
    options: Any = dict(weight=weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing)
    loss = vocab_parallel_cross_entropy(local, target.reshape(-1), input.axis, input.vocab, **options)
    return loss.view(tokens) if reduction == "none" else loss


def _check_range(target: Tensor, vocab: int, ignore_index: int) -> None:
    if target.numel() == 0:
        return
    low, high = torch.aminmax(target)
    if low.item() >= 0 and high.item() < vocab:
        return
    wrong = target[((target < 0) | (target >= vocab)) & (target != ignore_index)]
    if len(wrong):
        raise TPError(
            f"Cross entropy: target {int(wrong[0])} is out of range for a vocabulary of {vocab}, and so are {len(wrong)} of {target.numel()} "
            f"targets in all. Use indices in [0, {vocab}), or `ignore_index` ({ignore_index})."
        )
