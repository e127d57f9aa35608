"""Assertions that compare a sharded run with a single process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from lightning_tp.verify.compare import difference, largest
from lightning_tp.verify.verify import ParityReport, verify

_SHOWN = 10  # a broken model differs everywhere; the worst few names say enough


def assert_trees_close(
    got: Mapping[str, Tensor],
    ref: Mapping[str, Tensor],
    *,
    rtol: float = 1e-5,
    floor: float = 1e-2,
    name: str = "tensors",
) -> float:
    """Raise an `AssertionError` with the worst names first unless every tensor of `got` is close to that of `ref`.

    The error is `max|got - ref| / max(max|ref|, floor * max over all of |ref|)`, computed in float64 on the CPU, so
    dtypes may differ. (A gradient that is zero in exact arithmetic is rounding noise, and has no scale of its own.)
    Infinities match equal infinities; NaN matches nothing.

    Args:
        got: Name -> full tensor (no `DTensor`) to test.
        ref: Name -> tensor that is right.
        rtol: The largest error allowed.
        floor: The smallest scale of a tensor, relative to the largest value in `ref`.
        name: What the tensors are, for the message.

    Returns:
        The largest error.

    Example:
        >>> import torch
        >>> ref = {"weight": torch.tensor([1.0, 2.0])}
        >>> assert_trees_close({"weight": torch.tensor([1.0, 2.0])}, ref)
        0.0
        >>> assert_trees_close({"weight": torch.tensor([2.0, 4.0])}, ref, name="gradients")
        Traceback (most recent call last):
        ...
        AssertionError: gradients: 1 of 1 differ by more than rtol=1e-05, the worst first
          weight   error 1.0e+00   max|got-ref| 2.0e+00   max|ref| 2.0e+00   (2,)   got is 2 x ref
    """
    top = max(map(largest, ref.values()), default=0.0)
    differences = {key: difference(got[key], ref[key], floor * top) for key in ref if key in got}
    bad = sorted((key for key, (error, _) in differences.items() if not error <= rtol), key=lambda key: -differences[key][0])
    missing, extra = [key for key in ref if key not in got], [key for key in got if key not in ref]
    if bad or missing or extra:
        lines = [f"{name}: {len(bad)} of {len(differences)} differ by more than rtol={rtol:g}, the worst first"]
        lines += [f"  {key}   {differences[key][1]}" for key in bad[:_SHOWN]]
        lines += [f"  .. and {len(bad) - _SHOWN} more"] if len(bad) > _SHOWN else []
        lines += [f"  missing (only in ref): {', '.join(missing)}"] if missing else []
        lines += [f"  extra (only in got): {', '.join(extra)}"] if extra else []
        raise AssertionError("\n".join(lines))
    return max((error for error, _ in differences.values()), default=0.0)


def assert_parity(
    model_fn: Callable[[], nn.Module],
    inputs: Any,
    loss_fn: Callable[..., Tensor],
    **options: Any,
) -> ParityReport:
    """Raise an `AssertionError` unless the model trains the same on `tp` processes as in a single one: loss, gradients, weights.

    Args:
        model_fn, inputs, loss_fn, **options: As for `lightning_tp.verify`: `tp`, `dp`, `plan`, `rtol`, `steps`, `timeout`, ..

    Returns:
        The report, which is also the message of the error, with the worst parameter first.

    Example:
        >>> import torch
        >>> model = lambda: nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
        >>> assert_parity(model, (torch.ones(2, 4, 8),), lambda y: y.square().mean(), tp=2, steps=1).ok
        True
    """
    report = verify(model_fn, inputs, loss_fn, **options)
    if not report.ok:
        raise AssertionError(str(report))
    return report
