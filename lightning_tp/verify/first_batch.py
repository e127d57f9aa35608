"""`TPStrategy(verify=True)`: before training, the first batch in one process and split, loss and every gradient.

The whole model runs once on every rank before it is split, so it has to fit there. Dropout is off in both runs. Nothing is stepped, and
neither the data nor the random state moves on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map_only

from lightning_tp.data.sample_batch import first_batch, quiet
from lightning_tp.errors import TPError
from lightning_tp.shards.state_dict import full_gradients
from lightning_tp.verify.compare import compare_tensors

if TYPE_CHECKING:
    import lightning.pytorch as pl

RTOL = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.03}


class FirstBatchCheck:
    """The first batch of a fit, and what one process makes of it.

    Args:
        module: not split yet; on the CPU.
        trainer: that is about to train it.
        context: makes the context of a training step in the Trainer's precision.
        step: runs `training_step` of the split module as the Trainer does, `step(batch, 0)`.

    Raises:
        TPError: for a module that steps its optimizers by itself, or whose loss is no finite number.
    """

    def __init__(self, module: pl.LightningModule, trainer: pl.Trainer, context: Any, step: Any) -> None:
        if not module.automatic_optimization:
            raise TPError(
                "`verify=True` runs `training_step` without a step of an optimizer; this module steps them by itself. Leave it out."
            )
        if any(p.is_meta for p in module.parameters()):
            raise TPError(
                "`verify=True`: the model is on the meta device. Build it with weights, or verify a small one of the same kind."
            )
        self.context, self.step = context, step
        self.batch = tree_map_only(Tensor, lambda t: t.detach().cpu(), first_batch(trainer))
        self.loss, self.gradients = self._run(module, module.training_step)
        if not bool(torch.isfinite(self.loss).all()):
            raise TPError(
                f"`verify=True`: the loss of the first batch is {self.loss.item()} in one process. Look at the data first."
            )

    def compare(self, module: pl.LightningModule) -> str:
        """The same batch through the split module.

        Returns:
            One line that says how near it came.

        Raises:
            TPError: with the worst parameters first, if loss or gradients differ.
        """
        loss, gradients = self._run(module, self.step)
        dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
        autocast = self._autocast()
        rtol = max(RTOL.get(dtype, 1e-3), 0.0 if autocast is None else RTOL.get(autocast, 0.0))
        rows = compare_tensors("loss", {"first batch": loss}, {"first batch": self.loss}, rtol)
        rows += compare_tensors("grad", gradients, self.gradients, rtol)
        rows.sort(key=lambda row: -row.severity)
        bad = [row for row in rows if not row.ok]
        if bad:
            raise TPError(
                f"`verify=True`: on the first batch the split model is not as one process: {len(bad)} of {len(rows)} differ.\n"
                + "\n".join(f"  {row.kind} of {row.name}: {row.detail} (allowed {row.tolerance:g})" for row in bad[:10])
                + "\nIf you gave the plan, look at these modules in it; an inferred plan should never do that: please report it."
            )
        return f"The first batch as in one process: loss and {len(rows) - 1} gradients, the worst error is {rows[0].error:.1e}"

    def _autocast(self) -> torch.dtype | None:
        with self.context():
            return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None

    def _run(self, module: pl.LightningModule, step: Any) -> tuple[Tensor, dict[str, Tensor]]:
        device = next((p.device for p in module.parameters()), torch.device("cpu"))
        batch = tree_map_only(Tensor, lambda t: t.clone().to(device), self.batch)
        with _without_dropout(module), quiet(module), self.context(), sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
            out = step(batch, 0)
            loss = out if isinstance(out, Tensor) else out["loss"] if isinstance(out, dict) else None
            if loss is None:
                raise TPError("`verify=True`: `training_step` returned no loss for the first batch.")
        loss.backward()
        gradients = full_gradients(module)
        module.zero_grad(set_to_none=True)
        return loss.detach().double().cpu(), gradients


@contextmanager
def _without_dropout(module: pl.LightningModule) -> Iterator[None]:
    """In eval mode, from one random state, and back."""
    modes = [(m, m.training) for m in module.modules()]
    devices = [p.device for p in module.parameters() if p.device.type == "cuda"][:1]
    with torch.random.fork_rng(devices):
        torch.manual_seed(0)
        module.eval()
        try:
            yield
        finally:
            for m, training in modes:
                m.training = training
