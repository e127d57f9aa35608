"""`TPStrategy(verify=True)`: before training, run the first batch in one process and split, and compare the loss and every gradient.

The full model runs once on every rank's device before it is split, so it has to fit there: by the same kernels, under the same autocast, with
the same random numbers as the split one. Dropout is off in both runs. No optimizer steps, and neither the data nor the random state advances. A
plan that somebody wrote, and that does not seem to fit, is tried in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from lightning_tp.apply.parallelize import PlanLike
from lightning_tp.apply.same_everywhere import same_weights_everywhere
from lightning_tp.apply.unsplit import always_on_shards
from lightning_tp.core.comm.mesh import TENSOR_PARALLEL
from lightning_tp.core.ops.rng import local_state_restored, seed_torch
from lightning_tp.data.sample_batch import quiet
from lightning_tp.errors import TPError
from lightning_tp.infer.given import Doubt
from lightning_tp.plan.plan import Plan
from lightning_tp.plan.rule import INFERRED
from lightning_tp.shards.state_dict import full_gradients
from lightning_tp.shards.view import local_view
from lightning_tp.trainer.module_plan import doubt_about_plan, first_batch
from lightning_tp.verify.compare import compare_tensors

RTOL = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.03}
SHOWN = 10  # parameters in an error


def first_batch_check(
    module: pl.LightningModule,
    plan: PlanLike | None,
    mesh: DeviceMesh,
    context: Callable[[], AbstractContextManager[Any]],
    *,
    verify: bool,
    device: torch.device,
) -> FirstBatchCheck | None:
    """Run the first batch in one process: with `verify`, or to decide about a plan that somebody wrote, and that seems to be wrong. A collective.

    Raises:
        TPError: as `FirstBatchCheck`; for a plan on whose shards the code of the model does not run, where it can't be compared.
    """
    doubt, tp = None, mesh[TENSOR_PARALLEL].size()
    if not verify:
        given = None if plan is None or tp == 1 else Plan.of(plan)
        if given is None or given.source.startswith(INFERRED):
            return None
        given.check(module, tp)
        doubt = doubt_about_plan(module, module.trainer, given, tp)
        if doubt is None:
            return None
    same_weights_everywhere(module, mesh)
    try:
        return FirstBatchCheck(module, first_batch(module.trainer), context, doubt, device=device)
    except TPError:
        if doubt is None:
            raise
        if doubt.raises:
            raise TPError(f"The plan does not fit the model: {doubt}.") from None
        rank_zero_warn(f"The plan may not fit the model: {doubt}. Compare a few steps with one process.")
        return None


class FirstBatchCheck:
    """The loss and the gradients of one process on the first batch, to compare those of the split module with.

    Args:
        module: Not split yet; on whatever device, where it is again afterwards.
        batch: The first batch, on the CPU.
        context: Makes the context of a training step in the Trainer's precision.
        doubt: What speaks against the plan, if that is why they are compared.
        device: Where the module runs. Default: where it is.

    Raises:
        TPError: For a module that steps its optimizers by itself, is on the meta device, or does not fit on the device, or whose loss is not
            finite.
    """

    def __init__(
        self,
        module: pl.LightningModule,
        batch: Any,
        context: Callable[[], AbstractContextManager[Any]],
        doubt: Doubt | None = None,
        *,
        device: torch.device | None = None,
    ) -> None:
        if not module.automatic_optimization:
            raise TPError(
                "`verify=True` compares a `training_step` without an optimizer step, and this module steps its optimizers by itself. Leave it "
                "out."
            )
        if any(p.is_meta for p in module.parameters()):
            raise TPError(
                "`verify=True`: the model is on the meta device. Build it with weights, or verify a small model of its kind."
            )
        self.context, self.batch, self.doubt = context, batch, doubt
        with _on_device(module, device), _HalfPrecision() as seen:
            self.loss, self.gradients = self._run(module, module.training_step)
        dtypes = [*seen.dtypes, *(p.dtype for p in module.parameters() if p.is_floating_point())]
        self.rtol = max((RTOL.get(dtype, 1e-3) for dtype in dtypes), default=1e-3)
        if not bool(torch.isfinite(self.loss).all()):
            raise TPError(f"`verify=True`: the loss of the first batch is {self.loss.item()} in one process. Check the data first.")

    def compare(self, module: pl.LightningModule, step: Callable[[Any, int], Any]) -> str:
        """Run the same batch through the split module by `step`, and say in one line how closely it matches.

        `TPError` if the loss or gradients differ; the worst parameters come first.
        """
        if self.doubt is None:
            return self._compare(module, step)
        try:
            return self._compare(module, step)
        except Exception as error:
            lines = str(error).splitlines()
            found = "gives other numbers than one process" if isinstance(error, TPError) else f"raises {type(error).__name__}"
            raise TPError(
                f"The plan does not fit the model: {self.doubt}.\nThe first batch on shards {found}: "
                + "\n".join(line for line in lines[:SHOWN] if not line.startswith("If you wrote the plan"))
            ) from error

    def _compare(self, module: pl.LightningModule, step: Callable[[Any, int], Any]) -> str:
        with always_on_shards():
            loss, gradients = self._run(module, step)
        rows = compare_tensors("loss", {"first batch": loss}, {"first batch": self.loss}, self.rtol)
        rows += compare_tensors("grad", gradients, self.gradients, self.rtol)
        rows.sort(key=lambda row: -row.severity)
        bad = [row for row in rows if not row.ok]
        if bad:
            raise TPError(
                f"`verify=True`: on the first batch the split model does not match one process: {len(bad)} of {len(rows)} tensors differ.\n"
                + "\n".join(f"  {row.kind} of {row.name}: {row.detail} (allowed {row.tolerance:g})" for row in bad[:SHOWN])
                + "\nIf you wrote the plan, check its rules for these modules; if it was inferred, please report this as a bug."
            )
        return (
            f"The first batch matches one process: loss and {len(rows) - 1} gradients, largest relative error {rows[0].error:.1e}"
        )

    def _run(self, module: pl.LightningModule, step: Callable[[Any, int], Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, full gradients) of a step on the batch."""
        device = next((p.device for p in module.parameters()), torch.device("cpu"))
        batch = tree_map_only(Tensor, lambda t: t.clone().to(device), self.batch)
        with _without_dropout(module), quiet(module), self.context(), sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
            out = step(batch, 0)
            loss = out if isinstance(out, Tensor) else out["loss"] if isinstance(out, dict) else None
            if loss is None:
                raise TPError("`verify=True`: `training_step` returned no loss for the first batch.")
        with local_view():
            loss.backward()
        gradients = full_gradients(module)
        module.zero_grad(set_to_none=True)
        return loss.detach().double().cpu(), gradients


