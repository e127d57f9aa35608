"""Vocabulary-parallel cross entropy against torch's own on the whole logits: values, gradients, what crosses the ranks."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_tp import TPError
from lightning_tp.core.ops.cross_entropy import vocab_parallel_cross_entropy
from lightning_tp.testing import run_ranks
from tests.core.ops.logits import Case

SPLITS = [(2, 1003), (4, 1003), (2, 64), (4, 64), (4, 5)]  # 1003 over 4: 251, 251, 251, 250; 5 over 4: 2, 2, 1, 0


# -------------------------------------------------------------------------------------------------- against torch


@pytest.mark.parametrize("tp, vocab", SPLITS)
def test_every_option_matches_torch(tp: int, vocab: int) -> None:
    def body() -> None:
        case = Case(vocab, (24,))
        case.target[3:6] = -100
        case.target[10] = 1
        options = itertools.product(("mean", "sum", "none"), (-100, 1, 4), (0.0, 0.1, 1.0), (None, case.class_weight))
        for reduction, ignore_index, smoothing, weight in options:
            kwargs = dict(reduction=reduction, ignore_index=ignore_index, label_smoothing=smoothing, weight=weight)
            case.target[3:6] = ignore_index
            sent = case.compare(lambda x, t, kw=kwargs: F.cross_entropy(x, t, **kw), what=str(kwargs))
            sums = 3 if smoothing else 2
            assert sent == [("allreduce", 24 * 4), ("allreduce", sums * 24 * 4)], f"{kwargs}: {sent}"

    run_ranks(body, tp)


def test_torch_counts_the_same_collectives() -> None:
    def body() -> None:
        case = Case(64, (24,))
        case.axis.group = dist.group.WORLD
        with CommDebugMode() as comm:
            F.cross_entropy(case.split(), case.target).backward()
        assert comm.get_comm_counts() == {torch.ops.c10d.allreduce_: 2}

    run_ranks(body, 2)


@pytest.mark.parametrize("tp", [2, 4])
def test_every_layout_runs_in_parallel(tp: int) -> None:
    layouts: dict[str, tuple[tuple[int, ...], Callable[[Tensor, Tensor], Tensor]]] = {
        "(V,)": ((), F.cross_entropy),
        "(N, V)": ((6,), F.cross_entropy),
        "(N, V) none": ((6,), lambda x, t: F.cross_entropy(x, t, reduction="none")),
        "(V,) none": ((), lambda x, t: F.cross_entropy(x, t, reduction="none")),
        "view": ((2, 5), lambda x, t: F.cross_entropy(x.view(-1, x.size(-1)), t.view(-1))),
        "shifted": ((2, 5), lambda x, t: F.cross_entropy(x[:, :-1].flatten(0, 1), t[:, 1:].flatten())),
        "transposed": ((2, 5), lambda x, t: F.cross_entropy(x.transpose(1, 2), t, reduction="none")),
        "permuted": ((2, 3, 4), lambda x, t: F.cross_entropy(x.permute(0, 3, 1, 2), t, reduction="none")),
        "movedim": ((2, 3, 4), lambda x, t: F.cross_entropy(x.movedim(-1, 1).contiguous(), t)),
        "masked": ((2, 5), lambda x, t: F.cross_entropy(x[t > 3], t[t > 3])),
        "module": ((2, 5), lambda x, t: nn.CrossEntropyLoss(ignore_index=2, label_smoothing=0.2)(x.view(-1, 11), t.view(-1))),
        "no tokens": ((0,), lambda x, t: F.cross_entropy(x, t, reduction="sum")),
        "no tokens, nan": ((0,), F.cross_entropy),
        "softcap": ((2, 5), lambda x, t: F.cross_entropy((7 * torch.tanh(x / 7)).view(-1, 11), t.view(-1))),
        "keywords": ((6,), lambda x, t: F.cross_entropy(input=x, target=t)),
    }

    def body() -> None:
        for name, (tokens, loss_fn) in layouts.items():
            sent = Case(11, tokens).compare(loss_fn, what=name)
            assert [op for op, _ in sent] == ["allreduce"] * 2, f"{name}: {sent}"

    run_ranks(body, tp)


def test_hugging_face_loss_runs_in_parallel() -> None:
    loss_utils = pytest.importorskip("transformers.loss.loss_utils")

    def body() -> None:
        for dtype, rtol in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
            for items in (None, 7, torch.tensor(7)):
                case = Case(1003, (2, 8), dtype)
                case.target[0, 2] = -100

                def loss_fn(x: Tensor, t: Tensor, items: Any = items) -> Tensor:
                    return loss_utils.ForCausalLMLoss(x, t, 1003, num_items_in_batch=items)

                sent = case.compare(loss_fn, rtol, f"{dtype} {items}")
                assert [op for op, _ in sent] == ["allreduce"] * 2, sent
                case.compare(lambda x, t: loss_utils.ForMaskedLMLoss(x, t, 1003), rtol, "masked")

    run_ranks(body, 2)


def test_what_cannot_run_in_parallel_gathers() -> None:
    def body() -> None:
        case = Case(11, (6,))
        soft = torch.rand(6, 11).softmax(-1)
        dist.broadcast(soft, 0)
        for name, loss_fn in {
            "probabilities": lambda x, t: F.cross_entropy(x, soft),
            "probabilities of itself": lambda x, t: F.cross_entropy(x, x.detach().softmax(-1), label_smoothing=0.1),
            "old arguments": lambda x, t: F.cross_entropy(x, t, size_average=False),
            "nll": lambda x, t: F.nll_loss(F.log_softmax(x, -1), t),
            "gather": lambda x, t: -x.log_softmax(-1).gather(-1, t.unsqueeze(-1)).mean(),
            "logsumexp": lambda x, t: torch.logsumexp(x, -1).square().mean() + F.cross_entropy(x, t),
        }.items():
            sent = case.compare(loss_fn, what=name)
            assert any("allgather" in op for op, _ in sent), f"{name}: {sent}"
        square = Case(6, (4, 6))  # the class dim of (4, 6, 6) is dim 1, the vocabulary is dim 2
        square.compare(F.cross_entropy, what="another class dim")
        for wrong in (case.target.int(), case.target[:3], case.target.view(2, 3)):
            for logits in (case.whole, case.split()):
                with pytest.raises((RuntimeError, ValueError)):
                    F.cross_entropy(logits, wrong)

    run_ranks(body, 2)


# ------------------------------------------------------------------------------------------------ precision and extremes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    def body() -> None:
        case = Case(1003, (24,), dtype)
        rtol = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float64: 1e-12}[dtype]
        case.compare(F.cross_entropy, rtol)
        case.compare(lambda x, t: F.cross_entropy(x, t, label_smoothing=0.1, reduction="none"), rtol)
        case.compare(lambda x, t: F.cross_entropy(x, t, weight=case.class_weight.to(dtype)), rtol)
        # the sums are taken in float32: closer to the truth than torch
        truth = F.cross_entropy(case.whole.double(), case.target)
        loss = vocab_parallel_cross_entropy(case.local, case.target, case.axis, 1003)
        assert loss.dtype == dtype and loss.double().item() == truth.to(dtype).item()

    run_ranks(body, 2)


def test_under_autocast() -> None:
    def body() -> None:
        for dtype in (torch.bfloat16, torch.float32):
            case = Case(1003, (2, 12), dtype)
            with torch.autocast("cpu", torch.bfloat16):
                sent = case.compare(lambda x, t: F.cross_entropy(x.view(-1, 1003), t.view(-1)))
                assert [op for op, _ in sent] == ["allreduce"] * 2
                assert F.cross_entropy(case.split().view(-1, 1003), case.target.view(-1)).dtype == torch.float32
                case.compare(lambda x, t: x.softmax(-1).square().sum())

    run_ranks(body, 2)


def test_extremes() -> None:
    def body() -> None:
        for scale, shift in ((1e4, 0.0), (1.0, 1e6), (0.0, 0.0)):
            case = Case(11, (6,))
            case.whole.data = case.whole.data * scale + shift
            case.local.data = case.columns(case.whole.data).clone()
            case.compare(F.cross_entropy, what=f"{scale} {shift}")
        case = Case(11, (6,))  # masked classes, one of them the nearest column to another rank's targets
        case.target.clamp_(min=2, max=8)
        for column in (0, 5, 6, 10):
            case.target[case.target == column] = 4
            case.whole.data[:, column] = -torch.inf
        case.local.data = case.columns(case.whole.data).clone()
        case.compare(F.cross_entropy, what="-inf")
        case.whole.data[0, :6] = -torch.inf  # all of one rank's columns
        case.target[0] = 8
        case.local.data = case.columns(case.whole.data).clone()
        case.compare(F.cross_entropy, what="-inf on a rank")
        case = Case(11, (6,))
        case.whole.data[2] = torch.nan
        case.target[2] = -100
        case.local.data = case.columns(case.whole.data).clone()
        case.compare(F.cross_entropy, what="NaN in an ignored token")
        for reduction in ("mean", "sum", "none"):
            case = Case(11, (6,))
            case.target.fill_(-100)
            for smoothing in (0.0, 0.1):
                kwargs = dict(reduction=reduction, label_smoothing=smoothing)
                case.compare(lambda x, t, kw=kwargs: F.cross_entropy(x, t, **kw), what=f"all ignored, {kwargs}")

    run_ranks(body, 2)


def test_a_target_out_of_range_raises() -> None:
    def body() -> None:
        case = Case(11, (6,))
        for wrong in (11, -1, -100):
            case.target[2] = wrong
            with pytest.raises(TPError, match=f"target {wrong} is out of range for a vocabulary of 11, and so are 1 of 6"):
                F.cross_entropy(case.split(), case.target, ignore_index=-7)
        F.cross_entropy(case.split(), case.target)  # -100 is ignored
        with pytest.raises((ValueError, RuntimeError)):
            F.cross_entropy(case.split(), case.target, reduction="median")
        with pytest.raises(TPError, match="reduction='median'"):
            F.cross_entropy(case.split(), case.target, reduction="median", label_smoothing=0.1)

    run_ranks(body, 2)


# ---------------------------------------------------------------------------------------------------- memory and graphs


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_kept_graph_gives_the_same_gradient_again(smoothing: float) -> None:
    def body() -> None:
        case = Case(11, (6,))
        loss = F.cross_entropy(case.split(), case.target, label_smoothing=smoothing)
        (first,) = torch.autograd.grad(loss, case.local, retain_graph=True)
        (second,) = torch.autograd.grad(loss, case.local, torch.tensor(3.0), retain_graph=True)
        loss.backward()
        torch.testing.assert_close(second, 3 * first)
        torch.testing.assert_close(case.local.grad, first)
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()
        loss = F.cross_entropy(case.split(), case.target)
        (grad,) = torch.autograd.grad(loss, case.local, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward()

    run_ranks(body, 2)


def test_memory_and_number_of_operations() -> None:
    """One tensor as large as the logits is made, in all; and small tensors by few operations."""

    class Count(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.ops, self.large = 0, set[int]()

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            self.ops += 1
            for tensor in out if isinstance(out, (list, tuple)) else [out]:
                if isinstance(tensor, Tensor) and tensor.untyped_storage().nbytes() >= 64 * 128 * 4:
                    self.large.add(tensor.untyped_storage().data_ptr())
            return out

    def body() -> tuple[int, int]:
        case = Case(256, (64,))
        leaf = case.local.data_ptr()
        with Count() as forward:
            loss = vocab_parallel_cross_entropy(case.local, case.target, case.axis, 256)
        with Count() as backward:
            loss.backward()
        made = (forward.large | backward.large) - {leaf}
        assert len(made) == 1 and case.local.grad.data_ptr() in made, made
        return forward.ops, backward.ops

    forward, backward = run_ranks(body, 2)[0]
    assert forward <= 22 and backward <= 8, (forward, backward)
