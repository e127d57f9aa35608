"""The command `lightning-tp verify`."""

from __future__ import annotations

import argparse
import sys

from lightning_tp.cli.parser import checked_plan_file
from lightning_tp.cli.plan import _check_sizes, _choose, show
from lightning_tp.cli.target import load
from lightning_tp.errors import TPError
from lightning_tp.verify.run_ranks import RankError
from lightning_tp.verify.verify import verify


def _verify(args: argparse.Namespace) -> int:
    _check_sizes(args)
    if args.steps < 1:
        raise TPError(f"`--steps {args.steps}`: give a number of steps, 1 or more.")
    if not args.rtol > 0:
        raise TPError(f"`--rtol {args.rtol:g}`: give an error above 0, such as 1e-3.")
    args.plan = checked_plan_file(args.plan)
    target = load(args.target, weights=True)
    plan = _choose(target, args)
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
        print(f"NOT as in one process: the split model does not run. {error}", file=sys.stderr)
        return 1
    show(plan)
    print(report)
    return 0 if report.ok else 1
