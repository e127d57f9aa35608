"""The command `lightning-tp plan`."""

from __future__ import annotations

import argparse
import math
import sys
from typing import Any

from torch import nn

from lightning_tp.cli import estimate, options
from lightning_tp.cli.parser import check_output, checked_plan_file
from lightning_tp.cli.target import Target, load
from lightning_tp.cli.torch_source import python_source
from lightning_tp.core.comm.axis import even_shard
from lightning_tp.core.files import write_text
from lightning_tp.errors import TPError
from lightning_tp.infer import infer_plan
from lightning_tp.infer.dry_run import count_collectives
from lightning_tp.plan.checked import CheckedPlan
from lightning_tp.plan.declared import declared_plan
from lightning_tp.verify.verify import plan_under_test, scalar_loss


def _plan(args: argparse.Namespace) -> int:
    _check_sizes(args)
    options.check_pictures(args)
    check_output(args.json, "--json")
    check_output(args.emit_python, "--emit-python")
    args.plan = checked_plan_file(args.plan)
    target = load(args.target)
    plan = _choose(target, args)
    written = [(args.json, plan.to_json), (args.emit_python, lambda: python_source(plan, target.model, args.target))]
    texts = [(where, make()) for where, make in written if where is not None]  # before anything is written
    for where, text in texts:
        if where == "-":
            print(text)
            continue
        write_text(where, text if text.endswith("\n") else text + "\n")
    quiet, lines = "-" in (args.json, args.emit_python), list[str]()
    if not quiet:
        lines = [held_by_a_rank(plan, target.model, args.dp), _sent(plan, target, args.dp)]
        show(plan)
        print("\n".join(lines))
    drawn = estimate.draw_plan(plan, target, args, lines)
    for where in () if quiet else (*(where for where, _ in texts), *drawn):
        print(f"Wrote {where}")
    return 0


def _check_sizes(args: argparse.Namespace) -> None:
    for name in ("tp", "dp"):
        if getattr(args, name) < 1:
            raise TPError(f"`--{name} {getattr(args, name)}`: give a number of ranks, 1 or more.")


def _choose(target: Target, args: argparse.Namespace) -> CheckedPlan:
    """The plan that the options ask for, checked."""
    plan: Any = args.plan
    if plan is None and args.declared:
        plan = declared_plan(target.model, args.tp)
        if plan is None:
            raise TPError(f"`--declared`: {type(target.model).__name__} declares no plan. Leave it out, and one is inferred.")
    elif plan is None and args.inferred:
        plan = infer_plan(target.model, target.inputs, args.tp)
    elif plan is None:
        plan = target.plan
    found = plan_under_test(target.model, target.inputs, args.tp, plan, sequence_parallel=not args.no_sequence_parallel)
    if args.tp > 1 and not found.shards_anything:
        raise TPError(found.why_nothing_is_sharded(target.model))
    return found


def show(plan: CheckedPlan) -> None:
    """The table of a plan; in colour on a terminal, if rich is there."""
    try:
        if not sys.stdout.isatty():
            raise ImportError
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        print(plan)
        return
    head = str(plan).partition("\n")[0]
    table = Table("modules", "style", "full shape -> local shard", "reason", title=head, title_justify="left", header_style="bold")
    for module, style, shapes, reason in plan.rows:
        colour = "dim" if style.startswith("replicate") else "magenta" if style.startswith(("sequence", "prepare")) else "green"
        table.add_row(Text(module, "cyan"), Text(style, colour), Text(shapes), Text(reason, "dim"))
    Console().print(table)


def held_by_a_rank(plan: CheckedPlan, model: nn.Module, dp: int) -> str:
    """What the first rank, which holds no less than any other, has of the parameters: a line to read."""
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    total = held = size = 0
    for name, split in plan.splits.items():
        if name in plan.tied or name not in dtypes:
            continue
        shape = split.local_shape(plan.shapes[name], 0)
        rows = (len(even_shard(shape[0], 0, dp)), *shape[1:]) if shape else ()
        total += math.prod(plan.shapes[name])
        held += math.prod(rows)
        size += math.prod(rows) * dtypes[name].itemsize
    kinds = ", ".join(sorted({str(d).removeprefix("torch.") for d in dtypes.values()}))
    return (
        f"One rank of {dp * (plan.tp or 1)} (tp={plan.tp} x dp={dp}) holds {held:,} of {total:,} parameters "
        f"({held / max(1, total):.2%}), {_bytes(size)} in {kinds}"
    )


def _bytes(n: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if n < 1024:
            return f"{n:.0f} {unit}" if unit == "bytes" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.1f} GiB"


def _sent(plan: CheckedPlan, target: Target, dp: int) -> str:
    of = "Collectives of one forward and backward on the tensor-parallel axis"
    try:
        counts = collectives(plan, target)
    except Exception as error:  # the model runs on made-up values here: what it makes of them is no reason to hide the plan
        return f"{of}: not counted, {type(error).__name__}: {' '.join(str(error).split())}"
    what = ", ".join(f"{n} {name}" for name, n in sorted(counts.items())) or "none"
    return f"{of}: {what}" + ("; those of FSDP2 on the data-parallel axis come on top" if dp > 1 else "")


def collectives(plan: CheckedPlan, target: Target) -> dict[str, int]:
    """Collectives on the tensor-parallel axis in one forward and backward, by name; nothing is sent."""
    assert plan.tp is not None
    if plan.tp == 1:
        return {}
    return count_collectives(target.model, lambda m, x: scalar_loss(m, x, target.loss_fn), target.inputs, plan, plan.tp)
