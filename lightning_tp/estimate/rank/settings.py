"""How a model is trained, as far as a trace of it depends on that: mesh, precision, activation checkpointing."""

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
    """What is in which dtype.

    Args:
        name: as a Trainer calls it, or "bf16-fsdp".
        held: dtype of the parameters that a rank holds, their gradients and the optimizer's state; None: the model's own.
        autocast: dtype of products under autocast; None without it.
        gathered: dtype in which FSDP2 gathers, and modules compute; None: as held.
        reduced: dtype in which FSDP2 sums gradients; None: as computed.
        scaled: whether the loss is scaled.
    """

    name: str
    held: torch.dtype | None = None
    autocast: torch.dtype | None = None
    gathered: torch.dtype | None = None
    reduced: torch.dtype | None = None
    scaled: bool = False

    @staticmethod
    def of(precision: str | MixedPrecisionPolicy) -> Precision:
        """What a Trainer's precision means; or a policy of FSDP2 alone.

        Raises:
            TPError: it names those that there are.
        """
        if not isinstance(precision, str):
            return Precision("policy", gathered=precision.param_dtype, reduced=precision.reduce_dtype)
        if precision not in PRECISIONS:
            raise TPError(f"`precision={precision!r}`: there are {', '.join(PRECISIONS)}, and FSDP2's MixedPrecisionPolicy.")
        return PRECISIONS[precision]


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


@dataclass(frozen=True)
class Settings:
    """How the model is trained, as far as the trace depends on it."""

    tp: int
    dp: int
    rank: int = 0
    precision: Precision = PRECISIONS["bf16-mixed"]
    activation_checkpointing: ActivationCheckpointing | None = None
    loss_parallel: bool = True
    device: str = "cuda"
    fused_attention: bool = True
