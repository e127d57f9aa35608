"""The table of all places where this package replaces or overrides code of another one.

Other packages have no public extension point for these. `replaced.py` makes the patches of Lightning and torchmetrics: it looks them up here and
compares the signature first. Rows whose file is below `trainer/` are listed for the reader, and checked by the tests.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

# the versions that these patches were tested with
TESTED: dict[str, tuple[str, ...]] = {
    package: ("2.6.0", "2.6.1", "2.6.6") for package in ("lightning", "pytorch_lightning", "lightning_fabric")
}
TESTED |= {"torchmetrics": ("1.9.0",), "torch": ("2.13.0",)}


class Scope(Enum):
    """For how long a patch is in place, and for whom."""

    IMPORT = "since this package was imported"
    PROCESS = "since the first strategy of this package was made, or the first model split"
    RUN = "while a Trainer with TPStrategy runs"
    OBJECT = "on the objects of one Trainer, while it runs"
    CALL = "during one call"
    SUBCLASS = "in a subclass of this package"


@dataclass(frozen=True)
class Patch:
    """One function, method or attribute of another package that this one replaces."""

    target: str  # `package.module:name`, or `package.module:Class.name`
    signature: str | None  # the parameters that the replacement relies on; None for an attribute that is not a function
    scope: Scope
    by: str  # the file of this package that replaces it
    reason: str  # what works because of it
    needed: bool = False  # results would be wrong without it: a changed signature raises `TPError`; else the original stays

    @property
    def package(self) -> str:
        return self.target.partition(":")[0].partition(".")[0]

    @property
    def versions_tested(self) -> tuple[str, ...]:
        return TESTED.get(self.package, ())


IMPORT, PROCESS, RUN, OBJECT, CALL, SUBCLASS = Scope

# fmt: off
PATCHES: list[Patch] = [
    # ---------------------------------------------------------------------------------------------------- for good, in this process
    Patch("lightning.pytorch.core.module:_load_from_checkpoint",
          "(cls, checkpoint_path, map_location, hparams_file, strict, weights_only, **kwargs)", IMPORT, "trainer/patches/process.py",
          "`MyModule.load_from_checkpoint` takes a sharded folder, where Lightning raises IsADirectoryError"),
    Patch("lightning.pytorch.trainer.connectors.accelerator_connector:_AcceleratorConnector._validate_precision_choice",
          "(self)", PROCESS, "trainer/patches/process.py",
          "`Trainer(precision='16-mixed')` and '64-true', which Lightning refuses for every ModelParallelStrategy"),
    Patch("lightning.fabric.connector:_Connector._check_and_init_precision", "(self)", PROCESS, "trainer/patches/process.py",
          "the same precisions for `Fabric`"),
    Patch("lightning.pytorch.utilities.grads:grad_norm", "(module, norm_type, group_separator)", PROCESS, "trainer/patches/process.py",
          "norms of the full gradients of a split model, not of this rank's shards (its `__code__`: wherever it was imported)"),
    Patch("lightning.pytorch.tuner.tuning:_check_scale_batch_size_configuration", "(trainer)", PROCESS, "trainer/patches/process.py",
          "an error with advice for `Tuner.scale_batch_size`, before any process is started"),
    Patch("pytorch_lightning.strategies:Strategy.register", None, PROCESS, "trainer/patches/process.py",
          "the other package's Trainer takes the strategy as far as the error that says which import is right (an ABC's public method)"),
    Patch("torch.nn.utils.clip_grad:_get_total_norm", "(tensors, norm_type, error_if_nonfinite, foreach)", PROCESS, "_compat/modules.py",
          "`torch.nn.utils.clip_grad_norm_`, however it was imported, takes the norm of the full gradients of a split model", needed=True),
    Patch("torch.nn.utils:get_total_norm", "(tensors, norm_type, error_if_nonfinite, foreach)", PROCESS, "_compat/modules.py",
          "the same norm by itself", needed=True),
    Patch("torch.optim.optimizer:_group_tensors_by_device_and_dtype", "(tensorlistlist, with_indices)", PROCESS, "_compat/modules.py",
          "with `backend='dtensor'`, `foreach` and `fused` optimizers take plain parameters and DTensors together", needed=True),
    Patch("torch.nn.utils.clip_grad:_group_tensors_by_device_and_dtype", "(tensorlistlist, with_indices)", PROCESS, "_compat/modules.py",
          "likewise what clips gradients", needed=True),
    Patch("torch.backends.mha:set_fastpath_enabled", "(value)", PROCESS, "core/ops/attention.py",
          "off: the fused layer of nn.TransformerEncoder reads full weights (a public switch)"),
    Patch("torch.nn:Module.register_forward_hook", "(self, hook, prepend, with_kwargs, always_call)", PROCESS, "apply/unsplit.py",
          "hooks that are registered after the split see full activations; unsplit modules register as before", needed=True),
    Patch("torch.nn:Module.register_forward_pre_hook", "(self, hook, prepend, with_kwargs)", PROCESS, "apply/unsplit.py",
          "the same", needed=True),
    Patch("torch.nn:Module.register_full_backward_hook", "(self, hook, prepend)", PROCESS, "apply/unsplit.py",
          "the same", needed=True),
    Patch("torch.nn:Module.register_full_backward_pre_hook", "(self, hook, prepend)", PROCESS, "apply/unsplit.py",
          "the same", needed=True),
    # ----------------------------------------------------------------------------------------- while a Trainer with TPStrategy runs
    Patch("lightning.pytorch.trainer.connectors.checkpoint_connector:_CheckpointConnector._parse_ckpt_path",
          "(self, state_fn, ckpt_path, model_provided, model_connected)", OBJECT, "trainer/patches/run.py",
          "`ckpt_path='last'` finds what was saved last though a run died in the middle of a save; one error on one rank"),
    Patch("lightning.pytorch.trainer.connectors.accelerator_connector:_AcceleratorConnector.use_distributed_sampler",
          None, OBJECT, "trainer/patches/run.py",
          "with dp=1 every rank reads all the data, in the user's own order"),
    Patch("lightning.pytorch.trainer.connectors.checkpoint_connector:_CheckpointConnector._ckpt_path", None, OBJECT, "trainer/patches/private.py",
          "`trainer.ckpt_path` is the checkpoint that was loaded instead of a damaged one"),
    Patch("lightning.pytorch.trainer.trainer:Trainer._run_stage", "(self)", OBJECT, "trainer/launch/watchdog.py",
          "the watchdog sees an exception in forked and spawned ranks, where Lightning calls no `on_exception`"),
    Patch("lightning.pytorch.trainer.connectors.signal_connector:_SignalConnector._sigterm_notifier_fn",
          "(self, signum, _)", OBJECT, "trainer/launch/requested_end.py",
          "SIGTERM to one rank or to all ends them after one batch; Lightning's handler broadcasts, wherever the other ranks are"),
    Patch("lightning.pytorch.trainer.connectors.signal_connector:_SignalConnector._slurm_sigusr_handler_fn",
          "(self, signum, _)", OBJECT, "trainer/launch/requested_end.py",
          "SLURM's signal before a time limit: the checkpoint, a collective, is saved between two batches on all ranks"),
    Patch("lightning.pytorch.loops.training_epoch_loop:_TrainingEpochLoop._broadcast_sigterm_tensor",
          "(self)", OBJECT, "trainer/launch/requested_end.py",
          "ranks agree on that over the store: no copy to the device, broadcast over all ranks and wait for it in each micro-batch"),
    Patch("lightning.pytorch.loops.fit_loop:_FitLoop.setup_data", "(self)", OBJECT, "trainer/adapt/global_batch.py",
          "`TPStrategy(global_batch=..)`: the micro-batch size is known once the loader is there", needed=True),
    Patch("lightning.pytorch.tuner.lr_finder:_LRCallback.on_train_batch_end",
          "(self, trainer, pl_module, outputs, batch, batch_idx)", RUN, "trainer/patches/run.py",
          "`lr_find` looks at the mean loss of the data-parallel ranks; Lightning takes rank 0's (the callback is made during the run)"),
    Patch("torchmetrics.metric:gather_all_tensors", "(result, group)", RUN, "trainer/adapt/metrics.py",
          "metrics are gathered over the data-parallel ranks, so that each batch counts once", needed=True),
    Patch("lightning.pytorch.trainer.connectors.logger_connector.result:_ResultCollection.log",
          "(self, fx, name, value)", RUN, "trainer/adapt/metrics.py",
          "`self.log` of a sharded tensor logs the full one"),
    Patch("lightning.pytorch.callbacks.model_summary:ModelSummary._summary", "(self, trainer, pl_module)", OBJECT, "trainer/adapt/metrics.py",
          "the summary counts the parameters of the full model, and next to them those of a device"),
    Patch("lightning.pytorch.callbacks.throughput_monitor:ThroughputMonitor._throughputs", None, OBJECT, "trainer/patches/private.py",
          "samples are counted over the data-parallel ranks, and FLOPs shared by a tensor-parallel group (each run makes its own)"),
    Patch("lightning.pytorch.callbacks.prediction_writer:BasePredictionWriter.write_on_batch_end",
          "(self, trainer, pl_module, prediction, batch_indices, batch, batch_idx, dataloader_idx)", OBJECT, "trainer/adapt/metrics.py",
          "each prediction is written once, by the first rank of its tensor-parallel group"),
    Patch("lightning.pytorch.callbacks.prediction_writer:BasePredictionWriter.write_on_epoch_end",
          "(self, trainer, pl_module, predictions, batch_indices)", OBJECT, "trainer/adapt/metrics.py",
          "the same at the end"),
    Patch("lightning.pytorch.callbacks.weight_averaging:WeightAveraging.setup",
          "(self, trainer, pl_module, stage)", RUN, "trainer/adapt/averaging.py",
          "the average is made of the shards, once the model is split (on the class: subclasses call `super().setup`)", needed=True),
    Patch("lightning.pytorch.callbacks.weight_averaging:WeightAveraging._swap_models", "(self, pl_module)", RUN, "trainer/adapt/averaging.py",
          "average and weights change places shard by shard", needed=True),
    Patch("lightning.pytorch.callbacks.weight_averaging:WeightAveraging._copy_average_to_current",
          "(self, pl_module)", RUN, "trainer/adapt/averaging.py",
          "the average is copied into the weights shard by shard", needed=True),
    Patch("lightning.pytorch.callbacks.stochastic_weight_avg:StochasticWeightAveraging.setup",
          "(self, trainer, pl_module, stage)", RUN, "trainer/adapt/averaging.py",
          "as for WeightAveraging", needed=True),
    Patch("lightning.pytorch.callbacks.stochastic_weight_avg:StochasticWeightAveraging.update_parameters",
          "(average_model, model, n_averaged, avg_fn)", RUN, "trainer/adapt/averaging.py",
          "as for WeightAveraging", needed=True),
    Patch("lightning.pytorch.callbacks.stochastic_weight_avg:StochasticWeightAveraging.transfer_weights",
          "(src_pl_module, dst_pl_module)", RUN, "trainer/adapt/averaging.py",
          "as for WeightAveraging", needed=True),
    Patch("lightning.pytorch.callbacks.stochastic_weight_avg:StochasticWeightAveraging.load_state_dict",
          "(self, state_dict)", RUN, "trainer/adapt/averaging.py",
          "a resumed run uses SWA's scheduler: Lightning's own place for it is too early for a strategy that restores after its setup", needed=True),
    Patch("warnings:filters", None, RUN, "trainer/patches/run.py",
          "two warnings that every run gives, whatever the user does, are not shown"),
    Patch("lightning.fabric.strategies.launchers.subprocess_script:_ChildProcessObserver._terminate_all",
          "(self)", OBJECT, "trainer/launch/processes.py",
          "ranks get some seconds to report which of them failed before Lightning's launcher kills all (on the thread that watches them)"),
    Patch("sys:excepthook", None, RUN, "trainer/launch/watchdog.py",
          "an exception that another rank shows is one line here; set when this rank has failed, and about to end"),
    # -------------------------------------------------------------------------------------------------------------- during one call
    Patch("torch.distributed:init_process_group",
          "(backend, init_method, timeout, world_size, rank, store, group_name, pg_options, device_id)", CALL, "trainer/launch/rendezvous.py",
          "workers that torchrun has restarted make their process group in a store of this start's own"),
    Patch("torch.distributed.checkpoint:load", "(state_dict)", CALL, "trainer/checkpoints.py",
          "Lightning's own loading (`backend='dtensor'`) reads checkpoints without unpickling arbitrary classes"),
    Patch("lightning.pytorch.core.module:LightningModule.load_state_dict",
          "(self, state_dict, strict, assign)", CALL, "checkpoint/weights/pretrained.py",
          "`load_from_checkpoint` of a folder: Lightning builds the module, and this package reads the weights"),
    Patch("lightning.pytorch.core.module:LightningModule.log", "(self, name, value)", CALL, "data/sample_batch.py",
          "a step that is run to infer a plan logs nothing (likewise `log_dict` and `print`; on the module)"),
    Patch("lightning.pytorch.trainer.trainer:Trainer.fit",
          "(self, model, train_dataloaders, val_dataloaders, datamodule, ckpt_path, weights_only)", CALL, "cli/targets/script.py",
          "a training script runs up to `fit` (likewise `__init__`, `validate`, `test`, `predict` and `Fabric.launch`)"),
    Patch("signal:signal", "(signalnum, handler, /)", CALL, "errors.py",
          "a rank that is about to end leaves SIGTERM to the system: Lightning's handler would talk to ranks that are gone"),
    Patch("builtins:open", "(file, mode, buffering, encoding, errors, newline, closefd, opener)", CALL, "core/forked.py",
          "what a step writes while its plan is found goes to copies (in the forked child only)"),
    Patch("torch:seed", "()", CALL, "core/ops/random_numbers.py",
          "a module that seeds anew draws one seed for its group"),
    Patch("torch.nn.functional:dropout", "(input, p, training, inplace)", CALL, "core/ops/random_numbers.py",
          "masks of shards differ between ranks (likewise every function of torch.nn.functional that draws random numbers)"),
    Patch("torch.nn.functional:multi_head_attention_forward",
          "(query, key, value, embed_dim_to_check, num_heads, in_proj_weight, in_proj_bias, bias_k, bias_v, add_zero_attn, dropout_p,"
          " out_proj_weight, out_proj_bias)", CALL, "core/ops/attention.py",
          "attention is traced, and runs on local heads, operator by operator (also styles/calls/rewritten_calls.py)"),
    Patch("torch.nn:Module.forward",
          None, CALL, "infer/blocks/repeated.py",
          "identical blocks are traced once (on the block; also estimate/trace/repeated_blocks.py)"),
    Patch("torch.distributed.fsdp._fully_shard._fsdp_param_group:FSDPParamGroup._init_mp_dtypes", "(self)", OBJECT, "_compat/distributed.py",
          "a unit of FSDP2 that is frozen in its first forward knows in which dtype to reduce once it is unfrozen"),
    # ---------------------------------------------------------------------- private methods and attributes that subclasses override
    Patch("lightning.pytorch.strategies.strategy:Strategy._lightning_module", None, SUBCLASS, "trainer/patches/run.py",
          "`trainer.fit(torch.compile(module))`: uncompiled before Lightning refuses it, and compiled block by block"),
    Patch("lightning.pytorch.strategies.model_parallel:ModelParallelStrategy._configure_launcher", "(self)", SUBCLASS, "trainer/mesh_strategy.py",
          "sizes that do not fit are refused before any process is started; the launchers are this package's"),
    Patch("lightning.fabric.strategies.model_parallel:ModelParallelStrategy._configure_launcher", "(self)", SUBCLASS, "trainer/mesh_strategy.py",
          "the same for `Fabric`"),
    Patch("lightning.pytorch.strategies.launchers.multiprocessing:_MultiProcessingLauncher._wrapping_function",
          "(self, process_idx, trainer, function, args, kwargs, return_queue, global_states)", SUBCLASS, "trainer/launch/processes.py",
          "a forked rank computes with one thread"),
    Patch("lightning.pytorch.strategies.launchers.multiprocessing:_MultiProcessingLauncher._collect_rank_zero_results",
          "(self, trainer, results)", SUBCLASS, "trainer/launch/processes.py",
          "the full weights come back from ranks that hold shards"),
    Patch("lightning.pytorch.strategies.launchers.multiprocessing:_MultiProcessingLauncher._recover_results_in_main_process",
          "(self, worker_output, trainer)", SUBCLASS, "trainer/launch/processes.py",
          "and go into the module of the process that started the ranks"),
    Patch("lightning.fabric.strategies.launchers.multiprocessing:_MultiProcessingLauncher._wrapping_function",
          "(self, process_idx, function, args, kwargs, return_queue, global_states)", SUBCLASS, "trainer/launch/processes.py",
          "a forked rank computes with one thread"),
    Patch("lightning.pytorch.utilities.model_summary.model_summary:ModelSummary._get_summary_data", "(self)", SUBCLASS, "trainer/adapt/metrics.py",
          "a column `Params per Device`"),
    Patch("torch.amp:GradScaler._unscale_grads_", "(self, optimizer, inv_scale, found_inf, allow_fp16)", SUBCLASS, "trainer/adapt/precision.py",
          "a gradient that is not finite on one rank makes all ranks skip the step"),
    Patch("torch.nn:Module._load_from_state_dict",
          "(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)", SUBCLASS, "trainer/adapt/averaging.py",
          "an average of shards is loaded from DTensors or full tensors"),
]
