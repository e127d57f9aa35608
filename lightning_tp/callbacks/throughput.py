"""How fast a run trains: tokens per second of all ranks together, milliseconds per step, model FLOP/s, MFU.

The ranks of a tensor-parallel group see the same batch, so tokens are counted once per group: tokens of this rank's batch *
data-parallel size. (All data-parallel ranks are assumed to have batches of the same size.)

The time includes everything between the counted steps, such as waiting for data and other callbacks; the first `warmup`
steps and validation are excluded. A step is one call of `training_step`; with gradient accumulation, an optimizer step is
several of them. On CUDA the clock synchronizes with the device only when it starts, stops or is read.

Model FLOP/s are those of a forward and a backward pass, 6 per parameter and token (Kaplan et al. 2020; attention scores
and recomputed activations are not counted), unless the module has an attribute `num_flops_per_token`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import lightning as L
import torch
from typing_extensions import override

from lightning_tp.callbacks.predicted import copy_on_meta, held_bytes, kept_batch, predict_run, prediction_line
from lightning_tp.callbacks.shards import find_mesh, num_global_parameters
from lightning_tp.core.comm.mesh import DATA_PARALLEL
from lightning_tp.core.trees import tensors_in
from lightning_tp.core.units import flop_rate
from lightning_tp.errors import TPError
from lightning_tp.estimate import Estimate


@dataclass(frozen=True)
class Speed:
    """Tokens, steps and seconds of a run, over all ranks together."""

    num_tokens: int
    num_steps: int
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.seconds

    @property
    def ms_per_step(self) -> float:
        return 1000 * self.seconds / self.num_steps


class Throughput(L.Callback):
    """Log `tokens_per_s` (and `mfu`, from 0 to 1) of the last `window` steps to the progress bar, and print one line at the end of `fit`.

    After `fit`, `.speed` holds the numbers of that line (None if the run ended within the warmup), and `.predicted` the `Estimate`.

    Args:
        tokens_fn: Counts the tokens of this rank's batch. Default: the elements of the first integer tensor with two or more
            dims in the batch, usually (batch, sequence).
        window: Steps between two readings of the clock.
        warmup: Steps at the start that are not counted (compilation, memory allocation, first data).
        peak_flops: Peak FLOP/s of one device (H100 SXM, dense bfloat16: 989e12); if given, MFU is shown.
        predict: Under `TPStrategy`, also print what `estimate` predicts for this run, next to what was measured; step times only if
            the device is known. This takes some seconds after training.

    Raises:
        TPError: For an argument out of range; if the tokens of a batch cannot be counted.

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(accelerator="cpu", devices=1, callbacks=[Throughput(window=10)], logger=False)
        >>> # trainer.fit(module) ends with a line such as
        >>> # Throughput: 12,345 tokens/s, 83.0 ms/step over 97 steps, 0.9 GFLOP/s
    """

    def __init__(
        self,
        *,
        tokens_fn: Callable[[Any], int] | None = None,
        window: int = 20,
        warmup: int = 3,
        peak_flops: float | None = None,
        predict: bool = True,
    ) -> None:
        if window < 1 or warmup < 0:
            raise TPError(f"`Throughput`: `window={window}` must be at least 1 and `warmup={warmup}` at least 0.")
        if peak_flops is not None and peak_flops <= 0:
            raise TPError(f"`Throughput`: `peak_flops={peak_flops}` must be above 0. Pass the FLOP/s of one device, or None.")
        self.tokens_fn = tokens_fn or count_tokens
        self.window = window
        self.warmup = warmup
        self.peak_flops = peak_flops
        self.speed: Speed | None = None
        self.predict = predict
        self.predicted: Estimate | None = None
        self._clock: _Clock | None = None
        self._twin: L.LightningModule | None = None
        self._batch: Any = None

    def before_split(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep a copy of the module without weights, to predict from; `TPStrategy` calls this on rank 0, before it shards the module."""
        if self.predict:
            try:
                self._twin = copy_on_meta(pl_module)
            except Exception:  # something in it cannot be copied: the run itself does not depend on it
                self._twin = None

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.speed = None
        self._clock = _Clock(trainer.strategy.root_device)
        mesh = find_mesh(trainer)
        self._dp = trainer.world_size if mesh is None else mesh[DATA_PARALLEL].size()  # different batches at a time
        self._num_seen = 0  # steps, warmup included
        self._num_tokens = 0  # of all ranks, warmup excluded
        self._window_start = (0, 0.0)  # tokens and seconds when the last window ended

    @override
    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start_clock()

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert self._clock is not None
        if self._twin is not None and self._batch is None:
            self._batch = kept_batch(batch)
        self._num_seen += 1
        if self._num_seen <= self.warmup:
            self._start_clock()  # it runs from the end of the last warmup step
            return
        self._num_tokens += self.tokens_fn(batch) * self._dp
        if (self._num_seen - self.warmup) % self.window == 0:
            tokens, seconds = self._num_tokens, self._clock.read()
            rate = (tokens - self._window_start[0]) / (seconds - self._window_start[1])
            self._window_start = (tokens, seconds)
            pl_module.log("tokens_per_s", rate, prog_bar=True, on_step=True, on_epoch=False)
            if self.peak_flops is not None and (flops_per_token := num_flops_per_token(trainer, pl_module)) is not None:
                mfu = rate * flops_per_token / (self.peak_flops * trainer.world_size)
                pl_module.log("mfu", mfu, prog_bar=True, on_step=True, on_epoch=False)

    @override
    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stop_clock()

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start_clock()

    @override
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stop_clock()  # before ModelCheckpoint, which Lightning puts last

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert self._clock is not None
        num_steps = self._num_seen - self.warmup
        if num_steps > 0:
            self.speed = Speed(self._num_tokens, num_steps, self._clock.read())
        self._clock = None
        if trainer.is_global_zero:
            flops_per_token = num_flops_per_token(trainer, pl_module)
            print(self._summary(flops_per_token, num_devices=trainer.world_size), flush=True)
            if self._twin is not None and self._batch is not None:
                print(self._prediction(trainer, pl_module), flush=True)
        self._twin = self._batch = None

    def _prediction(self, trainer: L.Trainer, module: L.LightningModule) -> str:
        assert self._twin is not None
        optimizers = trainer.optimizers
        plan = next((m.__dict__["_tp_applied_plan"] for m in module.modules() if "_tp_applied_plan" in m.__dict__), None)
        try:
            self.predicted, timed = predict_run(
                self._twin, self._batch, trainer, plan, optimizer=optimizers[0] if len(optimizers) == 1 else None
            )
        except Exception as error:  # the run itself has succeeded
            return f"Throughput, predicted: not available ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
        device = trainer.strategy.root_device
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
        rate = self.speed.tokens_per_s if self.speed is not None else None
        return prediction_line(self.predicted, timed, rate, held_bytes(module, optimizers), peak)

    def _start_clock(self) -> None:
        if self._clock is not None and self._num_seen >= self.warmup:
            self._clock.start()

    def _stop_clock(self) -> None:
        if self._clock is not None:
            self._clock.stop()

    def _summary(self, flops_per_token: float | None, *, num_devices: int) -> str:
        if self.speed is None:
            return f"Throughput: not measured, all {self._num_seen} steps were warmup (warmup={self.warmup})"
        speed = self.speed
        line = f"Throughput: {speed.tokens_per_s:,.0f} tokens/s, {speed.ms_per_step:.1f} ms/step over {speed.num_steps:,} steps"
        if flops_per_token is not None:
            flops = speed.tokens_per_s * flops_per_token
            line += f", {flop_rate(flops)}"
            if self.peak_flops is not None:
                line += f", MFU {100 * flops / (self.peak_flops * num_devices):.1f}%"
        return line


