from __future__ import annotations

import math

import pytest
import torch

from lightning_tp.verify.compare import FLOOR, Row, compare_tensors, difference, largest, rounding_of


def test_nan_is_never_allowed() -> None:
    assert not Row("w", "grad", math.nan, 1e-3).ok
    assert math.isinf(Row("w", "grad", math.nan, 1e-3).severity)
    assert Row("w", "grad", 1e-4, 1e-3).ok
    assert Row("w", "grad", 2e-3, 1e-3).severity == 2


def test_an_error_is_relative_to_the_tensor_or_to_the_largest_of_all() -> None:
    ref = {"large": torch.tensor([0.0, -4.0]), "small": torch.tensor([1e-6])}
    got = {"large": torch.tensor([1.0, -4.0]), "small": torch.tensor([3e-6])}
    large, small = compare_tensors("grad", got, ref, 1e-2)
    assert (large.name, large.kind, large.error, large.tolerance) == ("large", "grad", 0.25, 1e-2)
    assert small.error == pytest.approx(2e-6 / (FLOOR * 4), rel=1e-3)
    assert compare_tensors("grad", got, ref, 1e-2, {"small": 2.0})[1].error == pytest.approx(1e-6, rel=1e-3)


def test_a_tensor_that_one_side_lacks_counts_as_zeros() -> None:
    one, other = compare_tensors("grad", {"b": torch.zeros(2)}, {"a": torch.full((2,), 3.0)}, 1e-3)
    assert (one.name, one.error, other.name, other.error) == ("a", 1.0, "b", 0.0)
    assert "got is 0 x ref" in one.detail


def test_values_that_are_not_finite() -> None:
    inf, nan = torch.tensor([torch.inf, 1.0]), torch.tensor([torch.nan, 1.0])
    assert difference(inf, inf.clone(), 0.0)[0] == 0
    assert math.isinf(difference(nan, nan.clone(), 0.0)[0])
    assert math.isinf(difference(torch.ones(2), torch.zeros(2), 0.0)[0])
    assert difference(torch.ones(2), torch.zeros(2), 4.0)[0] == 0.25


def test_a_multiple_is_said() -> None:
    ref = torch.tensor([1.0, -2.0])
    assert difference(2 * ref, ref, 0.0)[1].endswith("got is 2 x ref")
    assert "got is" not in difference(ref + torch.tensor([0.0, 0.5]), ref, 0.0)[1]
    assert "got is" not in difference(1.005 * ref, ref, 0.0)[1]
    assert difference(3 * ref * 1j, ref * 1j, 0.0)[1].endswith("got is 3 x ref")


def test_sizes() -> None:
    assert largest(torch.tensor([1.0, -3.0, torch.nan])) == 3 and largest(torch.empty(0)) == 0
    assert rounding_of(torch.tensor([4.0])) == 4 * 2**-23 and rounding_of(torch.tensor([4])) == 0
