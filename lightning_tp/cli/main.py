"""`lightning-tp`: look at the plan of a model, and check it against one process, from the command line.

`plan`, `estimate` and `tune` need no devices and no process group: the model may be on the meta device, and tp and dp of any size. `verify`
runs real processes on the CPU of this machine.

Exit status: 0 it is well, 1 the split model differs from one process, 2 a mistake of the user.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence

import torch

from lightning_tp._compat import version_of
from lightning_tp.cli import checkpoint, estimate, options
from lightning_tp.cli.parser import TARGET, Parser, ended, examples
from lightning_tp.cli.plan import _plan
from lightning_tp.cli.verify import _verify
from lightning_tp.errors import TPError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit status."""
    args, extra = _parser().parse_known_args(arguments)
    if extra:
        args.parser.refuse(extra)
    args.command = shlex.join(["lightning-tp", *(sys.argv[1:] if arguments is None else arguments)])

    def run() -> int:
        try:
            status: int = args.run(args)
        except TPError as error:
            print(f"lightning-tp: {' '.join(str(error).split())}", file=sys.stderr)
            return 2
        return status

    return ended(run)


def _parser() -> Parser:
    parser = Parser("lightning-tp", description=f"Tensor parallelism for PyTorch Lightning.\n\n{TARGET}", epilog=examples())
    version = f"lightning-tp {version_of('lightning-tp') or '(not installed)'}, torch {torch.__version__}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(
        required=True, dest="name", metavar="plan | verify | estimate | tune | export | consolidate | inspect"
    )
    about = "how a model is split, what one rank holds, and the collectives of a step; no devices are needed"
    plan = commands.add_parser("plan", help=about, description=f"{about}\n\n{TARGET}", epilog=examples("plan"))
    plan.set_defaults(run=_plan)
    about = "train the model on tp x dp processes of this machine's CPU, and compare losses, gradients and weights with one process"
    check = commands.add_parser("verify", help=about, description=f"{about}\n\n{TARGET}", epilog=examples("verify"))
    check.set_defaults(run=_verify)
    for command in (plan, check):
        command.add_argument("target", metavar="TARGET", help="the model: see above")
        command.add_argument("--tp", type=int, default=2, metavar="N", help="ranks that share one model (default: %(default)s)")
        command.add_argument(
            "--dp", type=int, default=1, metavar="N", help="such groups; FSDP2 shards over them (default: %(default)s)"
        )
        command.add_argument("--plan", metavar="FILE", help="the JSON of a plan (default: the declared one, else the inferred one)")
        which = command.add_mutually_exclusive_group()
        which.add_argument("--declared", action="store_true", help="the plan that the model declares (Hugging Face), or an error")
        which.add_argument("--inferred", action="store_true", help="the plan that is found by running the model once")
        command.add_argument(
            "--no-sequence-parallel", action="store_true", help="whole activations between the split modules, not shards of tokens"
        )
    plan.add_argument("--json", metavar="FILE", help="write the plan as JSON; - for stdout, and nothing else there")
    plan.add_argument(
        "--emit-python",
        metavar="FILE",
        help="write `parallelize(model, tp_mesh)` for plain PyTorch, without this package; - for stdout",
    )
    options.add_pictures(plan, "the plan as a picture of the model's blocks", "that picture and the table with its reasons")
    check.add_argument(
        "--steps", type=int, default=3, metavar="N", help="steps of the optimizer that are compared (default: %(default)s)"
    )
    check.add_argument(
        "--rtol", type=float, default=1e-3, metavar="X", help="the largest relative error allowed (default: %(default)s)"
    )
    estimate.add_commands(commands)
    checkpoint.add_commands(commands)
    for command in commands.choices.values():
        command.set_defaults(parser=command)
    return parser


if __name__ == "__main__":
    sys.exit(main())
