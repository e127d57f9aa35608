"""`verify`: a model in one process against the same model split over several, step by step.

Both sides have the same weights and the same data. Compared are the loss of each step, every gradient of the first, how far every
weight has moved after all of them, and the names of the state dict; on every rank, so that replicated weights that drift apart are
seen. What might differ for another reason is taken out:

- The steps are plain SGD: Adam divides a gradient by its size, and so turns the sign of one that is all rounding into a whole step.
- `model.eval()`: dropout on split activations draws other masks than one process. Gradients are the same kind in both modes.
- Attention runs by SDPA's math kernel on both sides: the flash kernel differs on rows that are masked out altogether.
- Parameters that are constant (biases of zero, norm weights of one) get a little noise: mistakes hide behind zeros.
- An error is relative to the largest value of its tensor, or to a thousandth of the largest of all tensors where that is more: some
  gradients are zero in exact arithmetic (a key bias under softmax) and hold noise only.

It runs on the CPU of this machine, in processes of its own (`lightning_tp.testing.run_ranks`); nothing of this process is changed.
Precision, activation checkpointing and Lightning's own loop are not covered.
"""

from __future__ import annotations

import inspect
import math
import random
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten, tree_map

from lightning_tp._compat import local_tensor
from lightning_tp.apply.parallelize import PlanLike, parallelize, resolve_plan
from lightning_tp.core.comm.mesh import DATA_PARALLEL, make_mesh
from lightning_tp.errors import TPError
from lightning_tp.infer.choose import default_plan
from lightning_tp.infer.search import call_with
from lightning_tp.plan.checked import CheckedPlan
from lightning_tp.shards.state_dict import full_gradients, full_state_dict
from lightning_tp.verify.compare import Row, _eps, _largest, compare_tensors
from lightning_tp.verify.report import ParityReport
from lightning_tp.verify.run_ranks import RankError, run_ranks

FIRST_STEP = 1e-2  # how far the default learning rate moves the weights, relative to their norm


Inputs = Mapping[str, Any] | tuple[Any, ...]


def verify(
    model_fn: Callable[[], nn.Module],
    inputs: Inputs | Callable[[], Inputs],
    loss_fn: Callable[..., Tensor],
    *,
    tp: int = 2,
    dp: int = 1,
    plan: PlanLike | None = None,
    steps: int = 3,
    rtol: float = 1e-3,
    lr: float | None = None,
    sequence_parallel: bool = True,
    loss_parallel: bool = True,
    seed: int = 0,
    timeout: float = 600.0,
) -> ParityReport:
    """Train a model for some steps in one process and on `dp` x `tp` processes of this machine, and compare the two.

    Args:
        model_fn: builds the model, on the CPU; called without arguments, after torch is seeded.
        inputs: what forward is called with: keyword arguments, a tuple, or a function that returns them (called at each step,
            seeded). With `dp` > 1 each data-parallel rank gets its rows (dim 0) of every tensor; one process gets these parts one
            after the other.
        loss_fn: `loss_fn(output)`, or `loss_fn(output, inputs)` with the inputs that this output is of; returns a scalar.
        tp: ranks that share one model.
        dp: such groups; FSDP2 shards over them.
        plan: how the model is split. Default: what `default_plan` takes of what the model declares and what can be inferred.
        steps: of the optimizer.
        rtol: the largest error allowed, relative to the largest value of a tensor.
        lr: of the SGD. Default: the first step moves the weights by a hundredth of their norm.
        sequence_parallel: as for `parallelize`.
        loss_parallel: as for `parallelize`.
        seed: for weights and data.
        timeout: seconds for either side.

    Raises:
        TPError: for a plan that doesn't fit, a model that does not run in one process, or data that `dp` does not divide.
        RankError: if the split model does not run; with the traceback of the rank that failed first.

    Example:
        >>> def mlp():
        ...     return nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
        >>> report = verify(mlp, (torch.ones(2, 4, 8),), lambda y: y.square().mean(), tp=2)
        >>> report.ok, report.plan.source
        (True, 'inferred')
    """
    for name, value in (("tp", tp), ("dp", dp), ("steps", steps)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise TPError(f"`verify({name}={value!r})`: give a number, 1 or more.")
    job = _Job(model_fn, inputs, loss_fn, tp, dp, plan, steps, rtol, lr, sequence_parallel, loss_parallel, seed)
    try:
        (reference,) = run_ranks(_in_one_process, 1, job, timeout=timeout, init=False)
    except RankError as error:
        if isinstance(error.__cause__, TPError):
            raise error.__cause__ from None
        failure = error.errors[error.rank]
        raise TPError(f"`verify`: the model does not run in one process: {failure.type_name}: {failure.message}") from error
    try:
        views = run_ranks(_on_a_rank, dp * tp, job, reference, timeout=timeout)
    except RankError as error:
        if isinstance(error.__cause__, TPError):
            raise error.__cause__ from None
        raise
    worst: dict[tuple[str, str], Row] = {}
    for row in (row for rows, _ in views for row in rows):
        key = (row.kind, row.name)
        if key not in worst or row.badness > worst[key].badness:
            worst[key] = row
    rows = tuple(sorted(worst.values(), key=lambda row: -row.badness))
    held = max(held for _, held in views)
    return ParityReport(all(row.ok for row in rows), rows, reference.plan, held, tp, dp, reference.lr)


def plan_under_test(
    model: nn.Module, inputs: Inputs, tp: int, plan: PlanLike | None = None, *, sequence_parallel: bool = True
) -> CheckedPlan:
    """The checked plan for `model`: the one given, else the one that `default_plan` takes.

    Raises:
        TPError: if none fits.
    """
    if plan is None and tp > 1:
        plan = default_plan(model, call_with, inputs, tp)
    return resolve_plan(model, plan, tp, sequence_parallel=sequence_parallel)


def scalar_loss(model: nn.Module, inputs: Inputs, loss_fn: Callable[..., Tensor]) -> Tensor:
    """`loss_fn` of the model's output for these inputs; it may want the inputs as well.

    Raises:
        TPError: if it is no scalar.
    """
    output = model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)
    loss = loss_fn(output, inputs) if _takes_two(loss_fn) else loss_fn(output)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise TPError(f"`loss_fn` returned {what}; it has to be a scalar, such as `.mean()` of it.")
    return loss.reshape(())


