"""Say how a model is trained, as far as a trace of a step depends on it: mesh, precision, activation checkpointing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lightning_tp.apply.activation_checkpointing import ActivationCheckpointing
from lightning_tp.errors import TPError

if TYPE_CHECKING:
    from torch.distributed.fsdp import MixedPrecisionPolicy


@dataclass(frozen=True)
class Precision:
    """The dtypes of a training.

    Args:
        name: as a Trainer calls it, or "bf16-fsdp".
        held: dtype of the parameters that a rank holds, their gradients and the optimizer's state; None: the model's own.
        autocast: dtype of matmuls under autocast; None without autocast.
        gathered: dtype in which FSDP2 all-gathers parameters, and modules compute; None: as held.
        reduced: dtype in which FSDP2 reduces gradients; None: as computed.
        scaled: whether the loss is scaled.
    """

    name: str
    held: torch.dtype | None = None
    autocast: torch.dtype | None = None
    gathered: torch.dtype | None = None
    reduced: torch.dtype | None = None
    scaled: bool = False

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
    """How a model is trained, as far as a trace depends on it.

    Args:
        tp, dp: sizes of the mesh.
        rank: on the tensor-parallel axis.
        precision: see `Precision`.
        activation_checkpointing: as for `parallelize`.
        loss_parallel: as for `parallelize`.
        device: "cuda" or "cpu": whose kernels run.
        fused_attention: False writes attention out.
        sequence_parallel: as for `parallelize`.
    """

    tp: int
    dp: int
    rank: int = 0
    precision: Precision = PRECISIONS["bf16-mixed"]
    activation_checkpointing: ActivationCheckpointing | None = None
    loss_parallel: bool = True
    device: str = "cuda"
    fused_attention: bool = True
    sequence_parallel: bool = True