def count_tokens(batch: Any) -> int:
    """Count the elements of the first integer tensor with two or more dims in a batch."""
    for tensor in tensors_in(batch):
        is_integer = not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)
        if is_integer and tensor.dim() >= 2:
            return tensor.numel()
    found = ", ".join(f"{t.dtype} {tuple(t.shape)}" for t in tensors_in(batch)) or "no tensors"
    raise TPError(
        f"`Throughput`: the batch has no integer tensor with 2 or more dims (a {type(batch).__name__} with {found}), so its "
        "tokens cannot be counted. Pass `Throughput(tokens_fn=lambda batch: ..)`."
    )


def num_flops_per_token(trainer: L.Trainer, module: L.LightningModule) -> float | None:
    """Return the FLOPs of a training step per token: the module's own `num_flops_per_token`, else 6 per parameter of the model."""
    known = getattr(module, "num_flops_per_token", None)
    if known is not None:
        return float(known() if callable(known) else known)
    num_parameters = num_global_parameters(trainer, module)
    return None if num_parameters is None else 6.0 * num_parameters


class _Clock:
    """A stopwatch that synchronizes with the device whenever it is started, stopped or read."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds = 0.0
        self._since: float | None = None  # None: stopped

    def start(self) -> None:
        if self._since is None:
            self._since = self._now()

    def stop(self) -> None:
        if self._since is not None:
            self._seconds += self._now() - self._since
            self._since = None

    def read(self) -> float:
        return self._seconds + (self._now() - self._since if self._since is not None else 0.0)

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return perf_counter()
