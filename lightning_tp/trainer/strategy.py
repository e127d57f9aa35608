"""`TPStrategy`: Lightning's hooks, in the order in which a Trainer calls them."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.fabric.utilities.data import _auto_add_worker_init_fn, _set_sampler_epoch
from lightning.fabric.utilities.distributed import _sync_ddp_if_available
from lightning.fabric.utilities.optimizer import _optimizers_to_device
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.core import module as core_module
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DistributedSampler
from typing_extensions import override

from lightning_tp import checkpoint
from lightning_tp._compat import patched
from lightning_tp.apply import materialize
from lightning_tp.apply.activation_checkpointing import ActivationCheckpointing
from lightning_tp.apply.bind import tag_parameters
from lightning_tp.apply.compile import Compile, unwrap_compiled
from lightning_tp.apply.parallelize import PlanLike, check_options, parallelize
from lightning_tp.apply.same_everywhere import same_weights_everywhere
from lightning_tp.checkpoint import (
    Background,
    HostCopy,
    Manifest,
    Peers,
    SaveContent,
    StoragePath,
    group_for_saving,
    put_aside,
    remove,
    save_file,
    save_folder,
    to_bytes,
    versions,
    without_dtensors,
)
from lightning_tp.checkpoint.single_file import save_whole
from lightning_tp.checkpoint.weights.dcp_folder import model_key
from lightning_tp.checkpoint.weights.hugging_face import HF_CONFIG, config_in
from lightning_tp.checkpoint.weights.pretrained import load_pretrained
from lightning_tp.core.comm.mesh import DATA_PARALLEL, TENSOR_PARALLEL, same_mesh
from lightning_tp.core.ops.random_numbers import Dropout, RandomCallPolicy, policy_of
from lightning_tp.core.ops.rng import rng_state, seed_mesh, set_shared_state
from lightning_tp.data.group_loader import Ranks, share_loader
from lightning_tp.data.resume import Position, ResumableLoader
from lightning_tp.data.same_batch import check_same_batch
from lightning_tp.errors import TPError, raise_on_rank_zero
from lightning_tp.plan.plan import Plan
from lightning_tp.plan.table import numels
from lightning_tp.shards import gradients, optimizer_state, state_dict
from lightning_tp.trainer.adapt.averaging import Averaging
from lightning_tp.trainer.adapt.finetuning import note_trainable, restore_trainable
from lightning_tp.trainer.adapt.global_batch import keep_global_batch, rescale
from lightning_tp.trainer.adapt.metrics import MetricsOverDataParallel, all_gather, plain
from lightning_tp.trainer.adapt.optimizers import check_optimizer
from lightning_tp.trainer.adapt.precision import MeshMixedPrecision, fsdp_policy, precision_of
from lightning_tp.trainer.adapt.tuner import check_callbacks
from lightning_tp.trainer.launch.processes import ProcessLauncher
from lightning_tp.trainer.launch.watchdog import Watchdog
from lightning_tp.trainer.mesh_strategy import Launcher, MeshStrategyMixin, check_launcher
from lightning_tp.trainer.module_plan import _applied_to, _fsdp_root, _not_followed, plan_for_module
from lightning_tp.trainer.patches import (
    allow_all_precisions,
    allow_compiled,
    allow_folders,
    filter_known_warnings,
    find_lr_by_mean_loss,
    follow_ckpt_path,
    refuse_batch_size_finder,
    wrap_grad_norm,
)
from lightning_tp.trainer.resume import LOADERS, RNG_STATE, _is_mid_epoch, _same
from lightning_tp.verify.first_batch import FirstBatchCheck

CHECKED_BATCHES = 3


OTHER_PACKAGE = (
    "This Trainer is that of `pytorch_lightning`, whose classes are others than those of `lightning`. Write `from lightning_tp.pytorch_lightning "
    "import TPStrategy` for it (callbacks likewise), or `import lightning.pytorch as pl` in the place of `import pytorch_lightning as pl`."
)


class TPStrategy(MeshStrategyMixin, ModelParallelStrategy):
    """Train a transformer split over `tp` ranks, and sharded by FSDP2 over the others.

    `Trainer(devices=4, strategy=TPStrategy(tp=2))` is a mesh of 2 x 2 ranks: data-parallel x tensor-parallel, the ranks of one
    tensor-parallel group beside each other. The LightningModule may be any (see `lightning_tp.TensorParallel` for one that
    wants to say more); losses, gradients and weights are those of one process. Also registered as `strategy="tp"`.

    Args:
        tp: how many ranks share one model. "auto": those of a node.
        dp: over how many such groups data and FSDP2's shards are spread. "auto": what is left of the world.
        plan: how the model is split: a mapping pattern -> style, a `Plan`, or the path of its JSON. Default: the module's own
            `plan`, else what the model inside declares (`base_model_tp_plan` of Hugging Face), else it is inferred: by running
            `forward` on `example_input_array`, or the step on the first batch.
        sequence_parallel: False keeps activations whole between the split modules, whatever the plan says.
        loss_parallel: False gathers logits where they are made.
        activation_checkpointing: "block" keeps only the input of each repeated block for the backward, and runs it again; "selective" also keeps
            what is dear to compute; a function (name, module) -> bool chooses the modules that are run again. See
            `lightning_tp.apply.activation_checkpointing`.
        compile: True compiles each repeated block by `torch.compile`; also the name of a backend. See `lightning_tp.apply.compile`.
        dropout: "independent" gives each rank masks of its own for its shards of an activation, and all ranks of a group the same ones for
            a whole activation; "exact" gives the masks of one process, for comparing runs.
        backend: "local" (plain tensors, fast) or "dtensor" (the same plan by PyTorch's own styles).
        verify: True runs the first batch in one process and split before training, and stops if loss or a gradient differ. The whole
            model has to fit on every rank.
        save_distributed_checkpoint: False gathers a checkpoint in one file, on rank 0.
        async_checkpoint: True writes checkpoints beside training, which waits for a copy in host memory only. One at a time; an error
            is raised at the next one, or at the end.
        on_save_error: what happens if a checkpoint can't be written (a full disk): "raise", or "warn" and go on. Those before it are kept.
        safe_globals: classes of your own that a checkpoint may have in it (hyperparameters, states of callbacks), and be loaded.
        global_batch: items of one optimizer step over all ranks: batches are accumulated until they are that many, on whatever mesh the run
            goes on. None: as `accumulate_grad_batches` says.
        launcher: how a process that is alone starts the others: "popen" runs the script again for each; "fork" and "spawn" run `fit` in
            processes of its own, which end before it returns. "auto": "fork" in a notebook, else "popen".
        process_group_backend: of torch.distributed; default: gloo on CPU, nccl on CUDA.
        timeout: of its collectives.

    Raises:
        TPError: when the Trainer is made, if tp and dp don't make up the world; when it starts, for a plan that does not fit; in the
            first batches, if ranks of one group have different ones.

    Example:
        >>> import lightning as L
        >>> L.Trainer(accelerator="cpu", devices=2, strategy=TPStrategy(tp=2), logger=False).strategy.sizes
        (1, 2)
        >>> L.Trainer(accelerator="cpu", devices=4, strategy=TPStrategy(tp=3), logger=False)
        Traceback (most recent call last):
        ...
        lightning_tp.errors.TPError: `tp=3` needs a multiple of 3 ranks, and the world size is 4. Use tp=1, 2, 4, or another number of devices.
    """

    strategy_name = "tp"
    _launcher_class = ProcessLauncher

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
        backend: Literal["local", "dtensor"] = "local",
        verify: bool = False,
        save_distributed_checkpoint: bool = True,
        async_checkpoint: bool = False,
        on_save_error: Literal["raise", "warn"] = "raise",
        safe_globals: list[Any] | None = None,
        global_batch: int | None = None,
        launcher: Launcher = "auto",
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        filter_known_warnings()  # here, not on import: for other strategies they are true
        super().__init__(
            data_parallel_size=dp,
            tensor_parallel_size=tp,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        with raise_on_rank_zero(rank_zero_only.rank):  # type: ignore[attr-defined]
            if backend not in ("local", "dtensor"):
                raise TPError(f"`backend={backend!r}`: there are 'local' and 'dtensor'.")
            check_options(activation_checkpointing, compile, dropout, backend)
            check_launcher(launcher)
            if on_save_error not in ("raise", "warn"):
                raise TPError(f"`on_save_error={on_save_error!r}`: there are 'raise' and 'warn'.")
            if global_batch is not None and (not isinstance(global_batch, int) or global_batch < 1):
                raise TPError(f"`global_batch={global_batch!r}`: give a number of items, 1 or more.")
            self.plan = Plan.of(plan) if plan is not None else None
        if (other := sys.modules.get("pytorch_lightning.strategies")) is not None:  # lets its Trainer come to `OTHER_PACKAGE`
            other.Strategy.register(type(self))
        self.sequence_parallel = sequence_parallel
        self.loss_parallel = loss_parallel
        self.activation_checkpointing = activation_checkpointing
        self.compile = compile
        self.dropout: Dropout = dropout
        self.backend = backend
        self.verify = verify
        self.global_batch = global_batch
        self._launch_by: Launcher = launcher
        self._first: FirstBatchCheck | None = None
        self._asked = (tp, dp)
        self._redirect: nn.Module | None = None
        self._checked: dict[str, int] = {}
        self._draws: RandomCallPolicy | None = None
        self.async_checkpoint = async_checkpoint
        self.on_save_error: Literal["raise", "warn"] = on_save_error
        self.safe_globals: list[Any] = list(safe_globals or [])
        self._background, self._host_copy = Background(), HostCopy()
        self._save_failed = False  # the last one: what it was to take the place of stays
        self._ckpt_word: str | None = None  # `ckpt_path="last"`, if that is how a checkpoint was asked for
        self._ckpt_weights_only: bool | None = None
        self._positions: list[Position] = []  # of the training loaders, from a checkpoint
        self._pass_is_over = False
        self._rng_at_step: dict[str, Any] | None = None  # the random states of a checkpoint from the middle of an epoch
        self._ranks: Ranks | None = None
        self._numbers: MetricsOverDataParallel | None = None
        self._averaging: Averaging | None = None
        self._watch: Watchdog | None = None
        self._accumulation: Callable[[], None] | None = None  # undoes what `global_batch` has set
        self._expected: float | None = None  # batches to accumulate, in the rest of an epoch that was begun with as many items each
        self._pretrained: list[tuple[Any, bool]] = []

    def load_pretrained(self, path: Any, *, strict: bool = True) -> None:
        """Give the LightningModule the weights of a Hugging Face folder: each rank reads its slices only, if the module is on the meta device.

        Before `fit` or in `configure_model`, then it is done when the module is split; later, at once. See `lightning_tp.load_pretrained`. For
        a run that goes on from a checkpoint the checkpoint's weights come after it.

        Args:
            path: the folder, or a file of safetensors, or any checkpoint.
            strict: False passes over what is missing or too much, with a warning.

        Raises:
            TPError: one, that lists what does not fit; then, not now, if the module is not there yet.
        """
        module = self.lightning_module
        if module is not None and _applied_to(module) is not None:
            with raise_on_rank_zero(self.global_rank):
                load_pretrained(module, path, strict=strict)
        else:
            self._pretrained.append((path, strict))

    # ------------------------------------------------------------------------------------------ the Trainer is made

    @override
    def _check_package(self) -> None:
        if not isinstance(self.accelerator, pl.accelerators.Accelerator):
            raise TPError(OTHER_PACKAGE)

    @property
    @override
    def precision_plugin(self) -> Precision:
        return super().precision_plugin

    @precision_plugin.setter
    def precision_plugin(self, plugin: Precision | None) -> None:
        self._precision_plugin = precision_of(plugin)

    # ---------------------------------------------------------------------------------------------------- fit begins

    @override
    def setup_environment(self) -> None:
        self._data_parallel_size, self._tensor_parallel_size = self.sizes
        state = torch.get_rng_state()
        with self._one_start():
            self._setup_distributed()  # all that Lightning does here, but for its mesh, which would be a new one for each run
        self._device_mesh = same_mesh(self.root_device.type, *self.sizes)
        self._limit_waiting()
        torch.set_rng_state(state)  # Lightning seeds anew here: go on as one process would
        if self._averaging is not None:  # of a run that did not come to its end
            self._averaging.close()
        assert self.lightning_module is not None
        with raise_on_rank_zero(self.global_rank):
            check_callbacks(self.lightning_module.trainer)
            self._averaging = Averaging(self.lightning_module.trainer, whole=not self._save_distributed_checkpoint)
            if self._averaging.callbacks and self.backend == "dtensor":
                name = type(self._averaging.callbacks[0]).__name__
                raise TPError(f"`{name}` works with `backend='local'`, and the strategy has 'dtensor'.")
        self._watch = Watchdog(self.lightning_module.trainer, self.local_rank, self.num_processes, self._timeout)

    @contextmanager
    @override
    def tensor_init_context(self, empty_init: bool | None = None) -> Generator[None, None, None]:
        context = materialize.init_on_meta() if empty_init else nullcontext()
        with self.precision_plugin.tensor_init_context(), context:
            yield

    def apply_plan(self, module: pl.LightningModule) -> None:
        """Split `module` by its plan, once. Called by `configure_model` of the mixin, else by `setup`.

        Raises:
            TPError: on one rank's screen, if there is no plan, or it does not fit.
        """
        with raise_on_rank_zero(self.global_rank):
            applied = _applied_to(module)
            if applied is not None:
                if applied.tp != self.sizes[1]:
                    raise TPError(
                        f"This module is split for tp={applied.tp} already, and the strategy has tp={self.sizes[1]}. Make a new one."
                    )
                self._take_pretrained(module)
                return
            if not any(p.is_meta for p in module.parameters()):
                self.precision_plugin.convert_module(module)
            compile = unwrap_compiled(module) or module.__dict__.pop("_tp_compile", None) or self.compile
            root = _fsdp_root(module)
            self._take_pretrained(module)
            plan = self.plan if self.plan is not None else getattr(module, "plan", None)
            if plan is None and self.sizes[1] > 1:
                plan = self._found_plan(module)
            if self.verify and module.trainer.state.fn == TrainerFn.FITTING:
                same_weights_everywhere(module, self.device_mesh)
                step = partial(self._call, "training_step")
                self._first = FirstBatchCheck(module, module.trainer, self.precision_plugin.train_step_context, step)
            if self.is_global_zero and module.trainer.state.fn == TrainerFn.FITTING:
                for callback in module.trainer.callbacks:  # type: ignore[attr-defined]
                    if hasattr(callback, "before_split"):
                        callback.before_split(module.trainer, module)
            parallelize(
                module,
                self.device_mesh,
                plan,
                sequence_parallel=self.sequence_parallel,
                loss_parallel=self.loss_parallel,
                activation_checkpointing=self.activation_checkpointing,
                precision=fsdp_policy(self.precision_plugin.precision),
                compile=compile,
                dropout=self.dropout,
                backend=self.backend,
                device=self.root_device,
                fsdp_root=root,
            )
        self._redirect = module if self.sizes[0] > 1 and root is module else None
        rank_zero_info(str(_applied_to(module)))

    def _take_pretrained(self, module: pl.LightningModule) -> None:
        while self._pretrained:
            path, strict = self._pretrained.pop(0)
            load_pretrained(module, path, strict=strict)

    def _found_plan(self, module: pl.LightningModule) -> Plan:
        """The plan that the first rank finds; the same on all."""
        found: list[Plan | str | None] = [None]
        if self.is_global_zero:
            try:
                found = [plan_for_module(module, module.trainer, self.sizes[1])]
            except Exception as error:  # whatever the step raises: the other ranks wait for an answer
                found = [str(error) if isinstance(error, TPError) else _not_followed(module, error)]
        dist.broadcast_object_list(found, src=0)
        if not isinstance(found[0], Plan):
            raise TPError(str(found[0]))
        return found[0]

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        assert self.lightning_module is not None and self.accelerator is not None
        self.accelerator.setup(trainer)
        self.apply_plan(self.lightning_module)
        self.model_to_device()
        if hasattr(self.lightning_module, "_tp_registry"):
            tag_parameters(self.lightning_module)
        if self._first is not None:
            with raise_on_rank_zero(self.global_rank):
                rank_zero_info(self._first.compare(self.lightning_module))
            self._first = None
        if self._averaging is not None and trainer.state.fn == TrainerFn.FITTING:
            self._averaging.begin(self.lightning_module)
        if self.sizes[0] > 1:  # what FSDP2 gathers in inference mode can't be trained with afterwards
            for loop in (trainer.validate_loop, trainer.test_loop, trainer.predict_loop):
                loop.inference_mode = False
        self._checked.clear()
        self._positions, self._rng_at_step = [], None  # a checkpoint that this run begins with comes later
        self._draws = policy_of(self.lightning_module)
        if self._numbers is not None:  # of a run that did not come to its end
            self._numbers.close(self.lightning_module)
        self._numbers = MetricsOverDataParallel(trainer, self.device_mesh)
        if self._accumulation is not None:
            self._accumulation()
            self._accumulation = None
        if self.global_batch is not None and trainer.state.fn == TrainerFn.FITTING:
            with raise_on_rank_zero(self.global_rank):
                self._expected = None  # a checkpoint that this run begins with comes later
                self._accumulation = keep_global_batch(trainer, self.global_batch, self.sizes[0], lambda: self._expected)
        seed_mesh(self.device_mesh)
        if isinstance(self.precision_plugin, MeshMixedPrecision):
            self.precision_plugin.span(self.device_mesh.get_all_groups())
        if self.sizes[0] == 1:  # every rank has all the data: the user's own sampler is right, and Lightning's would shuffle
            trainer._accelerator_connector.use_distributed_sampler = False
        self.barrier()
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
            self._look_at_optimizers()
        self.setup_precision_plugin()
        if trainer.state.fn == TrainerFn.FITTING:
            _optimizers_to_device(self.optimizers, self.root_device)

    def _look_at_optimizers(self) -> None:
        with raise_on_rank_zero(self.global_rank):
            for optimizer in self.optimizers:
                check_optimizer(optimizer, *self.sizes, collected="`configure_optimizers`", plain=self.backend == "local")

    @property
    def num_global_parameters(self) -> int:
        """The elements of all parameters of the whole model, tied ones once."""
        plan = _applied_to(self.lightning_module) if self.lightning_module is not None else None
        if plan is not None:
            return numels(plan)[0]
        return sum(p.numel() for p in self.model.parameters()) if self.model is not None else 0

    @override
    def process_dataloader(self, dataloader: Any) -> Any:
        assert self.lightning_module is not None
        trainer = self.lightning_module.trainer
        if self._ranks is None or self._ranks.mesh is not self.device_mesh:
            self._ranks = Ranks(self.device_mesh)
        _auto_add_worker_init_fn(dataloader, self._ranks.dp_rank)  # Lightning would seed by the global rank
        predicts = trainer.state.fn == TrainerFn.PREDICTING
        trains = trainer.state.fn == TrainerFn.FITTING and trainer.training
        if (
            trains
        ):  # Lightning does it once the loader's workers have begun, with the order of epoch 0 where a run goes on from a later one
            progress: Any = trainer.fit_loop.epoch_progress.current
            mid_epoch = bool(self._positions) and not self._pass_is_over
            _set_sampler_epoch(dataloader, progress.processed if mid_epoch else progress.ready)
        if trainer.state.fn in (TrainerFn.VALIDATING, TrainerFn.TESTING):
            _warn_of_items_counted_twice(dataloader, trainer.state.fn.value)
        shared = share_loader(
            dataloader,
            self._ranks,
            shadow=self._shadow_step if predicts else None,
            limit=trainer.limit_predict_batches if predicts else 1.0,
            where=f"a loader of `trainer.{trainer.state.fn.value}`" if trainer.state.fn is not None else "a loader",
        )
        if not trains:
            return shared
        resume = self._positions.pop(0) if self._positions else None
        if resume is not None and not self._pass_is_over:
            return ResumableLoader(shared, resume=resume, then=None if resume.get("prefetched") else self._rng_is_reached)
        return ResumableLoader(shared, resume=resume, finished=True)

    def _rng_is_reached(self) -> None:
        """The loader stands where it stood: go on with the random numbers of the checkpoint."""
        if self._rng_at_step is not None:
            set_shared_state(self.device_mesh, self._rng_at_step)
            self._rng_at_step = None

    def _shadow_step(self, loader: Any, batch: Any, batch_idx: int) -> None:
        """A step of `predict` that is nobody's: FSDP2's collectives need this rank, which has no batch of its own left."""
        assert self.lightning_module is not None
        trainer = self.lightning_module.trainer
        loaders: Any = trainer.predict_loop._combined_loader
        index = next(i for i, other in enumerate(loaders.flattened) if other is loader)
        batch = self.precision_plugin.convert_input(batch)
        batch = self.lightning_module._on_before_batch_transfer(batch, dataloader_idx=index)
        batch = self.batch_to_device(batch, dataloader_idx=index)
        kwargs = trainer.predict_loop._build_kwargs(batch, batch_idx, index if len(loaders.flattened) > 1 else None)
        self.predict_step(*trainer.predict_loop._build_step_args_from_hook_kwargs(kwargs, "predict_step"))

    # ---------------------------------------------------------------------------------------------------- every step

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        if self._rng_at_step is not None:
            set_shared_state(self.device_mesh, self._rng_at_step)
            self._rng_at_step = None
        with nullcontext() if self._draws is None else self._draws.step():
            return self._step("training_step", self.precision_plugin.train_step_context(), *args, **kwargs)

    @override
    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        return self._step("validation_step", self.precision_plugin.val_step_context(), *args, **kwargs)

    @override
    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        return self._step("test_step", self.precision_plugin.test_step_context(), *args, **kwargs)

    @override
    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        return plain(self._step("predict_step", self.precision_plugin.predict_step_context(), *args, **kwargs))

    def _step(self, name: str, context: Any, *args: Any, **kwargs: Any) -> Any:
        module = self.lightning_module
        assert module is not None
        seen = self._checked.get(name, 0)
        if seen < CHECKED_BATCHES and self.sizes[1] > 1:
            self._checked[name] = seen + 1
            with raise_on_rank_zero(self.global_rank):
                self._check_batch((args, kwargs), f"`{name}`, batch {seen}")
        with context:
            return self._call(name, *args, **kwargs)

    def _call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        module = self.lightning_module
        assert module is not None
        if self._redirect is not None:  # FSDP2's hooks are on the LightningModule itself: go through its __call__
            return self._forward_redirection(module, module, name, *args, **kwargs)
        return getattr(module, name)(*args, **kwargs)

    def _check_batch(self, batch: Any, where: str) -> None:
        """Compare a batch inside each tensor-parallel group; what one of the groups finds, all ranks raise."""
        found: list[str | None] = [None] * self.world_size
        try:
            check_same_batch(batch, self.device_mesh.get_group(TENSOR_PARALLEL), self.root_device, where)
        except TPError as error:
            found[self.global_rank] = str(error)
        dist.all_gather_object(found, found[self.global_rank])
        if message := next((m for m in found if m is not None), None):
            raise TPError(message)

    @override
    def backward(self, *args: Any, **kwargs: Any) -> Tensor:
        with raise_on_rank_zero(self.global_rank % self.sizes[1]):  # all ranks of a group find the same about a gradient
            return super().backward(*args, **kwargs)

    @contextmanager
    @override
    def block_backward_sync(self) -> Generator[None, None, None]:
        """A micro-batch that is not the last: gradients are left unsummed over both axes, as far as that saves a collective."""
        assert self.lightning_module is not None
        with gradients.no_sync(self.lightning_module):
            yield

    @override
    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Over the data-parallel axis, unless there is a group: ranks of one tensor-parallel group have the same number."""
        if not isinstance(tensor, Tensor):
            return tensor
        tensor = plain(tensor)
        if group is None and self._data_parallel_size == 1:
            return tensor
        if not tensor.is_floating_point() and reduce_op in ("mean", "avg"):
            tensor = tensor.to(torch.float64 if self.root_device.type != "mps" else torch.float32)  # a mean of integers is none
        return _sync_ddp_if_available(tensor, group or self.device_mesh.get_group(DATA_PARALLEL), reduce_op=reduce_op)

    @override
    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        """(..) -> (dp, ..), or over the group that is given. `LightningModule.all_gather` comes here, with the world if it was given none."""
        over_dp = group is None or group is dist.group.WORLD
        return all_gather(tensor, self.device_mesh.get_group(DATA_PARALLEL) if over_dp else group, sync_grads=sync_grads)

    @override
    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        votes = torch.tensor(int(decision), device=self.root_device)
        dist.all_reduce(votes)
        return int(votes) == self.world_size if all else bool(votes)

    @override
    def teardown(self) -> None:
        trainer = getattr(self.lightning_module, "_trainer", None)
        failed = trainer is not None and trainer.interrupted
        try:
            self._finish_saving(quietly=failed)
        finally:
            self._teardown(failed)

    def _teardown(self, failed: bool) -> None:
        watch, self._watch = self._watch, None
        if watch is not None:
            watch.stop(failed=failed)
        if self._numbers is not None:
            self._numbers.close(self.lightning_module)
            self._numbers = None
        if self._averaging is not None:
            self._averaging.close()
            self._averaging = None
        if self._accumulation is not None:
            self._accumulation()
            self._accumulation = None
        super().teardown()
        self.checkpoint_io.teardown()

    # --------------------------------------------------------------------------------------------------- checkpoints

    @property
    def _streams(self) -> bool:
        """Whether a checkpoint in one file is written tensor by tensor. Not where somebody's code wants to see all of it, whole, before."""
        return (
            self.backend == "local"
            and not self.async_checkpoint
            and type(self.checkpoint_io) is TorchCheckpointIO
            and not is_overridden("on_save_checkpoint", self.lightning_module)
        )

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        if self._save_distributed_checkpoint or self._streams:
            return self.lightning_module.state_dict()
        whole = state_dict.full_state_dict(self.lightning_module)
        if type(self.lightning_module).state_dict is not nn.Module.state_dict:  # its own, which may leave out what is frozen
            wanted = self.lightning_module.state_dict()
            whole = {name: whole.get(name, value) for name, value in wanted.items()}
        return whole if self.is_global_zero else {}

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        optimizer = getattr(optimizer, "_optimizer", optimizer)
        if self.backend == "dtensor":
            return super().optimizer_state(optimizer)
        if self._save_distributed_checkpoint or self._streams:
            return optimizer_state.optimizer_state(optimizer)
        whole = optimizer_state.full_optimizer_state(optimizer)
        return whole if self.is_global_zero else {}

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        assert self.lightning_module is not None
        weights_only = self._ckpt_weights_only if weights_only is None else weights_only
        self._finish_saving()
        with raise_on_rank_zero(self.global_rank):
            place = self._whole_checkpoint(str(self.broadcast(str(checkpoint_path))))
            loaded = self._load_checkpoint(place, weights_only)
            self._restore_rng(loaded)
            self._restore_positions(loaded)
        return loaded

    def _whole_checkpoint(self, path: str) -> StoragePath:
        """What was asked for; if it was asked for as the last or the best and is damaged, the newest one that is whole."""
        assert self.lightning_module is not None
        trainer = self.lightning_module.trainer
        instead: list[str] | None = None
        if self._ckpt_word is not None:
            of = trainer.checkpoint_callback
            instead = []
            if self._ckpt_word == "best" and isinstance(of, ModelCheckpoint):
                instead = sorted(of.best_k_models, key=lambda p: float(of.best_k_models[p]), reverse=of.mode == "max")
        word, self._ckpt_word = self._ckpt_word, None
        place, said = checkpoint.select_intact(StoragePath(path), Peers(), instead=instead)
        if said is not None:
            rank_zero_warn(f"`ckpt_path={word!r}`: {said}")
            trainer._checkpoint_connector._ckpt_path = place.url
        return place

    def _restore_rng(self, loaded: dict[str, Any]) -> None:
        """Go on with the random numbers of the run that was saved, if it is trained on."""
        assert self.lightning_module is not None
        state = loaded.get(RNG_STATE)
        self._rng_at_step = None
        if state is None or self.lightning_module.trainer.state.fn != TrainerFn.FITTING:
            return
        if tuple(state["mesh"]) != self.sizes:
            rank_zero_info(
                f"The checkpoint is from a mesh of {state['mesh']} ranks: random numbers of split activations (dropout) go on differently "
                f"on {self.sizes}."
            )
        set_shared_state(self.device_mesh, state)
        if _is_mid_epoch(loaded):
            self._rng_at_step = state  # its epoch had begun: what a loader draws when it begins one was drawn before

    def _restore_positions(self, loaded: dict[str, Any]) -> None:
        """Where this rank's training loaders go on, once they are there."""
        assert self.lightning_module is not None
        self._positions = []
        if self.lightning_module.trainer.state.fn != TrainerFn.FITTING:
            return
        fit_loop = loaded.get("loops", {}).get("fit_loop", {}).get("state_dict", {})
        states = fit_loop.pop("combined_loader", [])  # Lightning's list knows those of one rank
        self._pass_is_over = not _is_mid_epoch(loaded)
        saved = loaded.get(LOADERS)
        if saved is None:  # of a Trainer without this package: how many batches it has taken
            progress = loaded.get("loops", {}).get("fit_loop", {}).get("epoch_loop.batch_progress", {})
            read = progress.get("current", {}).get("ready", 0)
            self._positions = [{"read": read, "loader": state} for state in states] or [{"read": read}]
            return
        ranks, dp_rank = saved["ranks"], self.device_mesh.get_local_rank(DATA_PARALLEL)
        if len(ranks) != self.sizes[0] and any("loader" in p for p in ranks[0]) and not all(_same(ranks[0], r) for r in ranks):
            rank_zero_warn(
                f"The loaders' states in the checkpoint are of {len(ranks)} data-parallel ranks, each its own, and there are {self.sizes[0]} now: "
                "all go on from that of the first. Give loaders a state that does not depend on the rank, or resume with as many."
            )
        self._positions = list(ranks[dp_rank if len(ranks) == self.sizes[0] else 0])
        for position in self._positions:
            position["prefetched"] = saved["prefetched"] > 0
        if self.global_batch is not None and "accumulated" in saved and not self._pass_is_over:
            self._expected = saved["accumulated"] * len(ranks) / self.sizes[0]
            rescale(loaded, self._positions, len(ranks), self.sizes[0])

    def _load_checkpoint(self, place: StoragePath, weights_only: bool | None) -> dict[str, Any]:
        assert self.lightning_module is not None
        trains = self.lightning_module.trainer.state.fn == TrainerFn.FITTING
        optimizers = self.optimizers if trains else []  # a validation after training still has them
        safe: dict[str, Any] = {"safe_globals": self.safe_globals, "weights_only": weights_only}
        if self.backend == "dtensor":
            return self._load_dtensors(place, safe)
        if place.is_file():
            loaded: dict[str, Any] = checkpoint.load(place, mmap=True, **safe)
            self._load_weights_of_file(loaded, place)
            if self._averaging is None or not self._averaging.callbacks:
                del loaded["state_dict"]
            if trains:
                restore_trainable(self.lightning_module.trainer, loaded)
            states = loaded.get("optimizer_states", ())
            if len(states) < len(optimizers):
                raise TPError(
                    f"`{place}` has the states of {len(states)} optimizer(s), and there are {len(optimizers)}, so training can't go on from it: it "
                    "was saved with weights only, or by another module. Weights alone are read by `trainer.validate`, `test` and `predict`, and "
                    "by `load_from_checkpoint`."
                )
            for optimizer, state in zip(optimizers, states, strict=False):
                optimizer_state.load_optimizer_state(optimizer, state)
            return loaded
        metadata: dict[str, Any] = checkpoint.load(place / "meta.pt", **safe)
        key = model_key(checkpoint.read_metadata(place).state_dict_metadata) or "state_dict"  # "model": of FSDPStrategy
        checkpoint.load_model(self.lightning_module, place, strict=self.lightning_module.strict_loading, key=key)
        if trains:
            restore_trainable(self.lightning_module.trainer, metadata)
        for i, optimizer in enumerate(optimizers):
            checkpoint.load_optimizer(optimizer, place, f"optimizer_{i}", **safe)
        metadata = checkpoint.with_dtensors(metadata, place, self.lightning_module)
        if self._averaging is not None and self._averaging.callbacks:
            metadata["state_dict"] = self.lightning_module.state_dict()
        return metadata

    def _load_weights_of_file(self, loaded: Any, place: StoragePath) -> None:
        """The whole tensors of a checkpoint in one file; each rank takes its shards."""
        assert self.lightning_module is not None
        if not isinstance(loaded, dict) or not isinstance(loaded.get("state_dict"), dict):
            what = "a dict without `state_dict`" if isinstance(loaded, dict) else f"a {type(loaded).__name__}"
            raise TPError(f"`{place}` is no checkpoint of a Trainer: there is {what} in it.")
        found = self.lightning_module.load_state_dict(loaded["state_dict"], strict=False)
        if not self.lightning_module.strict_loading:
            return
        for names, problem in ((found.missing_keys, "has no"), (found.unexpected_keys, "has, and the model has not,")):
            if names:
                more = f" and {len(names) - 1} more" if len(names) > 1 else ""
                raise TPError(
                    f"`{place}` {problem} `{names[0]}`{more}. Load with `strict_loading = False`, or use the model that wrote it."
                )

    def _load_dtensors(self, place: StoragePath, safe: dict[str, Any]) -> dict[str, Any]:
        """By Lightning's own functions, whose reader would unpickle anything."""

        def load(state: dict[str, Any], checkpoint_id: Any) -> None:
            checkpoint.dcp_load(state, StoragePath(checkpoint_id), **safe)

        undo = patched(dcp, "load", load)
        try:
            with torch.serialization.safe_globals(self.safe_globals):
                return super().load_checkpoint(Path(place.path), safe["weights_only"])
        finally:
            undo()

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        if self._device_mesh is None:  # the ranks were forked, and have ended: this process has the whole weights
            self._save_file(checkpoint, StoragePath(filepath, storage_options), storage_options)
            return
        place = StoragePath(str(self.broadcast(str(filepath))), storage_options)
        checkpoint[RNG_STATE] = rng_state(self.device_mesh)
        self._add_positions(checkpoint)
        if self.lightning_module is not None:
            note_trainable(self.lightning_module.trainer, checkpoint)
        self._finish_saving()
        if self.lightning_module is not None and (configs := config_in(self.lightning_module)):
            checkpoint[HF_CONFIG] = configs
        if not self._save_distributed_checkpoint and self._streams:
            self._save(place, lambda: save_whole(checkpoint, place))
            return
        if not self._save_distributed_checkpoint:
            if self.async_checkpoint:
                whole: dict[str, Any] = {
                    k: checkpoint.pop(k) for k in ("state_dict", "optimizer_states") if k in checkpoint
                }  # copies already
                checkpoint = copy.deepcopy(checkpoint) | whole
            world = Peers(self._group_for_saving())
            self._save(place, lambda: world.from_first(lambda: self._save_file(checkpoint, place, storage_options)))
            return
        content = self._content_of(checkpoint)
        if self.async_checkpoint:
            content.sharded, content.apart = self._host_copy.of((content.sharded, content.apart))
        world = Peers(self._group_for_saving())
        self._save(place, lambda: save_folder(place, content, world))

    def _group_for_saving(self) -> Any:
        return group_for_saving() if self.async_checkpoint else None

    def _content_of(self, checkpoint: dict[str, Any]) -> SaveContent:
        """What goes into a folder, of what Lightning wants to be saved."""
        about = Manifest(
            step=int(checkpoint.get("global_step", 0)),
            epoch=int(checkpoint.get("epoch", 0)),
            mesh=dict(zip((DATA_PARALLEL, TENSOR_PARALLEL), self.sizes)),
            versions=versions(),
            weights_only="optimizer_states" not in checkpoint,
        )
        apart: dict[str, Any] = {}
        sharded = {"state_dict": checkpoint.pop("state_dict")}
        sharded |= {f"optimizer_{i}": state for i, state in enumerate(checkpoint.pop("optimizer_states", []))}
        for key in list(checkpoint):
            checkpoint[key] = without_dtensors(checkpoint[key], apart, key)
        plan = _applied_to(self.lightning_module) if self.lightning_module is not None else None
        rest = to_bytes(checkpoint) if self.is_global_zero else None
        return SaveContent(sharded, apart, rest, plan.to_json() if plan is not None and self.is_global_zero else None, about)

    def _save_file(self, checkpoint: dict[str, Any], place: StoragePath, storage_options: Any) -> None:
        if type(self.checkpoint_io) is TorchCheckpointIO:
            save_file(place, lambda stream: torch.save(checkpoint, stream))
        else:  # the user's own
            self.checkpoint_io.save_checkpoint(checkpoint, place.url, storage_options)

    def _save(self, place: StoragePath, work: Callable[[], None]) -> None:
        assert self.lightning_module is not None
        self._save_failed = False
        running = self.lightning_module.trainer.state.status == TrainerStatus.RUNNING
        requeued = place.name.startswith("hpc_ckpt_")  # SLURM ends the job right after
        if not self.async_checkpoint:
            try:
                work()
            except TPError as error:
                self._could_not_save(error)
            return
        self._background.start(f"Saving `{place}`", work)
        if not running or requeued:  # nobody would wait for it
            self._finish_saving()

    def _finish_saving(self, *, quietly: bool = False) -> None:
        """Until no save is under way.

        Raises:
            TPError: if it failed, unless the run goes on without it, or has failed before.
        """
        try:
            self._background.wait()
        except TPError as error:
            if quietly:
                rank_zero_warn(str(error))
            else:
                self._could_not_save(error)

    def _could_not_save(self, error: TPError) -> None:
        self._save_failed = True
        if self.on_save_error == "raise":
            raise error
        rank_zero_warn(f"{error} Training goes on without it.")

    @override
    def remove_checkpoint(self, filepath: Any) -> None:
        """Once what takes its place is there."""
        if not self.is_global_zero or self._save_failed:
            return
        if type(self.checkpoint_io) is not TorchCheckpointIO and not StoragePath(filepath).is_dir():
            super().remove_checkpoint(filepath)
            return
        self._background.after(lambda: remove(StoragePath(filepath)))

    def _add_positions(self, checkpoint: dict[str, Any]) -> None:
        """Where the training loaders of each data-parallel rank stand. A collective."""
        assert self.lightning_module is not None
        trainer = self.lightning_module.trainer
        combined, fetcher = trainer.fit_loop._combined_loader, trainer.fit_loop._data_fetcher
        loaders: list[Any] = [x for x in (combined.flattened if combined is not None else ()) if type(x) is ResumableLoader]
        fit_loop = checkpoint.get("loops", {}).get("fit_loop", {}).get("state_dict", {})
        fit_loop.pop("combined_loader", None)
        if not loaders or trainer.state.fn != TrainerFn.FITTING:
            return
        prefetched = len(getattr(fetcher, "batches", ()))
        every = Peers().gather([loader.position(prefetched) for loader in loaders])
        ranks = [every[row[0]] for row in self.device_mesh.mesh.tolist()]
        checkpoint[LOADERS] = {"prefetched": prefetched, "ranks": ranks}
        if self.global_batch is not None:
            checkpoint[LOADERS]["accumulated"] = trainer.accumulate_grad_batches
        if states := [p["loader"] for p in ranks[0] if "loader" in p]:
            fit_loop["combined_loader"] = states  # for a Trainer without this package

    def find_checkpoint(self, trainer: pl.Trainer, asked: Any, found: Any) -> Any:
        """What `ckpt_path=asked` comes down to, where Lightning has found `found`."""
        self._ckpt_word = asked if asked in ("last", "best", "hpc") else None
        if asked is None and found is not None:  # by a callback or SLURM, or an evaluation after training
            self._ckpt_word = "last" if trainer.state.fn == TrainerFn.FITTING else "best"
        if asked != "last":
            return found
        callbacks = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.save_last]
        folders = [StoragePath(c._ModelCheckpoint__resolve_ckpt_dir(trainer)) for c in callbacks]  # type: ignore[attr-defined]
        for folder in folders:
            for name in put_aside(folder):
                if name.startswith(ModelCheckpoint.CHECKPOINT_NAME_LAST):
                    return (folder / name).url
        if found is not None:
            place = StoragePath(found)
            here = any(folder.path == place.parent.path for folder in folders)
            return checkpoint.newer(place).url if here else found
        return next((place.url for folder in folders for place in checkpoint.candidates(folder)), None)


