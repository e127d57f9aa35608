"""Clipping the gradient norm and stepping AdamW on a split model, against the same number of plain tensors of the same sizes.

    OMP_NUM_THREADS=1 python benchmarks/optimizer.py

On a fake process group (no communication), one thread, in turns. What is compared: `torch.nn.utils.clip_grad_norm_` and `AdamW.step` on
plain tensors; the same two calls on a model after `parallelize`; and on DTensors, as PyTorch's styles leave them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from dispatch import PLAN, interleaved, llama, mesh
from torch import nn

import lightning_tp as ltp
from lightning_tp.testing import fake_world


def with_gradients(parameters: list[nn.Parameter]) -> list[nn.Parameter]:
    for p in parameters:
        p.grad = torch.randn_like(p)
    return parameters


def steps(name: str, parameters: list[nn.Parameter], fused: bool) -> dict[str, Callable[[], object]]:
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=fused, foreach=not fused)
    return {
        f"{name}: clip": lambda: torch.nn.utils.clip_grad_norm_(parameters, 1e6),
        f"{name}: step": optimizer.step,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with fake_world(4):
        split = ltp.parallelize(llama(), mesh(1, 2), PLAN)
        plain = [nn.Parameter(p.detach().clone()) for p in split.parameters()]
        torch_styles = ltp.parallelize(llama(), mesh(1, 2), PLAN, backend="dtensor")
        for fused in (False, True):
            calls: dict[str, Callable[[], object]] = {}
            for name, parameters in (
                ("plain", plain),
                ("lightning_tp", list(split.parameters())),
                ("torch styles", list(torch_styles.parameters())),
            ):
                calls |= steps(name, with_gradients(parameters), fused)
            ms = interleaved(calls, args.rounds)  # type: ignore[arg-type]
            print(f"{len(plain)} tensors, AdamW {'fused' if fused else 'foreach'}")
            for what in ("clip", "step"):
                base = ms[f"plain: {what}"]
                for name in ("plain", "lightning_tp", "torch styles"):
                    value = ms[f"{name}: {what}"]
                    print(f"  {what} {name:14s} {value:7.3f} ms  {value / base:5.2f} x plain tensors")


if __name__ == "__main__":
    main()
