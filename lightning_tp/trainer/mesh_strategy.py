"""What the strategies of a Trainer and of Fabric share: options, sizes of the mesh, launchers, joining the process group, names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal, get_args

import torch

from lightning_tp._compat import limit_waiting
from lightning_tp.apply.activation_checkpointing import ActivationCheckpointing
from lightning_tp.apply.compile import Compile
from lightning_tp.apply.parallelize import PlanLike, check_options
from lightning_tp.core.comm.mesh import DATA_PARALLEL, TENSOR_PARALLEL, mesh_sizes
from lightning_tp.core.ops.random_numbers import Dropout
from lightning_tp.core.ops.rng import local_state_restored
from lightning_tp.errors import TPError, raise_on_rank_zero
from lightning_tp.plan.plan import Plan
from lightning_tp.trainer.checkpoints import CheckpointWriter, OnSaveError
from lightning_tp.trainer.launch.processes import end_with_children
from lightning_tp.trainer.launch.rendezvous import agree_on_start
from lightning_tp.trainer.patches import private

Launcher = Literal["auto", "popen", "fork", "spawn"]
Backend = Literal["local", "dtensor"]
Size = int | Literal["auto"]
NAMES: dict[str, Launcher] = {"tp": "auto", "tp_notebook": "fork", "tp_fork": "fork", "tp_spawn": "spawn"}  # for `strategy=`


class MeshStrategyMixin:
    """Keep the options that both strategies have, build their mesh and start their ranks. To be put before Lightning's class."""

    host: Literal["Trainer", "Fabric"]  # what the strategy is for
    make_launcher: Any  # (self, "external", "popen", "fork" or "spawn") -> the launcher

    def set_mesh_options(self, tp: Size, dp: Size, launcher: Launcher, timeout: timedelta | None) -> None:
        """Keep the sizes of the mesh as the user gave them, how ranks are started, and the timeout of collectives."""
        check_choice("launcher", launcher, Launcher)
        self.requested_sizes = (tp, dp)
        self.requested_launcher = launcher
        self.collective_timeout = timeout

    def set_model_options(
        self,
        plan: PlanLike | None,
        sequence_parallel: bool,
        loss_parallel: bool,
        activation_checkpointing: ActivationCheckpointing | None,
        compile: Compile,
        dropout: Dropout,
        backend: Backend = "local",
    ) -> None:
        """Keep how the model is parallelized; options that exclude each other raise `TPError`."""
        check_choice("backend", backend, Backend)
        check_options(activation_checkpointing, compile, dropout, backend)
        self.plan = Plan.of(plan) if plan is not None else None
        self.sequence_parallel = sequence_parallel
        self.loss_parallel = loss_parallel
        self.activation_checkpointing = activation_checkpointing
        self.compile = compile
        self.dropout: Dropout = dropout
        self.backend: Backend = backend

    @property
    def model_options(self) -> dict[str, Any]:
        """The options of `set_model_options`, except for the plan, as `parallelize` takes them."""
        names = ("sequence_parallel", "loss_parallel", "activation_checkpointing", "compile", "dropout", "backend")
        return {name: getattr(self, name) for name in names}

    def set_checkpoint_options(
        self,
        save_distributed_checkpoint: bool,
        async_checkpoint: bool,
        safe_globals: list[Any] | None,
        on_save_error: OnSaveError = "raise",
    ) -> None:
        """Keep how checkpoints are saved and loaded."""
        check_choice("on_save_error", on_save_error, OnSaveError)
        self.save_distributed_checkpoint = save_distributed_checkpoint
        self.async_checkpoint = async_checkpoint
        self.safe_globals: list[Any] = list(safe_globals or [])
        self.on_save_error = on_save_error
        self.checkpoint_writer = CheckpointWriter(background=async_checkpoint, on_error=on_save_error)

    @property
    def sizes(self: Any) -> tuple[int, int]:
        """(dp, tp) in this world; `TPError` if the requested sizes do not fit the number of devices."""
        tp, dp = self.requested_sizes
        world = self.num_nodes * self.num_processes
        if dp == "auto" and isinstance(tp, int) and tp > 0 and world % tp:
            raise TPError(too_few_devices(self.host, tp, world))
        return mesh_sizes(tp, dp, world, ranks_per_node=self.num_processes)

    def _configure_launcher(self: Any) -> None:
        assert self.cluster_environment is not None
        external = self.cluster_environment.creates_processes_externally
        with raise_on_rank_zero(self.cluster_environment.global_rank() if external else 0):
            self.check_package()
            self.sizes  # noqa: B018  sizes that do not fit are refused here, before any other process is started
            method = "external" if external else start_method(self.requested_launcher)
        private.set_launcher(self, self.make_launcher(method))

    def check_package(self) -> None:
        """Raise `TPError` if this strategy belongs to the other of Lightning's two packages."""

    @contextmanager
    def joining_process_group(self: Any) -> Iterator[None]:
        """While this lasts, make the process group and `device_mesh`; random states are restored, since Lightning seeds anew there."""
        dp, tp = self.sizes
        private.set_sizes(self, dp, tp)
        if self.root_device.type == "cuda":
            torch.cuda.set_device(self.root_device)
            torch.cuda.init()  # else seeds are only noted so far, and the last one counts
        with local_state_restored():
            end_with_children(self.launcher)
            with agree_on_start(self.cluster_environment.global_rank(), dp * tp, self.collective_timeout):
                yield
            if self.collective_timeout is not None:
                limit_waiting(self.device_mesh.get_all_groups(), self.collective_timeout)

    @property
    def mesh_sizes_by_axis(self) -> dict[str, int]:
        """Axis -> size, as a checkpoint's manifest has them."""
        return dict(zip((DATA_PARALLEL, TENSOR_PARALLEL), self.sizes))


def too_few_devices(host: str, tp: int, world: int) -> str:
    """Say that `tp` does not divide the number of devices, and what would."""
    fitting = [str(n) for n in range(2, world + 1) if world % n == 0]
    other = f", or use tp={' or '.join(filter(None, (', '.join(fitting[:-1]), fitting[-1])))}" if fitting else ""
    devices = -(-world // tp) * tp
    return f"tp={tp} needs a multiple of {tp} devices, but the {host} has {world}. Pass `{host}(devices={devices})`{other}."


def start_method(launcher: Launcher) -> Literal["popen", "fork", "spawn"]:
    """Choose how ranks are started: "auto" forks in a notebook, and runs the script again elsewhere. `TPError` for what a notebook can't do."""
    if not private.is_interactive():
        return "popen" if launcher == "auto" else launcher
    if launcher in ("popen", "spawn"):
        raise TPError(
            f"`launcher={launcher!r}` starts processes that know nothing of what was defined in a notebook or at a prompt. Leave it out, or "
            "use `launcher='fork'` (`strategy=\"tp_notebook\"`); or run a script."
        )
    return "fork"


def check_choice(name: str, value: Any, choices: Any) -> None:
    """Raise `TPError` for an argument that is none of the choices of a `Literal` type."""
    if value not in get_args(choices):
        raise TPError(f"`{name}={value!r}` is unknown. Valid values: {', '.join(map(repr, get_args(choices)))}.")


def register(registry: Any, strategy: type) -> None:
    """Make a strategy known to Lightning as `strategy="tp"`, and under the names of its launchers; again is harmless."""
    for name, launcher in NAMES.items():
        if name not in registry:
            description = f"Tensor parallelism over the devices of a node, FSDP2 over the nodes (launcher: {launcher})"
            registry.register(name, strategy, description=description, launcher=launcher)
