"""The command `lightning-tp plan`: how a model is sharded, as a table, JSON, Python or a picture."""

from __future__ import annotations

import argparse
import math
from typing import Any

from torch import nn

from lightning_tp.cli import options
from lightning_tp.cli.parser import add_command
from lightning_tp.cli.targets.load import load
from lightning_tp.cli.targets.target import Target
from lightning_tp.cli.torch_source import python_source
from lightning_tp.core.comm.axis import even_shard
from lightning_tp.core.files import check_file, write_text
from lightning_tp.core.tables import has_rich_terminal, print_framed
from lightning_tp.core.units import size
from lightning_tp.errors import TPError
from lightning_tp.estimate.drawn.pages import write_plan
from lightning_tp.estimate.drawn.picture_from_trace import picture_of
from lightning_tp.estimate.drawn.picture_render import plot_plan
from lightning_tp.infer import infer_plan
from lightning_tp.infer.dry_run import count_collectives
from lightning_tp.plan.checked import CheckedPlan
from lightning_tp.plan.declared import declared_plan
from lightning_tp.verify.training import scalar_loss
from lightning_tp.verify.verify import plan_under_test

EXAMPLES = """\
  lightning-tp plan my_model.py:build --tp 2                        the plan as a table
  lightning-tp plan train.py --tp 2                                 the plan of the module that a script trains
  lightning-tp plan llama-2-7b/config.json --tp 8 --dp 256          for a mesh that this machine does not have
  lightning-tp plan my_model.py:build --tp 2 --plot plan.svg        as a picture of the model's blocks
  lightning-tp plan my_model.py:build --tp 2 --json plan.json       for TPStrategy(plan="plan.json")
  lightning-tp plan my_model.py:build --tp 2 --emit-python split.py for plain PyTorch
"""


def add_to(commands: Any) -> None:
    """Add the command to the parser."""
    summary = "show how a model is sharded, what a rank holds, and the collectives of a step; needs no devices"
    command = add_command(commands, "plan", summary, _run, EXAMPLES)
    add_plan_options(command)
    command.add_argument("--json", metavar="FILE", help="write the plan as JSON; - for stdout, with nothing else there")
    text = "write `parallelize(model, tp_mesh)` for plain PyTorch, without this package; - for stdout"
    command.add_argument("--emit-python", metavar="FILE", help=text)
    options.add(command, "--plot", help=f"write the plan as a picture of the model's blocks; {options.FORMATS}")
    options.add(command, "--html", help="write that picture and the table with the reasons, as one self-contained HTML file")


def add_plan_options(command: Any) -> None:
    """Add the options that `plan` and `verify` share: the mesh, and which plan."""
    options.add(command, "--tp", "--dp")
    options.add(command, "--plan", help="a plan as JSON (default: the declared plan, else the inferred one)")
    which = command.add_mutually_exclusive_group()
    which.add_argument("--declared", action="store_true", help="use the plan that the model declares (Hugging Face)")
    which.add_argument("--inferred", action="store_true", help="use the plan that is inferred by tracing the model")
    options.add(command, "--no-sequence-parallel")


def _run(args: argparse.Namespace) -> int:
    for file, option in ((args.json, "--json"), (args.emit_python, "--emit-python")):
        if file not in (None, "-"):
            check_file(file, option)
    target = load(args.target)
    plan = plan_from_options(target, args)
    makers = [(args.json, plan.to_json), (args.emit_python, lambda: python_source(plan, target.model, args.target))]
    texts = [(file, make()) for file, make in makers if file is not None]  # all of them before anything is written
    for file, text in texts:
        if file == "-":
            print(text)
        else:
            write_text(file, text if text.endswith("\n") else text + "\n")
    is_quiet = "-" in (args.json, args.emit_python)
    lines = [] if is_quiet else [held_line(plan, target.model, args.dp), collectives_line(plan, target, args.dp)]
    if not is_quiet:
        show(plan)
        print("\n".join(lines))
    pictures = _draw(plan, target, args, lines)
    for file in () if is_quiet else (*(file for file, _ in texts), *pictures):
        print(f"Wrote {file}")
    return 0


