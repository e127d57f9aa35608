"""`FabricTPStrategy`: the counterpart of `TPStrategy` for Lightning Fabric, where the training loop is the user's own.

    fabric = Fabric(devices=2, strategy=FabricTPStrategy(tp=2, inputs=(tokens,)))
    fabric.launch()
    model, optimizer = fabric.setup(model, optimizer)  # the model is split here, and the optimizer continues with the shards

Fabric has no batch to look at before `setup`: a model that declares no plan needs `plan=`, or `inputs=` to trace it with. What is split, and how,
is the same as under a Trainer. Not available here, since it belongs to a Trainer: `verify=`, and random states in checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from functools import cached_property, partial
from typing import Any, Literal

import torch.distributed as dist
from lightning.fabric.accelerators import Accelerator
from lightning.fabric.plugins import Precision
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.fabric.plugins.precision import MixedPrecision
from lightning.fabric.strategies import STRATEGY_REGISTRY, ModelParallelStrategy
from lightning.fabric.utilities.rank_zero import rank_zero_info, rank_zero_only, rank_zero_warn
from lightning.fabric.utilities.seed import pl_worker_init_function
from torch import nn
from torch.amp import GradScaler
from torch.optim import Optimizer
from torch.utils.data import DataLoader, IterableDataset
from typing_extensions import override

from lightning_tp import checkpoint
from lightning_tp.apply import materialize
from lightning_tp.apply.bind import tag_parameters
from lightning_tp.apply.compile import Compile
from lightning_tp.apply.parallelize import PlanLike, parallelize
from lightning_tp.checkpoint import Peers, SaveContent, StoragePath, save_folder
from lightning_tp.checkpoint.single_file import save_single_file
from lightning_tp.core.comm.mesh import DATA_PARALLEL, TENSOR_PARALLEL
from lightning_tp.core.ops.random_numbers import Dropout, policy_of
from lightning_tp.core.ops.rng import seed_mesh, share_random_states
from lightning_tp.data.group_loader import Ranks, share_loader
from lightning_tp.data.same_batch import check_same_batch
from lightning_tp.errors import TPError, raise_on_rank_zero
from lightning_tp.infer.choose import default_plan
from lightning_tp.infer.search import call_with
from lightning_tp.plan.declared import declared_plan
from lightning_tp.plan.plan import Plan
from lightning_tp.shards import gradients, optimizer_state
from lightning_tp.trainer.adapt.optimizers import check_optimizer
from lightning_tp.trainer.adapt.precision import MeshGradScaler, fsdp_policy
from lightning_tp.trainer.launch.processes import fabric_launcher
from lightning_tp.trainer.loaders import FirstBatches
from lightning_tp.trainer.mesh_strategy import Launcher, MeshStrategyMixin, register
from lightning_tp.trainer.module_plan import plan_of_first_rank
from lightning_tp.trainer.patches import private
from lightning_tp.trainer.patches.process import patch_for_fabrics

STEPS, EPOCHS = ("global_step", "step", "iteration", "iter"), ("current_epoch", "epoch")  # what loops call them, for the manifest


class FabricTPStrategy(MeshStrategyMixin, ModelParallelStrategy):
    """Shard a model across `tp` ranks in `fabric.setup`, and with FSDP2 over the remaining ones.

    `Fabric(devices=4, strategy=FabricTPStrategy(tp=2, inputs=..))` makes a mesh of 2 x 2 ranks: data-parallel x tensor-parallel.
    `setup(model, optimizer)` splits the model in place, and lets an optimizer that has not stepped yet continue with the shards. Data loaders are
    sharded over the data-parallel axis. `clip_gradients`, `no_backward_sync`, `save` and `load` work as in one process.

    `all_reduce` goes over the data-parallel axis, so that each number counts once; `all_gather` over all ranks, as its shape says.

    Args:
        tp: Tensor-parallel size: how many ranks share one model. "auto": the devices of a node.
        dp: Data-parallel size: the number of such groups, over which FSDP2 shards. "auto": the number of devices divided by `tp`.
        plan: How the model is sharded: a mapping pattern -> style, a `Plan`, or the path of its JSON. Default: the module's own `plan`, else it
            is inferred by tracing the module with `inputs`, else the plan that the module declares (`base_model_tp_plan` of Hugging Face).
        inputs: What `forward` is traced with: a mapping of keyword arguments, or a tuple. Default: the module's `example_input_array`.
        activation_checkpointing: None, or "block".
        async_checkpoint: True writes checkpoints in the background; training waits only for a copy to host memory. One at a time; an error is
            raised at the next `save` or `load`, or by `fabric.strategy.finish_saving()`.
        launcher: "popen", "fork", "spawn" or "auto"; with "fork" and "spawn", `fabric.launch` needs a function.

    The other arguments, and what these mean, are as in `TPStrategy`.

    Raises:
        TPError: When the Fabric is created, if `tp` and `dp` do not fit the number of devices; in `setup`, if there is no plan, or it does not fit.

    Example:
        >>> from lightning.fabric import Fabric
        >>> Fabric(accelerator="cpu", devices=4, strategy=FabricTPStrategy(tp=2)).strategy.sizes
        (2, 2)
    """

    host = "Fabric"
    make_launcher = fabric_launcher

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
        super().__init__(self._parallelize, dp, tp, save_distributed_checkpoint, process_group_backend, timeout)
        with raise_on_rank_zero(rank_zero_only.rank):  # type: ignore[attr-defined]
            self.set_mesh_options(tp, dp, launcher, timeout)
            self.set_model_options(plan, sequence_parallel, loss_parallel, activation_checkpointing, compile, dropout)
            self.set_checkpoint_options(save_distributed_checkpoint, async_checkpoint, safe_globals)
            if async_checkpoint and not save_distributed_checkpoint:
                raise TPError(
                    "`async_checkpoint=True` with `save_distributed_checkpoint=False`: one file is gathered while all ranks wait. Leave one out."
                )
            if inputs is not None and not isinstance(inputs, (Mapping, tuple)):
                raise TPError(
                    f"`inputs` is a {type(inputs).__name__}: pass a tuple of the arguments of `forward`, `(tokens,)`, or a dict of its "
                    "keyword arguments."
                )
        self.inputs = inputs
        private.set_backward_sync_control(self, _NoBackwardSync())
        patch_for_fabrics(FabricTPStrategy)

    # ------------------------------------------------------------------------------------------- the Fabric is created

    @override
    def check_package(self) -> None:
        if not isinstance(self.accelerator, Accelerator):
            raise TPError("This is a Fabric of `lightning_fabric`. Import `Fabric` from `lightning.fabric`.")

    @property
    @override
    def precision(self) -> Precision:
        return super().precision

    @precision.setter
    def precision(self, plugin: Precision | None) -> None:
        if isinstance(plugin, MixedPrecision) and type(plugin.scaler) is GradScaler:
            plugin.scaler = MeshGradScaler.like(plugin.scaler)  # all ranks skip a step if a gradient is not finite on one
        ModelParallelStrategy.precision.fset(self, plugin)  # type: ignore[attr-defined]

    @override
    def setup_environment(self) -> None:
        with self.joining_process_group():
            super().setup_environment()
        share_random_states(self.device_mesh)
        scaler = getattr(self.precision, "scaler", None)
        if isinstance(scaler, MeshGradScaler):
            scaler.groups = tuple(self.device_mesh.get_all_groups())

    # --------------------------------------------------------------------------------------------- model, optimizers

    @contextmanager
    @override
    def module_init_context(self, empty_init: bool | None = None) -> Generator[None, None, None]:
        with self.precision.module_init_context(), materialize.init_on_meta() if empty_init else nullcontext():
            yield

    @override
    def setup_module(self, module: nn.Module) -> nn.Module:
        with raise_on_rank_zero(self.global_rank):
            self._parallelize(module)
        module.to(self.root_device)
        tag_parameters(module)  # moving to the device may have replaced them
        seed_mesh(self.device_mesh)
        self.ranks.watch({"module": module})
        return CalledModule(module, self)

    def _parallelize(self, module: nn.Module, *_: Any) -> nn.Module:
        if hasattr(module, "_tp_applied_plan"):  # by the user, with `parallelize`
            return module
        plan = self.plan if self.plan is not None else getattr(module, "plan", None)
        if plan is None and self.sizes[1] > 1:
            plan = self._inferred_plan(module)
        precision = fsdp_policy(self.precision.precision)
        parallelize(module, self.device_mesh, plan, **self.model_options, precision=precision, device=self.root_device)
        rank_zero_info(str(module._tp_applied_plan))
        return module

    def _inferred_plan(self, module: nn.Module) -> Plan | None:
        """Infer the plan on the first rank; None if there is nothing to trace the module with, and it declares a plan."""
        inputs, tp = self.inputs if self.inputs is not None else getattr(module, "example_input_array", None), self.sizes[1]
        name = type(module).__name__
        if inputs is None:
            if declared_plan(module, tp) is None:
                raise TPError(
                    f"There is no plan for {name}, and Fabric has no batch from which one could be inferred before `setup`. Pass "
                    "the arguments of its `forward`, `FabricTPStrategy(inputs=(tokens,))`, or a plan, `FabricTPStrategy(plan=..)`."
                )
            return None
        inputs = inputs if isinstance(inputs, (Mapping, tuple)) else (inputs,)

        def find() -> Plan:
            return default_plan(module, call_with, self.precision.convert_input(inputs), tp)

        remedy = "Check that `forward` runs on these `inputs` in one process, or pass `FabricTPStrategy(plan=..)`"
        return plan_of_first_rank(find, module, tp, traced=f"{name}.forward", remedy=remedy)

    @override
    def setup_module_and_optimizers(
        self, module: nn.Module, optimizers: list[Optimizer], scheduler: Any = None
    ) -> tuple[nn.Module, list[Optimizer], Any]:
        names = {id(p): name for name, p in module.named_parameters()}
        stepped = next((o for o in optimizers if o.state), None)
        with raise_on_rank_zero(self.global_rank):
            if stepped is not None and not hasattr(module, "_tp_applied_plan"):
                raise TPError(
                    f"`setup`: {type(stepped).__name__} has stepped already, and its state belongs to full weights. Set it up first, then "
                    "`fabric.load` a checkpoint."
                )
        called = self.setup_module(module)
        for optimizer in optimizers:  # made before the model was split, as in one process: it continues with the shards
            for group in optimizer.param_groups:
                group["params"] = [module.get_parameter(names[id(p)]) if id(p) in names else p for p in group["params"]]
        return called, [self.setup_optimizer(optimizer) for optimizer in optimizers], scheduler

    @override
    def setup_optimizer(self, optimizer: Optimizer) -> Optimizer:
        with raise_on_rank_zero(self.global_rank):
            check_optimizer(optimizer, *self.sizes, collected="`setup_optimizers`")
        return optimizer

    # -------------------------------------------------------------------------------------------------------- data

    @cached_property
    def ranks(self) -> Ranks:
        """The position of this rank in the mesh, and the random states that its tensor-parallel group shares."""
        return Ranks(self.device_mesh)

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any] | None:  # type: ignore[override]
        return super().distributed_sampler_kwargs if self.sizes[0] > 1 else None  # else the user's own sampler is right

    @override
    def process_dataloader(self, dataloader: DataLoader) -> DataLoader:
        """Seed workers by the data-parallel rank; a stream is read by one rank and scattered, which is a collective."""
        seed = dataloader.worker_init_fn
        if isinstance(seed, partial) and seed.func is pl_worker_init_function:  # Fabric's, by the global rank
            dataloader.worker_init_fn = partial(pl_worker_init_function, rank=self.device_mesh.get_local_rank(DATA_PARALLEL))
        self.ranks.watch({"loader": dataloader})
        if isinstance(dataloader.dataset, IterableDataset):
            shared: DataLoader = share_loader(dataloader, self.ranks, where="a loader of `setup_dataloaders`")
            return shared
        return dataloader

    @override
    def all_reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        if group is None or group is dist.group.WORLD:  # the default; a tensor-parallel group has one and the same number
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
        if filter and self.save_distributed_checkpoint:
            raise TPError("`save`: `filter` works with `save_distributed_checkpoint=False` only. Set that, or leave `filter` out.")
        sharded, rest = _sorted_state(state, filter or {})
        self.finish_saving()
        if not self.save_distributed_checkpoint:
            with raise_on_rank_zero(self.global_rank):
                save_single_file({**sharded, **rest}, place)
            return
        step, epoch = (next((v for k, v in rest.items() if k in names and type(v) is int), 0) for names in (STEPS, EPOCHS))
        trains = any(isinstance(value, Optimizer) for value in state.values())
        manifest = checkpoint.Manifest(step, epoch, self.mesh_sizes_by_axis, checkpoint.versions(), weights_only=not trains)
        data = checkpoint.to_bytes(rest) if self.is_global_zero else None
        content = SaveContent(self.checkpoint_writer.snapshot(sharded), rest=data, about=manifest)
        self.checkpoint_writer.write(place, partial(save_folder, place, content, self.checkpoint_writer.peers()))

    def finish_saving(self) -> None:
        """Wait until no checkpoint is being written, with `async_checkpoint=True`; `TPError` if it could not be written."""
        self.checkpoint_writer.finish()

    @override
    def load_checkpoint(
        self, path: Any, state: Any = None, strict: bool = True, weights_only: bool | None = None
    ) -> dict[str, Any]:
        path = str(self.broadcast(str(path)))
        options: dict[str, Any] = {"safe_globals": self.safe_globals, "weights_only": weights_only}
        self.finish_saving()
        with raise_on_rank_zero(self.global_rank):
            if not state or isinstance(state, Optimizer):
                raise TPError("`load`: pass what to load it into, `fabric.load(path, {'model': model, 'optimizer': optimizer})`.")
            place, _ = checkpoint.select_intact(StoragePath(path), Peers())
            if isinstance(state, nn.Module):  # load_raw
                _inner(state).load_state_dict(checkpoint.load(place, **options), strict=strict)
                return {}
            return _load(place, state, strict, options)


def _sorted_state(state: dict[str, Any], filter: dict[str, Callable[[str, Any], bool]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what is sharded, the rest) of what `fabric.save` was given."""
    sharded: dict[str, Any] = {}
    rest: dict[str, Any] = {}
    for key, value in state.items():
        target = sharded
        if isinstance(value, nn.Module):
            value = _inner(value).state_dict()
        elif isinstance(value, Optimizer):
            value = optimizer_state.optimizer_state(value)
        else:
            target, value = rest, value.state_dict() if isinstance(value, private.Stateful) else value
        private.apply_filter(key, filter, value, target)
    return sharded, rest


