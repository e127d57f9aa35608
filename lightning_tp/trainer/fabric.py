"""`FabricTPStrategy`: the twin of `TPStrategy` for Lightning Fabric, whose loops are the user's own.

    fabric = Fabric(devices=2, strategy=FabricTPStrategy(tp=2, inputs=(tokens,)))
    fabric.launch()
    model, optimizer = fabric.setup(model, optimizer)      # split here; the optimizer goes on with the shards

Fabric has no batch to look at before `setup`: a model that declares no plan needs `plan=`, or `inputs=` to run it on. What is split, and how,
is as under a Trainer (`apply.py`). Not here, since they are a Trainer's: `verify=`, and random states in checkpoints.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.fabric.accelerators import Accelerator
from lightning.fabric.connector import _Connector
from lightning.fabric.plugins import Precision
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.fabric.plugins.precision import MixedPrecision
from lightning.fabric.strategies import STRATEGY_REGISTRY, ModelParallelStrategy
from lightning.fabric.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from lightning.fabric.strategies.strategy import _apply_filter, _BackwardSyncControl, _validate_keys_for_strict_loading
from lightning.fabric.utilities.load import _move_state_into
from lightning.fabric.utilities.rank_zero import rank_zero_info, rank_zero_only
from lightning.fabric.utilities.seed import pl_worker_init_function
from lightning.fabric.utilities.types import _Stateful
from torch import nn
from torch.amp import GradScaler
from torch.multiprocessing import ProcessRaisedException
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader, IterableDataset
from typing_extensions import override

from lightning_tp import checkpoint
from lightning_tp.apply import materialize
from lightning_tp.apply.bind import tag_parameters
from lightning_tp.apply.compile import Compile
from lightning_tp.apply.parallelize import PlanLike, check_options, parallelize
from lightning_tp.checkpoint import Background, HostCopy, Manifest, Peers, SaveContent, StoragePath, group_for_saving
from lightning_tp.checkpoint.single_file import save_single_file
from lightning_tp.core.comm.mesh import DATA_PARALLEL, TENSOR_PARALLEL
from lightning_tp.core.ops.random_numbers import Dropout, policy_of
from lightning_tp.core.ops.rng import seed_mesh
from lightning_tp.core.ops.split_logits import SplitLogits
from lightning_tp.data.group_loader import Ranks, share_loader
from lightning_tp.data.same_batch import check_same_batch
from lightning_tp.errors import TPError, raise_on_rank_zero
from lightning_tp.infer.choose import default_plan
from lightning_tp.infer.search import call_with
from lightning_tp.plan.check import any_split, splits_nothing
from lightning_tp.plan.declared import declared_plan
from lightning_tp.plan.plan import Plan
from lightning_tp.shards import gradients, optimizer_state
from lightning_tp.trainer.adapt.optimizers import check_optimizer
from lightning_tp.trainer.adapt.precision import MeshGradScaler, fsdp_policy
from lightning_tp.trainer.launch.processes import from_file, one_thread, own_error, refuse_used_cuda, to_file
from lightning_tp.trainer.mesh_strategy import Launcher, MeshStrategyMixin, check_launcher
from lightning_tp.trainer.patches import REFUSED_BY_LIGHTNING

CHECKED_BATCHES = 3
_STEPS, _EPOCHS = ("global_step", "step", "iteration", "iter"), ("current_epoch", "epoch")  # what loops call them, for the manifest


class FabricTPStrategy(MeshStrategyMixin, ModelParallelStrategy):
    """Split a model over `tp` ranks in `fabric.setup`, and shard it by FSDP2 over the others.

    `Fabric(devices=4, strategy=FabricTPStrategy(tp=2, inputs=..))` is a mesh of 2 x 2 ranks: data-parallel x tensor-parallel.
    `setup(model, optimizer)` splits the model in place, and lets an optimizer that has not stepped yet go on with the shards. Data loaders are
    split over the data-parallel axis. `clip_gradients`, `no_backward_sync`, `save` and `load` are as in one process.

    `all_reduce` goes over the data-parallel axis, so that each number is counted once; `all_gather` over all ranks, as its shape says.

    Args:
        tp: how many ranks share one model. "auto": those of a node.
        dp: over how many such groups data and FSDP2's shards are spread. "auto": what is left of the world.
        plan: how the model is split: a mapping pattern -> style, a `Plan`, or the path of its JSON. Default: the module's own `plan`, else it
            is found by running the module on `inputs`, else what the module declares (`base_model_tp_plan` of Hugging Face).
        inputs: to run the module on: a mapping of keyword arguments, or a tuple. Default: its `example_input_array`.
        sequence_parallel: False keeps activations whole between the split modules, whatever the plan says.
        loss_parallel: False gathers logits where they are made.
        activation_checkpointing: "block" keeps only the input of each repeated block for the backward.
        compile: True compiles each repeated block by `torch.compile`; also the name of a backend.
        dropout: "independent" or "exact", as in `TPStrategy`.
        save_distributed_checkpoint: False gathers a checkpoint in one file, on rank 0.
        async_checkpoint: True writes checkpoints beside training, which waits for a copy in host memory only. One at a time; an error is raised
            at the next `save` or `load`, or by `fabric.strategy.finish_saving()`.
        safe_globals: classes of your own that a checkpoint may have in it, and be loaded.
        launcher: "popen", "fork", "spawn" or "auto", as in `TPStrategy`; with "fork" and "spawn", `fabric.launch` needs a function.
        process_group_backend: of torch.distributed; default: gloo on CPU, nccl on CUDA.
        timeout: of its collectives.

    Raises:
        TPError: when the Fabric is made, if tp and dp don't make up the world; in `setup`, if there is no plan, or it does not fit.

    Example:
        >>> from lightning.fabric import Fabric
        >>> Fabric(accelerator="cpu", devices=4, strategy=FabricTPStrategy(tp=2)).strategy.sizes
        (2, 2)
    """

    def __init__(
        self,
        tp: int | Literal["auto"] = "auto",
        dp: int | Literal["auto"] = "auto",
        *,
        plan: PlanLike | None = None,
        inputs: Mapping[str, Any] | tuple[Any, ...] | None = None,
        sequence_parallel: bool = True,
        loss_parallel: bool = True,
        activation_checkpointing: Literal["block"] | None = None,
        compile: Compile = False,
        dropout: Dropout = "independent",
        save_distributed_checkpoint: bool = True,
        async_checkpoint: bool = False,
        safe_globals: list[Any] | None = None,
        launcher: Launcher = "auto",
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        super().__init__(
            parallelize_fn=self._parallelize,
            data_parallel_size=dp,
            tensor_parallel_size=tp,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        with raise_on_rank_zero(rank_zero_only.rank):  # type: ignore[attr-defined]
            check_launcher(launcher)
            check_options(activation_checkpointing, compile, dropout, "local")
            if async_checkpoint and not save_distributed_checkpoint:
                raise TPError(
                    "`async_checkpoint=True` with `save_distributed_checkpoint=False`: one file is gathered while all wait. Leave one of them out."
                )
            if inputs is not None and not isinstance(inputs, (Mapping, tuple)):
                raise TPError(
                    f"`inputs` is a {type(inputs).__name__}: give a tuple of what `forward` is called with, `(tokens,)`, or a dict of its "
                    "keyword arguments."
                )
            self.plan = Plan.of(plan) if plan is not None else None
        self.inputs = inputs
        self.options: dict[str, Any] = {
            "sequence_parallel": sequence_parallel,
            "loss_parallel": loss_parallel,
            "activation_checkpointing": activation_checkpointing,
            "compile": compile,
            "dropout": dropout,
        }
        self.async_checkpoint = async_checkpoint
        self._background, self._host_copy = Background(), HostCopy()
        self._asked = (tp, dp)
        self.safe_globals: list[Any] = list(safe_globals or [])
        self._launch_by: Launcher = launcher
        self._backward_sync_control = _Unsummed()

    # ------------------------------------------------------------------------------------------- the Fabric is made

    @property
    def _launcher_class(self) -> type[_ProcessLauncher]:
        return _ProcessLauncher

    @override
    def _check_package(self) -> None:
        if not isinstance(self.accelerator, Accelerator):
            raise TPError("This Fabric is that of `lightning_fabric`. Import it from `lightning.fabric`.")

    @property
    @override
    def precision(self) -> Precision:
        return super().precision

    @precision.setter
    def precision(self, plugin: Precision | None) -> None:
        if isinstance(plugin, MixedPrecision) and type(plugin.scaler) is GradScaler:
            plugin.scaler = MeshGradScaler.like(plugin.scaler)  # a gradient that is not finite on one rank is everybody's
        self._precision = plugin

    @override
    def setup_environment(self) -> None:
        self._data_parallel_size, self._tensor_parallel_size = self.sizes
        state = torch.get_rng_state()
        with self._one_start():
            super().setup_environment()
        self._limit_waiting()
        torch.set_rng_state(state)  # Lightning seeds anew here: go on as one process would
        scaler = getattr(self.precision, "scaler", None)
        if isinstance(scaler, MeshGradScaler):
            scaler.groups = tuple(group for group in self.device_mesh.get_all_groups() if group.size() > 1)

    # --------------------------------------------------------------------------------------------- model, optimizers

    @override
    def module_init_context(self, empty_init: bool | None = None) -> AbstractContextManager:
        return self._init_context(empty_init)

    @contextmanager
    def _init_context(self, empty_init: bool | None) -> Generator[None, None, None]:
        with self.precision.module_init_context(), materialize.init_on_meta() if empty_init else nullcontext():
            yield

    @override
    def setup_module(self, module: nn.Module) -> nn.Module:
        with raise_on_rank_zero(self.global_rank):
            self._parallelize(module)
        module.to(self.root_device)
        tag_parameters(module)
        seed_mesh(self.device_mesh)
        return _Called(module, self)

    def _parallelize(self, module: nn.Module, *_: Any) -> nn.Module:
        if hasattr(module, "_tp_applied_plan"):  # by the user, with `parallelize`
            return module
        plan = self.plan if self.plan is not None else getattr(module, "plan", None)
        if plan is None and self.sizes[1] > 1:
            plan = self._found_plan(module)
        parallelize(
            module,
            self.device_mesh,
            plan,
            precision=fsdp_policy(self.precision.precision),
            device=self.root_device,
            **self.options,
        )
        rank_zero_info(str(module._tp_applied_plan))
        return module

    def _found_plan(self, module: nn.Module) -> Plan | None:
        """The plan that the first rank finds; None: what the module declares has to do."""
        inputs = self.inputs if self.inputs is not None else getattr(module, "example_input_array", None)
        tp = self.sizes[1]
        if inputs is None:
            if declared_plan(module, tp) is None:
                raise TPError(
                    f"There is no plan for {type(module).__name__}, and Fabric has no batch on which one could be found before `setup`. Give "
                    "what its `forward` is called with, `FabricTPStrategy(inputs=(tokens,))`, or a plan: `FabricTPStrategy(plan=..)`."
                )
            return None
        inputs = inputs if isinstance(inputs, (Mapping, tuple)) else (inputs,)
        found: list[Plan | str | None] = [None]
        if self.is_global_zero:
            try:
                plan = default_plan(module, call_with, self.precision.convert_input(inputs), tp)
                found = [plan if any_split(plan.check(module, tp).entries) else splits_nothing(plan, module, tp)]
            except TPError as error:
                found = [str(error)]
            except Exception as error:  # whatever the forward raises: the other ranks wait for an answer
                found = [f"`inputs`: {type(module).__name__} can't be run on them to find a plan: {type(error).__name__}: {error}"]
        dist.broadcast_object_list(found, src=0)
        if not isinstance(found[0], Plan):
            raise TPError(str(found[0]))
        return found[0]

    @override
    def setup_module_and_optimizers(
        self, module: nn.Module, optimizers: list[Optimizer], scheduler: Any = None
    ) -> tuple[nn.Module, list[Optimizer], Any]:
        names = {id(p): name for name, p in module.named_parameters()}
        stepped = next((o for o in optimizers if o.state), None)
        with raise_on_rank_zero(self.global_rank):
            if stepped is not None and not hasattr(module, "_tp_applied_plan"):
                raise TPError(
                    f"`setup`: {type(stepped).__name__} has stepped already, and its state is of whole weights. Set it up first, then "
                    "`fabric.load` a checkpoint."
                )
        called = self.setup_module(module)
        for optimizer in optimizers:  # made before the split, as in one process: it goes on with the shards
            for group in optimizer.param_groups:
                group["params"] = [module.get_parameter(names[id(p)]) if id(p) in names else p for p in group["params"]]
        return called, [self.setup_optimizer(optimizer) for optimizer in optimizers], scheduler

    @override
    def setup_optimizer(self, optimizer: Optimizer) -> Optimizer:
        with raise_on_rank_zero(self.global_rank):
            check_optimizer(optimizer, *self.sizes, collected="`setup_optimizers`")
        return optimizer

    # -------------------------------------------------------------------------------------------------------- data

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any] | None:  # type: ignore[override]
        return super().distributed_sampler_kwargs if self.sizes[0] > 1 else None  # else the user's own sampler is right

    @override
    def process_dataloader(self, dataloader: DataLoader) -> DataLoader:
        """Workers are seeded by the data-parallel rank; a stream is read by one rank and dealt out (`data/shared.py`), which is a collective."""
        of_worker = dataloader.worker_init_fn
        if isinstance(of_worker, partial) and of_worker.func is pl_worker_init_function:  # Fabric's, by the global rank
            dataloader.worker_init_fn = partial(pl_worker_init_function, rank=self.device_mesh.get_local_rank(DATA_PARALLEL))
        if isinstance(dataloader.dataset, IterableDataset):
            shared: DataLoader = share_loader(dataloader, Ranks(self.device_mesh), where="a loader of `setup_dataloaders`")
            return shared
        return dataloader

    @override
    def all_reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        if group is None or group is dist.group.WORLD:  # which Fabric fills in: ranks of one tensor-parallel group have the same
            group = self.device_mesh.get_group(DATA_PARALLEL)
        return super().all_reduce(tensor, group, reduce_op)

    # ------------------------------------------------------------------------------------------------- checkpoints

    @override
    def save_checkpoint(
        self,
        path: Any,
        state: dict[str, Any],
        storage_options: Any = None,
        filter: dict[str, Callable[[str, Any], bool]] | None = None,
    ) -> None:
        place = StoragePath(str(self.broadcast(str(path))), storage_options)
        if filter and self._save_distributed_checkpoint:
            raise TPError("`save`: `filter` needs `save_distributed_checkpoint=False`. Leave it out.")
        whole: dict[str, Any] = {}
        rest: dict[str, Any] = {}
        for key, value in state.items():
            target = whole
            if isinstance(value, nn.Module):
                value = _inner(value).state_dict()
            elif isinstance(value, Optimizer):
                value = optimizer_state.optimizer_state(value)
            else:
                target, value = rest, value.state_dict() if isinstance(value, _Stateful) else value
            _apply_filter(key, filter or {}, value, target)
        self.finish_saving()
        if not self._save_distributed_checkpoint:
            with raise_on_rank_zero(self.global_rank):
                save_single_file({**whole, **rest}, place)
            return
        step, epoch = (next((v for k, v in rest.items() if k in names and type(v) is int), 0) for names in (_STEPS, _EPOCHS))
        sizes = dict(zip((DATA_PARALLEL, TENSOR_PARALLEL), self.sizes))
        optimizers = any(isinstance(value, Optimizer) for value in state.values())
        about = Manifest(step=step, epoch=epoch, mesh=sizes, versions=checkpoint.versions(), weights_only=not optimizers)
        data = checkpoint.to_bytes(rest) if self.is_global_zero else None
        if not self.async_checkpoint:
            checkpoint.save_folder(place, SaveContent(whole, rest=data, about=about), Peers())
            return
        content, world = SaveContent(self._host_copy.copy(whole), rest=data, about=about), Peers(group_for_saving())
        self._background.start(f"Saving `{place}`", lambda: checkpoint.save_folder(place, content, world))

    def finish_saving(self) -> None:
        """Wait until no save is under way, with `async_checkpoint=True`.

        Raises:
            TPError: if it failed.
        """
        self._background.wait()

    @override
    def load_checkpoint(
        self, path: Any, state: Any = None, strict: bool = True, weights_only: bool | None = None
    ) -> dict[str, Any]:
        path = str(self.broadcast(str(path)))
        self.finish_saving()
        with raise_on_rank_zero(self.global_rank):
            if not state or isinstance(state, Optimizer):
                raise TPError("`load`: say into what, `fabric.load(path, {'model': model, 'optimizer': optimizer})`.")
            if isinstance(state, nn.Module):  # load_raw
                place, _ = checkpoint.select_intact(StoragePath(path), Peers())
                raw = checkpoint.load(place, safe_globals=self.safe_globals, weights_only=weights_only)
                _inner(state).load_state_dict(raw, strict=strict)
                return {}
            place, _ = checkpoint.select_intact(StoragePath(path), Peers())
            return self._load(place, state, strict, weights_only)

    def _load(self, path: StoragePath, state: dict[str, Any], strict: bool, weights_only: bool | None) -> dict[str, Any]:
        one_file = path.is_file()
        safe: dict[str, Any] = {"safe_globals": self.safe_globals, "weights_only": weights_only}
        stored: dict[str, Any] = checkpoint.load(path if one_file else path / "meta.pt", mmap=one_file, **safe)
        rest = [key for key, value in state.items() if not isinstance(value, (nn.Module, Optimizer))]
        for key in [key for key in state if key not in rest]:  # in the same order on all ranks
            value = state[key]
            if one_file and key not in stored:
                raise TPError(f"`{path}` has no `{key}`, but {sorted(map(str, stored))}.")
            if isinstance(value, Optimizer):
                if one_file:
                    optimizer_state.load_optimizer_state(value, stored.pop(key))
                else:
                    checkpoint.load_optimizer(value, path, key, **safe)
            elif one_file:
                _inner(value).load_state_dict(stored.pop(key), strict=strict)
            else:
                checkpoint.load_model(_inner(value), path, strict=strict, key=key)
        _validate_keys_for_strict_loading(rest, stored.keys(), strict=strict)
        _move_state_into(source=stored, destination=state, keys=set(rest))
        return stored


class _Called(nn.Module):
    """What Fabric calls, so that its methods come through `__call__`, too; the first batches are compared inside each group."""

    def __init__(self, module: nn.Module, strategy: FabricTPStrategy) -> None:
        super().__init__()
        self.module = module
        self._strategy = strategy
        self._left = CHECKED_BATCHES if strategy.sizes[1] > 1 else 0
        self._draws = policy_of(module) if hasattr(module, "training_step") else None  # another module's forward is a step itself

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._left:
            self._left -= 1
            of = self._strategy
            group = of.device_mesh.get_group(TENSOR_PARALLEL)
            with raise_on_rank_zero(of.global_rank % of.sizes[1]):
                check_same_batch((args, kwargs), group, of.root_device, f"forward of {type(self.module).__name__}")
        with self._draws.step() if self._draws is not None and self.module.training else nullcontext():
            return self.module(*args, **kwargs)


def _inner(module: nn.Module) -> nn.Module:
    return module.module if isinstance(module, _Called) else module


class _Unsummed(_BackwardSyncControl):
    """`fabric.no_backward_sync`: gradients are left unsummed over both axes."""

    @override
    def no_backward_sync(self, module: nn.Module, enabled: bool) -> AbstractContextManager:
        return gradients.no_sync(_inner(module)) if enabled else nullcontext()


class _ProcessLauncher(_MultiProcessingLauncher):
    @override
    def launch(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        refuse_used_cuda(self._strategy, self._start_method)
        try:
            return from_file(super().launch(partial(_in_file, function), *args, **kwargs))
        except ProcessRaisedException as error:
            if own := own_error(error):
                raise own from None
            raise

    @override
    def _wrapping_function(self, *args: Any, **kwargs: Any) -> None:
        one_thread(self._start_method)
        super()._wrapping_function(*args, **kwargs)


def _in_file(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Path | None:
    results = tree_map_only(SplitLogits, lambda logits: logits.full_tensor(), function(*args, **kwargs))  # every rank takes part
    return to_file(results) if int(os.environ["LOCAL_RANK"]) == 0 else None


def allow_all_precisions() -> None:
    """Let a Fabric with this strategy have the precisions that Lightning refuses for all strategies of its kind; once."""
    own: Any = _Connector._check_and_init_precision
    if hasattr(own, "_lightning_tp"):
        return

    def check(self: _Connector) -> Precision:
        if not (isinstance(self.strategy, FabricTPStrategy) and self._precision_input in REFUSED_BY_LIGHTNING):
            return own(self)
        strategy, self.strategy = self.strategy, None  # it asks for the kind of strategy only
        try:
            return own(self)
        finally:
            self.strategy = strategy

    check._lightning_tp = True  # type: ignore[attr-defined]
    _Connector._check_and_init_precision = check  # type: ignore[method-assign]


def register(registry: Any) -> None:
    """Make `Fabric(strategy="tp")` known, and the names of its launchers; again is no harm."""
    for name, launcher in (("tp", "auto"), ("tp_notebook", "fork"), ("tp_fork", "fork"), ("tp_spawn", "spawn")):
        if name not in registry:
            registry.register(name, FabricTPStrategy, description="Tensor parallelism, FSDP2 over the nodes", launcher=launcher)


register(STRATEGY_REGISTRY)
allow_all_precisions()
