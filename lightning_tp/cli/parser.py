"""What the commands of `lightning-tp` have in common: their parser, whose errors are one line, and the words of their help."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Callable
from difflib import get_close_matches
from typing import Any, NoReturn

from lightning_tp.core.files import check_file
from lightning_tp.errors import TPError
from lightning_tp.plan.plan import Plan

TARGET = """\
TARGET is one of
  package.module:function   a function without arguments that returns (model, inputs) or (model, inputs, loss_fn);
  path/to/file.py:function  inputs: what forward is called with (a dict, a tuple, a tensor); loss_fn(output) or
                            loss_fn(output, inputs): a scalar (default: the loss in the output, or of the next token)
  package.module:Class      a LightningModule that is built without arguments and has an `example_input_array`
  path/to/train.py          a script that calls `Trainer.fit`, where it is stopped: its LightningModule, on a first batch of its data;
                            with arguments in quotes: "train.py fit --config my.yaml"
  path/to/config.json       a Hugging Face model, or the folder of one; a large one has no weights (but for `verify`)
"""
STATUS = "exit status: 0 it is well, 1 the split model differs from one process (verify) or a checkpoint is not complete (inspect),\n  2 a mistake"
EXAMPLES = """\
  lightning-tp plan my_model.py:build --tp 2                        the plan as a table
  lightning-tp plan train.py --tp 2                                 of what a script trains
  lightning-tp plan llama-2-7b/config.json --tp 8 --dp 256          at a size that this machine does not have
  lightning-tp plan my_model.py:build --tp 2 --plot plan.svg        as a picture of the model's blocks
  lightning-tp plan my_model.py:build --tp 2 --json plan.json       for TPStrategy(plan="plan.json")
  lightning-tp plan my_model.py:build --tp 2 --emit-python split.py the same for plain PyTorch
  lightning-tp verify my_model.py:build --tp 2 --dp 2               train a few steps on 4 processes, compare with one
  lightning-tp verify my_model.py:build --tp 2 --plan plan.json     with a plan that you have edited
  lightning-tp estimate llama-2-70b/config.json --tp 8 --dp 256 --seq 4096 --batch 1 --hardware h100
                                                                    memory, communication and time of a step, on a rank
  lightning-tp estimate "train.py --size large" --tp 8 --dp 16      the same for what a script trains, with its own batch
  lightning-tp estimate llama-2-70b/config.json --tp 8 --dp 256 --html report.html --plot memory.png
                                                                    the same as a page, and as plots
  lightning-tp tune llama-3-8b/config.json --gpus 64 --hardware h100 --global-batch 512 --seq 8192
                                                                    which mesh, micro-batch and checkpointing
"""


class Parser(argparse.ArgumentParser):
    """A mistake in the options is one line, as every other mistake of a user."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        wide = min(shutil.get_terminal_size().columns, 130) - 2
        kwargs["formatter_class"] = lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=30, width=wide)
        super().__init__(*args, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Say it and leave with status 2."""
        self.exit(2, f"lightning-tp: {message.removesuffix('.')}. `{self.prog} --help` shows what there is.\n")

    def refuse(self, extra: list[str]) -> NoReturn:
        """Options that there are not, with the nearest that there is."""
        known = [o for action in self._actions for o in action.option_strings if o.startswith("--")]
        near = get_close_matches(extra[0].partition("=")[0], known, 1)
        self.error(f"there is no `{' '.join(extra)}`{f', did you mean `{near[0]}`?' if near else ''}")


def examples(command: str = "") -> str:
    """Those of a command, or all; and what the exit status says."""
    lines: list[str] = []
    mine = False
    for line in EXAMPLES.splitlines():
        mine = line.startswith(f"  lightning-tp {command}") if line.startswith("  lightning-tp") else mine
        if mine:
            lines.append(line)
    return "\n".join(["examples:", *lines, "", STATUS])


def checked_plan_file(path: str | None) -> Plan | None:
    """The plan of `--plan`, read before anything else is done.

    Raises:
        TPError: if there is none in that file; it names the file.
    """
    if path is None:
        return None
    try:
        return Plan.of(path)
    except TPError as error:
        raise TPError(f"`--plan {path}`: {str(error).removeprefix(f'`plan={path!r}`: ')}") from None


def check_output(path: str | None, option: str) -> None:
    """Refuse a file that could not be written, before the work begins; - is stdout.

    Raises:
        TPError: as `check_file`.
    """
    if path is not None and path != "-":
        check_file(path, option)


def ended(run: Callable[[], int]) -> int:
    """The status of a command; of one that was interrupted, or whose reader has gone (`| head`), as a shell has it."""
    try:
        status = run()
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print("lightning-tp: interrupted.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it flushes at the end
        return 141
