"""The matmuls of a training step at each tp and an equal global batch: how fast they are, and whether tensor parallelism gains.

    python benchmarks/study_matmuls.py llama-3-8b/config.json --gpus 64 --global-batch 32 --seq 4096   every matmul, tp=1 to 8
    python benchmarks/study_matmuls.py llama-3-8b/config.json --local-batch 0.25,0.5,1,2 --plot tp.svg   where it turns
    python benchmarks/study_matmuls.py gpt2/config.json --seq 256 --tp 1,2,4 --measure --seconds 30      timed on this machine, too

The model is traced on the meta device as `lightning_tp.estimate` does; nothing but `--measure` needs a device. docs/shapes.md has the answers for
models from 0.1B to 405B.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

import torch
from matmul_study.chart import plot_study
from matmul_study.measure import measure
from matmul_study.report import text
from matmul_study.study import LOCAL_BATCHES, TPS, shapes

from lightning_tp.cli import options
from lightning_tp.cli.parser import TARGET
from lightning_tp.cli.targets.load import load
from lightning_tp.cli.tune import Progress
from lightning_tp.errors import TPError
from lightning_tp.estimate.cost.hardware import hardware

LONGEST = 4096  # tokens of a sample that are taken for a config.json that says more
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study; returns the exit status."""
    args = _parser().parse_args(arguments)
    try:
        options.check(args)
        return _study(args)
    except TPError as error:
        print(f"study_matmuls: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=f"{__doc__}\n{TARGET}", formatter_class=raw)
    parser.add_argument("target", metavar="TARGET", help="the model: see above")
    parser.add_argument("--gpus", type=int, metavar="N", help="devices, all of them used (default: those of a node)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--global-batch", type=int, metavar="N", help="samples of a step over all devices: one local batch")
    which.add_argument(
        "--local-batch",
        metavar="LIST",
        help=f"samples for each device, with commas; below 1: fewer samples than devices (default: {_joined(LOCAL_BATCHES)})",
    )
    parser.add_argument(
        "--seq",
        type=int,
        metavar="N",
        help=f"length of the sequences (default: that of the inputs; of a config.json, up to {LONGEST})",
    )
    parser.add_argument(
        "--tp", metavar="LIST", help=f"sizes of the tensor-parallel axis (default: of {_joined(TPS)} those that fit)"
    )
    options.add(parser, "--hardware", "--precision", "--activation-checkpointing", "--compile", "--plan")
    parser.add_argument("--products", action="store_true", help="list each matmul (default: with one local batch only)")
    parser.add_argument("--json", action="store_true", help="print JSON, and nothing else")
    parser.add_argument("--plot", metavar="FILE", help="draw FLOP/s and tokens/s against the local batch: .png, .svg or .pdf")
    parser.add_argument("--measure", action="store_true", help="time the matmuls on this machine, on a GPU if there is one")
    parser.add_argument("--seconds", type=float, default=60.0, metavar="S", help="to measure, about (default: %(default)g)")
    parser.add_argument("--dtype", choices=list(DTYPES), help="to measure in (default: bfloat16 on a GPU, float32 on the CPU)")
    return parser


def _study(args: argparse.Namespace) -> int:
    batches = _list("local-batch", args.local_batch, float)
    tps = _list("tp", args.tp, int)
    hw = hardware(args.hardware)  # before the model is built
    if not args.seconds > 0:
        raise TPError(f"`--seconds {args.seconds:g}`: give a time above 0.")
    target = load(args.target)
    measured = None
    with Progress() as progress:
        found = shapes(
            target.model,
            target.inputs,
            gpus=args.gpus,
            global_batch=args.global_batch,
            local_batches=batches,
            tps=tps,
            hardware=hw,
            seq=args.seq or _longest(target.model, args.target),
            precision=args.precision,
            activation_checkpointing=options.activation_checkpointing(args),
            plan=args.plan or target.plan,
            loss_fn=target.loss_fn,
            compile=args.compile,
            progress=progress,
        )
        if args.measure:
            dtype = DTYPES[args.dtype] if args.dtype else None
            measured = measure(found, seconds=args.seconds, dtype=dtype, progress=progress)
    if args.plot:
        plot_study(found, args.plot)
    if args.json:
        values = json.loads(found.to_json())
        print(json.dumps(values if measured is None else values | {"measured": measured.jsonable()}, indent=1))
        return 0
    print(text(found, details=True if args.products else None))
    if measured is not None:
        print("\n" + measured.text(found))
    if args.plot:
        print(f"\nWrote {args.plot}")
    return 0


def _list(name: str, given: str | None, kind: type[int] | type[float]) -> list[Any] | None:
    if given is None:
        return None
    try:
        return [kind(x) for x in given.split(",")]
    except ValueError:
        what = "whole numbers" if kind is int else "numbers"
        raise TPError(
            f"`--{name} {given}`: give {what} with commas between them, such as {'1,2,4' if kind is int else '0.5,1,2'}."
        ) from None


def _longest(model: Any, target: str) -> int | None:
    """The made-up tokens of a config.json are few: what the model can take says more."""
    config = getattr(model, "config", None)
    if ":" in target or config is None:
        return None
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    most = getattr(text_config, "max_position_embeddings", None)
    return min(most, LONGEST) if isinstance(most, int) and most > 0 else None


def _joined(values: Any) -> str:
    return ",".join(f"{v:g}" for v in values)


if __name__ == "__main__":
    sys.exit(main())
