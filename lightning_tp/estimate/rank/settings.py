"""Say how a model is trained: `Options` for all of an estimate, and `Settings` for what a trace of a step depends on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from lightning_tp.apply.activation_checkpointing import ActivationCheckpointing
from lightning_tp.errors import TPError

if TYPE_CHECKING:
    from torch.distributed.fsdp import MixedPrecisionPolicy


OptimizerLike = str | type[torch.optim.Optimizer] | Callable[[list[nn.Parameter]], torch.optim.Optimizer]


@dataclass(frozen=True)
class Precision:
    """The dtypes of a training."""

    name: str  # as a Trainer calls it, or "bf16-fsdp"
    # dtype of the parameters that a rank holds, their gradients and the optimizer's state; None: the model's own
    held: torch.dtype | None = None
    autocast: torch.dtype | None = None  # dtype of matmuls under autocast; None without autocast
    gathered: torch.dtype | None = None  # dtype in which FSDP2 all-gathers parameters, and modules compute; None: as held
    reduced: torch.dtype | None = None  # dtype in which FSDP2 reduces gradients; None: as computed
    scaled: bool = False  # whether the loss is scaled

    @property
    def inputs(self) -> torch.dtype | None:
        """The dtype to which a Trainer converts floating-point inputs; None if it leaves them."""
        return self.held if self.autocast is None and self.held in (torch.bfloat16, torch.float16) else None

    @property
    def buffers(self) -> torch.dtype | None:
        """The dtype to which a Trainer converts floating-point buffers; None if it leaves them."""
        return self.held if self.held in (torch.bfloat16, torch.float16, torch.float64) else None

    def computes_in(self, otherwise: torch.dtype) -> torch.dtype:
        """Return the dtype of matmuls; `otherwise` for a model that keeps its own."""
        return self.autocast or self.gathered or self.held or otherwise


_BF16, _FP16, _FP32 = torch.bfloat16, torch.float16, torch.float32
PRECISIONS = {
    p.name: p
    for p in (
        Precision("32-true", held=_FP32),
        Precision("bf16-mixed", _FP32, autocast=_BF16, gathered=_BF16, reduced=_FP32),
        Precision("16-mixed", _FP32, autocast=_FP16, gathered=_FP16, reduced=_FP32, scaled=True),
        Precision("bf16-true", held=_BF16, reduced=_FP32),
        Precision("16-true", held=_FP16, reduced=_FP32),
        Precision("64-true", held=torch.float64),
        Precision("bf16-fsdp", _FP32, gathered=_BF16, reduced=_FP32),
    )
}


def precision_of(precision: str | MixedPrecisionPolicy) -> Precision:
    """Return the dtypes of a Trainer's precision, or of a policy of FSDP2 alone.

    Raises:
        TPError: for a name that is none of `PRECISIONS`.

    Example:
        >>> precision_of("bf16-true").held
        torch.bfloat16
    """
    if not isinstance(precision, str):
        return Precision("policy", gathered=precision.param_dtype, reduced=precision.reduce_dtype)
    if precision not in PRECISIONS:
        raise TPError(
            f"Unknown `precision={precision!r}`. Valid are {', '.join(PRECISIONS)}, or a `MixedPrecisionPolicy` of FSDP2."
        )
    return PRECISIONS[precision]


@dataclass(frozen=True)
class Settings:
    """How a model is trained, as far as a trace depends on it."""

    # tp, dp: sizes of the mesh
    tp: int
    dp: int
    rank: int = 0  # on the tensor-parallel axis
    precision: Precision = PRECISIONS["bf16-mixed"]  # see `Precision`
    # activation_checkpointing, loss_parallel, sequence_parallel: as for `parallelize`
    activation_checkpointing: ActivationCheckpointing | None = None
    loss_parallel: bool = True
    device: str = "cuda"  # "cuda" or "cpu": whose kernels run
    fused_attention: bool = True  # False writes attention out
    sequence_parallel: bool = True


@dataclass(frozen=True)
class Options:
    """How a model is trained; the arguments of `estimate` of the same names."""

    precision: str | MixedPrecisionPolicy = "bf16-mixed"
    optimizer: OptimizerLike = "adamw"
    activation_checkpointing: ActivationCheckpointing | None = None
    sequence_parallel: bool = True
    loss_parallel: bool = True
    accumulate: int = 1
    clip_gradients: bool = True
    compile: bool = False
    fused_attention: bool = True

    @property
    def checkpointing_name(self) -> str:
        """The kind of activation checkpointing, for reading."""
        how = self.activation_checkpointing
        return how if isinstance(how, str) else "none" if how is None else "by a function"

    @property
    def optimizer_name(self) -> str:
        """The optimizer, for reading."""
        return self.optimizer if isinstance(self.optimizer, str) else getattr(self.optimizer, "__name__", "an optimizer")