@dataclass(frozen=True)
class _Job:
    """The arguments of `verify`, for the processes."""

    model_fn: Callable[[], nn.Module]
    inputs: Inputs | Callable[[], Inputs]
    loss_fn: Callable[..., Tensor]
    tp: int
    dp: int
    plan: PlanLike | None
    steps: int
    rtol: float
    lr: float | None
    sequence_parallel: bool
    loss_parallel: bool
    seed: int

    def model(self) -> nn.Module:
        """The model, as both sides have it."""
        _seed(self.seed)
        model = self.model_fn()
        if not isinstance(model, nn.Module):
            raise TPError(f"`verify`: `model_fn` returned a {type(model).__name__}, not a torch.nn.Module.")
        meta = next((name for name, p in model.named_parameters() if p.is_meta), None)
        if meta is not None:
            raise TPError(f"`verify`: `{meta}` is on the meta device. Build a model with weights, a small one of the same kind.")
        return model.eval()

    def batch(self, step: int) -> Inputs:
        """What forward is called with, whole."""
        _seed(self.seed + 1 + step)
        inputs: Any = self.inputs() if callable(self.inputs) else self.inputs
        if isinstance(inputs, Mapping):
            return dict(inputs)
        return tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)


@dataclass
class _Run:
    """What one process saw."""

    plan: CheckedPlan
    lr: float
    start: dict[str, Tensor]
    losses: list[float]
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]


def _train(model: nn.Module, job: _Job, plan: CheckedPlan, lr: float | None, rows: range) -> _Run:
    """Some steps; `rows` are the data-parallel parts of the batch that this process works on, one after the other."""
    start, losses, gradients = full_state_dict(model), [], {}
    for step in range(job.steps):
        batch, total = job.batch(step), 0.0
        for i in rows:
            with sdpa_kernel(SDPBackend.MATH):
                loss = scalar_loss(model, _part(batch, i, job.dp), job.loss_fn) / len(rows)
                loss.backward()
            total += loss.item()
        losses.append(total)
        if step == 0:
            gradients = full_gradients(model)
        lr = default_lr(start, gradients) if lr is None else lr
        optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=lr)
        optimizer.step()
        optimizer.zero_grad()
    assert lr is not None
    return _Run(plan, lr, start, losses, gradients, full_state_dict(model))


