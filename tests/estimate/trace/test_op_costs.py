"""The kernels of operators: FLOPs and bytes by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_tp import TPError
from lightning_tp.estimate.trace.op_costs import FUSED_ATTENTION, Call, bytes_of, kernel_of
from lightning_tp.estimate.trace.step_trace import Op


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def kernel(name: str, inputs: list[Tensor], outputs: list[Tensor], **options: bool) -> Op:
    found = kernel_of(Call(name, "layer", "forward", inputs, outputs, **options))
    assert found is not None and (found.name, found.module, found.phase, found.dtype) == (name, "layer", "forward", torch.float32)
    return found


@pytest.mark.parametrize(
    ("name", "inputs", "output", "shape"),  # (batch, m, n, k)
    [
        ("mm", [(8, 4), (4, 2)], (8, 2), (1, 8, 2, 4)),
        ("addmm", [(2,), (8, 4), (4, 2)], (8, 2), (1, 8, 2, 4)),
        ("bmm", [(3, 8, 4), (3, 4, 2)], (3, 8, 2), (3, 8, 2, 4)),
        ("baddbmm", [(3, 8, 2), (3, 8, 4), (3, 4, 2)], (3, 8, 2), (3, 8, 2, 4)),
        ("_grouped_mm", [(8, 4), (3, 4, 2), (3,)], (8, 2), (1, 8, 2, 4)),
        ("mv", [(8, 4), (4,)], (8,), (1, 8, 1, 4)),
        ("dot", [(4,), (4,)], (), (1, 1, 1, 4)),
    ],
)
def test_matmuls(name: str, inputs: list[tuple[int, ...]], output: tuple[int, ...], shape: tuple[int, ...]) -> None:
    tensors = [meta(*sizes) for sizes in inputs]
    found = kernel(name, tensors, [meta(*output)])
    batch, m, n, k = shape
    assert (found.kind, found.shape, found.flops, found.work) == ("product", shape, 2 * batch * m * n * k, 2 * batch * m * n * k)
    assert found.bytes == sum(t.numel() * 4 for t in tensors) + 4 * meta(*output).numel()


def test_convolutions() -> None:
    x, weight, y = meta(2, 3, 16, 16), meta(8, 3, 5, 5), meta(2, 8, 12, 12)
    found = kernel("convolution", [x, weight], [y])
    assert (found.kind, found.shape, found.flops) == ("product", (), 2 * y.numel() * 3 * 5 * 5)
    both = kernel("convolution_backward", [y, x, weight], [x, weight, meta(8)])
    assert both.flops == 2 * found.flops
    assert kernel("convolution_backward", [y, x, weight], [weight]).flops == found.flops  # the input needs no gradient


@pytest.mark.parametrize("name", FUSED_ATTENTION)
def test_attention(name: str) -> None:
    q, k, v = meta(2, 8, 64, 16), meta(2, 8, 32, 16), meta(2, 8, 32, 16)
    found = kernel(f"_scaled_dot_product_{name}", [q, k, v], [q])
    assert (found.kind, found.shape) == ("attention", (2 * 8, 64, 32, 16))
    assert found.flops == found.work == 2 * (2 * 8 * 64 * 32 * 16) * 2  # scores, weighted sum
    causal = kernel(f"_scaled_dot_product_{name}", [q, k, v], [q], flag=True)
    assert (causal.flops, causal.work) == (found.flops, found.flops // 2)
    backward = kernel(f"_scaled_dot_product_{name}_backward", [q, q, k, v, q], [q, k, v])
    assert backward.flops == found.flops * 5 // 2 and backward.shape == found.shape


@pytest.mark.parametrize(
    ("name", "inputs", "outputs", "in_place", "elements"),
    [
        ("add", [(8,), (8,)], [(8,)], False, 24),
        ("embedding", [(1000, 4), (6,)], [(6, 4)], False, 48),  # rows that are read, and written
        ("index", [(1000, 4), (6,)], [(6, 4)], False, 48),
        ("copy_", [(8,), (8,)], [(8,)], True, 16),
        ("fill_", [(8,)], [(8,)], True, 16),
        ("add_", [(8,), (8,)], [(8,)], True, 24),  # its target is read and written
        ("native_layer_norm", [(4, 8), (8,), (8,)], [(4, 8), (4, 1), (4, 1)], False, 32 + 16 + 32 + 8),
    ],
)
def test_kernels_that_are_bound_by_memory(
    name: str, inputs: list[tuple[int, ...]], outputs: list[tuple[int, ...]], in_place: bool, elements: int
) -> None:
    made = [meta(*s) for s in outputs]
    given = [meta(*s) for s in inputs]
    if in_place:
        made = given[:1]
    found = kernel(name, given, made, in_place=in_place)
    assert (found.kind, found.flops, found.work, found.shape, found.bytes) == ("other", 0, 0, (), 4 * elements)


def test_no_kernel() -> None:
    for name in ("empty", "new_empty_strided", "_local_scalar_dense"):
        assert kernel_of(Call(name, "", "forward", [], [meta(8)])) is None
    assert kernel_of(Call("add", "", "forward", [meta(0)], [meta(0)])) is None


def test_of_an_expanded_tensor_what_is_stored_counts() -> None:
    assert bytes_of(meta(8, 1).expand(8, 100)) == 32 and bytes_of(meta(8, 100)[:2]) == 800


@pytest.mark.parametrize("name", ["mm", "convolution"])
def test_dtypes_that_do_not_go_together(name: str) -> None:
    tensors = [meta(8, 8), meta(8, 8, dtype=torch.bfloat16)]
    with pytest.raises(TPError, match=r"`layer` multiplies bfloat16 and float32, which raises on a real device"):
        kernel_of(Call(name, "layer", "forward", tensors, [meta(8, 8)]))
    if name == "mm":  # a bias may be of another one
        assert kernel_of(Call("addmm", "layer", "forward", [meta(8, dtype=torch.bfloat16), meta(8, 8), meta(8, 8)], [meta(8, 8)]))
