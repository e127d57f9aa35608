"""How far tensors are from those of a reference: the one comparison of `verify` and of tests."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

FLOOR = 1e-3  # the smallest scale of a tensor, relative to the largest value of all


Kind = Literal["loss", "grad", "weight"]


@dataclass(frozen=True)
class Row:
    """One thing that was compared.

    Args:
        name: of the parameter or buffer, or the step of a loss.
        kind: "loss", "grad" (of the first step), or "weight" (how far it moved in all steps).
        error: the largest difference, relative to the scale of the reference.
        tolerance: the largest error allowed.
        detail: the numbers behind the error, for reading.
    """

    name: str
    kind: Kind
    error: float
    tolerance: float
    detail: str = ""

    @property
    def badness(self) -> float:
        """The error as a share of what is allowed; infinite for what is no number."""
        return math.inf if math.isnan(self.error) else self.error / self.tolerance

    @property
    def ok(self) -> bool:
        """Whether the error is allowed; NaN is not."""
        return self.error <= self.tolerance


class Difference(NamedTuple):
    """How far one tensor is from its reference."""

    name: str
    error: float
    detail: str


def compare_tensors(
    kind: Kind, got: Mapping[str, Tensor], ref: Mapping[str, Tensor], rtol: float, least: Mapping[str, float] | None = None
) -> list[Row]:
    """One row for each name of either side; a tensor that one side lacks counts as zeros there (a gradient may be None)."""
    top = max((_largest(t) for t in ref.values()), default=0.0)
    rows = []
    for name in dict.fromkeys([*ref, *got]):
        one = ref[name] if name in ref else got[name]
        g, r = got.get(name, torch.zeros_like(one)), ref.get(name, torch.zeros_like(one))
        found = difference(name, g, r, max(FLOOR * top, (least or {}).get(name, 0.0)))
        rows.append(Row(name, kind, found.error, rtol, found.detail))
    return rows


def _eps(t: Tensor) -> float:
    return torch.finfo(t.dtype).eps if t.is_floating_point() else 0.0


def difference(name: str, got: Tensor, ref: Tensor, floor: float) -> Difference:
    """How far `got` is from `ref`, relative to the largest value of `ref`, or to `floor` where that is more."""
    if got.shape != ref.shape:
        return Difference(name, float("inf"), f"shape {tuple(got.shape)}, but ref has {tuple(ref.shape)}")
    g, r = _wide(got), _wide(ref)
    delta = torch.where(g == r, 0.0, (g - r).abs()).nan_to_num(nan=float("inf"))
    largest = delta.max().item() if delta.numel() else 0.0
    scale = max(_largest(ref), floor)
    error = 0.0 if largest == 0 else largest / scale if scale else float("inf")
    detail = f"error {error:.1e}   max|got-ref| {largest:.1e}   max|ref| {_largest(ref):.1e}   {tuple(ref.shape)}"
    return Difference(name, error, detail + _factor(g, r))


def _factor(got: Tensor, ref: Tensor) -> str:
    """Says when `got` is a multiple of `ref`: the mark of a sum over ranks that is missing, or done twice."""
    norm = (ref.abs() ** 2).sum().item()
    if not norm or not torch.isfinite(got).all() or not torch.isfinite(ref).all():
        return ""
    factor = (got * ref.conj()).sum().real.item() / norm
    off = (got - factor * ref).abs().max().item() / ref.abs().max().item()
    return f"   got is {factor:.3g} x ref" if abs(factor - 1) > 1e-2 and off < 1e-3 else ""


def _largest(tensor: Tensor) -> float:
    """The largest finite absolute value."""
    wide = _wide(tensor).abs()
    wide = wide[wide.isfinite()]
    return wide.max().item() if wide.numel() else 0.0


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.complex128 if tensor.is_complex() else torch.float64)