def _warn_of_items_counted_twice(loader: Any, name: str) -> None:
    """In the place of Lightning's warning, which comes whether or not there are such items."""
    sampler = getattr(getattr(loader, "batch_sampler", None), "sampler", None)
    if not isinstance(sampler, DistributedSampler) or sampler.drop_last:
        return
    items = len(sampler.dataset)  # type: ignore[arg-type]
    if twice := sampler.total_size - items:
        rank_zero_warn(
            f"`trainer.{name}`: the {sampler.num_replicas} data-parallel ranks do not divide {items} items, so {twice} of them count(s) twice in "
            f"what is logged. Give {items - items % sampler.num_replicas} or {sampler.total_size} items for exact numbers."
        )


def register(registry: Any) -> None:
    """Make `Trainer(strategy="tp")` known, and the names of its launchers; again is no harm."""
    what = "Tensor parallelism over the devices of a node, FSDP2 over the nodes"
    for name, launcher in (("tp", "auto"), ("tp_notebook", "fork"), ("tp_fork", "fork"), ("tp_spawn", "spawn")):
        if name not in registry:
            registry.register(name, TPStrategy, description=f"{what} (launcher: {launcher})", launcher=launcher)


register(StrategyRegistry)


allow_compiled(TPStrategy)


follow_ckpt_path(TPStrategy)


allow_folders(core_module)


allow_all_precisions(TPStrategy)


wrap_grad_norm()


refuse_batch_size_finder(TPStrategy)


find_lr_by_mean_loss(TPStrategy)
