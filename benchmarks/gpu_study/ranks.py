"""Sections with real process groups: two ranks that share the GPU against one, and an NCCL group of one rank."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import lightning_tp as ltp
from gpu_study.common import DEVICE, ON_GPU, QUIET, Make, Net, fit, fits, gpt2, llama, loader, shared_group, short, trainer
from lightning_tp import TPStrategy
from lightning_tp.checkpoint import Peers
from lightning_tp.core.comm.axis import Axis
from lightning_tp.core.comm.collectives import all_gather, all_reduce, reduce_scatter
from lightning_tp.core.comm.mesh import make_mesh
from lightning_tp.testing import run_ranks

FORMS: list[dict[str, Any]] = [{}, {"async_checkpoint": True}, {"save_distributed_checkpoint": False}]


def env() -> dict[str, Any]:
    """Versions, the GPU, and what gloo does with its tensors."""
    found: dict[str, Any] = {"torch": torch.__version__, "python": sys.version.split()[0], "lightning": L.__version__}
    if "pretend_cuda" not in sys.modules:  # whose tensors gloo can't read
        try:
            found["gloo"] = run_ranks(_gloo, 2, timeout=30)[0]  # first: ranks are forked, and nothing may have used the GPU before
        except Exception as error:
            found["gloo"] = short(error)
    if ON_GPU:
        found["gpu"], found["memory"] = torch.cuda.get_device_name(0), torch.cuda.get_device_properties(0).total_memory
        with contextlib.suppress(Exception):
            found["nccl"] = str(torch.cuda.nccl.version())
        from lightning_tp.estimate.cost.hardware import guess

        known = guess(found["gpu"])
        found["estimate knows it as"] = None if known is None else known.key
    return found


def _gloo() -> dict[str, str]:
    if ON_GPU:
        torch.cuda.set_device(0)
    group: Any = dist.group.WORLD
    calls: dict[str, Callable[[Tensor], Any]] = {
        "allreduce": lambda x: group.allreduce([x]).wait(),
        "broadcast": lambda x: dist.broadcast(x, 0),
        "allgather": lambda x: dist.all_gather([torch.empty_like(x), torch.empty_like(x)], x),
        "_allgather_base": lambda x: group._allgather_base(x.new_empty(8), x).wait(),
        "_reduce_scatter_base": lambda x: group._reduce_scatter_base(x.new_empty(2), x).wait(),
    }
    found = {}
    for name, call in calls.items():
        for dtype in (torch.float32, torch.bfloat16):
            try:
                call(torch.ones(4, device=DEVICE, dtype=dtype))
                found[f"{name} {dtype}"] = "works"
            except Exception as error:
                found[f"{name} {dtype}"] = short(error, 90)
    return found


def nccl_of_one() -> dict[str, Any]:
    """The collectives on an NCCL group of one rank; fits of one rank that save and resume in each form."""
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="29611")
    if ON_GPU:
        torch.cuda.set_device(0)
    dist.init_process_group("nccl" if ON_GPU else "gloo", **({"device_id": torch.device("cuda", 0)} if ON_GPU else {}))
    assert dist.group.WORLD is not None
    axis, found = Axis(dist.group.WORLD), {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.randn(2, 6, 8, device=DEVICE, dtype=dtype)
        t = x.transpose(0, 1)
        pairs = [
            (all_reduce(x.clone(), axis), x),
            (all_gather(x, 1, 6, axis), x),
            (reduce_scatter(x, 1, axis), x),
            (reduce_scatter(t, 1, axis), t),
            (all_gather(t, 1, 2, axis), t),
        ]
        found[f"collectives {dtype}"] = {"ok": all(torch.equal(a, b) for a, b in pairs)}
    try:
        found["empty tensor"] = tuple(all_gather(torch.empty(0, 4, device=DEVICE), 0, 0, axis).shape)
    except Exception as error:
        found["empty tensor"] = short(error)
    objects: list[Any] = [None]
    dist.all_gather_object(objects, {"x": 1})
    found["objects"] = objects
    with tempfile.TemporaryDirectory() as folder:
        for i, how in enumerate(FORMS):
            try:
                found[f"save and resume {how}"] = {"ok": True, "losses": _saved_and_resumed(how, f"{folder}/{i}.ckpt")}
            except Exception as error:
                found[f"save and resume {how}"] = {"ok": False, "error": short(error, 300)}
    return found


def _saved_and_resumed(how: dict[str, Any], path: str) -> list[float]:
    module = Net(lambda: gpt2(0.1))
    first = L.Trainer(accelerator=DEVICE, devices=1, strategy=TPStrategy(tp=1, **how), max_steps=2, **QUIET)
    first.fit(module, loader())
    first.save_checkpoint(path)
    finish_saving(first)
    module = Net(lambda: gpt2(0.1))
    then = L.Trainer(accelerator=DEVICE, devices=1, strategy=TPStrategy(tp=1, **how), max_steps=4, **QUIET)
    then.fit(module, loader(), ckpt_path=path)
    return [float(x) for x in module.losses]


def finish_saving(t: L.Trainer) -> None:
    t.strategy.checkpoint_writer.finish()  # type: ignore[attr-defined]


def ranks_parity() -> dict[str, Any]:
    """Two ranks on the one GPU against one: losses of some steps, in every precision."""

    def pair(make: Make, tolerance: float, options: Any = None, strategy: Any = None, net: Any = None) -> dict[str, Any]:
        one, two = fits(1, make, options, None, net)[0], fits(2, make, options, strategy, net)
        worst = max(abs(a - b) for a, b in zip(one, two[0]))
        return {"one": one, "two": two[0], "worst": worst, "ok": worst <= tolerance and two[0] == two[1]}

    return {
        "llama": pair(llama, 1e-4),
        "gpt2": pair(gpt2, 1e-4),
        "llama, bf16-mixed, clipped": pair(llama, 3e-2, {"precision": "bf16-mixed", "gradient_clip_val": 0.5}),
        "llama, 16-mixed, fused": pair(llama, 3e-2, {"precision": "16-mixed"}, net={"fused": True}),
        "llama, blocks recomputed": pair(llama, 1e-4, strategy={"activation_checkpointing": "block"}),
        "llama, selective": pair(llama, 1e-4, strategy={"activation_checkpointing": "selective"}),
    }


def ranks_random() -> dict[str, Any]:
    """Two ranks on the one GPU: dropout, its replay, exact masks, a second fit."""

    def drops() -> nn.Module:
        return gpt2(0.2)

    found: dict[str, Any] = {}
    two = fits(2, drops, net={"sgd": True, "lr": 0.0}, times=2)
    found["a second fit goes on"] = {"losses": two[0], "ok": two[0][:4] != two[0][4:] and two[0] == two[1]}
    kept, again = (fits(2, drops, strategy=how)[0] for how in (None, {"activation_checkpointing": "block"}))
    found["recomputed"] = {"kept": kept, "again": again, "ok": max(abs(x - y) for x, y in zip(kept, again)) < 1e-4}
    for by_name in (False, True):
        grads = [run_ranks(_gradients_of_blocks, 2, by_name, how, init=False, timeout=60)[0] for how in (None, "block")]
        worst = max((x - y).abs().max().item() for x, y in zip(*grads))
        found[f"blocks called by {'name' if by_name else 'position'}, recomputed"] = {"worst": worst, "ok": worst < 1e-5}

    def exact(tp: int) -> list[float]:
        with sdpa_kernel(SDPBackend.MATH):
            return fit(tp, drops, None, {"dropout": "exact"} if tp > 1 else None, None)

    one, both = (run_ranks(exact, tp, tp, init=False, timeout=60)[0] for tp in (1, 2))
    found["exact masks"] = {"one": one, "two": both, "ok": max(abs(x - y) for x, y in zip(one, both)) < 1e-4}
    return found


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down, self.drop = nn.Linear(width, 4 * width), nn.Linear(4 * width, width), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.down(torch.relu(self.up(x))))


class Blocks(nn.Module):
    def __init__(self, by_name: bool) -> None:
        super().__init__()
        self.blocks, self.by_name = nn.ModuleList(Block(16) for _ in range(2)), by_name

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x=x) if self.by_name else block(x)
        return x


def _gradients_of_blocks(by_name: bool, activation_checkpointing: Any) -> list[Tensor]:
    backend = shared_group()
    if ON_GPU:
        torch.cuda.set_device(0)
    dist.init_process_group(backend)
    torch.manual_seed(0)
    model = Blocks(by_name).to(DEVICE)
    plan = {"blocks.*.up": "colwise", "blocks.*.down": "rowwise", "**": "replicate"}
    ltp.parallelize(model, make_mesh(DEVICE, 1, 2), plan, activation_checkpointing=activation_checkpointing)
    torch.manual_seed(5)
    model(torch.ones(4, 3, 16, device=DEVICE)).square().sum().backward()
    return [g.cpu() for g in ltp.full_gradients(model).values()]


def ranks_rest() -> dict[str, Any]:
    """Two ranks on the one GPU: verify=True, checkpoints and resuming in all forms, an overflow on one rank."""
    found: dict[str, Any] = {}

    def attempt(name: str, work: Callable[[], dict[str, Any]]) -> None:
        try:
            found[name] = work()
        except Exception as error:
            found[name] = {"ok": False, "error": short(error, 300)}

    def verified(precision: str) -> dict[str, Any]:
        fits(2, llama, {"precision": precision}, {"verify": True})
        return {"ok": True}

    def resumed(how: dict[str, Any]) -> dict[str, Any]:
        whole, part = run_ranks(_resumed, 2, how, init=False, timeout=60)[0]
        return {"ok": whole[2:] == part, "whole": whole, "part": part}

    for precision in ("32-true", "bf16-mixed", "16-mixed"):
        attempt(f"verify {precision}", lambda precision=precision: verified(precision))  # type: ignore[misc]
    for how in FORMS:
        attempt(f"resume {how}", lambda how=how: resumed(how))  # type: ignore[misc]
    attempt("an overflow on one rank", lambda: run_ranks(_overflow, 2, init=False, timeout=60)[0])
    return found


def _resumed(how: dict[str, Any]) -> list[list[float]]:
    L.seed_everything(7, verbose=False)
    first = trainer(2, how, max_steps=2)
    first.fit(Net(lambda: gpt2(0.1)), loader())
    folder = Peers().from_first(tempfile.mkdtemp)
    first.save_checkpoint(f"{folder}/x.ckpt")
    finish_saving(first)
    parts = []
    for path in (None, f"{folder}/x.ckpt"):
        L.seed_everything(7, verbose=False)
        module = Net(lambda: gpt2(0.1))
        trainer(2, how, max_steps=4).fit(module, loader(), ckpt_path=path)
        parts.append([float(x) for x in module.losses])
    return parts


class Overflows(Net):
    def on_after_backward(self) -> None:
        if len(self.losses) == 2 and self.global_rank == 1:
            gradient = next(self.parameters()).grad
            assert gradient is not None
            gradient.view(-1)[0] = float("inf")


def _overflow() -> dict[str, Any]:
    t = trainer(2, max_steps=4, precision="16-mixed")
    t.fit(Overflows(llama), loader())
    scaler: Any = t.precision_plugin.scaler  # type: ignore[attr-defined]
    return {"ok": True} if scaler is None else {"scale": scaler.get_scale(), "ok": scaler.get_scale() == 2.0**15}
