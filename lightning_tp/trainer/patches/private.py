"""Private functions and attributes of Lightning that this package reads or sets, each under a public name: nothing else touches them."""
# ruff: noqa: F401  what is imported here is imported for others

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.strategies.launchers.multiprocessing import _MultiProcessingLauncher as FabricMultiProcessingLauncher
from lightning.fabric.strategies.launchers.subprocess_script import _SubprocessScriptLauncher as FabricScriptLauncher
from lightning.fabric.strategies.strategy import _apply_filter as apply_filter
from lightning.fabric.strategies.strategy import _BackwardSyncControl as BackwardSyncControl
from lightning.fabric.strategies.strategy import _validate_keys_for_strict_loading as check_keys
from lightning.fabric.utilities import imports as fabric_imports
from lightning.fabric.utilities.data import _auto_add_worker_init_fn as seed_workers
from lightning.fabric.utilities.data import _set_sampler_epoch as set_sampler_epoch
from lightning.fabric.utilities.distributed import _sync_ddp_if_available as sync_over_group
from lightning.fabric.utilities.load import _move_state_into as move_state_into
from lightning.fabric.utilities.optimizer import _optimizers_to_device as optimizers_to_device
from lightning.fabric.utilities.types import _Stateful as Stateful
from lightning.pytorch.strategies.launchers.launcher import _Launcher as Launcher
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher as MultiProcessingLauncher
from lightning.pytorch.strategies.launchers.multiprocessing import _WorkerOutput as WorkerOutput
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher as ScriptLauncher
from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultCollection as ResultCollection
from lightning.pytorch.utilities.compile import to_uncompiled
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from lightning_tp._compat import backend_of_context

# ----------------------------------------------------------------------------------------------------------------- strategies


def is_interactive() -> bool:
    """Whether this process is a notebook, or a prompt."""
    return bool(fabric_imports._IS_INTERACTIVE)


def set_sizes(strategy: Any, dp: int, tp: int) -> None:
    """Set the sizes of the mesh that a strategy was asked for, where Lightning would fill in its own defaults."""
    strategy._data_parallel_size, strategy._tensor_parallel_size = dp, tp


def set_mesh(strategy: Any, mesh: DeviceMesh) -> None:
    """Set what `strategy.device_mesh` returns."""
    strategy._device_mesh = mesh


def has_mesh(strategy: Any) -> bool:
    """Whether the process group of a strategy was made in this process."""
    return strategy._device_mesh is not None


def set_launcher(strategy: Any, launcher: Any) -> None:
    """Set what `strategy.launcher` returns."""
    strategy._launcher = launcher


def set_backward_sync_control(strategy: Any, control: BackwardSyncControl) -> None:
    """Set what `fabric.no_backward_sync` uses."""
    strategy._backward_sync_control = control


def join_process_group(strategy: Any) -> None:
    """Do what `ModelParallelStrategy.setup_environment` does, except for making a mesh, which would be a new one in each run."""
    strategy._setup_distributed()


def call_through_forward(strategy: Any, module: nn.Module, method: str, *args: Any, **kwargs: Any) -> Any:
    """Call a method of a module inside the module's `__call__`, so that its forward hooks run."""
    return strategy._forward_redirection(module, module, method, *args, **kwargs)


def uncompile(module: Any) -> Any:
    """Undo `torch.compile(LightningModule())` in place, and return its backend; None if it was not compiled."""
    context = getattr(module, "_compiler_ctx", None)
    if context is not None:
        to_uncompiled(module)
        return backend_of_context(context["dynamo_ctx"])
    return None


def watched_processes(thread: Any) -> Any:
    """The processes that Lightning's launcher watches from this thread; None for another thread."""
    return getattr(thread, "_child_processes", None)


# ------------------------------------------------------------------------------------------------------------------- Trainers


def trainer_of(module: Any) -> Any:
    """The Trainer of a LightningModule; None if it has none."""
    return getattr(module, "_trainer", None)


def loaders_of(loop: Any) -> list[Any]:
    """The loaders of a loop, once it has them."""
    combined = loop._combined_loader
    return [] if combined is None else list(combined.flattened)


def data_of(trainer: pl.Trainer) -> list[Any]:
    """What was passed to the Trainer as loaders, or what has the hooks that make them."""
    loops: list[Any] = [
        trainer.fit_loop,
        trainer.fit_loop.epoch_loop.val_loop,
        trainer.validate_loop,
        trainer.test_loop,
        trainer.predict_loop,
    ]
    return [loop._data_source.instance for loop in loops]


