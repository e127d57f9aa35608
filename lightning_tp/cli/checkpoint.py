"""The commands `lightning-tp export | consolidate | inspect`: no devices, no process group, no model code."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from lightning_tp.cli.parser import add_command
from lightning_tp.core.units import size

INSPECT = """\
  lightning-tp inspect last.ckpt                                    what it holds, and whether it is complete
  lightning-tp inspect last.ckpt --verify --json                    with checksums, for scripts
"""
EXPORT = """\
  lightning-tp export last.ckpt llama-out --format hf               for AutoModelForCausalLM.from_pretrained("llama-out")
  lightning-tp export last.ckpt out --dtype bf16                    safetensors with the model's own names
  lightning-tp export last.ckpt out.ckpt --format torch             for MyModule.load_from_checkpoint, torch.load
"""
CONSOLIDATE = """\
  lightning-tp consolidate last.ckpt one.ckpt                       with the optimizer, for a Trainer without this package
"""
EXAMPLES = INSPECT + EXPORT + CONSOLIDATE


def add_to(commands: Any) -> None:
    """Add the three commands to the parser."""
    export = add_command(
        commands, "export", "export weights (safetensors, Hugging Face, torch.save)", _export, EXPORT, target=False
    )
    export.add_argument("checkpoint", metavar="CKPT", help="a checkpoint folder or file")
    export.add_argument("out", metavar="OUT", help="the folder to write; for `torch` a file")
    text = "safetensors with the model's own names, a Hugging Face model, or one file for torch.load (default: %(default)s)"
    export.add_argument("--format", choices=("safetensors", "hf", "torch"), default="safetensors", help=text)
    export.add_argument("--dtype", metavar="TYPE", help="bf16, fp16, fp32 (default: as stored)")
    text = "the largest size of one safetensors file (default: %(default)s)"
    export.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help=text)
    export.add_argument("--config", metavar="PATH", help="for --format hf: a config.json (default: the one in the checkpoint)")
    export.add_argument("--prefix", metavar="NAME", help="for --format hf: the attribute that holds the model (default: detected)")

    consolidate = add_command(
        commands, "consolidate", "merge a sharded checkpoint into one file", _consolidate, CONSOLIDATE, target=False
    )
    consolidate.add_argument("checkpoint", metavar="CKPT", help="a checkpoint folder, written by many ranks")
    consolidate.add_argument("out", metavar="OUT.ckpt", help="the file to write")
    for command in (export, consolidate):
        command.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")

    inspect = add_command(
        commands, "inspect", "show what a checkpoint holds, and whether it is complete", _inspect, INSPECT, target=False
    )
    inspect.add_argument("checkpoint", metavar="CKPT", help="a checkpoint folder or file of any kind")
    inspect.add_argument("--json", action="store_true", help="print JSON, with nothing else on stdout")
    inspect.add_argument("--verify", action="store_true", help="read all files and compare checksums")
    for command in (export, consolidate, inspect):
        command.add_argument("--trust", action="store_true", help="unpickle any class that the checkpoint names (it may run code)")


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
    print(f"Wrote {args.out}: {len(files)} file{'s' if len(files) > 1 else ''}, {size(total)}")
    return 0


def _consolidate(args: argparse.Namespace) -> int:
    from lightning_tp.checkpoint.export import consolidate

    file = consolidate(args.checkpoint, args.out, overwrite=args.overwrite, weights_only=not args.trust)
    print(f"Wrote {file}: {size(Path(file).stat().st_size)}")
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from lightning_tp.checkpoint.inspect import inspect_checkpoint

    found = inspect_checkpoint(args.checkpoint, verify=args.verify, weights_only=not args.trust)
    print(json.dumps(found.as_dict(), indent=1) if args.json else found)
    return 0 if found.complete else 1
