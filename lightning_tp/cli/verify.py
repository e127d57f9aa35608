"""The command `lightning-tp verify`: train a few steps on CPU processes, and compare with a single process."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from lightning_tp.cli.parser import add_command
from lightning_tp.cli.plan import add_plan_options, plan_from_options, show
from lightning_tp.cli.targets.load import load
from lightning_tp.errors import TPError
from lightning_tp.verify.run_ranks import RankError
from lightning_tp.verify.verify import verify

EXAMPLES = """\
  lightning-tp verify my_model.py:build --tp 2 --dp 2               train a few steps on 4 processes, compare with a single one
  lightning-tp verify my_model.py:build --tp 2 --plan plan.json     with a plan that you have edited
"""


def add_to(commands: Any) -> None:
    """Add the command to the parser."""
    summary = "train the model on tp x dp processes of this CPU, and compare losses, gradients and weights with a single process"
    command = add_command(commands, "verify", summary, _run, EXAMPLES)
    add_plan_options(command)
    command.add_argument("--steps", type=int, default=3, metavar="N", help="optimizer steps to compare (default: %(default)s)")
    command.add_argument(
        "--rtol", type=float, default=1e-3, metavar="X", help="largest relative error allowed (default: %(default)s)"
    )


def _run(args: argparse.Namespace) -> int:
    if not args.rtol > 0:
        raise TPError(f"`--rtol {args.rtol:g}`: pass an error above 0, such as 1e-3.")
    target = load(args.target, weights=True)
    plan = plan_from_options(target, args)
    try:
        report = verify(
            target.build,
            target.inputs,
            target.loss_fn,
            tp=args.tp,
            dp=args.dp,
            plan=plan,
            steps=args.steps,
            rtol=args.rtol,
            sequence_parallel=not args.no_sequence_parallel,
        )
    except RankError as error:
        print(f"DIFFERS from a single process: the sharded model does not run. {error}", file=sys.stderr)
        return 1
    show(plan)
    print(report)
    return 0 if report.ok else 1
