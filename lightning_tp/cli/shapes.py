"""The command `lightning-tp shapes`: the matmuls of a model at each tensor-parallel size, and whether TP is faster."""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch

from lightning_tp.cli import options
from lightning_tp.cli.parser import add_command
from lightning_tp.cli.targets.load import load
from lightning_tp.cli.tune import Progress
from lightning_tp.errors import TPError
from lightning_tp.estimate.drawn import matmul_plot
from lightning_tp.estimate.matmul_measure import measure
from lightning_tp.estimate.matmul_study import LOCAL_BATCHES, TPS, shapes
from lightning_tp.estimate.report.matmul import text as report_of

LONGEST = 4096  # the default sequence length for a config.json that allows more
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
EXAMPLES = """\
  lightning-tp shapes llama-3-8b/config.json --gpus 64 --global-batch 32 --seq 4096 --hardware h100
                                                                    all matmuls for tp=1 to 8, and whether TP is faster
  lightning-tp shapes llama-3-8b/config.json --local-batch 0.25,0.5,1,2 --plot tp.svg
                                                                    the same for several local batch sizes
  lightning-tp shapes gpt2/config.json --seq 256 --tp 1,2,4 --measure --seconds 30
                                                                    timed on this machine as well
"""


def add_to(commands: Any) -> None:
    """Add the command to the parser."""
    summary = "compare the shapes and the speed of the matmuls at each tp for an equal global batch, and say whether TP is faster"
    command = add_command(commands, "shapes", summary, _run, EXAMPLES)
    text = "number of devices, all of which are used (default: those of a node)"
    command.add_argument("--gpus", type=int, metavar="N", help=text)
    batch = command.add_mutually_exclusive_group()
    batch.add_argument("--global-batch", type=int, metavar="N", help="samples per step over all devices: a single local batch")
    text = f"samples per device, separated by commas; below 1, fewer samples than devices (default: {','.join(f'{b:g}' for b in LOCAL_BATCHES)})"
    batch.add_argument("--local-batch", metavar="LIST", help=text)
    options.add(command, "--seq", help=f"sequence length (default: that of the inputs; for a config.json, up to {LONGEST})")
    text = f"tensor-parallel sizes, separated by commas (default: those of {','.join(map(str, TPS))} that fit)"
    command.add_argument("--tp", metavar="LIST", help=text)
    options.add(command, "--precision", "--activation-checkpointing", "--compile", "--hardware", "--plan", "--json")
    command.add_argument("--products", action="store_true", help="list each matmul (default: with a single local batch only)")
    options.add(command, "--plot", help="plot FLOP/s and tokens/s against the local batch: .png, .svg or .pdf")
    command.add_argument("--measure", action="store_true", help="time the matmuls on this machine, on a GPU if there is one")
    command.add_argument(
        "--seconds", type=float, default=60.0, metavar="S", help="about how long to measure (default: %(default)g)"
    )
    text = "dtype to measure in (default: bfloat16 on a GPU, float32 on the CPU)"
    command.add_argument("--dtype", choices=list(DTYPES), help=text)


def _run(args: argparse.Namespace) -> int:
    batches: list[float] | None = _numbers("--local-batch", args.local_batch, float)
    tps: list[int] | None = _numbers("--tp", args.tp, int)
    if not args.seconds > 0:
        raise TPError(f"`--seconds {args.seconds:g}`: pass a time above 0.")
    if args.plot:
        matmul_plot.check(args.plot, "--plot")
    target = load(args.target)
    with Progress() as progress:
        found = shapes(
            target.model,
            target.inputs,
            gpus=args.gpus,
            global_batch=args.global_batch,
            local_batches=batches,
            tps=tps,
            hardware=args.hardware,
            seq=args.seq or _default_length(target.model, args.target),
            precision=args.precision,
            activation_checkpointing=options.activation_checkpointing(args),
            plan=args.plan or target.plan,
            loss_fn=target.loss_fn,
            compile=args.compile,
            progress=progress,
        )
        dtype = DTYPES[args.dtype] if args.dtype else None
        measured = measure(found, seconds=args.seconds, dtype=dtype, progress=progress) if args.measure else None
    if args.plot:
        matmul_plot.draw(found, args.plot)
    if args.json:
        values = json.loads(found.to_json())
        print(json.dumps(values if measured is None else values | {"measured": measured.jsonable()}, indent=1))
        return 0
    print(report_of(found, details=True if args.products else None))
    if measured is not None:
        print("\n" + measured.text(found))
    if args.plot:
        print(f"\nWrote {args.plot}")
    return 0


def _numbers(option: str, given: str | None, kind: type[Any]) -> list[Any] | None:
    """Parse numbers separated by commas."""
    if given is None:
        return None
    try:
        return [kind(x) for x in given.split(",")]
    except ValueError:
        what, example = ("whole numbers", "1,2,4") if kind is int else ("numbers", "0.5,1,2")
        raise TPError(f"`{option} {given}`: pass {what} separated by commas, such as {example}.") from None


def _default_length(model: Any, target: str) -> int | None:
    """Return the sequence length that a Hugging Face model allows, up to `LONGEST`: its random inputs are shorter."""
    config = getattr(model, "config", None)
    if ":" in target or config is None:
        return None
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    length = getattr(text_config, "max_position_embeddings", None)
    return min(length, LONGEST) if isinstance(length, int) and length > 0 else None
