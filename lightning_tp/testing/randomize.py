"""Random weights that make a comparison worth something: no mistake hides behind a zero bias or a norm weight of one."""

from __future__ import annotations

import zlib
from typing import TypeVar

import torch
from torch import nn

from lightning_tp.errors import TPError

M = TypeVar("M", bound=nn.Module)

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def randomize_(model: M, seed: int = 0) -> M:
    """Give every parameter random values, in place, and return the model.

    Biases are N(0, 0.1), norm weights and other vectors 1 + N(0, 0.1), embeddings N(0, 0.3), and all other weights
    N(0, 1 / fan_in), which preserves the scale of activations (0.1, 0.3: standard deviations). Values
    depend on the seed and the parameter's name alone, so the same model has the same weights on every rank, device and
    dtype. Tied parameters are drawn once; buffers stay as they are.

    Raises:
        TPError: For a parameter on the meta device.

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
            raise TPError(f"`randomize_`: parameter `{name}` is on meta. Materialize it first: `model.to_empty(device=..)`.")
        mean, std = _moments(parameter, owners[parameter])
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
        values = torch.randn(parameter.shape, generator=generator, dtype=torch.float32) * std + mean
        parameter.detach().copy_(values)
    return model


def _moments(parameter: nn.Parameter, owners: list[tuple[nn.Module, str]]) -> tuple[float, float]:
    """Return the mean and standard deviation of a parameter, which several modules may own."""
    kinds = [type(module).__name__ for module, _ in owners]
    if any(isinstance(module, (nn.Embedding, nn.EmbeddingBag)) for module, _ in owners):
        return 0.0, 0.3
    if any("bias" in leaf for _, leaf in owners):
        return 0.0, 0.1
    if parameter.ndim < 2 or any("norm" in kind.lower() for kind in kinds):
        return 1.0, 0.1
    if "Conv1D" in kinds:  # Hugging Face's linear with a transposed weight: (in, out)
        fan_in = parameter.shape[0]
    elif any(isinstance(module, CONVOLUTIONS) for module, _ in owners):
        fan_in = parameter[0].numel()  # (out, in / groups, *kernel)
    else:
        fan_in = parameter.shape[-1]  # (out, in), and stacked experts (expert, out, in)
    return 0.0, max(fan_in, 1) ** -0.5
