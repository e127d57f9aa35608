"""Llama 2 70B at a global batch of 1,024 sequences of 4,096 tokens: what FSDP alone and tensor parallelism do, from 64 to 4,096 devices.

    OMP_NUM_THREADS=1 python benchmarks/llama_70b.py                               # the tables; some minutes
    OMP_NUM_THREADS=1 python benchmarks/llama_70b.py --write docs/llama-2-70b.md   # and docs/img/llama-2-70b.svg

Everything is predicted by `tune` and `estimate`; the fastest micro-batch and checkpointing that fit are taken for each mesh.
"""

from __future__ import annotations

import argparse
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from published import loss
from published_models import build

from lightning_tp.core.units import seconds, size
from lightning_tp.estimate import estimate
from lightning_tp.estimate.cost.hardware import hardware
from lightning_tp.estimate.cost.roofline import collective_seconds, in_node
from lightning_tp.estimate.drawn.figure import new_figure, save
from lightning_tp.estimate.predict import Estimate
from lightning_tp.estimate.tune import tune

SEQ, GLOBAL = 4096, 1024
TPS = (1, 2, 4, 8)
GPUS = (64, 128, 256, 512, 1024, 2048, 4096)
COLORS = {1: "#D55E00", 2: "#E69F00", 4: "#56B4E9", 8: "#0072B2"}  # Okabe and Ito's, told apart by everybody
MARKS = {1: "X", 2: "o", 4: "s", 8: "^"}


@dataclass(frozen=True)
class Study:
    """What was found.

    Args:
        best: (devices, tp) -> the fastest choice that fits.
        refused: devices -> (what, why).
        more: tp=1 on 2,048 devices at twice the global batch, one sequence on each.
    """

    best: dict[tuple[int, int], Estimate]
    refused: dict[int, tuple[tuple[str, str], ...]]
    more: Estimate


def study(kind: str, gpus: tuple[int, ...] = GPUS) -> Study:
    """All of it, on this hardware."""
    model, inputs = build("Llama 2 70B", SEQ), {"tokens": torch.zeros(1, SEQ, dtype=torch.long)}
    best: dict[tuple[int, int], Estimate] = {}
    refused = {}
    for n in gpus:
        found = tune(model, inputs, n, GLOBAL, hardware_=kind, tps=TPS, loss_fn=loss, compile=True, most=10_000)
        refused[n] = tuple((r.what, r.why) for r in found.refused)
        for e in found.fits:
            best.setdefault((n, e.tp), e)  # the fastest comes first
        print(
            f"{kind}: {n:,} devices",
            *(f"tp={tp} {e.tokens_per_s_per_device:,.0f}" for (m, tp), e in best.items() if m == n),
            flush=True,
        )
    more = estimate(model, inputs, (2048, 1), loss_fn=loss, hardware=kind, activation_checkpointing="block", compile=True)
    return Study(best, refused, more)


def latency(e: Estimate) -> float:
    """Seconds of FSDP2's collectives in a step that do not grow with what they carry: the hops of their rings."""

    def seconds_of(kind: str, size: int, ranks: int) -> float:
        return collective_seconds(e.hardware, kind, size, ranks, in_node(e.hardware, "dp", e.tp, ranks))

    return sum(
        c.count * (2 * seconds_of(c.kind, c.bytes, c.ranks) - seconds_of(c.kind, 2 * c.bytes, c.ranks))
        for c in e.collectives
        if c.axis == "dp"
    )


def row(e: Estimate) -> list[str]:
    t = e.time
    return [
        f"{e.dp * e.tp:,}",
        str(e.tp),
        f"{e.dp:,}",
        f"{GLOBAL // e.dp}" if e.dp <= GLOBAL else "1 (global batch 2,048)",
        f"{e.batch}, {e.activation_checkpointing}",
        size(e.needed),
        seconds(t.step),
        f"{e.tokens_per_s_per_device:,.0f}",
        f"{e.mfu:.0%}",
        seconds(t.products + t.attention + t.other),
        seconds(t.tp),
        f"{seconds(t.dp)}, {seconds(t.dp_exposed)}",
        seconds(latency(e)),
    ]


COLUMNS = [
    "devices", "tp", "dp", "sequences per TP group", "micro-batch, checkpointing", "memory", "step", "tokens/s/device", "MFU",
    "kernels", "TP communication", "FSDP2 communication: total, exposed", "FSDP2 latency",
]  # fmt: skip


def table(rows: list[list[str]]) -> list[str]:
    return [
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "--:|" * len(COLUMNS),
        *("| " + " | ".join(r) + " |" for r in rows),
    ]


def plot(found: dict[str, dict[tuple[int, int], float]], path: Path) -> None:
    """Tokens a second of a device, (devices, tp) -> that, against devices; one panel for each kind of hardware."""
    figure = new_figure((5.4 * len(found), 4.2))
    for ax, (kind, speeds) in zip(figure.subplots(1, len(found), squeeze=False)[0], found.items()):
        for tp in TPS:
            points = sorted((n, speed) for (n, t), speed in speeds.items() if t == tp)
            if points:
                ax.plot(*zip(*points), color=COLORS[tp], marker=MARKS[tp], ms=7, label=f"tp={tp}" if tp > 1 else "FSDP alone")
        ax.axvline(GLOBAL, color="0.5", lw=1, ls="--")
        ax.text(
            GLOBAL * 0.94,
            0.03,
            "one sequence for each device",
            transform=ax.get_xaxis_transform(),
            fontsize=8,
            color="0.35",
            ha="right",
        )
        ax.set(xscale="log", xlabel="devices", ylabel="tokens/s of a device", title=hardware(kind).name, ylim=(0, None))
        ax.set_xticks(GPUS, [f"{n:,}" for n in GPUS], rotation=30)
        ax.minorticks_off()
        ax.grid(alpha=0.25)
        ax.legend(fontsize=8, loc="center left")
    path.parent.mkdir(parents=True, exist_ok=True)
    save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hardware", default="h100,a100", help="kinds, with commas (default: %(default)s)")
    parser.add_argument("--write", type=Path, metavar="FILE", help="as Markdown, with a plot beside it in img/")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found = {kind: study(kind) for kind in args.hardware.split(",")}
    text: list[str] = []
    for kind, s in found.items():
        text += ["", f"## On {hardware(kind).name}", "", "2,048 devices:", ""]
        at = [row(s.best[2048, tp]) for tp in TPS if (2048, tp) in s.best]
        text += table([row(s.more), *at])
        text += ["", "Rejected configurations:", "", *(f"- {what}: {why}" for what, why in s.refused[2048])]
        text += ["", "The fastest configuration for each tp, at 1,024 sequences per step:", ""]
        text += table([row(s.best[n, tp]) for n in GPUS for tp in TPS if (n, tp) in s.best])
    print("\n".join(text))
    if args.write:
        speeds = {kind: {at: e.tokens_per_s_per_device for at, e in s.best.items()} for kind, s in found.items()}
        plot(speeds, args.write.parent / "img" / f"{args.write.stem}.svg")
        before = args.write.read_text() if args.write.exists() else ""
        kept = before.split(MARK)[0].rstrip() if MARK in before else f"# {args.write.stem}"
        args.write.write_text(f"{kept}\n\n{MARK}\n" + "\n".join(text) + "\n")


MARK = "<!-- From here on written by benchmarks/llama_70b.py -->"

if __name__ == "__main__":
    main()
