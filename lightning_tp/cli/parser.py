"""The parser of `lightning-tp`: usage errors are one line, and the help of each command describes TARGET, examples and the exit status."""

from __future__ import annotations

import argparse
import re
import shutil
from collections.abc import Callable
from difflib import get_close_matches
from typing import Any, NoReturn

TARGET = """\
TARGET is one of
  package.module:function   a function without arguments that returns (model, inputs) or (model, inputs, loss_fn);
  path/to/file.py:function  inputs: what forward is called with (a dict, a tuple, a tensor); loss_fn(output) or
                            loss_fn(output, inputs): a scalar (default: the loss in the output, or that of the next token)
  package.module:Class      a LightningModule that can be built without arguments and has an `example_input_array`
  path/to/train.py          a script that calls `Trainer.fit`, where it is stopped; its LightningModule and a first batch are used;
                            with arguments in quotes: "train.py fit --config my.yaml"
  path/to/config.json       a Hugging Face model, or its folder; a large model is built without weights (except for `verify`)
"""
STATUS = """\
exit status: 0 success, 1 the sharded model differs from a single process (verify) or the checkpoint is incomplete (inspect),
  2 usage error"""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, like all other errors of the command line."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        width = min(shutil.get_terminal_size().columns, 130) - 2
        kwargs["formatter_class"] = lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=30, width=width)
        super().__init__(*args, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Print the message and exit with status 2."""
        self.exit(2, f"lightning-tp: {message.removesuffix('.')}. See `{self.prog} --help`.\n")

    def refuse(self, unknown: list[str]) -> NoReturn:
        """Exit with an error for unknown options, which names the nearest option that exists."""
        known = re.findall(r"--[a-z-]+", self.format_usage())
        near = get_close_matches(unknown[0].partition("=")[0], known, 1)
        self.error(f"unrecognized arguments: `{' '.join(unknown)}`{f', did you mean `{near[0]}`?' if near else ''}")


def add_command(
    commands: Any, name: str, summary: str, run: Callable[[argparse.Namespace], int], examples: str, *, target: bool = True
) -> Any:
    """Add a command to the parser, and return its own parser, to add options to; `run` returns the exit status."""
    description = f"{summary}\n\n{TARGET}" if target else summary
    command = commands.add_parser(name, help=summary, description=description, epilog=epilog(examples))
    command.set_defaults(run=run, parser=command)
    if target:
        command.add_argument("target", metavar="TARGET", help="the model: see above")
    return command


def epilog(examples: str) -> str:
    """Return what stands below the options in the help: examples and the exit status."""
    return f"examples:\n{examples}\n{STATUS}"
