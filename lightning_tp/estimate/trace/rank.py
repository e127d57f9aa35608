"""A model as one rank of a world has it, on the meta device and without a process group: what is traced.

The steps are those of `parallelize`: shards by the plan, styles, what is run again in the backward. FSDP2 does not change what a module computes;
its gathers and buffers are added in `memory.py` and `collectives.py`.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only

from lightning_tp._compat import backward_under_modes
from lightning_tp.apply.activation_checkpointing import ActivationCheckpointing, checkpoint_modules, modules_to_checkpoint
from lightning_tp.apply.bind import bind_styles
from lightning_tp.apply.fsdp import own_units
from lightning_tp.core.modules.blocks import find_blocks, own_numbers
from lightning_tp.core.modules.snapshot import MetaWeights, preserve_modules
from lightning_tp.errors import TPError
from lightning_tp.estimate.trace.device_kernels import Kernels, memory_of_casts
from lightning_tp.estimate.trace.trace import OpRecorder, StepTrace, alone
from lightning_tp.plan.checked import CheckedPlan
from lightning_tp.styles import Split

if TYPE_CHECKING:
    from torch.distributed.fsdp import MixedPrecisionPolicy

LossOf = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class Precision:
    """What is in which dtype.

    Args:
        name: as a Trainer calls it, or "bf16-fsdp".
        held: dtype of the parameters that a rank holds, their gradients and the optimizer's state; None: the model's own.
        autocast: dtype of products under autocast; None without it.
        gathered: dtype in which FSDP2 gathers, and modules compute; None: as held.
        reduced: dtype in which FSDP2 sums gradients; None: as computed.
        scaled: whether the loss is scaled.
    """

    name: str
    held: torch.dtype | None = None
    autocast: torch.dtype | None = None
    gathered: torch.dtype | None = None
    reduced: torch.dtype | None = None
    scaled: bool = False

    @staticmethod
    def of(precision: str | MixedPrecisionPolicy) -> Precision:
        """What a Trainer's precision means; or a policy of FSDP2 alone.

        Raises:
            TPError: it names those that there are.
        """
        if not isinstance(precision, str):
            return Precision("policy", gathered=precision.param_dtype, reduced=precision.reduce_dtype)
        if precision not in PRECISIONS:
            raise TPError(f"`precision={precision!r}`: there are {', '.join(PRECISIONS)}, and FSDP2's MixedPrecisionPolicy.")
        return PRECISIONS[precision]


_BF16, _FP16, _FP32 = torch.bfloat16, torch.float16, torch.float32
PRECISIONS = {
    p.name: p
    for p in (
        Precision("32-true", held=_FP32),
        Precision("bf16-mixed", _FP32, autocast=_BF16, gathered=_BF16, reduced=_FP32),
        Precision("16-mixed", _FP32, autocast=_FP16, gathered=_FP16, reduced=_FP32, scaled=True),
        Precision("bf16-true", held=_BF16, reduced=_FP32),
        Precision("16-true", held=_FP16, reduced=_FP32),
        Precision("64-true", held=torch.float64),
        Precision("bf16-fsdp", _FP32, gathered=_BF16, reduced=_FP32),
    )
}


@dataclass(frozen=True)
class LocalParam:
    """A parameter on a rank.

    Args:
        name: from the root.
        shape: whole.
        tp_shape: after the tensor-parallel axis.
        rows: of dim 0 that FSDP2 leaves on this rank, the padding of the last ranks included.
        split: how it lies on the tensor-parallel axis.
        unit: FSDP2's that it belongs to, "" for the root's.
        dtype: as held.
        trained: whether it has a gradient.
    """

    name: str
    shape: tuple[int, ...]
    tp_shape: tuple[int, ...]
    rows: int
    split: Split
    unit: str
    dtype: torch.dtype
    trained: bool

    @property
    def local_shape(self) -> tuple[int, ...]:
        """What this rank holds, padded as FSDP2 pads it."""
        return (self.rows, *self.tp_shape[1:]) if self.tp_shape else ()

    @property
    def numel(self) -> int:
        """Elements that this rank holds."""
        return math.prod(self.local_shape)


@dataclass(frozen=True)
class Settings:
    """How the model is trained, as far as the trace depends on it."""

    tp: int
    dp: int
    rank: int = 0
    precision: Precision = PRECISIONS["bf16-mixed"]
    activation_checkpointing: ActivationCheckpointing | None = None
    loss_parallel: bool = True
    device: str = "cuda"
    fused_attention: bool = True


@dataclass(frozen=True)
class RankModel:
    """What is known of one rank after the trace.

    Args:
        held: its parameters.
        buffers: their bytes.
        trace: of one micro-batch.
        units: FSDP2's, "" last.
        classes: of each module, by name.
        blocks: their names.
    """

    held: tuple[LocalParam, ...]
    buffers: int
    trace: StepTrace
    units: tuple[str, ...]
    classes: Mapping[str, str]
    blocks: tuple[str, ...]

    def over(self, dp: int) -> RankModel:
        """The same with another number of data-parallel ranks (both more than one)."""
        held = tuple(replace(h, rows=math.ceil(h.tp_shape[0] / dp) if h.tp_shape else 1) for h in self.held)
        return replace(self, held=held)


def default_loss(output: Any, inputs: Any) -> Tensor:
    """The loss that the output carries; else of the next token, where it looks like that; else a random projection.

    Raises:
        TPError: if there is no tensor of floats.
    """
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(loss, Tensor):
        return loss
    values = [
        t
        for t in tree_flatten(dict(output) if isinstance(output, Mapping) else output)[0]
        if isinstance(t, Tensor) and t.is_floating_point()
    ]
    if not values:
        raise TPError(
            f"The model returns a {type(output).__name__} without a tensor of floats. Return a loss_fn as the third value."
        )
    value = values[0]
    tokens = next((t for t in tree_flatten(inputs)[0] if isinstance(t, Tensor) and t.dtype == torch.int64 and t.ndim == 2), None)
    if (
        tokens is not None
        and value.ndim == 3
        and value.shape[:2] == tokens.shape
        and (tokens.is_meta or int(tokens.max()) < value.shape[2])
    ):
        return nn.functional.cross_entropy(value.flatten(0, 1)[:-1], tokens.flatten()[1:])
    noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(0)).to(value.device, value.dtype)
    return (value * noise).sum() / math.sqrt(max(1, value.numel()))


def resized(inputs: Any, batch: int | None, seq: int | None) -> Any:
    """The inputs with another batch (dim 0 of all) and sequence (dim 1 of tokens, and every further dim of masks that is as long).

    Raises:
        TPError: for a sequence length of inputs without tokens.
    """
    tensors = [t for t in tree_flatten(inputs)[0] if isinstance(t, Tensor) and t.ndim]
    tokens = next((t for t in tensors if t.ndim >= 2 and not t.is_floating_point()), None)
    if seq is not None and tokens is None:
        raise TPError(
            "`seq`: the inputs have no tokens (integers of two dims), so there is no length to change. Give inputs of that length."
        )
    length = tokens.shape[1] if tokens is not None else None
    size = (tokens if tokens is not None else tensors[0]).shape[0] if tensors else 0

    def change(t: Tensor) -> Tensor:
        whole = list(t.shape)
        if t.ndim and batch is not None and t.shape[0] == size:
            whole[0] = batch
        for dim in range(1, t.ndim):
            if (
                seq is not None
                and t.shape[dim] == length
                and (dim == 1 or t.ndim == 4)
                and not (t.is_floating_point() and t.ndim < 4)
            ):
                whole[dim] = seq
        if whole == list(t.shape):
            return t
        if t.is_meta:
            return torch.empty(whole, dtype=t.dtype, device="meta")
        times = [-(-new // old) for new, old in zip(whole, t.shape)]
        return t.repeat(times)[tuple(slice(n) for n in whole)].contiguous()

    return tree_map_only(Tensor, change, inputs)


def held_by(model: nn.Module, plan: CheckedPlan, settings: Settings) -> tuple[LocalParam, ...]:
    """The parameters of the rank, the tied ones once."""
    blocks = find_blocks(model)
    units = {id(m) for m in own_units(model, [b for _, b in blocks])}
    unit_of = {id(p): name for name, b in blocks if id(b) in units for p in b.parameters()}
    splits, found = plan.splits, []
    for name, p in model.named_parameters():
        split = splits.get(name, Split())
        shape = tuple(p.shape)
        local = split.local_shape(shape, settings.rank)
        rows = (math.ceil(local[0] / settings.dp) if settings.dp > 1 else local[0]) if local else 1
        dtype = settings.precision.held or p.dtype
        found.append(
            LocalParam(
                name,
                shape,
                local,
                rows,
                split,
                unit_of.get(id(p), ""),
                dtype if p.is_floating_point() else p.dtype,
                p.requires_grad,
            )
        )
    return tuple(found)


def trace_step(model: nn.Module, loss_of: LossOf, inputs: Any, plan: CheckedPlan, settings: Settings) -> RankModel:
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


def _follow(
    model: nn.Module, loss_of: LossOf, inputs: Any, plan: CheckedPlan, settings: Settings, kinds: Mapping[str, Any]
) -> StepTrace:
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


def _take_shards(model: nn.Module, plan: CheckedPlan, settings: Settings) -> None:
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


def _kinds(model: nn.Module, plan: CheckedPlan) -> dict[str, Any]:
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
