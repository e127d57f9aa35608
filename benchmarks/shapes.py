"""Which models gain from tensor parallelism at a small local batch? Matrix products in the shapes of tp 1, 2, 4 and 8, at an equal global batch.

    OMP_NUM_THREADS=1 python benchmarks/shapes.py                       measure on the CPU (and on a GPU, if there is one), some minutes
    python benchmarks/shapes.py --predict                               what the model of the hardware says, as a table
    python benchmarks/shapes.py --plots docs/img                        the pictures of docs/shapes.md
    python benchmarks/shapes.py --published vidur [--plots docs/img]    against kernel times that others have measured

With b s tokens for each device, FSDP alone multiplies (b s, k) by (k, n); with tp=t the same devices multiply (t b s, k) by (k, n / t), or by
(k / t, n). The layers below are those of the named models, with every size as it is; products that would take longer than `LONGEST` seconds are
left out, and counted. Other work on the machine is met by rounds over all products, of which the fastest counts.

`--published` reads a checkout of github.com/microsoft/vidur (Agrawal et al. 2024, arXiv 2405.05465; MIT license): kernel times of float16 forward
products of eight models on A100 and six on H100, at tp 1 to 8 and 1 to 32,768 tokens.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
import sys
import warnings
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matmul_study.chart import line_style, step_rates
from matmul_study.measure import Measured, ProductKey, free_bytes, once_of, present_device, rate_of
from matmul_study.study import shapes

from lightning_tp.estimate.cost.gemm_tiling import tiling
from lightning_tp.estimate.cost.hardware import Hardware, hardware
from lightning_tp.estimate.drawn.figure import new_figure, save

TPS = (1, 2, 4, 8)
TOKENS = (64, 128, 256, 512, 1024, 2048, 4096, 8192)  # for each device
LONGEST = 1.5  # seconds of one product on the CPU


@dataclass(frozen=True)
class Model:
    """What its matrices have for sizes.

    Args:
        width, inner: of the stream and of the MLP; `gated`: two matrices lead there.
        heads, kv_heads, head: how many, and the width of one.
        blocks: how many.
        vocab: columns of the head, 0 for none of size.
    """

    width: int
    inner: int
    heads: int
    kv_heads: int
    head: int
    blocks: int
    vocab: int
    gated: bool
    fused: bool  # q, k and v in one matrix

    def layers(self, tp: int) -> list[tuple[str, int, int, int]]:
        """(name, columns n, inner k, how many in the model) on the rank that holds most."""
        q, kv = math.ceil(self.heads / tp) * self.head, math.ceil(self.kv_heads / tp) * self.head
        f, v, h, n = math.ceil(self.inner / tp), math.ceil(self.vocab / tp), self.width, self.blocks
        qkv = [("qkv", q + 2 * kv, h, n)] if self.fused else [("q", q, h, n), ("k, v", kv, h, 2 * n)]
        mlp = [("gate, up", f, h, 2 * n)] if self.gated else [("up", f, h, n)]
        return [*qkv, ("o", h, q, n), *mlp, ("down", h, f, n), *([("head", v, h, 1)] if v else [])]


MODELS = {
    "GPT-2 124M": Model(768, 3072, 12, 12, 64, 12, 50257, False, True),
    "BERT-large 0.34B": Model(1024, 4096, 16, 16, 64, 24, 30522, False, False),
    "ViT-H/14 0.63B": Model(1280, 5120, 16, 16, 80, 32, 0, False, False),
    "Llama 3.2 1B": Model(2048, 8192, 32, 8, 64, 16, 128256, True, False),
    "Llama 3 8B": Model(4096, 14336, 32, 8, 128, 32, 128256, True, False),
    "Qwen 2.5 32B": Model(5120, 27648, 40, 8, 128, 64, 152064, True, False),
    "Llama 2 70B": Model(8192, 28672, 64, 8, 128, 80, 32000, True, False),
    "Llama 3.1 405B": Model(16384, 53248, 128, 8, 128, 126, 128256, True, False),
}


def keys_of(n: int, k: int, rows: int) -> list[ProductKey]:
    """Forward, gradient of the input, gradient of the weight."""
    return [ProductKey("x @ w.T", 1, rows, n, k), ProductKey("g @ w", 1, rows, k, n), ProductKey("x.T @ g", 1, n, k, rows)]


def predicted(model: Model, hw: Hardware, tokens: int, tp: int, *, dtype: torch.dtype = torch.bfloat16) -> tuple[float, int]:
    """(seconds, FLOPs) of all matrix products of a step on a device."""
    seconds, flops = 0.0, 0
    for _, n, k, count in model.layers(tp):
        for key in keys_of(n, k, tokens * tp):
            seconds += count * tiling(hw, *key[1:], dtype, key.bytes(dtype.itemsize)).seconds
            flops += count * key.flops
    return seconds, flops


def saved(model: Model, hw: Hardware, tokens: int, tp: int) -> float:
    """Share of the matrix time of tp=1 that tp saves."""
    return 1 - predicted(model, hw, tokens, tp)[0] / predicted(model, hw, tokens, 1)[0]


# ------------------------------------------------------------------------------------------------------------------ predicted


def print_predicted() -> None:
    for device in ("h100", "a100"):
        hw = hardware(device)
        print(f"\n{hw.name}: TFLOP/s of matrix products with tp=1, and the share of their time that tp=2, 4, 8 save (predicted)")
        print(f"{'tokens for each device':24}" + "".join(f"{t:>22,}" for t in TOKENS))
        for name, model in MODELS.items():
            cells = []
            for tokens in TOKENS:
                seconds, flops = predicted(model, hw, tokens, 1)
                cells.append(f"{flops / seconds / 1e12:5.0f}" + "".join(f"{saved(model, hw, tokens, tp):+5.0%}" for tp in TPS[1:]))
            print(f"{name:24}" + "".join(f"{c:>22}" for c in cells))


# ------------------------------------------------------------------------------------------------------------------- measured


def measure(device: str, tokens: tuple[int, ...], budget: float, roles: int) -> None:
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    rate, room = rate_of(dtype, device), free_bytes(device) // 2
    longest = LONGEST if device == "cpu" else 0.1
    wanted: dict[ProductKey, None] = {}
    for model in MODELS.values():
        for rows in tokens:
            for name, *_ in model.layers(1):
                of_tps = [key for tp in TPS for key in _of(model, name, tp, rows, roles)]
                if name != "head" and all(k.flops / rate < longest and k.bytes(dtype.itemsize) < room for k in of_tps):
                    wanted |= dict.fromkeys(of_tps)  # all of tp=1, 2, 4 and 8, or none
    cheap = sorted(wanted, key=lambda k: k.flops)
    while sum(8 * k.flops / rate for k in cheap) > budget:  # each of 4 rounds runs twice, once to warm up
        cheap.pop()
    best: dict[ProductKey, float] = {}
    for done in range(4):
        for i, key in enumerate(cheap):
            if sys.stderr.isatty():
                sys.stderr.write(f"\r\033[Kround {done + 1} of 4, product {i + 1} of {len(cheap)}")
            best[key] = min(best.get(key, math.inf), once_of(key, dtype, device))
    name, hw = present_device(device)
    found = Measured(name, hw, dtype, best, {})
    print(
        f"\n{name}, {str(dtype).removeprefix('torch.')}: GFLOP/s with tp=1, and the share of time that tp=2, 4, 8 save (measured)"
    )
    asked = sum(
        len(_of(m, layer, tp, rows, roles))
        for m in MODELS.values()
        for rows in tokens
        for tp in TPS
        for layer, *_ in m.layers(1)
        if layer != "head"
    )
    print(f"{len(best)} distinct products, the fastest of 4 rounds; of {asked} listed those that fit into {budget:.0f} s. "
          f"{'Forward only' if roles == 1 else 'Forward and both gradients'}.")  # fmt: skip
    _print_table(found, tokens, roles)


def _of(model: Model, layer: str, tp: int, tokens: int, roles: int) -> list[ProductKey]:
    return [key for name, n, k, _ in model.layers(tp) if name == layer for key in keys_of(n, k, tokens * tp)[:roles]]


def _print_table(found: Measured, tokens: tuple[int, ...], roles: int) -> None:
    print(f"{'':20}{'layer':10}{'n':>8}{'k':>8}" + "".join(f"{f'{t:,} tokens':>24}" for t in tokens))
    for name, model in MODELS.items():
        sums: dict[tuple[int, int], float] = defaultdict(float)
        covered: dict[int, int] = defaultdict(int)
        rows = []
        for layer, n, k, count in model.layers(1):
            if layer == "head":
                continue
            cells = []
            for t in tokens:
                seconds = [sum(found.seconds.get(key, math.nan) for key in _of(model, layer, tp, t, roles)) for tp in TPS]
                if any(math.isnan(s) for s in seconds):
                    cells.append("left out")
                    continue
                covered[t] += count * n * k
                for tp, s in zip(TPS, seconds):
                    sums[t, tp] += count * s
                flops = sum(key.flops for key in _of(model, layer, 1, t, roles))
                cells.append(f"{flops / seconds[0] / 1e9:5.0f} " + "".join(f"{1 - s / seconds[0]:+5.0%}" for s in seconds[1:]))
            rows.append((layer, n, k, cells))
        for i, (layer, n, k, cells) in enumerate(rows):
            print(f"{name if i == 0 else '':20}{layer:10}{n:8,}{k:8,}" + "".join(f"{c:>24}" for c in cells))
        whole = sum(count * n * k for layer, n, k, count in model.layers(1) if layer != "head")
        cells = [
            f"({covered[t] / whole:.0%}) " + "".join(f"{1 - sums[t, tp] / sums[t, 1]:+5.0%}" for tp in TPS[1:])
            if covered[t]
            else "-"
            for t in tokens
        ]
        print(f"{'':20}{'a block (share of its FLOPs)':26}" + "".join(f"{c:>24}" for c in cells))


# ------------------------------------------------------------------------------------------------------------------ published

COLUMNS = {"attn_pre_proj": "qkv", "attn_post_proj": "o", "mlp_up_proj": "up", "mlp_down_proj": "down"}
NAMES = {  # in order of size; those of which both devices have been measured
    "Llama-2-7b-hf": "Llama 2 7B", "internlm-20b": "InternLM 20B", "CodeLlama-34b-Instruct-hf": "Code Llama 34B",
    "Llama-2-70b-hf": "Llama 2 70B", "Qwen-72B": "Qwen 72B",
}  # fmt: skip
Published = dict[tuple[str, int, int], dict[str, tuple[int, int, float]]]  # (model, tp, tokens) -> layer -> (n, k, seconds)


def read_published(folder: Path, device: str) -> Published:
    found: dict[tuple[str, int, int], dict[str, list[tuple[int, int, float]]]] = defaultdict(lambda: defaultdict(list))
    for path in sorted((folder / "data" / "profiling" / "compute" / device).glob("*/*/mlp.csv")):
        with path.open() as file:
            for row in csv.DictReader(file):
                tp, tokens = int(float(row["num_tensor_parallel_workers"])), int(float(row["num_tokens"]))
                h, f = int(float(row["n_embd"])), int(float(row["n_expanded_embd"]))
                heads, kv = int(float(row["n_head"])), int(float(row["n_kv_head"]))
                f = f * (2 if row["use_gated_mlp"] == "True" else 1)
                sizes = {
                    "attn_pre_proj": ((heads + 2 * kv) * h // heads // tp, h),
                    "attn_post_proj": (h, h // tp),
                    "mlp_up_proj": (f // tp, h),
                    "mlp_down_proj": (h, int(float(row["n_expanded_embd"])) // tp),
                }
                for column, (n, k) in sizes.items():
                    median = row.get(f"time_stats.{column}.median")
                    if median:
                        found[path.parent.name, tp, tokens][column].append((n, k, float(median) / 1e3))
    if not found:
        sys.exit(f"{folder} has no data/profiling/compute/{device}/*/*/mlp.csv: give a checkout of github.com/microsoft/vidur.")
    return {
        key: {c: (v[0][0], v[0][1], statistics.mean(t for *_, t in v)) for c, v in layers.items()} for key, layers in found.items()
    }


def timed(published: Published, key: tuple[str, int, int], hw: Hardware | None) -> float | None:
    """Seconds of the forward products of a block: measured, or predicted for `hw`."""
    layers = published.get(key)
    if layers is None or len(layers) < len(COLUMNS):
        return None
    if hw is None:
        return sum(t for *_, t in layers.values())
    return sum(_tiled(hw, key[2], n, k) for n, k, _ in layers.values())


def _tiled(hw: Hardware, rows: int, n: int, k: int) -> float:
    return tiling(hw, 1, rows, n, k, torch.float16, ProductKey("x @ w.T", 1, rows, n, k).bytes(2)).seconds


def print_published(folder: Path) -> None:
    grid = {2**i for i in range(6, 16)} | {3 * 2**i for i in range(5, 13)} | {5 * 2**i for i in range(7, 10)} | {72, 136, 264}
    for device in ("a100", "h100"):
        hw = hardware(device)
        published = read_published(folder, device)
        errors = [
            math.log(_tiled(hw, tokens, n, k) / t)
            for (_, _, tokens), layers in published.items()
            if tokens in grid
            for n, k, t in layers.values()
        ]
        errors.sort(key=abs)
        print(
            f"\n{hw.name}: {len(errors):,} products, predicted / measured: median {math.exp(statistics.median(errors)):.2f}, mean error "
            f"{statistics.mean(map(abs, errors)):.1%}, nine of ten within {abs(errors[int(0.9 * len(errors))]):.0%}"
        )
        print(
            "Share of the time of the forward products of a block that tp=2, 4, 8 save at an equal global batch: measured (predicted)"
        )
        tokens = (64, 128, 256, 512, 1024, 2048, 4096)
        print(f"{'tokens for each device':24}" + "".join(f"{t:>30,}" for t in tokens))
        for model, title in NAMES.items():
            cells = []
            for t in tokens:
                parts = []
                for tp in TPS[1:]:
                    found = [_saved(published, model, t, tp, h) for h in (None, hw)]
                    parts.append(f"{found[0]:+4.0%} ({found[1]:+3.0%})" if None not in found else "-")
                cells.append(" ".join(parts))
            print(f"{title:24}" + "".join(f"{c:>30}" for c in cells))


def _saved(published: Published, model: str, tokens: int, tp: int, hw: Hardware | None) -> float | None:
    one, many = timed(published, (model, 1, tokens), hw), timed(published, (model, tp, tokens * tp), hw)
    return None if one is None or many is None else 1 - many / one


# ---------------------------------------------------------------------------------------------------------------------- plots


def _style(i: int) -> dict[str, Any]:
    return line_style(i) | {"markersize": 4.5, "linewidth": 1.3}


def _axis(axes: Any, tokens: tuple[int, ...]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(tokens, [f"{t // 1024}k" if t >= 1024 else str(t) for t in tokens])
    axes.minorticks_off()
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def plot_predicted(folder: Path) -> None:
    """TFLOP/s of matrix products against the tokens of a device, eight models."""
    for device in ("h100", "a100"):
        hw = hardware(device)
        figure = new_figure((12.0, 6.2))
        grid = figure.subplots(2, 4, sharex=True, sharey=True)
        for axes, (name, model) in zip(grid.flat, MODELS.items()):
            for i, tp in enumerate(TPS):
                found = [predicted(model, hw, t, tp) for t in TOKENS]
                axes.plot(
                    TOKENS, [model_flops(model, t) / s / 1e12 for t, (s, _) in zip(TOKENS, found)], label=f"tp={tp}", **_style(i)
                )
            axes.set_title(name, fontsize=10)
            _axis(axes, TOKENS)
        grid.flat[0].set_ylim(0, 1.05 * hw.peak(torch.bfloat16) * hw.product_efficiency / 1e12)  # of all: shared
        _finish(
            figure,
            grid,
            "tokens for each device (local batch x sequence)",
            "matrix products, TFLOP/s",
            f"{hw.name}, bfloat16, predicted",
        )
        save(figure, folder / f"shapes-{device}.svg")


def model_flops(model: Model, tokens: int) -> int:
    """FLOPs of a device if all have equally many: what an uneven split computes beyond that is no use."""
    return sum(count * key.flops for _, n, k, count in model.layers(1) for key in keys_of(n, k, tokens))


def _finish(figure: Any, grid: Any, x: str, y: str, title: str) -> None:
    for axes in grid[-1]:
        axes.set_xlabel(x if grid.shape[1] < 4 else "")
    if grid.shape[1] >= 4:
        figure.supxlabel(x, fontsize=10)
    figure.supylabel(y, fontsize=10)
    handles, labels = grid.flat[0].get_legend_handles_labels()
    if title:
        figure.legend(handles, labels, loc="outside upper right", ncols=len(labels), frameon=False)
        figure.suptitle(title, fontsize=11, x=0.06, ha="left")
    else:
        figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)


def plot_published(folder: Path, out: Path) -> None:
    """Measured gain of tp against predicted gain, forward products of a block."""
    tokens = (64, 128, 256, 512, 1024, 2048)
    models = ("Llama-2-7b-hf", "CodeLlama-34b-Instruct-hf", "Llama-2-70b-hf")
    figure = new_figure((10.5, 6.2))
    grid = figure.subplots(2, 3, sharex=True, sharey=True)
    for row, device in zip(grid, ("h100", "a100")):
        hw = hardware(device)
        published = read_published(folder, device)
        for axes, model in zip(row, models):
            for i, tp in enumerate(TPS[1:], 1):
                for h, line in ((None, "-"), (hw, ":")):
                    found = [(t, s) for t in tokens if (s := _saved(published, model, t, tp, h)) is not None]
                    style = _style(i) | ({"marker": ""} if h else {}) | {"linestyle": line}
                    label = None if h else f"tp={tp}, measured"
                    axes.plot([t for t, _ in found], [100 * s for _, s in found], label=label, **style)
            axes.plot([], [], ":", color="0.3", label="predicted")
            axes.axhline(0, color="0.4", linewidth=0.8)
            axes.set_title(f"{NAMES[model]}, {hw.name.removeprefix('NVIDIA ')}", fontsize=10)
            _axis(axes, tokens)
    _finish(figure, grid, "tokens for each device", "time of forward products saved against tp=1, %", "")
    save(figure, out / "shapes-measured-gpu.svg")


STEPS = {  # samples of 4,096 tokens; devices, checkpointing
    "Llama 3.2 1B": (64, None),
    "Llama 3 8B": (64, None),
    "Llama 2 70B": (256, "block"),
    "Llama 3.1 405B": (1024, "block"),
}
LOCAL = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0)


def whole_steps(folder: Path | None) -> None:
    """Tokens/s of the whole step, by `matmul_study` on the Llama of transformers."""
    import transformers as hf

    warnings.simplefilter("ignore")
    hf.logging.set_verbosity_error()
    results = {}
    for name, (gpus, how) in STEPS.items():
        m = MODELS[name]
        config = hf.LlamaConfig(
            hidden_size=m.width, intermediate_size=m.inner, num_hidden_layers=m.blocks, num_attention_heads=m.heads, num_key_value_heads=m.kv_heads,
            vocab_size=m.vocab, max_position_embeddings=4096, tie_word_embeddings=name == "Llama 3.2 1B",
        )  # fmt: skip
        with torch.device("meta"):
            model = hf.LlamaForCausalLM(config)
        ids = torch.zeros(1, 32, dtype=torch.long)
        found = shapes(
            model,
            {"input_ids": ids, "labels": ids, "use_cache": False},
            gpus=gpus,
            local_batches=LOCAL,
            seq=4096,
            activation_checkpointing=how,
            compile=True,
        )
        results[name] = found
        print(f"\n{name}, {gpus} x H100, samples of 4,096 tokens, checkpointing {how or 'none'}, compiled", flush=True)
        print(f"{'local batch':14}" + "".join(f"{f'tp={tp}':>34}" for tp in TPS))
        for b in LOCAL:
            cells = []
            for tp in TPS:
                cell = found.cell(b, tp)
                e = cell.estimate if cell is not None else None
                matrix = f"{cell.flop_s / 1e12:.0f} TFLOP/s" if cell is not None else ""
                step = "no sample" if e is None else f"{e.tokens_per_s_per_device:,.0f} tokens/s" + ("" if e.fits else ", no room")
                cells.append(f"{matrix}, {step}")
            print(f"{b:<14g}" + "".join(f"{c:>34}" for c in cells), flush=True)
    if folder is not None:
        _plot_steps(results, folder)


def _plot_steps(results: dict[str, Any], folder: Path) -> None:
    figure = new_figure((12.0, 3.6))
    grid = figure.subplots(1, 4, squeeze=False)
    for axes, (name, found) in zip(grid.flat, results.items()):
        step_rates(axes, found)
        axes.set_title(f"{name}, {found.gpus:,} devices", fontsize=10)
        axes.set_ylabel("")
        axes.set_xlabel("")
        axes.set_xticks(found.local_batches, ["1/8", "1/4", "1/2", "1", "2", "4"])
    figure.supxlabel("local batch: samples of 4,096 tokens for each device (hollow: does not fit in memory)", fontsize=10)
    figure.supylabel("tokens/s on a device", fontsize=10)
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=4, frameon=False)
    figure.suptitle("Whole step on NVIDIA H100 SXM 80 GB, with communication, predicted", fontsize=11, x=0.06, ha="left")
    save(figure, folder / "shapes-step.svg")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--predict", action="store_true", help="print what is predicted, and measure nothing")
    parser.add_argument("--steps", action="store_true", help="print whole steps of four models, and measure nothing (some minutes)")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="draw the pictures, and measure nothing (some minutes)")
    parser.add_argument(
        "--published", type=Path, metavar="FOLDER", help="a checkout of github.com/microsoft/vidur: compare with its kernel times"
    )
    parser.add_argument(
        "--tokens", default="64,256,1024", metavar="LIST", help="for each device, to measure (default: %(default)s)"
    )
    parser.add_argument("--seconds", type=float, default=300, help="to measure, about (default: %(default)g)")
    parser.add_argument("--gradients", action="store_true", help="measure both gradients, too")
    args = parser.parse_args()
    if args.plots is not None and not args.plots.is_dir():
        sys.exit(f"{args.plots} is no folder.")
    if args.published is not None:
        print_published(args.published)
        if args.plots is not None:
            plot_published(args.published, args.plots)
        return
    if args.plots is not None:
        plot_predicted(args.plots)
        whole_steps(args.plots)
        return
    if args.predict or args.steps:
        if args.predict:
            print_predicted()
        if args.steps:
            whole_steps(None)
        return
    tokens = tuple(int(t) for t in args.tokens.split(","))
    if torch.cuda.is_available():
        measure("cuda", tokens, args.seconds, 3 if args.gradients else 1)
    else:
        print("GPU: skipped, there is none.")
    measure("cpu", tokens, args.seconds, 3 if args.gradients else 1)


if __name__ == "__main__":
    main()
