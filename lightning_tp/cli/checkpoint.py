"""`lightning-tp export | consolidate | inspect`: checkpoints from the command line. No devices, no process group, no model code.

Exit status: 0 it is well, 1 `inspect` found that the checkpoint is not complete, 2 a mistake of the user.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from lightning_tp.cli.parser import STATUS

EXAMPLES = """\
examples:
  lightning-tp inspect last.ckpt                                what it is, and whether it is complete
  lightning-tp inspect last.ckpt --verify --json                with checksums, for scripts
  lightning-tp export last.ckpt llama-out --format hf           for AutoModelForCausalLM.from_pretrained("llama-out")
  lightning-tp export last.ckpt out --dtype bf16                safetensors with the model's own names
  lightning-tp export last.ckpt out.ckpt --format torch         for MyModule.load_from_checkpoint, torch.load
  lightning-tp consolidate last.ckpt whole.ckpt                 optimizer and all, for a Trainer without this package
"""


FORMATS = "safetensors with the model's own names, a Hugging Face model, or one file for torch.load"


def _command(commands: Any, name: str, text: str) -> Any:
    return commands.add_parser(name, help=text, description=text, epilog=f"{EXAMPLES}\n{STATUS}")


def add_commands(commands: Any) -> None:
    """Add the three commands to the parser of `lightning-tp`."""
    out = _command(commands, "export", "weights of a checkpoint for others")
    out.set_defaults(run=_export)
    out.add_argument("checkpoint", metavar="CKPT", help="a folder or a file")
    out.add_argument("out", metavar="OUT", help="the folder that is made; for `torch` a file")
    out.add_argument(
        "--format",
        choices=("safetensors", "hf", "torch"),
        default="safetensors",
        help=f"what is written: {FORMATS} (default: %(default)s)",
    )
    out.add_argument("--dtype", metavar="TYPE", help="bf16, fp16, fp32 (default: as stored)")
    out.add_argument(
        "--max-shard-size", default="5GB", metavar="SIZE", help="the most that one file of safetensors holds (default: %(default)s)"
    )
    out.add_argument("--config", metavar="PATH", help="with --format hf: a config.json (default: the one in the checkpoint)")
    out.add_argument("--prefix", metavar="NAME", help="with --format hf: the attribute that holds the model (default: found)")
    one = _command(commands, "consolidate", "a checkpoint folder as one file")
    one.set_defaults(run=_consolidate)
    one.add_argument("checkpoint", metavar="CKPT", help="a folder that many ranks have written")
    one.add_argument("out", metavar="OUT.ckpt", help="the file that is made")
    for command in (out, one):
        command.add_argument("--overwrite", action="store_true", help="replace OUT if it is there")
    look = _command(commands, "inspect", "what a checkpoint is, and whether it is complete")
    look.set_defaults(run=_inspect)
    look.add_argument("checkpoint", metavar="CKPT", help="a folder or a file of any kind")
    look.add_argument("--json", action="store_true", help="print JSON, and nothing else")
    look.add_argument("--verify", action="store_true", help="read all files, and compare checksums")
    for command in (out, one, look):
        command.add_argument("--trust", action="store_true", help="load classes that the checkpoint names (it may run any code)")


def _export(args: argparse.Namespace) -> int:
    from lightning_tp.checkpoint.export import export

    files = export(
        args.checkpoint,
        args.out,
        args.format,
        dtype=args.dtype,
        max_shard_size=args.max_shard_size,
        config=args.config,
        prefix=args.prefix,
        overwrite=args.overwrite,
        weights_only=not args.trust,
    )
    total = sum(f.stat().st_size for f in files)
    print(f"Wrote {args.out}: {len(files)} file{'s' if len(files) > 1 else ''}, {total / 1e6:,.1f} MB")
    return 0


def _consolidate(args: argparse.Namespace) -> int:
    from lightning_tp.checkpoint.export import consolidate

    file = consolidate(args.checkpoint, args.out, overwrite=args.overwrite, weights_only=not args.trust)
    print(f"Wrote {file}: {Path(file).stat().st_size / 1e6:,.1f} MB")
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from lightning_tp.checkpoint.inspect import inspect_checkpoint

    found = inspect_checkpoint(args.checkpoint, verify=args.verify, weights_only=not args.trust)
    print(json.dumps(found.as_dict(), indent=1) if args.json else found)
    return 0 if found.complete else 1
