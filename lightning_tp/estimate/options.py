"""Say how a model is trained, for `estimate` and `tune`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning_tp.apply.activation_checkpointing import ActivationCheckpointing
from lightning_tp.estimate.rank.optimizer import OptimizerLike

if TYPE_CHECKING:
    from torch.distributed.fsdp import MixedPrecisionPolicy


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
