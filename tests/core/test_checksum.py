"""Checksums tell tensors apart by their bits, and are exact."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_tp.core.checksum import as_bytes, bit_sum, byte_sums

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.int8, torch.bool, torch.complex64]


def some(dtype: torch.dtype) -> Tensor:
    t = torch.arange(12).view(3, 4) * 37 % 11 - 3
    return (t > 0) if dtype == torch.bool else t.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_values_in_another_layout_have_equal_sums(dtype: torch.dtype) -> None:
    t = some(dtype)
    twin = t.T.contiguous().T
    assert twin.stride() != t.stride()
    assert torch.equal(as_bytes(twin), as_bytes(t)) and torch.equal(byte_sums(twin), byte_sums(t))
    assert as_bytes(t).numel() == t.nbytes
    assert torch.equal(bit_sum(twin), bit_sum(t))


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_other_element_changes_all_sums(dtype: torch.dtype) -> None:
    t = some(dtype)
    for index in (0, 5, 11):
        other = t.clone()
        other.view(-1)[index] = ~t.view(-1)[index] if dtype == torch.bool else t.view(-1)[index] + 1
        assert byte_sums(other)[0] != byte_sums(t)[0]
        assert bit_sum(other) != bit_sum(t)


def test_the_second_sum_tells_the_order() -> None:
    t = torch.tensor([1, 2, 3, 4, 5, 6])
    assert byte_sums(t).tolist() == [21, 6]
    assert byte_sums(t.flip(0)).tolist() == [21, 15]
    assert byte_sums(torch.tensor([1, 2, 3, 4, 5])).tolist() == [15, 6]  # 20 of 40 bytes are those of 1, 2 and half of the 3


def test_bits_and_not_values() -> None:
    assert bit_sum(torch.tensor(-0.0)) != bit_sum(torch.tensor(0.0))
    assert byte_sums(torch.tensor(-0.0))[0] == 0x80
    assert bit_sum(torch.tensor([2**62, 2**62], dtype=torch.int64)).dtype == torch.int64
    assert int(bit_sum(torch.tensor(3 + 0j))) == int(bit_sum(torch.tensor(3.0)))


def test_nothing_has_sums_of_zero() -> None:
    for dtype in DTYPES:
        assert as_bytes(torch.empty(0, 3, dtype=dtype)).dtype == torch.uint8
        assert byte_sums(torch.empty(0, 3, dtype=dtype)).tolist() == [0, 0]
    assert int(bit_sum(torch.empty(0))) == 0


def test_no_history() -> None:
    t = torch.ones(3, requires_grad=True)
    assert not any(x.requires_grad for x in (as_bytes(t), byte_sums(t), bit_sum(t)))
