"""How far tensors are from those of a reference: the one comparison of `verify` and of tests."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

FLOOR = 1e-3  # the smallest scale of a tensor, relative to the largest value of all tensors

Kind = Literal["loss", "grad", "weight"]


@dataclass(frozen=True)
class Row:
    """One comparison of a tensor with its reference."""

    name: str  # the parameter or buffer, or the step of a loss
    kind: Kind  # "loss", "grad" (of the first step), or "weight" (how far it moved in all steps)
    error: float  # the largest difference, relative to the scale of the reference
    tolerance: float  # the largest error allowed
    detail: str = ""  # the numbers behind the error, for reading

    @property
    def severity(self) -> float:
        """The error relative to the tolerance; infinite for NaN."""
        return math.inf if math.isnan(self.error) else self.error / self.tolerance

    @property
    def ok(self) -> bool:
        """Whether the error is allowed; NaN is not."""
        return self.error <= self.tolerance


def compare_tensors(
    kind: Kind, got: Mapping[str, Tensor], ref: Mapping[str, Tensor], rtol: float, smallest: Mapping[str, float] | None = None
) -> list[Row]:
    """Compare tensors by name, one row for each; a tensor that one side lacks counts as zeros there (a gradient may be None).

    `smallest` has the smallest scale of a tensor, by name, in addition to `FLOOR`.
    """
    top = max(map(largest, ref.values()), default=0.0)
    rows = []
    for name in dict.fromkeys([*ref, *got]):
        zeros = torch.zeros_like(ref[name] if name in ref else got[name])
        scale = max(FLOOR * top, (smallest or {}).get(name, 0.0))
        error, detail = difference(got.get(name, zeros), ref.get(name, zeros), scale)
        rows.append(Row(name, kind, error, rtol, detail))
    return rows


def difference(got: Tensor, ref: Tensor, floor: float) -> tuple[float, str]:
    """Return how far `got` is from `ref`, relative to the largest value of `ref` or to `floor` if that is more, and the numbers in words."""
    if got.shape != ref.shape:
        return math.inf, f"shape {tuple(got.shape)}, but ref has {tuple(ref.shape)}"
    g, r = _wide(got), _wide(ref)
    delta = torch.where(g == r, 0.0, (g - r).abs()).nan_to_num(nan=math.inf)
    worst = delta.max().item() if delta.numel() else 0.0
    scale = max(largest(ref), floor)
    error = 0.0 if worst == 0 else worst / scale if scale else math.inf
    detail = f"error {error:.1e}   max|got-ref| {worst:.1e}   max|ref| {largest(ref):.1e}   {tuple(ref.shape)}"
    return error, detail + _factor(g, r)


def _factor(got: Tensor, ref: Tensor) -> str:
    """Say whether `got` is a multiple of `ref`, which a sum over ranks that is missing or done twice makes it."""
    norm = (ref.abs() ** 2).sum().item()
    if not norm or not torch.isfinite(got).all() or not torch.isfinite(ref).all():
        return ""
    factor = (got * ref.conj()).sum().real.item() / norm
    off = (got - factor * ref).abs().max().item() / ref.abs().max().item()
    return f"   got is {factor:.3g} x ref" if abs(factor - 1) > 1e-2 and off < 1e-3 else ""


def largest(tensor: Tensor) -> float:
    """Return the largest finite absolute value, or 0."""
    wide = _wide(tensor).abs()
    wide = wide[wide.isfinite()]
    return wide.max().item() if wide.numel() else 0.0


def rounding_of(tensor: Tensor) -> float:
    """Return the rounding error of a tensor's largest value; 0 for integers."""
    return torch.finfo(tensor.dtype).eps * largest(tensor) if tensor.is_floating_point() else 0.0


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.complex128 if tensor.is_complex() else torch.float64)
