"""`verify`: train a model in a single process and sharded across several, and compare the two step by step.

Both sides have the same weights and the same data. Compared are the loss of each step, every gradient of the first step, how far every
weight has moved after all steps, and the names of the state dict; on every rank, so that replicated weights that drift apart are noticed.
Other causes of differences are ruled out:

- The steps are plain SGD: Adam divides a gradient by its magnitude, and so amplifies the sign of pure rounding noise to a full step.
- `model.eval()`: dropout on sharded activations draws other masks than a single process. Gradients are computed alike in both modes.
- Attention uses SDPA's math kernel on both sides: the flash kernel differs on rows that are masked completely.
- Constant parameters (biases of zero, norm weights of one) get a little noise: mistakes hide behind zeros.
- An error is relative to the largest value of its tensor, or to a thousandth of the largest value of all tensors if that is more: some
  gradients are zero in exact arithmetic (a key bias under softmax) and consist of noise.

Both sides run on the CPU of this machine, in processes of their own (`run_ranks`); this process is left as it is. Precision, activation
checkpointing and Lightning's own loop are not covered.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_tp._compat import local_tensor
from lightning_tp.apply.parallelize import PlanLike, parallelize, resolve_plan
from lightning_tp.core.comm.mesh import DATA_PARALLEL, make_mesh
from lightning_tp.core.tables import table
from lightning_tp.errors import TPError
from lightning_tp.infer.choose import default_plan
from lightning_tp.infer.search import call_with
from lightning_tp.plan.checked import CheckedPlan
from lightning_tp.verify.compare import Row, compare_tensors, rounding_of
from lightning_tp.verify.run_ranks import RankError, run_ranks
from lightning_tp.verify.training import Inputs, Run, Task, perturb_constants, train

SHOWN = 12  # rows of a report that are printed

T = TypeVar("T")


@dataclass(frozen=True)
class ParityReport:
    """The comparison of a sharded model with a single process; `str()` of it is a table with the verdict in its first line.

    Args:
        ok: Whether every row is within its tolerance.
        rows: What was compared, the worst first.
        plan: The plan that was applied.
        held: The largest share of all parameters that a rank held (after sharding by FSDP2 over `dp`).
        tp: The tensor-parallel size.
        dp: The data-parallel size.
        lr: The learning rate of the steps.
    """

    ok: bool
    rows: tuple[Row, ...]
    plan: CheckedPlan
    held: float
    tp: int
    dp: int
    lr: float

    def __str__(self) -> str:
        bad = [row for row in self.rows if not row.ok]
        worst, steps = self.rows[0], sum(row.kind == "loss" for row in self.rows)
        settings = f"tp={self.tp} x dp={self.dp}, {steps} SGD steps, lr={self.lr:.2g}"
        if bad:
            verdict = f"DIFFERS from a single process: {len(bad)} of {len(self.rows)} tensors, the worst is the {worst.kind} of `{worst.name}`"
        else:
            verdict = f"Matches a single process: {len(self.rows)} tensors compared, largest relative error {worst.error:.1e}"
        cells = [("ok" if r.ok else "BAD", r.kind, r.name, f"{r.tolerance:g}", r.detail) for r in self.rows[:SHOWN]]
        lines = [f"{verdict} ({settings})", table(("", "kind", "name", "tolerance", "difference"), cells)]
        if len(self.rows) > SHOWN:
            more = self.rows[SHOWN:]
            lines.append(f"  .. and {len(more)} more, {sum(not row.ok for row in more)} of them out of tolerance")
        lines.append(f"{str(self.plan).splitlines()[0]}; with dp={self.dp}, a rank holds at most {self.held:.1%}")
        return "\n".join(lines)


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
    """Train a model for a few steps in a single process and on `dp` x `tp` processes of this machine, and compare the two.

    Args:
        model_fn: Builds the model on the CPU; called without arguments, after torch is seeded.
        inputs: What forward is called with: keyword arguments, a tuple, or a function that returns them (called at each step, seeded).
            With `dp` > 1 each data-parallel rank gets its rows (dim 0) of every tensor, and the single process all of them in turn.
        loss_fn: `loss_fn(output)`, or `loss_fn(output, inputs)` with the inputs of that output; returns a scalar.
        tp: The tensor-parallel size.
        dp: The data-parallel size (FSDP2).
        plan: How the model is sharded. Default: the plan that the model declares or that is inferred, as `TPStrategy` chooses.
        steps: Optimizer steps.
        rtol: The largest error allowed, relative to the largest value of a tensor.
        lr: The learning rate of SGD. Default: the first step moves the weights by a hundredth of their norm.
        sequence_parallel: As for `parallelize`.
        loss_parallel: As for `parallelize`.
        seed: The seed of weights and data.
        timeout: Seconds for each of the two sides.

    Raises:
        TPError: For a plan that does not fit, a model that does not run in a single process, or rows that `dp` does not divide.
        RankError: If the sharded model does not run; with the traceback of the rank that failed first.

    Example:
        >>> def mlp():
        ...     return nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
        >>> report = verify(mlp, (torch.ones(2, 4, 8),), lambda y: y.square().mean(), tp=2)
        >>> report.ok, report.plan.source
        (True, 'inferred')
    """
    task = Task(model_fn, inputs, loss_fn, tp, dp, plan, steps, rtol, lr, sequence_parallel, loss_parallel, seed)
    try:
        (reference,) = _processes(_single_process, 1, task, timeout=timeout, init=False)
    except RankError as error:
        failure = error.errors[error.rank]
        raise TPError(f"`verify`: the model does not run in a single process: {failure.type_name}: {failure.message}") from error
    return _report(task, reference, _processes(_rank_of_the_mesh, dp * tp, task, reference, timeout=timeout))


def _processes(function: Callable[..., T], world: int, *args: Any, **options: Any) -> list[T]:
    """Run a function on ranks; a TPError of a rank is raised as it is."""
    try:
        return run_ranks(function, world, *args, **options)
    except RankError as error:
        if isinstance(error.__cause__, TPError):
            raise error.__cause__ from None
        raise


def _report(task: Task, reference: Run, results: list[tuple[list[Row], float]]) -> ParityReport:
    """Take the worst of all ranks for each tensor."""
    worst: dict[tuple[str, str], Row] = {}
    for row in (row for rows, _ in results for row in rows):
        key = (row.kind, row.name)
        if key not in worst or row.severity > worst[key].severity:
            worst[key] = row
    rows = tuple(sorted(worst.values(), key=lambda row: -row.severity))
    held = max(held for _, held in results)
    return ParityReport(all(row.ok for row in rows), rows, reference.plan, held, task.tp, task.dp, reference.lr)


def plan_under_test(
    model: nn.Module, inputs: Inputs, tp: int, plan: PlanLike | None = None, *, sequence_parallel: bool = True
) -> CheckedPlan:
    """Return the checked plan for a model: the given one, else the one that `default_plan` chooses."""
    if plan is None and tp > 1:
        plan = default_plan(model, call_with, inputs, tp)
    return resolve_plan(model, plan, tp, sequence_parallel=sequence_parallel)


def _single_process(task: Task) -> Run:
    model = task.build_model()
    perturb_constants(model)
    plan = plan_under_test(model, task.batch(0), task.tp, task.plan, sequence_parallel=task.sequence_parallel)
    run = train(model, task, plan, task.lr, range(task.dp))
    if not all(map(math.isfinite, run.losses)):
        raise TPError(
            f"`verify`: the losses are {run.losses} in a single process. Use a smaller `lr` than {run.lr:g}, or other data."
        )
    return run


def _rank_of_the_mesh(task: Task, reference: Run) -> tuple[list[Row], float]:
    """Train one rank; return the comparison with the reference, and the share of all parameters that the rank holds."""
    model = task.build_model()
    model.load_state_dict(reference.start)
    total = sum(p.numel() for p in model.parameters())
    mesh = make_mesh("cpu", task.dp, task.tp)
    parallelize(model, mesh, reference.plan, sequence_parallel=task.sequence_parallel, loss_parallel=task.loss_parallel)
    dp_rank = mesh.get_local_rank(DATA_PARALLEL)
    run = train(model, task, reference.plan, reference.lr, range(dp_rank, dp_rank + 1))
    losses = torch.tensor(run.losses, dtype=torch.float64)
    dist.all_reduce(losses, group=mesh.get_group(DATA_PARALLEL))
    run.losses = (losses / task.dp).tolist()
    held = sum(local_tensor(p).numel() for p in model.parameters()) / max(1, total)
    return _compare(run, reference, task.rtol), held


def _compare(run: Run, reference: Run, rtol: float) -> list[Row]:
    names = sorted(run.start.keys() ^ reference.start.keys())
    rows = [Row(name, "weight", math.inf, rtol, "only one of the two state dicts has this name") for name in names]
    got, ref = (_by_step(r.losses) for r in (run, reference))
    rows += compare_tensors("loss", got, ref, rtol)
    rows += compare_tensors("grad", run.gradients, reference.gradients, rtol)
    # The value of a weight after some steps hides how it got there: compare how far it moved, down to the rounding of the weight itself.
    got, ref = (_moved(reference.start, r.weights) for r in (run, reference))
    smallest = {name: 4 * len(run.losses) * rounding_of(t) / rtol for name, t in reference.weights.items()}
    return rows + compare_tensors("weight", got, ref, rtol, smallest)


def _by_step(losses: list[float]) -> dict[str, Tensor]:
    return {f"step {i}": torch.tensor(loss, dtype=torch.float64) for i, loss in enumerate(losses)}


def _moved(start: Mapping[str, Tensor], end: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.double() - start[name].double() for name, t in end.items() if name in start}