def _draw(plan: CheckedPlan, target: Target, args: argparse.Namespace, held: list[str]) -> list[str]:
    """Write the picture of a plan to the files that the options name, and return these."""
    files = [file for file in (args.plot, args.html) if file is not None]
    if not files:
        return []
    picture = picture_of(target.model, target.inputs, plan, loss_fn=target.loss_fn)
    if args.plot is not None:
        plot_plan(picture, args.plot)
    if args.html is not None:
        write_plan(plan, picture, args.html, command=args.command, held=held)
    return files


def plan_from_options(target: Target, args: argparse.Namespace) -> CheckedPlan:
    """Return the checked plan that the options ask for, which shards something."""
    plan: Any = args.plan
    if plan is None and args.declared:
        plan = declared_plan(target.model, args.tp)
        if plan is None:
            raise TPError(f"`--declared`: {type(target.model).__name__} declares no plan. Without this option, one is inferred.")
    elif plan is None and args.inferred:
        plan = infer_plan(target.model, target.inputs, args.tp)
    elif plan is None:
        plan = target.plan
    checked = plan_under_test(target.model, target.inputs, args.tp, plan, sequence_parallel=not args.no_sequence_parallel)
    if args.tp > 1 and not checked.shards_anything:
        raise TPError(checked.why_nothing_is_sharded(target.model))
    return checked


def show(plan: CheckedPlan) -> None:
    """Print a plan; with a frame and colors on a terminal."""
    if not has_rich_terminal():
        print(plan)
        return

    def style(column: int, cell: str) -> str:
        of_style = "dim" if cell.startswith("replicate") else "magenta" if cell.startswith(("sequence", "prepare")) else "green"
        return ("cyan", of_style, "", "dim")[column]

    header = ("modules", "style", "full shape -> local shard", "reason")
    print_framed(str(plan).splitlines()[0], header, plan.rows, style=style)


def held_line(plan: CheckedPlan, model: nn.Module, dp: int) -> str:
    """Say what the first rank, which holds no less than any other, holds of the parameters, and how many bytes that is."""
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    total = held = num_bytes = 0
    for name, split in plan.splits.items():
        if name in plan.tied or name not in dtypes:
            continue
        shape = split.local_shape(plan.shapes[name], 0)
        local = (len(even_shard(shape[0], 0, dp)), *shape[1:]) if shape else ()
        total += math.prod(plan.shapes[name])
        held += math.prod(local)
        num_bytes += math.prod(local) * dtypes[name].itemsize
    kinds = ", ".join(sorted({str(d).removeprefix("torch.") for d in dtypes.values()}))
    return (
        f"A rank of {dp * (plan.tp or 1):,} (tp={plan.tp} x dp={dp}) holds up to {held:,} of {total:,} parameters "
        f"({held / max(1, total):.2%}), {size(num_bytes)} in {kinds}"
    )


def collectives_line(plan: CheckedPlan, target: Target, dp: int) -> str:
    """Say how many collectives of each kind a forward and backward pass makes on the tensor-parallel axis; nothing is sent."""
    head = "Tensor-parallel collectives of one forward and backward pass"
    counts: dict[str, int] = {}
    try:
        if plan.tp is not None and plan.tp > 1:
            counts = count_collectives(target.model, lambda m, x: scalar_loss(m, x, target.loss_fn), target.inputs, plan, plan.tp)
    except Exception as error:  # the model runs on random values here: its errors are no reason to hide the plan
        return f"{head}: not counted ({type(error).__name__}: {' '.join(str(error).split())})"
    text = ", ".join(f"{n} {name}" for name, n in sorted(counts.items())) or "none"
    return f"{head}: {text}" + (" (plus those of FSDP2 on the data-parallel axis)" if dp > 1 else "")
