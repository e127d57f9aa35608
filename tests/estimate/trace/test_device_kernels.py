from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_tp.estimate.trace.device_kernels import Kernels


def saved(run: object, device: str, half: torch.dtype | None = None) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """(shape, dtype) of what is saved for the backward, each storage once."""
    found: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        found.setdefault(t.untyped_storage()._cdata, t)
        return t

    with Kernels(device, half), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        kept = run()  # type: ignore[operator]
    assert kept is not None
    return sorted(((tuple(t.shape), t.dtype) for t in found.values()), key=str)


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, device="meta", dtype=dtype, requires_grad=True)


def test_attention_keeps_no_scores() -> None:
    q, k = meta(2, 8, 64, 16), meta(2, 2, 64, 16)
    found = saved(lambda: F.scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=True), "cuda")
    assert sum(torch.Size(s).numel() for s, _ in found) == q.numel() * 2 + k.numel() + 2 * 8 * 64


@pytest.mark.parametrize(("device", "size"), [("cuda", 1), ("cpu", 4)])
def test_masks_of_dropout(device: str, size: int) -> None:
    x = meta(4, 8)
    assert [d.itemsize for _, d in saved(lambda: F.dropout(x, 0.5), device)] == [size]


def test_autocast() -> None:
    layer, norm = nn.Linear(8, 8, device="meta"), nn.LayerNorm(8, device="meta")
    with Kernels("cuda", torch.bfloat16) as kernels:
        y = layer(layer(meta(4, 8).detach()))
        assert y.dtype == torch.bfloat16 and len(kernels.casts) == 2  # the weight and the bias, once
        assert norm(y).dtype == torch.float32
        assert F.cross_entropy(y, torch.zeros(4, dtype=torch.int64, device="meta")).dtype == torch.float32
    with Kernels("cuda", None):
        assert layer(meta(4, 8)).dtype == torch.float32


def test_fused_norm() -> None:
    norm = nn.RMSNorm(8, device="meta")
    x = meta(4, 8)
    assert sum(torch.Size(s).numel() for s, _ in saved(lambda: norm(x), "cuda")) == 32 + 8 + 4


def test_attention_that_is_written_out_keeps_its_scores() -> None:
    q = meta(2, 8, 64, 16)
    with (
        Kernels("cuda", None, fused_attention=False),
        torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(t.shape) or t, lambda t: t),
    ):
        shapes: list[torch.Size] = []
        F.scaled_dot_product_attention(q, q, q)
    assert any(s[-2:] == (64, 64) for s in shapes)


def test_values_narrower_than_keys() -> None:
    q, v = meta(2, 8, 64, 16), meta(2, 8, 64, 8)
    with Kernels("cuda", None):
        assert F.scaled_dot_product_attention(q, q, v).shape == (2, 8, 64, 8)


def test_a_dropout_that_drops_nothing() -> None:
    x = meta(4, 8)
    assert saved(lambda: F.dropout(x, 0.0) * 2, "cuda") == saved(lambda: F.dropout(x, 0.5, training=False) * 2, "cuda") == []