def _load(place: StoragePath, state: dict[str, Any], strict: bool, options: dict[str, Any]) -> dict[str, Any]:
    """Load modules and optimizers, then the rest of `state`, in place; what `state` does not ask for is returned."""
    one_file = place.is_file()
    stored: dict[str, Any] = checkpoint.load(place if one_file else place / "meta.pt", mmap=one_file, **options)
    rest = [key for key, value in state.items() if not isinstance(value, (nn.Module, Optimizer))]
    for key in [key for key in state if key not in rest]:  # in the same order on all ranks
        value = state[key]
        if one_file and key not in stored:
            raise TPError(f"`{place}` has no `{key}`, but {sorted(map(str, stored))}.")
        if isinstance(value, Optimizer):
            if one_file:
                optimizer_state.load_optimizer_state(value, stored.pop(key))
            else:
                checkpoint.load_optimizer(value, place, key, **options)
        elif one_file:
            _inner(value).load_state_dict(stored.pop(key), strict=strict)
        else:
            checkpoint.load_model(_inner(value), place, strict=strict, key=key)
    private.check_keys(rest, stored.keys(), strict=strict)
    private.move_state_into(source=stored, destination=state, keys=set(rest))
    return stored


class CalledModule(nn.Module):
    """What Fabric calls, so that methods of the module go through `__call__`, too; the first batches are compared in each group."""

    def __init__(self, module: nn.Module, strategy: FabricTPStrategy) -> None:
        super().__init__()
        self.module, self._strategy, self._batches = module, strategy, FirstBatches()
        # the forward of a module without `training_step` is a step itself
        self._random_calls = policy_of(module) if hasattr(module, "training_step") else None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module."""
        strategy = self._strategy
        if strategy.sizes[1] > 1 and self._batches.is_due("forward"):
            strategy.ranks.agree(0, rank_zero_warn)
        if strategy.sizes[1] > 1 and self._batches.next("forward") is not None:
            group = strategy.device_mesh.get_group(TENSOR_PARALLEL)
            with raise_on_rank_zero(strategy.global_rank % strategy.sizes[1]):
                check_same_batch((args, kwargs), group, strategy.root_device, f"forward of {type(self.module).__name__}")
        with self._random_calls.step() if self._random_calls is not None and self.module.training else nullcontext():
            return self.module(*args, **kwargs)


def _inner(module: nn.Module) -> nn.Module:
    return module.module if isinstance(module, CalledModule) else module


class _NoBackwardSync(private.BackwardSyncControl):
    """`fabric.no_backward_sync`: gradients are not reduced over either axis."""

    @override
    def no_backward_sync(self, module: nn.Module, enabled: bool) -> AbstractContextManager:
        return gradients.no_sync(_inner(module)) if enabled else nullcontext()


register(STRATEGY_REGISTRY, FabricTPStrategy)
