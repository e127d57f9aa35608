"""How fast a run trains: tokens per second of the whole run, milliseconds per step, model FLOP/s, MFU.

Tensor-parallel ranks of one group see the same batch, so it is counted once over the data-parallel axis: tokens of this
rank's batch * data-parallel size. (All data-parallel ranks are taken to have batches of the same size.)

The time covers all that happens between the counted steps, waiting for data and the other callbacks included; the first
`warmup` steps and validation are left out. A step is one call of `training_step`; where gradients are accumulated, an
optimizer step is several of them. On CUDA the clock waits for the device only when it starts, stops or is read.

Model FLOP/s are those of a forward and a backward pass, 6 per parameter and token (Kaplan et al. 2020; attention scores
and recomputed activations are not counted), unless the module has an attribute `num_flops_per_token`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import lightning as L
import torch
from torch import Tensor
from typing_extensions import override

from lightning_tp.callbacks.predicted import copy_on_meta, held_bytes, kept_batch, predict_run, prediction_line
from lightning_tp.callbacks.shards import find_mesh, num_global_parameters
from lightning_tp.errors import TPError
from lightning_tp.estimate import Estimate


@dataclass(frozen=True)
class Speed:
    """What was counted over a run, all ranks together; times in seconds."""

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
    """Log `tokens_per_s` (and `mfu`, from 0 to 1) of the last `window` steps to the progress bar; print one line for the whole run.

    After `fit`, `.speed` holds the numbers of that line (None where no step came after the warmup).

    Args:
        tokens_fn: counts the tokens of this rank's batch; if None, they are the elements of the first integer tensor of
            two or more dims in the batch, (batch, sequence) as a rule.
        window: steps from one reading of the clock to the next.
        warmup: steps at the start that do not count (compilation, memory allocation, first data).
        peak_flops: FLOP/s that one device can do at best (H100 SXM, dense bfloat16: 989e12); if given, MFU is shown.
        predict: under `TPStrategy`, print at the end also what `estimate` predicts for this run, beside what was measured; times only where the
            device is known. It takes some seconds after the training.

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
            raise TPError(f"Throughput: `window={window}` must be at least 1 and `warmup={warmup}` at least 0.")
        if peak_flops is not None and peak_flops <= 0:
            raise TPError(f"Throughput: `peak_flops={peak_flops}` is not above 0. Give FLOP/s of one device, or None.")
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
        """Called by `TPStrategy` on the first rank, while the module is whole."""
        if self.predict:
            try:
                self._twin = copy_on_meta(pl_module)
            except Exception:  # something in it can't be copied; `estimate` has other ways in
                self._twin = None

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.speed = None
        self._clock = _Clock(trainer.strategy.root_device)
        self._dp = data_parallel_size(trainer)
        self._num_seen = 0  # steps, warmup included
        self._num_tokens = 0  # of all ranks, warmup excluded
        self._border = (0, 0.0)  # tokens and seconds when the last window closed

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
            self._start_clock()  # runs from the end of the last warmup step
            return
        self._num_tokens += self.tokens_fn(batch) * self._dp
        if (self._num_seen - self.warmup) % self.window == 0:
            tokens, seconds = self._num_tokens, self._clock.read()
            rate = (tokens - self._border[0]) / (seconds - self._border[1])
            self._border = (tokens, seconds)
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
        except Exception as error:  # the run itself is done, and well
            return f"Throughput, predicted: nothing, {type(error).__name__}: {' '.join(str(error).split())[:200]}"
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
            return f"Throughput: none of the {self._num_seen} steps came after the warmup of {self.warmup}"
        speed = self.speed
        line = f"Throughput: {speed.tokens_per_s:,.0f} tokens/s, {speed.ms_per_step:.1f} ms/step"
        line += f" over {speed.num_steps:,} steps"
        if flops_per_token is not None:
            flops = speed.tokens_per_s * flops_per_token
            line += f", {_flops(flops)}"
            if self.peak_flops is not None:
                line += f", MFU {100 * flops / (self.peak_flops * num_devices):.1f}%"
        return line


def count_tokens(batch: Any) -> int:
    """Count the elements of the first integer tensor of two or more dims, looking into dicts, lists and tuples.

    Example:
        >>> count_tokens({"pixels": torch.rand(2, 3), "tokens": torch.zeros(2, 5, dtype=torch.int64)})
        10
    """
    for tensor in _tensors(batch):
        is_integer = not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)
        if is_integer and tensor.dim() >= 2:
            return tensor.numel()
    found = ", ".join(f"{t.dtype} {tuple(t.shape)}" for t in _tensors(batch)) or "no tensors"
    raise TPError(
        f"Throughput: no integer tensor of 2 or more dims in the batch (a {type(batch).__name__} with {found}), so its "
        "tokens cannot be counted. Use Throughput(tokens_fn=lambda batch: ...)."
    )


def data_parallel_size(trainer: L.Trainer) -> int:
    """How many different batches the ranks work on at a time."""
    mesh = find_mesh(trainer)
    return trainer.world_size if mesh is None else mesh["data_parallel"].size()


def num_flops_per_token(trainer: L.Trainer, module: L.LightningModule) -> float | None:
    """FLOPs of a training step per token: the module's own `num_flops_per_token`, else 6 per parameter of the model."""
    told = getattr(module, "num_flops_per_token", None)
    if told is not None:
        return float(told() if callable(told) else told)
    num_parameters = num_global_parameters(trainer, module)
    return None if num_parameters is None else 6.0 * num_parameters


class _Clock:
    """Adds up seconds while it runs; waits for the device's queue whenever it is touched."""

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


def _tensors(batch: Any) -> Iterator[Tensor]:
    """The tensors of a batch, in order."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from _tensors(value)
    elif isinstance(batch, (list, tuple)):
        for value in batch:
            yield from _tensors(value)


def _flops(flops: float) -> str:
    for unit, size in {"PFLOP/s": 1e15, "TFLOP/s": 1e12, "GFLOP/s": 1e9}.items():
        if flops >= size:
            return f"{flops / size:.1f} {unit}"
    return f"{flops / 1e6:.1f} MFLOP/s"
