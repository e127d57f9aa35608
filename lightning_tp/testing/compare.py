"""Compare named tensors of a sharded run with those of one process; weights that make the comparison worth something.

The error of a tensor is the largest difference over the tensor's own largest value. Some gradients are zero in exact
arithmetic (a key bias under softmax), so what they hold is rounding noise and has no scale of its own: a floor,
relative to the largest value in the whole tree, stands in.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_tp.errors import TPError
from lightning_tp.verify.compare import _largest, difference
from lightning_tp.verify.report import ParityReport
from lightning_tp.verify.verify import verify

M = TypeVar("M", bound=nn.Module)

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
    dtypes may differ. Infinities match equal infinities; NaN matches nothing.

    Args:
        got: Name -> tensor, what is tested. Whole tensors, not `DTensor`s.
        ref: Name -> tensor, what is right.
        rtol: The largest error allowed.
        floor: The smallest scale of a tensor, relative to the largest value in `ref`.
        name: What the tensors are, for the message.

    Returns:
        The largest error.

    Example:
        >>> ref = {"weight": torch.tensor([1.0, 2.0])}
        >>> assert_trees_close({"weight": torch.tensor([1.0, 2.0])}, ref)
        0.0
        >>> assert_trees_close({"weight": torch.tensor([2.0, 4.0])}, ref, name="gradients")
        Traceback (most recent call last):
        ...
        AssertionError: gradients: 1 of 1 differ by more than rtol=1e-05, the worst first
          weight   error 1.0e+00   max|got-ref| 2.0e+00   max|ref| 2.0e+00   (2,)   got is 2 x ref
    """
    top = max((_largest(tensor) for tensor in ref.values()), default=0.0)
    common = [key for key in ref if key in got]
    differences = [difference(key, got[key], ref[key], floor * top) for key in common]
    bad = sorted((d for d in differences if not d.error <= rtol), key=lambda d: -d.error)
    missing = [key for key in ref if key not in got]
    extra = [key for key in got if key not in ref]
    if bad or missing or extra:
        lines = [f"{name}: {len(bad)} of {len(common)} differ by more than rtol={rtol:g}, the worst first"]
        lines += [f"  {d.name}   {d.detail}" for d in bad[:_SHOWN]]
        lines += [f"  ... and {len(bad) - _SHOWN} more"] if len(bad) > _SHOWN else []
        lines += [f"  missing (only in ref): {', '.join(missing)}"] if missing else []
        lines += [f"  extra (only in got): {', '.join(extra)}"] if extra else []
        raise AssertionError("\n".join(lines))
    return max((d.error for d in differences), default=0.0)


def assert_parity(
    model_fn: Callable[[], nn.Module],
    inputs: Any,
    loss_fn: Callable[..., Tensor],
    *,
    tp: int = 2,
    rtol: float = 1e-3,
    **options: Any,
) -> ParityReport:
    """Raise an `AssertionError` unless the model trains the same on `tp` processes as in one: loss, gradients, weights.

    Args:
        model_fn: builds the model, on the CPU.
        inputs: what forward is called with: keyword arguments, a tuple, or a function that returns them.
        loss_fn: `loss_fn(output)` or `loss_fn(output, inputs)`; returns a scalar.
        tp: ranks that share one model.
        rtol: the largest error allowed, relative to the largest value of a tensor.
        **options: those of `lightning_tp.verify`: `dp`, `plan`, `steps`, `timeout`, ..

    Returns:
        The report; the message of the error is that report, the worst parameter first.

    Example:
        >>> model = lambda: nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
        >>> assert_parity(model, (torch.ones(2, 4, 8),), lambda y: y.square().mean(), tp=2, steps=1).ok
        True
    """
    report = verify(model_fn, inputs, loss_fn, tp=tp, rtol=rtol, **options)
    if not report.ok:
        raise AssertionError(str(report))
    return report


def randomize_(model: M, seed: int = 0) -> M:
    """Give every parameter random values, in place: no mistake then hides behind a zero bias or a norm weight of one.

    Biases are N(0, 0.1), norm weights and other vectors 1 + N(0, 0.1), embeddings N(0, 0.3), all other weights
    N(0, 1 / fan_in), which keeps the size of activations. Values depend on the seed and the parameter's name alone, so
    the same model has the same weights on every rank, device and dtype. Tied parameters are drawn once; buffers stay.

    Example:
        >>> layer = randomize_(nn.Linear(64, 64), seed=1)
        >>> 0.1 < layer.weight.std() < 0.15 and bool(layer.bias.all())
        True
    """
    owners: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for leaf, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            owners.setdefault(parameter, []).append((module, leaf))
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise TPError(f"`randomize_`: parameter `{name}` is on meta. Materialize it first: `model.to_empty(device=...)`.")
        mean, std = _moments(parameter, owners[parameter])
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
        values = torch.randn(parameter.shape, generator=generator, dtype=torch.float32) * std + mean
        with torch.no_grad():
            parameter.copy_(values)
    return model


def _moments(parameter: nn.Parameter, owners: list[tuple[nn.Module, str]]) -> tuple[float, float]:
    """Mean and standard deviation for a parameter, which several modules may own."""
    kinds = [type(module).__name__ for module, _ in owners]
    if any(isinstance(module, (nn.Embedding, nn.EmbeddingBag)) for module, _ in owners):
        return 0.0, 0.3
    if any("bias" in leaf for _, leaf in owners):
        return 0.0, 0.1
    if parameter.ndim < 2 or any("norm" in kind.lower() for kind in kinds):
        return 1.0, 0.1
    if "Conv1D" in kinds:  # Hugging Face's linear with a transposed weight: (in, out)
        fan_in = parameter.shape[0]
    elif any(isinstance(module, nn.modules.conv._ConvNd) for module, _ in owners):
        fan_in = parameter[0].numel()  # (out, in / groups, *kernel)
    else:
        fan_in = parameter.shape[-1]  # (out, in), and stacked experts (expert, out, in)
    return 0.0, max(fan_in, 1) ** -0.5
