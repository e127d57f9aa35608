"""`TPStrategy`: Lightning's hooks, in the order in which a Trainer calls them. What they do is in the other files of this folder."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack, contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_tp.apply import materialize
from lightning_tp.apply.activation_checkpointing import ActivationCheckpointing
from lightning_tp.apply.bind import check_unchanged, tag_parameters
from lightning_tp.apply.compile import Compile, unwrap_compiled
from lightning_tp.apply.parallelize import PlanLike, parallelize
from lightning_tp.checkpoint import StoragePath
from lightning_tp.checkpoint.weights.hugging_face import HF_CONFIG, config_in
from lightning_tp.checkpoint.weights.pretrained import load_pretrained
from lightning_tp.core.comm.mesh import DATA_PARALLEL, same_mesh
from lightning_tp.core.ops.generators import random_states_restored
from lightning_tp.core.ops.random_numbers import Dropout, RandomCallPolicy, policy_of
from lightning_tp.core.ops.rng import seed_mesh, share_random_states
from lightning_tp.data.group_loader import Ranks
from lightning_tp.data.same_batch import fingerprint
from lightning_tp.errors import TPError, raise_on_rank_zero
from lightning_tp.shards import gradients
from lightning_tp.shards.view import local_view, set_depth
from lightning_tp.trainer import checkpoints, module_plan
from lightning_tp.trainer.adapt.averaging import averages_of_shards, averaging_callbacks
from lightning_tp.trainer.adapt.metrics import all_gather, full_tensors, reduce_over
from lightning_tp.trainer.adapt.optimizers import prepare_optimizers, unwrapped
from lightning_tp.trainer.adapt.precision import fsdp_policy, mesh_precision
from lightning_tp.trainer.adapt.run import adapted_to_mesh, refuse_batch_size_finder
from lightning_tp.trainer.checkpoints import OnSaveError, RequestedCheckpoint, Saving
from lightning_tp.trainer.first_batch import FirstBatchCheck, first_batch_check
from lightning_tp.trainer.launch.processes import trainer_launcher
from lightning_tp.trainer.launch.watchdog import Watchdog
from lightning_tp.trainer.loaders import FirstBatches, check_batch_everywhere, loader_of_rank, random_roots
from lightning_tp.trainer.mesh_strategy import Backend, Launcher, MeshStrategyMixin, register
from lightning_tp.trainer.module_plan import applied_plan
from lightning_tp.trainer.patches import private
from lightning_tp.trainer.patches.process import let_other_package_refuse, load_folders, patch_for_trainers
from lightning_tp.trainer.patches.run import UncompiledModule, known_warnings_filtered
from lightning_tp.trainer.resume import Resume

OTHER_PACKAGE = (
    "This is a Trainer of `pytorch_lightning`, whose classes differ from those of `lightning`. Use `from lightning_tp.pytorch_lightning "
    "import TPStrategy` with it (likewise for callbacks), or `import lightning.pytorch as pl` instead of `import pytorch_lightning as pl`."
)


class TPStrategy(MeshStrategyMixin, ModelParallelStrategy):
    """Train a model with its weights sharded across `tp` ranks, and with FSDP2 over the remaining ones.

    `Trainer(devices=4, strategy=TPStrategy(tp=2))` makes a mesh of 2 x 2 ranks, data-parallel x tensor-parallel; the ranks of a tensor-parallel
    group are neighbours. Any LightningModule works as it is (`lightning_tp.TensorParallel` is a mixin for more control). Losses, gradients and
    weights match a single-process run up to floating-point rounding. Also registered as `strategy="tp"`.

    A callback with a method `before_split(trainer, pl_module)` has it called in `fit`, on rank 0, after `configure_model` and before the model is
    sharded: the last moment at which a rank has the full model.

    Args:
        tp: Tensor-parallel size: how many ranks share one model. "auto": the devices of a node.
        dp: Data-parallel size: the number of such groups, over which FSDP2 shards. "auto": the number of devices divided by `tp`.
        plan: How the model is sharded: a mapping pattern -> style, a `Plan`, or the path of its JSON. Default: the module's own `plan`, else
            the plan that the model declares (`base_model_tp_plan` of Hugging Face), else it is inferred by tracing `forward` on
            `example_input_array`, or the step on the first batch.
        sequence_parallel: False replicates activations between the sharded modules, whatever the plan says.
        loss_parallel: False all-gathers the logits.
        activation_checkpointing: "block" saves only the input of each repeated block for the backward pass, and recomputes the rest; "selective"
            also saves what is expensive to compute; a function (name, module) -> bool chooses the modules that are recomputed. See
            `lightning_tp.apply.activation_checkpointing`.
        compile: True compiles each repeated block with `torch.compile`; also the name of a backend. See `lightning_tp.apply.compile`.
        dropout: "independent" draws different masks on each rank for its shard of an activation, and equal masks in a group for a replicated
            one; "exact" draws the masks of a single process, to compare runs.
        backend: "local" (plain tensors, fast) or "dtensor" (the same plan with PyTorch's own styles).
        verify: True runs the first batch in one process and sharded before training, and stops if loss or gradients differ. The full
            model has to fit on every rank.
        save_distributed_checkpoint: False gathers a checkpoint into one file, on rank 0.
        async_checkpoint: True writes checkpoints in the background; training waits only for a copy to host memory. One at a time; an error
            is raised at the next one, or at the end.
        on_save_error: What to do if a checkpoint can't be written (a full disk): "raise", or "warn" and continue. Earlier ones are kept.
        safe_globals: Classes of your own that checkpoints may contain (hyperparameters, states of callbacks), allowed when loading.
        global_batch: Samples of one optimizer step over all ranks: batches are accumulated until they are that many, on whatever mesh the run
            is resumed. None: as `accumulate_grad_batches` says.
        launcher: How one process starts the others: "popen" runs the script again for each; "fork" and "spawn" run `fit` in processes
            that end before it returns. "auto": "fork" in a notebook, else "popen".
        process_group_backend: As in `torch.distributed.init_process_group`. Default: gloo on CPU, nccl on CUDA.
        timeout: The timeout of collectives.

    Raises:
        TPError: When the Trainer is created, if `tp` and `dp` do not fit the number of devices; when it starts, if the plan does not fit the
            model; in the first batches, if the ranks of a group have different ones.

    Example:
        >>> import lightning as L
        >>> L.Trainer(accelerator="cpu", devices=2, strategy=TPStrategy(tp=2), logger=False).strategy.sizes
        (1, 2)
        >>> L.Trainer(accelerator="cpu", devices=4, strategy=TPStrategy(tp=3), logger=False)
        Traceback (most recent call last):
        ...
        lightning_tp.errors.TPError: tp=3 needs a multiple of 3 devices, but the Trainer has 4. Pass `Trainer(devices=6)`, or use tp=2 or 4.
    """

    strategy_name = "tp"
    host = "Trainer"
    make_launcher = trainer_launcher
    _lightning_module = UncompiledModule()  # the Trainer sets it first of all

    def __init__(
        self,
        tp: int | Literal["auto"] = "auto",
        dp: int | Literal["auto"] = "auto",
        *,
        plan: PlanLike | None = None,
        sequence_parallel: bool = True,
        loss_parallel: bool = True,
        activation_checkpointing: ActivationCheckpointing | None = None,
        compile: Compile = False,
        dropout: Dropout = "independent",
        backend: Backend = "local",
        verify: bool = False,
        save_distributed_checkpoint: bool = True,
        async_checkpoint: bool = False,
        on_save_error: OnSaveError = "raise",
        safe_globals: list[Any] | None = None,
        global_batch: int | None = None,
        launcher: Launcher = "auto",
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        super().__init__(dp, tp, save_distributed_checkpoint, process_group_backend, timeout)
        with raise_on_rank_zero(rank_zero_only.rank):  # type: ignore[attr-defined]
            self.set_mesh_options(tp, dp, launcher, timeout)
            self.set_model_options(plan, sequence_parallel, loss_parallel, activation_checkpointing, compile, dropout, backend)
            self.set_checkpoint_options(save_distributed_checkpoint, async_checkpoint, safe_globals, on_save_error)
            if global_batch is not None and (not isinstance(global_batch, int) or global_batch < 1):
                raise TPError(f"`global_batch={global_batch!r}`: pass a number of samples, 1 or more.")
        self.verify = verify
        self.global_batch = global_batch
        self.requested_checkpoint = RequestedCheckpoint()
        self._pretrained: list[tuple[Any, bool]] = []  # (path, strict), until the module is split
        self.resume = Resume()
        self._patches = ExitStack()  # of one run: everything that is patched, until it ends
        self._batches = FirstBatches()  # likewise, as the next three
        self._watchdog: Watchdog | None = None
        self._first_batch: FirstBatchCheck | None = None
        self._random_calls: RandomCallPolicy | None = None
        self._ranks: Ranks | None = None  # of the mesh of the last run
        self._call_through: nn.Module | None = None  # FSDP2's root is the LightningModule itself: steps go through its `__call__`
        patch_for_trainers(TPStrategy)
        let_other_package_refuse(type(self))

    def load_pretrained(self, path: Any, *, strict: bool = True) -> None:
        """Load the weights of a Hugging Face folder into the LightningModule; each rank reads only its slices if the module is on the meta device.

        Called before `fit` or in `configure_model`, it takes effect when the module is split; later, at once. See
        `lightning_tp.load_pretrained`. In a resumed run the checkpoint's weights replace them.

        Args:
            path: The folder, a safetensors file, or any checkpoint.
            strict: False ignores missing and unexpected weights, with a warning.

        Raises:
            TPError: It lists what does not fit; when the module is split, if it is not split yet.
        """
        self._pretrained.append((path, strict))
        if applied_plan(self.lightning_module) is not None:
            with raise_on_rank_zero(self.global_rank):
                self._read_pretrained(self.lightning_module)

    def _read_pretrained(self, module: Any) -> None:
        while self._pretrained:
            path, strict = self._pretrained.pop(0)
            load_pretrained(module, path, strict=strict)

    # ---------------------------------------------------------------------------------------------- the Trainer is created

    @override
    def check_package(self) -> None:
        if not isinstance(self.accelerator, pl.accelerators.Accelerator):
            raise TPError(OTHER_PACKAGE)

    @property
    @override
    def precision_plugin(self) -> Precision:
        return super().precision_plugin

    @precision_plugin.setter
    def precision_plugin(self, plugin: Precision | None) -> None:
        ModelParallelStrategy.precision_plugin.fset(self, mesh_precision(plugin))  # type: ignore[attr-defined]

    # ---------------------------------------------------------------------------------------------------------- fit begins

    @override
    def setup_environment(self) -> None:
        patch_for_trainers(TPStrategy)  # also in a spawned process
        self._patches.close()  # of a run that did not come to its end
        with self.joining_process_group():
            private.join_process_group(self)
            private.set_mesh(self, same_mesh(self.root_device.type, *self.sizes))
        share_random_states(self.device_mesh)
        trainer = self._trainer
        with raise_on_rank_zero(self.global_rank):
            refuse_batch_size_finder(trainer)
            self._patches.enter_context(averages_of_shards(trainer, backend=self.backend))
        self._patches.enter_context(known_warnings_filtered())
        self._watchdog = Watchdog(trainer, self.local_rank, self.num_processes, self.collective_timeout)

    @property
    def _trainer(self) -> pl.Trainer:
        assert self.lightning_module is not None
        return self.lightning_module.trainer

    @contextmanager
    @override
    def tensor_init_context(self, empty_init: bool | None = None) -> Generator[None, None, None]:
        context = materialize.init_on_meta() if empty_init else nullcontext()
        with self.precision_plugin.tensor_init_context(), context:
            yield

    def apply_plan(self, module: pl.LightningModule) -> None:
        """Split a module by its plan, once: in `configure_model` of the mixin, or else in `setup`.

        In this order: precision, pretrained weights, plan, the run in one process for `verify`, callbacks that want the full model, parallelisms.
        `TPError`, on one rank's screen, if there is no plan, or it does not fit.
        """
        fits = module.trainer.state.fn == TrainerFn.FITTING
        with raise_on_rank_zero(self.global_rank):
            if module_plan.is_split(module, self.sizes[1]):
                self._read_pretrained(module)
                return
            if not any(p.is_meta for p in module.parameters()):
                self.precision_plugin.convert_module(module)
            compile = unwrap_compiled(module) or module.__dict__.pop("_tp_compile", None) or self.compile
            root = module_plan.fsdp_root(module)
            self._read_pretrained(module)
            plan = self.plan if self.plan is not None else getattr(module, "plan", None)
            given = plan is not None
            if plan is None and self.sizes[1] > 1:
                with random_states_restored(random_roots(module.trainer)):
                    plan = module_plan.plan_of_module(module, module.trainer, self.sizes[1])
            if fits and (self.verify or (given and self.backend == "local")):
                context, mesh, device = self.precision_plugin.train_step_context, self.device_mesh, self.root_device
                with random_states_restored(random_roots(module.trainer)):
                    self._first_batch = first_batch_check(module, plan, mesh, context, verify=self.verify, device=device)
            if self.is_global_zero and fits:
                module_plan.call_before_split(module.trainer, module)
            parallelize(
                module,
                self.device_mesh,
                plan,
                **{**self.model_options, "compile": compile},
                precision=fsdp_policy(self.precision_plugin.precision),
                device=self.root_device,
                fsdp_root=root,
            )
        self._call_through = module if self.sizes[0] > 1 and root is module else None
        rank_zero_info(str(applied_plan(module)))

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        assert self.lightning_module is not None and self.accelerator is not None
        self.accelerator.setup(trainer)
        self.apply_plan(self.lightning_module)
        self.model_to_device()
        if hasattr(self.lightning_module, "_tp_registry"):
            tag_parameters(self.lightning_module)  # moving to the device may have replaced them
        if self._first_batch is not None:
            check, self._first_batch = self._first_batch, None
            with raise_on_rank_zero(self.global_rank), random_states_restored(random_roots(trainer)):
                rank_zero_info(check.compare(self.lightning_module, partial(self._call, "training_step")))
        self._batches, self.resume = FirstBatches(), Resume()  # a checkpoint that this run resumes from is loaded later
        self._random_calls = policy_of(self.lightning_module)
        self._patches.enter_context(adapted_to_mesh(trainer, self))
        seed_mesh(self.device_mesh)
        self._ranks_of_mesh().watch(random_roots(trainer))
        self.barrier()
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
            with raise_on_rank_zero(self.global_rank):
                prepare_optimizers(self.optimizers, *self.sizes, collected="`configure_optimizers`", plain=self.backend == "local")
        self.setup_precision_plugin()
        if trainer.state.fn == TrainerFn.FITTING:
            private.optimizers_to_device(self.optimizers, self.root_device)

    @property
    def num_global_parameters(self) -> int:
        """The number of elements of all parameters of the full model, tied ones counted once."""
        if (plan := applied_plan(self.lightning_module)) is not None:
            return plan.numel
        return sum(p.numel() for p in self.model.parameters()) if self.model is not None else 0

    @override
    def process_dataloader(self, dataloader: Any) -> Any:
        return loader_of_rank(dataloader, self._trainer, self._ranks_of_mesh(), self.resume)

    def _ranks_of_mesh(self) -> Ranks:
        if self._ranks is None or self._ranks.mesh is not self.device_mesh:
            self._ranks = Ranks(self.device_mesh)
        return self._ranks

    # ---------------------------------------------------------------------------------------------------------- every step

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        self.resume.restore_rng(self.device_mesh)
        with nullcontext() if self._random_calls is None else self._random_calls.step():
            return self._step("training_step", self.precision_plugin.train_step_context(), *args, **kwargs)

    @override
    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        return self._step("validation_step", self.precision_plugin.val_step_context(), *args, **kwargs)

    @override
    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        return self._step("test_step", self.precision_plugin.test_step_context(), *args, **kwargs)

    @override
    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        return full_tensors(self._step("predict_step", self.precision_plugin.predict_step_context(), *args, **kwargs))

    def _step(self, name: str, context: Any, *args: Any, **kwargs: Any) -> Any:
        if self.sizes[1] > 1 and (index := self._batches.next(name)) is not None:
            with raise_on_rank_zero(self.global_rank):
                check_unchanged(self.lightning_module)  # type: ignore[arg-type]
                check_batch_everywhere((args, kwargs), self.device_mesh, self.root_device, f"`{name}`, batch {index}")
        elif self._ranks is not None and self.sizes[1] > 1 and self.root_device.type == "cpu":  # a GPU would have to be waited for
            self._ranks.given = f"`{name}`", fingerprint((args, kwargs))
        with context:
            return self._call(name, *args, **kwargs)

    def _call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        if self._call_through is not None:
            return private.call_through_forward(self, self._call_through, name, *args, **kwargs)
        return getattr(self.lightning_module, name)(*args, **kwargs)

    @override
    def backward(self, *args: Any, **kwargs: Any) -> Tensor:
        # all ranks of a group find the same about a gradient; what is recomputed is the forward of the model
        with raise_on_rank_zero(self.global_rank % self.sizes[1]), local_view():
            return super().backward(*args, **kwargs)

    @contextmanager
    @override
    def block_backward_sync(self) -> Generator[None, None, None]:
        """Skip the reduction of gradients over both axes, where that saves a collective: a micro-batch that is not the last."""
        assert self.lightning_module is not None
        with gradients.no_sync(self.lightning_module):
            yield

    @override
    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Reduce over the data-parallel axis, unless there is a group: the ranks of one tensor-parallel group have the same number."""
        if not isinstance(tensor, Tensor):
            return tensor
        tensor = full_tensors(tensor)
        if group is None and self.sizes[0] == 1:
            return tensor
        return reduce_over(tensor, group or self.device_mesh.get_group(DATA_PARALLEL), reduce_op)

    @override
    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        """All-gather (..) -> (dp, ..), or over a group. `LightningModule.all_gather` passes the world if it was given none."""
        over_dp = group is None or group is dist.group.WORLD
        return all_gather(tensor, self.device_mesh.get_group(DATA_PARALLEL) if over_dp else group, sync_grads=sync_grads)

    @override
    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        votes = torch.tensor(int(decision), device=self.root_device)
        dist.all_reduce(votes)
        return int(votes) == self.world_size if all else bool(votes)

    # --------------------------------------------------------------------------------------------------------- checkpoints

    @property
    def _saving(self) -> Saving:
        if self.save_distributed_checkpoint:
            return "sharded"
        sees_full = is_overridden("on_save_checkpoint", self.lightning_module) or type(self.checkpoint_io) is not TorchCheckpointIO
        return "gathered" if sees_full or self.async_checkpoint or self.backend != "local" else "streamed"

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        return checkpoints.weights_to_save(self.lightning_module, self._saving)

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        if self.backend == "dtensor":
            return super().optimizer_state(unwrapped(optimizer))
        return checkpoints.optimizer_to_save(unwrapped(optimizer), self._saving)

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        trainer = self._trainer
        weights_only = self.requested_checkpoint.weights_only if weights_only is None else weights_only
        options: dict[str, Any] = {"safe_globals": self.safe_globals, "weights_only": weights_only}
        self.checkpoint_writer.finish()
        with raise_on_rank_zero(self.global_rank):
            place = self.requested_checkpoint.select(trainer, str(self.broadcast(str(checkpoint_path))))
            if self.backend == "dtensor":
                with checkpoints.lightning_loads_safely(options):
                    loaded = super().load_checkpoint(Path(place.path), weights_only)
            else:
                averages = bool(averaging_callbacks(trainer))
                loaded = checkpoints.load_trainer_checkpoint(place, trainer, keep_weights=averages, options=options)
            self.resume.load(loaded, trainer, self.device_mesh, global_batch=self.global_batch)
        return loaded

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        if not private.has_mesh(self):  # the ranks were forked, and have ended: this process has the full weights
            checkpoints.write_one_file(checkpoint, StoragePath(filepath, storage_options), self.checkpoint_io)
            return
        place = StoragePath(str(self.broadcast(str(filepath))), storage_options)
        trainer = self._trainer
        self.resume.save(checkpoint, trainer, self.device_mesh, global_batch=self.global_batch)
        self.checkpoint_writer.finish()
        if configs := config_in(trainer.lightning_module):
            checkpoint[HF_CONFIG] = configs
        ends = trainer.state.status != TrainerStatus.RUNNING or place.name.startswith("hpc_ckpt_")  # SLURM ends the job right after
        checkpoints.save_trainer_checkpoint(checkpoint, place, self._saving, self, wait=ends)

    @override
    def remove_checkpoint(self, filepath: Any) -> None:
        place = StoragePath(filepath)
        if not self.is_global_zero:
            return
        if type(self.checkpoint_io) is TorchCheckpointIO or place.is_dir():
            self.checkpoint_writer.remove(place)
        elif not self.checkpoint_writer.failed:
            super().remove_checkpoint(filepath)

    # ------------------------------------------------------------------------------------------------------------ run ends

    @override
    def teardown(self) -> None:
        trainer = private.trainer_of(self.lightning_module)
        failed = trainer is not None and trainer.interrupted
        set_depth(0)  # an optimizer's step may have raised
        try:
            self.checkpoint_writer.finish(only_warn=failed)
        finally:
            watchdog, self._watchdog = self._watchdog, None
            with self._patches:
                if watchdog is not None:
                    watchdog.stop(failed=failed)
            super().teardown()
            self.checkpoint_io.teardown()


register(StrategyRegistry, TPStrategy)
load_folders()
