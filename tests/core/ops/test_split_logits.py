"""Split logits behave as the whole tensor: in value, in gradient, and without communication where none is needed."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lightning_tp import TPError
from lightning_tp.core.comm.axis import Axis
from lightning_tp.core.ops.logits_rules import split_logits
from lightning_tp.core.ops.split_logits import SplitLogits
from lightning_tp.testing import run_ranks
from tests.core.ops.logits import GATHERS, NO_WORDS, PER_WORD, STAYS_SPLIT, WHOLE, Case, V, close, compare

# ------------------------------------------------------------------------------------------------ what a tensor also is


def test_metadata_needs_no_communication() -> None:
    def body() -> None:
        case = Case(V, (2, 5))
        x = case.split()
        assert isinstance(x, Tensor) and torch.is_tensor(x)
        assert x.shape == x.size() == (2, 5, V) and x.shape[-1] == x.size(-1) == V
        assert (x.ndim, x.dim(), len(x), x.numel(), torch.numel(x), x.nelement()) == (3, 3, 2, *3 * (10 * V,))
        assert x.dtype == torch.float32 and x.device == torch.device("cpu") and x.layout == torch.strided
        assert x.requires_grad and not x.is_leaf and x.grad_fn is not None and not x.is_cuda and not x.is_meta
        assert x.is_floating_point() and torch.is_floating_point(x) and not torch.is_complex(x)
        assert x.stride() == (5 * V, V, 1) and x.is_contiguous() and x.element_size() == x.itemsize == 4
        assert x.nbytes == 40 * V and x.get_device() == -1 and not x.is_inference()
        assert hash(x) == id(x) and x in {x} and {x: 1}[x] == 1
        assert x.local.shape == (2, 5, len(case.mine)) and (x.vocab, x.vocab_dim) == (V, 2)
        rank = f"local shape=(2, 5, {len(case.mine)}) on rank {case.axis.rank} of 2"
        assert rank in repr(x) and rank in str(x) and rank in f"{x}" and "(2, 5, 11)" in repr(x)
        assert torch.zeros_like(x).equal(torch.zeros(2, 5, V)) and type(torch.zeros_like(x)) is Tensor
        assert x.new_zeros(3).equal(torch.zeros(3)) and x.new_tensor([1]).dtype == torch.float32
        assert torch.ones(2).to(x).dtype == torch.ones(2, dtype=torch.float64).type_as(x).dtype == torch.float32
        assert not x.detach().requires_grad and x.detach().local.data_ptr() == x.local.data_ptr()
        assert x.float() is x and x.contiguous() is x and x.to("cpu") is x
        assert type(tree_map(lambda t: t, {"a": [x]})["a"][0]) is SplitLogits
        out = apply_to_collection({"logits": x, "loss": x}, Tensor, lambda t: t.detach())
        assert not out["logits"].requires_grad
        assert type(torch.ops.aten.mul.Tensor(x, 2)) is SplitLogits  # so does every operator under a dispatch mode
        assert case.comm.sent == []
        dist.barrier()  # a rank that ends while another still connects makes it fail

    run_ranks(body, 2)


def test_logits_are_gathered_once_per_grad_mode() -> None:
    def body() -> None:
        case = Case(V, (2, 5))
        x = case.split()
        x.argmax(-1), x.softmax(-1), x.topk(2), x.full_tensor()
        with torch.no_grad():
            x.argmax(-1)
            assert not x.full_tensor().requires_grad
        assert len(case.comm.sent) == 1
        y = case.split()
        with torch.no_grad():
            y.argmax(-1), y.max()
        assert len(case.comm.sent) == 2
        y.softmax(-1), y.logsumexp(-1)
        assert len(case.comm.sent) == 3
        assert type(y.to("meta")) is Tensor  # another device: the whole goes there
        assert len(case.comm.sent) == 3

    run_ranks(body, 2)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode: Any) -> None:
    def body() -> None:
        with mode():
            for name, use in {**STAYS_SPLIT, **GATHERS, "loss": F.cross_entropy}.items():
                if name in ("checkpoint", "loss"):
                    continue
                forward, _, out = compare(use, name)
                assert forward == ([] if isinstance(out, SplitLogits) else ["_allgather_base"]), name
            case = Case(V, (2, 5))
            loss = F.cross_entropy(case.split().transpose(1, 2), case.target)
            close(loss, F.cross_entropy(case.whole.transpose(1, 2), case.target), 1e-5, "loss")
            assert len(case.comm.sent) == 2
            x = case.split()
            x.argmax(-1), x.softmax(-1)

    run_ranks(body, 2)


# ------------------------------------------------------------------------------------------------------------- autograd


def test_hooks_and_a_retained_gradient() -> None:
    def body() -> None:
        case = Case(V, (2, 5))
        loss = F.cross_entropy(case.whole.view(-1, V), case.target.view(-1))
        loss.backward()
        seen: list[Tensor] = []
        x = case.split()
        x.register_hook(seen.append)
        x.retain_grad()
        y = x.view(-1, V)
        y.register_hook(lambda grad: grad * 2)
        F.cross_entropy(y, case.target.view(-1)).backward()
        assert len(case.comm.sent) == 2 and x.retains_grad
        assert isinstance(x.grad, SplitLogits) and isinstance(seen[0], SplitLogits)
        close(x.grad.full_tensor(), 2 * case.whole.grad, 1e-5, "retained")
        close(seen[0].full_tensor(), 2 * case.whole.grad, 1e-5, "hook")
        close(case.local.grad, case.columns(2 * case.whole.grad).contiguous(), 1e-5, "local")

        x = case.split()  # a gradient that arrives whole
        (grad,) = torch.autograd.grad(x, case.local, case.whole.grad)
        close(grad, case.columns(case.whole.grad).contiguous(), 0, "whole upstream")
        case.local.grad = None
        case.split().backward(case.whole.grad)
        close(case.local.grad, case.columns(case.whole.grad).contiguous(), 0, "backward(gradient)")
        (grad,) = torch.autograd.grad(x.softmax(-1)[..., 0].sum(), x)
        expected = torch.autograd.grad(case.whole.softmax(-1)[..., 0].sum(), case.whole)[0]
        close(grad.full_tensor(), expected, 1e-5, "grad of x")
        leaf = x.detach().requires_grad_()
        for _ in range(2):
            F.cross_entropy(leaf.view(-1, V), case.target.view(-1)).backward()
        assert leaf.is_leaf
        close(leaf.grad.full_tensor(), 2 * case.whole.grad, 1e-5, "leaf")

    run_ranks(body, 2)


def test_module_hooks_and_custom_functions() -> None:
    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return 3 * ctx.saved_tensors[0] ** 2 * grad

    class Head(nn.Module):
        def __init__(self, case: Case) -> None:
            super().__init__()
            self.case = case

        def forward(self, x: Tensor) -> Tensor:
            return split_logits(x * 2, self.case.axis, V)

    def body() -> None:
        case = Case(V, (2, 5))
        case.compare(lambda x, t: Cube.apply(x).softmax(-1).square().sum(), what="custom function")
        case.compare(lambda x, t: F.cross_entropy(Cube.apply(x)[:, 0], t[:, 0]), what="custom function, then parallel")
        case.comm.sent.clear()
        head, seen = Head(case), []
        head.register_full_backward_hook(lambda module, grads_in, grads_out: seen.append((grads_in, grads_out)))
        head.register_forward_hook(lambda module, args, out: out * 1)
        F.cross_entropy(head(case.local).view(-1, V), case.target.view(-1)).backward()
        assert len(seen) == 1 and [op for op, _ in case.comm.sent] == ["allreduce"] * 2, case.comm.sent
        F.cross_entropy(2 * case.whole.view(-1, V), case.target.view(-1)).backward()
        close(case.local.grad, case.columns(case.whole.grad).contiguous(), 1e-5, "module hooks")

    run_ranks(body, 2)


def test_logits_used_twice() -> None:
    def entropy(x: Tensor) -> Tensor:
        return -(x.softmax(-1) * x.log_softmax(-1)).sum(-1).mean()

    def z_loss(x: Tensor) -> Tensor:
        return x.logsumexp(-1).square().mean()

    def body() -> None:
        case = Case(V, (2, 5))

        def loss_fn(x: Tensor, t: Tensor) -> Tensor:
            return F.cross_entropy(x.view(-1, V), t.view(-1)) + 0.1 * entropy(x) + 1e-2 * z_loss(x[:, 1:])

        sent = case.compare(loss_fn)
        assert sorted(op for op, _ in sent) == ["_allgather_base"] * 2 + ["allreduce"] * 2, sent

    run_ranks(body, 2)


def test_second_derivatives_of_what_gathers() -> None:
    def body() -> None:
        case = Case(V, (2, 5))

        def penalty(x: Tensor, leaf: Tensor) -> Tensor:
            (grad,) = torch.autograd.grad(x.softmax(-1)[..., 0].sum() + (x**3).sum(), leaf, create_graph=True)
            return grad

        (expected,) = torch.autograd.grad(penalty(case.whole, case.whole).square().sum(), case.whole)
        ours = penalty(case.split(), case.local)  # this rank's columns: a sum over them is a share of the whole sum
        (got,) = torch.autograd.grad(split_logits(ours, case.axis, V).square().sum(), case.local)
        close(got, case.columns(expected).contiguous(), 1e-5, "penalty")

    run_ranks(body, 2)


# ----------------------------------------------------------------------------------------------------- in place, copies


def test_writing_in_place_without_gradients() -> None:
    writes: dict[str, Callable[[Tensor], Any]] = {
        "a word": lambda x: x.__setitem__((..., 5), -torch.inf),
        "words": lambda x: x.__setitem__((slice(None), slice(1, None), slice(8, None)), torch.zeros(2, 4, 3)),
        "mask": lambda x: x.__setitem__(x < x.topk(3)[0][..., [-1]], -torch.inf),
        "masked_fill_": lambda x: x.masked_fill_(NO_WORDS, 1.0),
        "div_": lambda x: x.div_(2),
        "add_ of another": lambda x: x.add_(x.softmax(-1)),
        "zero_": lambda x: x.zero_(),
        "copy_": lambda x: x.copy_(WHOLE),
        "scatter_": lambda x: x.scatter_(-1, x.argmax(-1, keepdim=True), 0.0),
        "relu_": lambda x: F.relu(x, inplace=True) if type(x) is Tensor else torch.relu_(x),
        "of a view": lambda x: x[:, -1].mul_(3),
        "of a copy": lambda x: x.clone().mul_(3),
        "data": lambda x: setattr(x, "data", torch.ones(2, 5, V)),
    }

    def body() -> None:
        for mode in (torch.no_grad, torch.inference_mode):
            for name, write in writes.items():
                case = Case(V, (2, 5))
                with mode():
                    whole, x = case.whole.detach().clone(), case.split()
                    x.argmax(-1)  # so that there is something that could go stale
                    expected, got = write(whole), write(x)
                    close(x.full_tensor(), whole, 1e-6, name)
                    close(x.local, case.columns(whole).contiguous(), 1e-6, name)
                    assert got is x or got is None or "of a" in name, name
                    if isinstance(got, SplitLogits):
                        close(got.full_tensor(), expected, 1e-6, name)
        x = Case(V, (2, 5)).split()
        y = x
        with torch.no_grad():
            y *= 2
            y[0] -= 1
        assert y is x
        close(
            x.full_tensor().detach(),
            torch.cat((Case(V, (2, 5)).whole[:1] * 2 - 1, Case(V, (2, 5)).whole[1:] * 2)).detach(),
            1e-6,
            "augmented",
        )

    run_ranks(body, 2)


def test_writing_in_place_while_a_gradient_is_recorded_raises() -> None:
    def body() -> None:
        x = Case(V, (2, 5)).split()
        for name, write in {
            "__setitem__": lambda: x.__setitem__((..., 5), 0.0),
            "masked_fill_": lambda: x.masked_fill_(NO_WORDS, 0.0),
            "mul_": lambda: x.mul_(2),
            "add_": lambda: x.detach().add_(PER_WORD),
        }.items():
            with pytest.raises(TPError, match=f"`{name}` writes in place to vocab-parallel logits .2, 5, 11. while a gradient"):
                write()
        with torch.no_grad(), pytest.raises(TPError, match="`unsqueeze_` would change the shape of vocab-parallel logits"):
            x.clone().unsqueeze_(0)
        with pytest.raises(TPError, match="`exp` would write its result into vocab-parallel logits"):
            torch.exp(torch.zeros(2, 5, V), out=x.detach())
        with pytest.raises(TPError, match="`allreduce_` would write its result into vocab-parallel logits"):
            dist.all_reduce(x.detach())
        for mode in (torch.no_grad, torch.enable_grad, torch.inference_mode):
            y = x.detach()
            with mode():
                y[..., 8:].fill_(-torch.inf)
                with pytest.raises(TPError, match="A slice of vocab-parallel logits along the vocabulary was written in place"):
                    y.argmax(-1)
                with pytest.raises(TPError, match="A slice of vocab-parallel logits along the vocabulary was written in place"):
                    F.cross_entropy(y[0], torch.zeros(5, dtype=torch.long))

    run_ranks(body, 2)


def test_copies_are_of_the_whole() -> None:
    def body() -> None:
        case = Case(V, (2, 5))
        x = case.split().detach()
        buffer = io.BytesIO()
        torch.save({"logits": x}, buffer)
        buffer.seek(0)
        copies = (torch.load(buffer)["logits"], pickle.loads(pickle.dumps(x)), copy.deepcopy(x))
        for i, other in enumerate(copies):
            close(other, case.whole.detach(), 0, f"copy {i}")
        assert isinstance(copy.copy([x])[0], SplitLogits)
        gathered = [torch.empty(2, 5, V) for _ in range(2)]
        dist.all_gather(gathered, x)
        close(gathered[1], case.whole.detach(), 0, "all_gather")
        objects: list[Any] = [None, None]
        dist.all_gather_object(objects, {"x": x})
        close(objects[0]["x"], case.whole.detach(), 0, "all_gather_object")

    run_ranks(body, 2)


# ------------------------------------------------------------------------------------------------------- other libraries


def test_torchmetrics() -> None:
    from torchmetrics.classification import MulticlassAccuracy
    from torchmetrics.text import Perplexity

    def body() -> None:
        case = Case(V, (2, 5))
        with torch.no_grad():
            x = case.split()
            for metric in (Perplexity(), MulticlassAccuracy(V, top_k=2, average="micro")):
                flat = isinstance(metric, MulticlassAccuracy)
                metric.distributed_available_fn = lambda: False
                expected = copy.deepcopy(metric)
                for m, logits in ((metric, x), (expected, case.whole.detach())):
                    m.update(*((logits.flatten(0, 1), case.target.flatten()) if flat else (logits, case.target)))
                close(metric.compute(), expected.compute(), 1e-5, str(metric))
        assert len(case.comm.sent) == 2

    run_ranks(body, 2)


def test_under_the_hooks_of_fsdp2() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    class Model(nn.Module):
        def __init__(self, axis: Axis, mine: range) -> None:
            super().__init__()
            self.axis, self.head = axis, nn.Linear(8, len(mine), bias=False)
            with torch.no_grad():
                self.head.weight.copy_(WEIGHT[mine.start : mine.stop])

        def forward(self, x: Tensor) -> Tensor:
            return split_logits(self.head(x), self.axis, V)

    WEIGHT = torch.randn(V, 8, generator=torch.Generator().manual_seed(1))

    def body() -> None:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data_parallel", "tensor_parallel"))
        axis, case = Axis(mesh["tensor_parallel"].get_group()), Case(V, (2, 5))
        from lightning_tp.core.comm.axis import even_shard

        mine = even_shard(V, axis.rank, 2)
        x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(2))
        for policy in (MixedPrecisionPolicy(), MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.float32)):
            model = Model(axis, mine)
            fully_shard(model, mesh=mesh["data_parallel"], mp_policy=policy)
            logits = model(x)
            assert isinstance(logits, SplitLogits) and logits.dtype == torch.float32
            F.cross_entropy(logits.view(-1, V), case.target.view(-1)).backward()
            weight = WEIGHT.clone().requires_grad_()
            F.cross_entropy((x @ weight.T).view(-1, V), case.target.view(-1)).backward()
            grad = model.head.weight.grad.full_tensor()
            rtol = 1e-5 if policy.param_dtype is None else 2e-2
            close(grad, weight.grad[mine.start : mine.stop].contiguous(), rtol, str(policy))

    run_ranks(body, 4)


def test_hugging_face_logits_processors() -> None:
    transformers = pytest.importorskip("transformers")

    def body() -> None:
        processors = transformers.LogitsProcessorList(
            [
                transformers.MinLengthLogitsProcessor(10, 3),
                transformers.RepetitionPenaltyLogitsProcessor(1.2),
                transformers.TemperatureLogitsWarper(0.7),
                transformers.TopKLogitsWarper(6),
                transformers.TopPLogitsWarper(0.8),
            ]
        )
        case = Case(V, (2, 5))
        with torch.no_grad():
            x = case.split()[:, -1].to(copy=True, dtype=torch.float32)
            got = processors(case.target, x)
            expected = processors(case.target, case.whole[:, -1].clone())
            close(got + 0 if type(got) is Tensor else got.full_tensor(), expected, 1e-5, "scores")
            assert x[:, 4].shape == (2,)

    run_ranks(body, 2)


@pytest.mark.filterwarnings("ignore:.*Dynamo")
def test_torch_compile_leaves_split_logits_to_python() -> None:
    def body() -> None:
        case = Case(V, (2, 5))

        @torch.compile(backend="eager")
        def step(local: Tensor, target: Tensor) -> Tensor:
            logits = split_logits(local * 2, case.axis, V)
            return F.cross_entropy(logits.view(-1, V), target.view(-1)) + 1

        loss = step(case.local, case.target)
        loss.backward()
        expected = F.cross_entropy(case.whole.view(-1, V) * 2, case.target.view(-1)) + 1
        expected.backward()
        close(loss, expected, 1e-5, "loss")
        close(case.local.grad, case.columns(case.whole.grad).contiguous(), 1e-5, "gradient")

    run_ranks(body, 2)


def clamp(x: Tensor) -> Tensor:
    """A function of the name of one of torch's, that reads rows."""
    if torch.overrides.has_torch_function_unary(x):
        return torch.overrides.handle_torch_function(clamp, (x,), x)
    return x - x.amax(-1, keepdim=True)


