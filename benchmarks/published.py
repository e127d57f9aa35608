"""Measurements that others have published, beside what `estimate` predicts for them.

    OMP_NUM_THREADS=1 python benchmarks/published.py                      # all: about 4 minutes
    OMP_NUM_THREADS=1 python benchmarks/published.py --source torchtitan  # those whose name begins so
    OMP_NUM_THREADS=1 python benchmarks/published.py --write docs/measurements.md

    OMP_NUM_THREADS=1 python benchmarks/published.py --fit                # the constants that were fitted to them, anew

The measurements, where they stand and what was assumed where a source does not say it are in `published.json`. `sustained` of each device and
`fsdp_traffic` of all, in `hardware.json`, were fitted to them; with `--fit`, each source is also predicted with constants from the others.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import warnings
from collections import defaultdict
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from published_models import build
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from lightning_tp.estimate.cost.hardware import Hardware, hardware
from lightning_tp.estimate.predict import Estimate, predict
from lightning_tp.estimate.rank.inputs import loss_of
from lightning_tp.estimate.rank.settings import Options
from lightning_tp.estimate.rank.trace_cache import TraceCache

FILE = Path(__file__).with_name("published.json")
BF16 = torch.bfloat16
LONGEST = 8192  # tokens, of the runs that count for the fit: attention of longer ones was another kernel


@dataclass(frozen=True)
class Run:
    """A row; `tokens_per_s` for each device, `memory_gib` of one."""

    source: str
    model: str
    hardware: str
    dp: int
    tp: int
    batch: int
    seq: int
    checkpointing: str
    precision: str
    compile: bool
    tokens_per_s: float | None
    memory_gib: float | None

    @property
    def setting(self) -> str:
        kind = "" if self.checkpointing == "none" else f", checkpointing: {self.checkpointing}"
        return f"dp {self.dp} x tp {self.tp}, {self.batch} x {self.seq:,} tokens{kind}{', compiled' if self.compile else ''}"


def runs() -> tuple[dict[str, Any], list[Run]]:
    """The sources, and their rows."""
    found = json.loads(FILE.read_text())
    return found["sources"], [Run(**dict(zip(found["columns"], row))) for row in found["rows"]]


def loss(logits: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), inputs["tokens"].flatten())


def two_of_five(name: str, module: nn.Module) -> bool:
    """Of the blocks, which are run again."""
    parts = name.split(".")
    return len(parts) == 2 and parts[0] == "blocks" and int(parts[1]) % 5 in (1, 3)


@lru_cache(maxsize=2)
def tracer(model: str, seq: int) -> TraceCache:
    tokens = torch.zeros(1, seq, dtype=torch.long)
    return TraceCache(build(model, seq), {"tokens": tokens}, loss_of(loss), None)


def predicted(run: Run, hardware: Hardware | None = None) -> Estimate:
    """What `estimate` says, for the mesh, batch and settings of a row."""
    how: Any = {"none": None, "2 of 5 blocks": two_of_five}.get(run.checkpointing, run.checkpointing)
    precision: Any = MixedPrecisionPolicy(BF16, BF16) if run.precision == "pure" else run.precision
    options = Options(precision, "adamw", how, compile=run.compile)
    tokens = torch.zeros(run.batch, run.seq, dtype=torch.long)
    return predict(tracer(run.model, run.seq), {"tokens": tokens}, run.dp, run.tp, hardware or run.hardware, options)


@dataclass(frozen=True)
class Pair:
    """A row and its prediction: errors are (predicted / measured - 1)."""

    run: Run
    tokens_per_s: float
    memory_gib: float

    @property
    def speed(self) -> float | None:
        return None if self.run.tokens_per_s is None else self.tokens_per_s / self.run.tokens_per_s - 1

    @property
    def memory(self) -> float | None:
        return None if self.run.memory_gib is None else self.memory_gib / self.run.memory_gib - 1


def pair(run: Run) -> Pair:
    """Predicted; memory as the allocator counts it, without what is taken before."""
    found = predicted(run)
    return Pair(run, found.tokens_per_s_per_device, (found.needed - found.hardware.reserved_bytes) / 2**30)


def summary(name: str, errors: list[float], within: float) -> str:
    """How many of these are near."""
    if not errors:
        return ""
    near = sum(abs(e) <= within for e in errors)
    return (
        f"{name}: {near} of {len(errors)} within {within:.0%}; mean error {statistics.fmean(errors):+.1%}, "
        f"mean absolute error {statistics.fmean(map(abs, errors)):.1%}, from {min(errors):+.0%} to {max(errors):+.0%}"
    )


def line(p: Pair) -> list[str]:
    run = p.run
    return [
        run.model,
        run.hardware,
        run.setting,
        "-" if run.tokens_per_s is None else f"{run.tokens_per_s:,.0f}",
        "-" if run.tokens_per_s is None else f"{p.tokens_per_s:,.0f} ({p.speed:+.0%})",
        "-" if run.memory_gib is None else f"{run.memory_gib:.1f}",
        "-" if run.memory_gib is None else f"{p.memory_gib:.1f} ({p.memory:+.0%})",
    ]


def fit(rows: list[Run]) -> None:
    """The best of a grid of constants for each kind of device, and how far each source is off with what the others give."""
    sustained, traffic = [0.74 + 0.02 * i for i in range(9)], [1.0, 2.0, 3.0]
    logs: dict[tuple[str, float, float], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for run in rows:
        if run.tokens_per_s is None or run.seq > LONGEST:
            continue
        kind = hardware(run.hardware)
        group = "h100" if run.hardware == "h100-500w" else run.hardware
        for s in sustained:
            for t in traffic:
                found = predicted(run, replace(kind, sustained=s, fsdp_traffic=t))
                logs[group, s, t][run.source].append(math.log(found.tokens_per_s_per_device / run.tokens_per_s))
    for group in sorted({key[0] for key in logs}):
        for t in traffic:

            def off(s: float, without: str = "", group: str = group, t: float = t) -> float:
                return statistics.fmean(size(e) for name, e in logs[group, s, t].items() if name != without)

            best = min(sustained, key=off)
            print(f"{group}, fsdp_traffic {t:g}: sustained {best:.2f}, mean error of the sources {off(best):.1%}")
            for name in logs[group, best, t]:
                if len(logs[group, best, t]) > 1:
                    other = min(sustained, key=lambda s: off(s, name))
                    errors = [math.exp(e) - 1 for e in logs[group, other, t][name]]
                    print(f"    {name}, with {other:.2f} from the others: " + summary("tokens/s", errors, 0.15))


def size(errors: list[float]) -> float:
    return statistics.fmean(map(abs, errors))


COLUMNS = ["model", "hardware", "run", "tokens/s measured", "predicted", "GiB measured", "predicted"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="", help="only sources whose name begins so")
    parser.add_argument("--write", type=Path, metavar="FILE", help="also as Markdown")
    parser.add_argument("--fit", action="store_true", help="find the constants anew, and leave out each source in turn")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    sources, rows = runs()
    if args.fit:
        fit([r for r in rows if r.source.startswith(args.source)])
        return
    text = ["# Predictions compared with published measurements", "", *INTRODUCTION.strip().splitlines()]
    speeds: dict[bool, list[float]] = defaultdict(list)
    memories: list[float] = []
    for name, source in sources.items():
        mine = [r for r in rows if r.source == name]
        if not mine or not name.startswith(args.source):
            continue
        print(f"\n{source['title']}; {source['where']}", flush=True)
        pairs = []
        for run in sorted(mine, key=lambda r: (r.hardware, rows.index(r))):
            pairs.append(pair(run))
            print("  " + "  ".join(c.ljust(w) for c, w in zip(line(pairs[-1]), (18, 9, 66, 7, 16, 6, 0))), flush=True)
        speed = [p.speed for p in pairs if p.speed is not None]
        memory = [p.memory for p in pairs if p.memory is not None]
        of = [summary("tokens/s", speed, 0.15), summary("memory", memory, 0.1)]
        short = [p.speed for p in pairs if p.speed is not None and p.run.seq <= LONGEST]
        if len(short) < len(speed):
            of.insert(1, summary(f"tokens/s, sequences up to {LONGEST:,} tokens", short, 0.15))
        speeds[name == "llm-foundry"] += speed
        memories += memory
        told = [s for s in of if s]
        print(*(f"  {s}" for s in told), sep="\n", flush=True)
        text += ["", f"## {source['title']}", "", f"From {source['where']}. {source['notes']}", "", *(f"- {s}" for s in told), ""]
        text += [
            "| " + " | ".join(COLUMNS) + " |",
            "|---|---|---|--:|--:|--:|--:|",
            *("| " + " | ".join(line(p)) + " |" for p in pairs),
        ]
    print()
    total = [
        summary("tokens/s, all sources except llm-foundry", speeds[False], 0.15),
        summary("tokens/s, llm-foundry", speeds[True], 0.15),
        summary("memory", memories, 0.1),
    ]
    print(*(s for s in total if s), sep="\n")
    if args.write:
        head = text.index("") + 1
        text[head:head] = [*(f"- {s}" for s in total if s), ""]
        args.write.write_text("\n".join(text) + "\n")


INTRODUCTION = """
Generated by `benchmarks/published.py` from `benchmarks/published.json`. Tokens/s are per device; errors are predicted / measured - 1. The
models are reimplemented after the authors' code (`benchmarks/published_models.py`), so that they save and communicate the same tensors.
"""

if __name__ == "__main__":
    main()
