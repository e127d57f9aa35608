"""Precision on a mesh: plugins for `16-mixed` and `bf16-mixed`, and a gradient scaler that all ranks agree on.

Other precisions are Lightning's own plugins; `patches/process.py` permits `16-mixed` and `64-true`, which Lightning refuses for model-parallel
strategies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from torch import Tensor
from torch.amp import GradScaler
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.optim import LBFGS, Optimizer
from typing_extensions import override

from lightning_tp._compat import is_unscaled, local_tensor, non_finite_check_and_unscale_, scaler_settings
from lightning_tp.core.comm.collectives import reduce_over
from lightning_tp.errors import TPError
from lightning_tp.trainer.adapt.optimizers import unwrapped
from lightning_tp.trainer.patches import private


def mesh_precision(plugin: Precision | None) -> Precision | None:
    """Replace a precision plugin by its counterpart for a mesh of ranks, where Lightning's own is not right there."""
    if type(plugin) is not MixedPrecision:
        return plugin
    scaler = MeshGradScaler.like(plugin.scaler) if type(plugin.scaler) is GradScaler else plugin.scaler
    return MeshMixedPrecision(plugin.precision, plugin.device, scaler)  # type: ignore[arg-type]  # Lightning says str


def fsdp_policy(precision: str | int) -> MixedPrecisionPolicy:
    """Choose FSDP2's policy for a Trainer's precision: it gathers and computes in half precision, and reduces in float32."""
    if precision in ("bf16-mixed", "16-mixed"):
        half = torch.bfloat16 if precision == "bf16-mixed" else torch.float16
        return MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32, cast_forward_inputs=False)
    if precision in ("bf16-true", "16-true"):
        return MixedPrecisionPolicy(reduce_dtype=torch.float32)
    return MixedPrecisionPolicy()


class MeshMixedPrecision(MixedPrecision):
    """Lightning's mixed precision with a scaler that all ranks agree on, and gradients that are unscaled before anything clips them.

    Lightning refuses to clip those of optimizers that unscale by themselves (`fused=True`), and clips scaled ones in manual optimization.
    """

    def span(self, groups: Iterable[dist.ProcessGroup]) -> None:
        """Set the groups over which the ranks agree on whether a gradient is finite: those of both axes of the mesh."""
        if isinstance(self.scaler, MeshGradScaler):
            self.scaler.groups = tuple(groups)

    @override
    def clip_gradients(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:
        if self.scaler is not None:
            self._unscale(optimizer)
        super(MixedPrecision, self).clip_gradients(optimizer, *args, **kwargs)

    @override
    def optimizer_step(  # type: ignore[override]
        self, optimizer: Any, model: pl.LightningModule, closure: Callable[[], Any], **kwargs: Any
    ) -> Any:
        if self.scaler is None:
            return super().optimizer_step(optimizer, model, closure, **kwargs)
        if isinstance(optimizer, LBFGS):
            raise TPError(
                "`precision='16-mixed'`: LBFGS evaluates its closure several times per step, which a gradient scaler does not support."
            )
        result = closure()
        skipped = result is None and model.automatic_optimization  # the step returned None: there was no backward
        if not skipped:
            self._unscale(optimizer)
        private.after_closure(self, model, optimizer)
        if skipped:
            return result
        done = self.scaler.step(optimizer, **kwargs)  # not taken where a gradient on any rank is not finite
        self.scaler.update()
        return done

    def _unscale(self, optimizer: Optimizer) -> None:
        assert self.scaler is not None
        optimizer = unwrapped(optimizer)  # in manual optimization
        if not is_unscaled(self.scaler, optimizer):
            self.scaler.unscale_(optimizer)


MeshMixedPrecision.__qualname__ = MixedPrecision.__qualname__  # the key of the scale in a checkpoint: that of one process fits


class MeshGradScaler(GradScaler):
    """torch's scaler for sharded gradients: if one is not finite on one rank, all ranks skip the step, by one all-reduce per axis and step."""

    groups: tuple[dist.ProcessGroup, ...] = ()

    @classmethod
    def like(cls, other: GradScaler) -> MeshGradScaler:
        """Make one with the settings of another scaler."""
        return cls(**scaler_settings(other))

    @override
    @torch.no_grad()
    def _unscale_grads_(
        self, optimizer: Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for p in (p for group in optimizer.param_groups for p in group["params"] if p.grad is not None):
            if p.grad.dtype == torch.float16 and not allow_fp16:
                name = getattr(getattr(p, "_tp_shard", None), "name", "a parameter")
                raise TPError(
                    f"`precision='16-mixed'`: the gradient of `{name}` is float16, so the parameter is: mixed precision keeps parameters in "
                    "float32. Don't call `.half()` on the model, or use `precision='16-true'`."
                )
            by_dtype.setdefault(p.grad.dtype, []).append(local_tensor(p.grad))
        if not by_dtype:
            return {}
        found_inf = found_inf.to(next(iter(by_dtype.values()))[0].device)
        for grads in by_dtype.values():
            non_finite_check_and_unscale_(grads, found_inf, inv_scale.to(found_inf.device))
        return {found_inf.device: reduce_over(found_inf, self.groups, largest=True)}