@torch.library.custom_op("test_split_logits::clone", mutates_args=())
def centered(x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True)


centered.register_fake(torch.empty_like)


def test_rules_are_those_of_torchs_functions_only() -> None:
    def body() -> None:
        case = Case(V, (2, 5))
        close(clamp(case.split()), case.whole - case.whole.amax(-1, keepdim=True), 1e-6, "function")
        with torch.no_grad():
            close(torch.ops.test_split_logits.clone(case.split()), case.whole - case.whole.mean(-1, keepdim=True), 1e-6, "operator")
        for out in (torch.clamp(case.split(), 0), case.split().clamp(0), case.split() ** 2, 1 / case.split(), F.relu(case.split())):
            assert type(out) is SplitLogits
        dist.barrier()

    run_ranks(body, 2)


def test_a_gather_that_nobody_asked_for_is_told_once_with_its_bytes() -> None:
    def body() -> list[str]:
        case = Case(V, (2, 5))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(3):
                case.split().argmax(-1)
            case.split().full_tensor()
            F.cross_entropy(case.split().view(-1, V), case.target.view(-1))
            case.split() * 2
        dist.barrier()
        return [str(w.message) for w in caught]

    (text,), nothing = run_ranks(body, 2)
    assert nothing == [] and text.startswith(f"{__file__}:") and "`argmax` needs all columns of the logits (2, 5, 11)" in text
    assert "440" in text and "full_tensor()" in text
