"""What splitting a model costs in eager mode besides communication: dispatch, on a fake process group that moves no bytes.

    OMP_NUM_THREADS=1 python benchmarks/dispatch.py

An 8-block Llama of width 64, forward + backward, on one thread. All variants take turns in one run, so that a drift of the machine
hits them alike; the median of each is given as a ratio to the whole model in one process. Not covered: communication (see
`gloo.py`) and kernels (they are smaller on a shard, which is why a ratio may be below what the dispatch alone costs).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

sys.path.insert(0, str(Path(__file__).parents[1]))
import lightning_tp as ltp
from examples.llama import PLAN, Llama, LlamaConfig
from lightning_tp.testing import fake_world

NAMES = ("data_parallel", "tensor_parallel")
CONFIG = LlamaConfig(vocab_size=512, dim=64, num_layers=8, num_heads=4, num_kv_heads=2, hidden_dim=176)


def mesh(dp: int, tp: int) -> DeviceMesh:
    """The first dp x tp ranks of the fake world."""
    return DeviceMesh("cpu", torch.arange(dp * tp).view(dp, tp), mesh_dim_names=NAMES)


def llama() -> Llama:
    torch.manual_seed(0)
    return Llama(CONFIG)


def fsdp(model: Llama) -> nn.Module:
    dp = mesh(2, 1)["data_parallel"]
    for layer in model.layers:
        fully_shard(layer, mesh=dp)
    return fully_shard(model, mesh=dp)


def step_of(model: nn.Module, batch: int, seq: int) -> Callable[[], None]:
    g = torch.Generator().manual_seed(0)
    tokens, targets = torch.randint(CONFIG.vocab_size, (2, batch, seq), generator=g)

    def step() -> None:
        logits = model(tokens)
        F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
        for p in model.parameters():
            p.grad = None

    return step


def interleaved(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Median milliseconds of each, in turns."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(rounds + 3):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if i >= 3:
                times[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(t) for name, t in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seq", type=int, default=64)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with fake_world(4):
        models = {
            "one process": llama(),
            "lightning_tp": ltp.parallelize(llama(), mesh(1, 2), PLAN),
            "lightning_tp, sequence_parallel=False": ltp.parallelize(llama(), mesh(1, 2), PLAN, sequence_parallel=False),
            "torch styles, same plan": ltp.parallelize(llama(), mesh(1, 2), PLAN, backend="dtensor"),
            "one process, FSDP2 over 2": fsdp(llama()),
            "lightning_tp, FSDP2 over 2": ltp.parallelize(llama(), mesh(2, 2), PLAN),
        }
        ms = interleaved({name: step_of(model, args.batch, args.seq) for name, model in models.items()}, args.rounds)
    for name, value in ms.items():
        base = ms["one process, FSDP2 over 2" if "FSDP2" in name else "one process"]
        print(f"{name:40s} {value:7.2f} ms  {value / base:5.2f} x the whole model")
    print(f"lightning_tp / torch styles: {ms['lightning_tp'] / ms['torch styles, same plan']:.3f}")


if __name__ == "__main__":
    main()
