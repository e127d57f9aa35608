"""`lightning-tp`: plan, verify, estimate and tune the sharding of a model, and handle checkpoints, from the command line.

`plan`, `estimate` and `tune` need no devices and no process group: the model may be on the meta device, and tp and dp of any size.
`verify` starts processes on the CPU of this machine. `export`, `consolidate` and `inspect` need no model code.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Sequence

import torch

from lightning_tp._compat import version_of
from lightning_tp.cli import checkpoint, estimate, options, plan, tune, verify
from lightning_tp.cli.parser import TARGET, Parser, epilog
from lightning_tp.errors import TPError

COMMANDS = (plan, verify, estimate, tune, checkpoint)  # in the order of the help


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line: the arguments after the name of the program, by default those of this process.

    Returns:
        The exit status: 0 success, 1 a difference or an incomplete checkpoint was found, 2 usage error.
    """
    args, unknown = make_parser().parse_known_args(arguments)
    if unknown:
        args.parser.refuse(unknown)
    args.command = shlex.join(["lightning-tp", *(sys.argv[1:] if arguments is None else arguments)])

    def run() -> int:
        try:
            options.check(args)
            status: int = args.run(args)
        except TPError as error:
            print(f"lightning-tp: {' '.join(str(error).split())}", file=sys.stderr)
            return 2
        return status

    return _exit_status(run)


def make_parser() -> Parser:
    """Build the parser with all commands."""
    examples = "".join(command.EXAMPLES for command in COMMANDS)
    parser = Parser("lightning-tp", description=f"Tensor parallelism for PyTorch Lightning.\n\n{TARGET}", epilog=epilog(examples))
    version = f"lightning-tp {version_of('lightning-tp') or '(not installed)'}, torch {torch.__version__}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(
        required=True, dest="name", metavar="plan | verify | estimate | tune | export | consolidate | inspect"
    )
    for command in COMMANDS:
        command.add_to(commands)
    return parser


def _exit_status(run: Callable[[], int]) -> int:
    """Return the status of a command; after an interrupt or a closed pipe (`| head`), the status that a shell would give."""
    try:
        status = run()
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print("lightning-tp: interrupted.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # otherwise Python complains when it flushes at exit
        return 141