def num_prefetched(trainer: pl.Trainer) -> int:
    """How many training batches were read, and are not used yet."""
    return len(getattr(trainer.fit_loop._data_fetcher, "batches", ()))


def signal_connector_of(trainer: pl.Trainer) -> Any:
    """What handles the signals that a run receives."""
    return trainer._signal_connector


def set_received_sigterm(trainer: pl.Trainer) -> None:
    """Let `trainer.received_sigterm` be true: Lightning ends the run after this batch."""
    trainer._signal_connector.received_sigterm = True


def tear_down(trainer: pl.Trainer) -> None:
    """End a run that an exception has ended, as Lightning does in the process in which it catches it."""
    trainer._teardown()


def save_and_requeue(trainer: pl.Trainer) -> None:
    """Do what Lightning does when SLURM is about to end a job: save a checkpoint, a collective, and let the job be queued again."""
    connector: Any = trainer._signal_connector
    type(connector)._slurm_sigusr_handler_fn(connector, signal.SIGUSR1, None)


def set_ckpt_path(trainer: pl.Trainer, path: str) -> None:
    """Set what `trainer.ckpt_path` returns, without the warning of its setter."""
    trainer._checkpoint_connector._ckpt_path = path


def checkpoint_folder(callback: Any, trainer: pl.Trainer) -> Any:
    """The folder into which a ModelCheckpoint writes."""
    return callback._ModelCheckpoint__resolve_ckpt_dir(trainer)


def predict_once_more(trainer: pl.Trainer, loader: Any, batch: Any, batch_idx: int) -> None:
    """Run `predict_step` as the predict loop does, and drop its result."""
    loop: Any = trainer.predict_loop
    strategy: Any = trainer.strategy
    loaders = loaders_of(loop)
    index = next(i for i, other in enumerate(loaders) if other is loader)
    batch = strategy.precision_plugin.convert_input(batch)
    batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=index)
    batch = strategy.batch_to_device(batch, dataloader_idx=index)
    kwargs = loop._build_kwargs(batch, batch_idx, index if len(loaders) > 1 else None)
    strategy.predict_step(*loop._build_step_args_from_hook_kwargs(kwargs, "predict_step"))


def after_closure(plugin: Any, module: pl.LightningModule, optimizer: Any) -> None:
    """Call what a precision plugin calls between the backward pass and the step: hooks, and clipping."""
    plugin._after_closure(module, optimizer)


# ------------------------------------------------------------------------------------------------------------------ callbacks


def throughputs_of(monitor: Any) -> Any:
    """The dict stage -> Throughput of a ThroughputMonitor that was set up."""
    return monitor._throughputs


def summary_depth(callback: Any) -> int:
    """The depth of the table that a ModelSummary prints."""
    return int(callback._max_depth)


def average_options(callback: Any, default: torch.device) -> dict[str, Any]:
    """What a WeightAveraging passes to torch's AveragedModel."""
    return {"device": torch.device(callback._device or default), "use_buffers": callback._use_buffers, **callback._kwargs}


def set_average(callback: Any, average: nn.Module) -> None:
    """Set the average of a callback that has not made its own."""
    callback._average_model = average


def use_scheduler_of_swa(callback: Any, trainer: pl.Trainer) -> None:
    """Drop the user's scheduler if a StochasticWeightAveraging has loaded the state of its own."""
    if callback._scheduler_state is not None:
        callback._clear_schedulers(trainer)


def transferred(trainer: Any, module: Any, batch: Any) -> Any:
    """A batch as a step is given it: converted to the precision, and after the module's hooks around its transfer, on the CPU."""
    batch = module._on_before_batch_transfer(trainer.precision_plugin.convert_input(batch), dataloader_idx=0)
    return module._apply_batch_transfer_handler(batch, device=torch.device("cpu"), dataloader_idx=0)


@contextmanager
def said_to_be_on_cpu(module: nn.Module) -> Iterator[None]:
    """Let `device` of a LightningModule, and of those in it, be the CPU: Lightning has them say the Trainer's before they are there."""
    saved = {m: m._device for m in module.modules() if isinstance(m, pl.LightningModule)}
    try:
        for m in saved:
            m._device = torch.device("cpu")
        yield
    finally:
        for m, device in saved.items():
            m._device = device
