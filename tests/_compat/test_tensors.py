"""What is wrapped of torch for tensors, operators, autograd and modes, on this version."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from lightning_tp import _compat


class Functions(TorchFunctionMode):
    """The names of the functions that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


class Operators(TorchDispatchMode):
    """The names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


class InBackward(torch.autograd.Function):
    """Does something in its backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, do: Any) -> Tensor:
        ctx.do = do
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.do()
        return grad, None


class Wrapper(Tensor):
    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return "function"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return torch.full((1,), 5.0)


def test_at_the_end_of_a_backward_pass() -> None:
    order: list[str] = []
    x = torch.ones(2, requires_grad=True)
    y = InBackward.apply(x * 2, lambda: _compat.queue_after_backward(lambda: order.append(f"end {x.grad}")))
    InBackward.apply(y, lambda: order.append("first")).sum().backward()
    assert order == ["first", "end tensor([2., 2.])"]


def test_kinds_of_backward() -> None:
    found: list[Any] = []
    w, other = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    assert _compat.backward_kind(w) is None

    def loss() -> Tensor:
        return InBackward.apply(w * other, lambda: found.append((_compat.backward_kind(w), _compat.backward_kind(other)))).sum()

    loss().backward()
    torch.autograd.grad(loss(), w)
    loss().backward(inputs=[other])
    assert found == [("backward", "backward"), ("grad", None), (None, "backward")]


def test_whether_the_graph_is_retained() -> None:
    found: list[bool] = []
    y = InBackward.apply(torch.ones(2, requires_grad=True), lambda: found.append(_compat.graph_is_retained())).sum()
    y.backward(retain_graph=True)
    y.backward()
    assert found == [True, False]


def test_apply_without_its_wrapper() -> None:
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            pass

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad * 2

    class Triple(InBackward):
        pass

    seen: list[int] = []
    apply = _compat.apply_of(Triple)
    x = torch.ones(2, requires_grad=True)
    y = apply(x, lambda: seen.append(1))
    y.sum().backward()
    assert x.grad.tolist() == [1, 1] and seen == [1] and "Triple" in type(y.grad_fn).__name__
    assert torch.func.grad(lambda t: _compat.apply_of(Double)(t).sum())(torch.ones(2)).tolist() == [2, 2]


def test_numbers_of_nodes() -> None:
    found: list[int | None] = []
    x = torch.ones(2, requires_grad=True)
    number = _compat.sequence_number()
    y = InBackward.apply(x, lambda: found.append(_compat.sequence_number_of_backward()))
    assert _compat.sequence_number() == number + 1 and _compat.sequence_number_of_backward() is None
    (y * 2).sum().backward()
    assert found == [number]


def test_modes_see_what_is_recomputed() -> None:
    x = torch.ones(2, requires_grad=True)
    with Functions() as seen:
        loss = checkpoint(lambda y: F.gelu(y), x, use_reentrant=False).sum()
        assert seen.names.count("gelu") == 1
        _compat.backward_under_modes(loss)
    assert seen.names.count("gelu") == 2 and x.grad is not None


def test_modes_that_are_on() -> None:
    assert _compat.function_modes() == []
    with Functions() as a, Functions() as b:
        assert _compat.function_modes() == [a, b]


def test_contexts_without_modes() -> None:
    x = torch.ones(2)
    with Functions() as functions, Operators() as operators:
        for context in (_compat.without_torch_function(), _compat.without_torch_function_subclass()):
            with context:
                x.add(1)
        for context in (_compat.without_torch_dispatch(), _compat.without_dispatch_modes()):
            with context:
                x.mul(2)
        x.sub(3)
    assert functions.names == ["add", "mul", "mul", "sub"]  # the first is off, the second is only about subclasses
    assert operators.names == ["add", "add", "sub"]


def test_tensors_of_a_subclass_without_memory() -> None:
    x = _compat.wrapper_tensor(Wrapper, [2, 3], dtype=torch.bfloat16, device=torch.device("cpu"))
    assert x.add(1) == "function"
    for context in (_compat.without_torch_function_subclass(), _compat.without_torch_function()):
        with context:
            assert (type(x), tuple(x.shape), x.dtype, x.requires_grad) == (Wrapper, (2, 3), torch.bfloat16, False)
            assert x.add(1).item() == 5


def test_arguments_that_operators_write_to() -> None:
    aten = torch.ops.aten
    assert _compat.written_arguments(aten.add.Tensor) == []
    assert _compat.written_arguments(aten.add_.Tensor) == [(0, "self")]
    assert _compat.written_arguments(aten.add.out) == [(3, "out")]
    assert _compat.written_arguments(aten.view.default) == []  # a view is no write
    attention = aten._scaled_dot_product_flash_attention.default
    assert _compat.position_of_argument(attention, "dropout_p") == 3
    assert _compat.position_of_argument(aten.view.default, "dropout_p") is None
    assert [i for i, _ in _compat.written_arguments(torch.ops.c10d.allreduce_.default)] == [0]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_keys_of_storages(device: str) -> None:
    x, y = torch.empty(2, 2, device=device), torch.empty(2, 2, device=device)
    assert _compat.storage_key(x) == _compat.storage_key(x.T[1:]) == _compat.storage_key(x.untyped_storage())
    assert _compat.storage_key(x) != _compat.storage_key(y)


def test_negative_views() -> None:
    x = torch.ones(2)
    y = _compat.negative_view(x)
    assert y.is_neg() and y.tolist() == [-1, -1] and _compat.storage_key(y) == _compat.storage_key(x)


def test_attention_weights_of_the_math_kernel() -> None:
    q, k, v = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    mask = torch.rand(3, 5) > 0.3
    for options in ({}, {"mask": mask}, {"mask": torch.randn(3, 5)}, {"is_causal": True}, {"scale": 0.1}):
        full = {"mask": None, "is_causal": False, "scale": None, "enable_gqa": True, **options}
        weights = _compat.math_attention_weights(q, k, v, full.pop("mask"), full.pop("is_causal"), **full)
        options["attn_mask"] = options.pop("mask", None)
        expected = F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **options)
        torch.testing.assert_close(weights @ v.repeat_interleave(2, 1), expected)


def test_gradients_are_unscaled_together() -> None:
    grads, found = [torch.tensor([2.0, 4.0]), torch.tensor([6.0])], torch.zeros(1)
    _compat.non_finite_check_and_unscale_(grads, found, torch.tensor(0.5))
    assert [g.tolist() for g in grads] == [[1, 2], [3]] and found.item() == 0
    _compat.non_finite_check_and_unscale_([torch.tensor([torch.inf])], found, torch.tensor(0.5))
    assert found.item() == 1


def test_small_tensors_are_flattened() -> None:
    tensors = [torch.ones(2), torch.zeros(3, 1)]
    flat = _compat.flatten(tensors)
    assert flat.tolist() == [1, 1, 0, 0, 0]
    assert [t.shape for t in _compat.unflatten(flat, tensors)] == [(2,), (3, 1)]
    assert {"READY", "UNSCALED", "STEPPED"} <= {state.name for state in _compat.OptState}