class _HalfPrecision(TorchFunctionMode):
    """See what a step computes in half precision on the way to its loss: by the Trainer's autocast, by one of its own, or by casts."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        found = (t for t in (out if isinstance(out, (tuple, list)) else (out,)) if isinstance(t, Tensor))
        self.dtypes.update(t.dtype for t in found if t.dtype in (torch.bfloat16, torch.float16) and t.requires_grad)
        return out


@contextmanager
def _on_device(module: pl.LightningModule, device: torch.device | None) -> Iterator[None]:
    """Run a module on a device, and put it back to where it was.

    Raises:
        TPError: if it does not fit there.
    """
    before = {t.device for t in (*module.parameters(), *module.buffers())}
    if device is None or before <= {device}:
        yield
        return
    try:
        module.to(device)
        yield
    except torch.OutOfMemoryError as error:
        raise TPError(
            f"`verify=True` runs the full model on {device} once, where it does not fit: {str(error).splitlines()[0]} Leave it out, or verify a "
            "small model of the same kind."
        ) from error
    finally:
        if len(before) == 1:  # else it goes to the device anyway
            module.to(next(iter(before)))


@contextmanager
def _without_dropout(module: pl.LightningModule) -> Iterator[None]:
    """Run a module in eval mode, from one random state, and restore its modes and the random state."""
    modes = [(m, m.training) for m in module.modules()]
    with local_state_restored():
        seed_torch(0)
        module.eval()
        try:
            yield
        finally:
            for m, training in modes:
                m.training = training