def _part(inputs: Inputs, i: int, dp: int) -> Any:
    """The rows of the `i`-th of `dp` data-parallel ranks, of every tensor whose dim 0 is the batch."""
    if dp == 1:
        return inputs
    size = next((len(t) for t in tree_flatten(inputs)[0] if isinstance(t, Tensor) and t.ndim), 0)
    if size == 0 or size % dp:
        raise TPError(f"`verify`: the inputs have {size} rows (dim 0), which dp={dp} ranks can't share. Give {dp * max(1, size)}.")
    rows = slice(i * size // dp, (i + 1) * size // dp)
    return tree_map(lambda t: t[rows] if isinstance(t, Tensor) and t.ndim and len(t) == size else t, inputs)


def default_lr(weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> float:
    """The learning rate with which the first step moves the weights by `FIRST_STEP` of their norm."""
    gradient = math.sqrt(sum(g.double().square().sum().item() for g in gradients.values()))
    if not gradient or not math.isfinite(gradient):
        raise TPError(
            f"`verify`: the norm of all gradients is {gradient} in one process, so there is nothing to compare. Let `loss_fn` "
            "depend on the weights, and stay finite."
        )
    return FIRST_STEP * math.sqrt(sum(weights[n].double().square().sum().item() for n in gradients)) / gradient


def _seed(seed: int) -> None:
    random.seed(seed)
    torch.manual_seed(seed)


def _takes_two(fn: Callable[..., Any]) -> bool:
    """Whether `loss_fn` wants the inputs as well."""
    try:
        parameters = inspect.signature(fn).parameters.values()
    except ValueError:
        return False
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty]
    return len(positional) == 2


def _in_one_process(job: _Job) -> _Run:
    model = job.model()
    perturb_constants(model)
    plan = plan_under_test(model, job.batch(0), job.tp, job.plan, sequence_parallel=job.sequence_parallel)
    run = _train(model, job, plan, job.lr, range(job.dp))
    if not all(map(math.isfinite, run.losses)):
        raise TPError(f"`verify`: the losses are {run.losses} in one process. Use a smaller `lr` than {run.lr:g}, or other data.")
    return run


def _on_a_rank(job: _Job, reference: _Run) -> tuple[list[Row], float]:
    """(what this rank found, the share of all parameters that it held)."""
    model = job.model()
    model.load_state_dict(reference.start)
    total = sum(p.numel() for p in model.parameters())
    mesh = make_mesh("cpu", job.dp, job.tp)
    parallelize(model, mesh, reference.plan, sequence_parallel=job.sequence_parallel, loss_parallel=job.loss_parallel)
    dp_rank = mesh.get_local_rank(DATA_PARALLEL)
    run = _train(model, job, reference.plan, reference.lr, range(dp_rank, dp_rank + 1))
    losses = torch.tensor(run.losses, dtype=torch.float64)
    dist.all_reduce(losses, group=mesh.get_group(DATA_PARALLEL))
    run.losses = (losses / job.dp).tolist()
    held = sum(local_tensor(p).numel() for p in model.parameters()) / max(1, total)
    names = set(model.state_dict()) ^ set(reference.start)
    return _compare(run, reference, names, job.rtol), held


@torch.no_grad()
def perturb_constants(model: nn.Module) -> None:
    """Add noise to parameters that are constant; it depends on their names alone."""
    for name, p in model.named_parameters():
        if p.is_floating_point() and p.numel() and bool((p == p.reshape(-1)[0]).all()):
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            p.add_((torch.randn(p.shape, generator=generator) * 0.1).to(p))


def _compare(run: _Run, reference: _Run, names: set[str], rtol: float) -> list[Row]:
    rows = [Row(name, "weight", math.inf, rtol, "this name is in one of the two state dicts only") for name in sorted(names)]
    got, ref = (_by_step(r.losses) for r in (run, reference))
    rows += compare_tensors("loss", got, ref, rtol)
    rows += compare_tensors("grad", run.gradients, reference.gradients, rtol)
    # What a weight is after some steps hides how it got there: compare how far it moved, down to the rounding of the weight itself.
    got, ref = (_moved(reference.start, r.weights) for r in (run, reference))
    rounding = {n: 4 * len(run.losses) * _eps(t) * _largest(t) / rtol for n, t in reference.weights.items()}
    return rows + compare_tensors("weight", got, ref, rtol, rounding)


def _by_step(losses: list[float]) -> dict[str, Tensor]:
    return {f"step {i}": torch.tensor(loss, dtype=torch.float64) for i, loss in enumerate(losses)}


def _moved(start: Mapping[str, Tensor], end: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n: t.double() - start[n].double() for n, t in end.items() if n in start}
