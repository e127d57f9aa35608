"""A model as one rank of a world has it, on the meta device and without a process group: what is traced.

The steps are those of `parallelize`: shards by the plan, styles, what is run again in the backward. FSDP2 does not change what a module computes;
its gathers and buffers are added in `memory.py` and `collectives.py`.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only

from lightning_tp._compat import backward_under_modes
from lightning_tp.apply.activation_checkpointing import checkpoint_modules, modules_to_checkpoint
from lightning_tp.apply.bind import bind_styles
from lightning_tp.core.modules.blocks import find_blocks, own_numbers
from lightning_tp.core.modules.snapshot import MetaWeights, preserve_modules
from lightning_tp.errors import TPError
from lightning_tp.estimate.rank.inputs import LossOf
from lightning_tp.estimate.rank.rank_model import RankModel, held_by
from lightning_tp.estimate.rank.settings import _BF16, _FP16, Settings
from lightning_tp.estimate.trace.device_kernels import Kernels, memory_of_casts
from lightning_tp.estimate.trace.recorder import OpRecorder, alone
from lightning_tp.estimate.trace.step_trace import StepTrace
from lightning_tp.plan.plan import Plan
from lightning_tp.styles import Split


def trace_step(model: nn.Module, loss_of: LossOf, inputs: Any, plan: Plan, settings: Settings) -> RankModel:
    """One micro-batch of the model on a rank; the model is left as it was.

    Raises:
        TPError: if it can't be followed; with the module.
    """
    held = held_by(model, plan, settings)
    buffers = {id(b): b.numel() * b.itemsize for b in model.buffers()}
    units = [*dict.fromkeys(h.unit for h in held if h.unit), ""]
    classes = {name: type(m).__name__ for name, m in model.named_modules()}
    with MetaWeights(model), preserve_modules(model):
        kinds = _kinds(model, plan)
        _take_shards(model, plan, settings)
        model.train()
        trace = _follow(model, loss_of, inputs, plan, settings, kinds)
    return RankModel(held, sum(buffers.values()), trace, tuple(units), classes, tuple(n for n, _ in find_blocks(model)))


def _follow(model: nn.Module, loss_of: LossOf, inputs: Any, plan: Plan, settings: Settings, kinds: Mapping[str, Any]) -> StepTrace:
    blocks = {name: model.get_submodule(name) for name in kinds}  # shards may look alike where whole modules don't
    axis = alone(settings.rank, settings.tp)
    if settings.tp > 1:
        bind_styles(model, plan, axis, loss_parallel=settings.loss_parallel)
    how = settings.activation_checkpointing
    if how is not None:
        checkpoint_modules(modules_to_checkpoint(model, list(blocks.values()), how), axis, how)
    recorder = OpRecorder(model, blocks, kinds, axis.group)  # type: ignore[arg-type]
    kernels = Kernels(settings.device, settings.precision.autocast, fused_attention=settings.fused_attention)
    recorder.run_again = kernels.casts.clear  # what is run again is an autocast of its own
    given = recorder.onto_meta(inputs)
    true = settings.precision.held if settings.precision.autocast is None else None
    if true in (_BF16, _FP16):
        given = tree_map_only(Tensor, lambda t: t.to(true) if t.is_floating_point() else t, given)
    recorder.uncounted |= {t.untyped_storage()._cdata for t in tree_flatten(given)[0] if isinstance(t, Tensor)}
    collects = gc.isenabled()
    gc.disable()  # what it lets go of, and when, is chance
    try:
        with recorder.following(), kernels:
            with memory_of_casts(kernels):
                loss = loss_of(model, given)
                alive = dict(recorder.levels)
            let_go = {label: n - recorder.levels.get(label, 0) for label, n in alive.items() if n != recorder.levels.get(label, 0)}
            if not loss.requires_grad:
                raise TPError(
                    "The loss does not depend on any parameter that is trained, so that there is no backward to estimate."
                )
            recorder.begin_backward()
            backward_under_modes(loss)
            del loss
    except TPError:
        raise
    except Exception as error:
        where = recorder.failed or recorder.where[0]
        raise TPError(
            f"{type(model).__name__} can't be followed on the meta device: `{where or type(model).__name__}` ended with {type(error).__name__}: "
            f"{' '.join(str(error).split())[:300]} (in the {'backward' if recorder.in_backward else 'forward'}, tp={settings.tp}). See that it "
            "runs on these inputs, and that it does not decide by the values of activations."
        ) from error
    finally:
        if collects:
            gc.enable()
        for p in model.parameters():
            p.grad = None
    return StepTrace(recorder.pieces, recorder.followed, recorder.gradients, tuple(recorder.walk.steps), let_go)


def _take_shards(model: nn.Module, plan: Plan, settings: Settings) -> None:
    """Meta parameters in the shapes of the rank, in the dtype that modules compute in; tied ones stay one."""
    precision = settings.precision
    dtype = (precision.gathered if settings.dp > 1 else None) or precision.held
    splits, done = plan.splits, {}
    names: dict[int, str] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        if name in splits:
            names.setdefault(id(p), name)
    keep = list(model.parameters())  # ids must not be used again
    for module in model.modules():
        for name, own in module._parameters.items():
            if own is None:
                continue
            p = own
            if id(p) not in done:
                split = splits[names[id(p)]] if id(p) in names else Split()
                shape = split.local_shape(tuple(p.shape), settings.rank)
                new = (dtype or p.dtype) if p.is_floating_point() else p.dtype
                done[id(p)] = nn.Parameter(torch.empty(shape, dtype=new, device="meta"), p.requires_grad)
                done[id(p)].__dict__.update(p.__dict__)
            module._parameters[name] = done[id(p)]
        for name, buffer in module._buffers.items():
            if precision.held in (_BF16, _FP16, torch.float64) and buffer is not None and buffer.is_floating_point():
                module._buffers[name] = buffer.to(precision.held)  # as `Module.to` does
    del keep


def _kinds(model: nn.Module, plan: Plan) -> dict[str, Any]:
    """For each block, what it has in common with those that do the same: classes, shapes, settings, styles."""
    styles: dict[str, list[tuple[str, str]]] = {}
    names = [n for n, _ in find_blocks(model)]
    prefixes = {n: n for n in names}
    for entry in plan.entries:
        where = entry.where
        while where and where not in prefixes:
            where = where.rpartition(".")[0]
        if where:
            styles.setdefault(where, []).append((entry.where[len(where) :], repr(entry.style)))
    kinds = {}
    numbers = own_numbers(dict(find_blocks(model)))
    for name, block in find_blocks(model):
        mine = numbers[name.rpartition(".")[0]]
        settings = tuple(
            (n, type(m).__name__, m.training, tuple((k, _plain(v, (n, k) in mine)) for k, v in m.__dict__.items() if _says(k, v)))
            for n, m in block.named_modules()
        )
        parameters = tuple((n, tuple(p.shape), p.dtype, p.requires_grad) for n, p in block.named_parameters())
        kinds[name] = hash((type(block), settings, parameters, tuple(sorted(styles.get(name, [])))))
    return kinds


def _says(name: str, value: Any) -> bool:
    return not name.startswith("__") and isinstance(value, (bool, int, float, str, type(None)))


def _plain(value: Any, number: bool) -> Any:
    """A setting of a module; a block's own number says nothing, and of a scale only whether there is one."""
    if isinstance(value, float):
        return value != 0
    return "its number" if number else value
