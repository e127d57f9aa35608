"""Sections of one process that stands for one rank of tp = 2, 4, 8: shards are real, and a fake process group moves nothing. Compute only."""

from __future__ import annotations

import collections
import contextlib
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaConfig, LlamaForCausalLM

import lightning_tp as ltp
from gpu_study.common import DEVICE, ON_GPU, SMALL, WORDS, Make, gpt2, language_loss, llama, short, wait_for_device
from lightning_tp.core.comm.axis import Axis, even_shard
from lightning_tp.core.comm.mesh import make_mesh
from lightning_tp.core.ops.cross_entropy import vocab_parallel_cross_entropy
from lightning_tp.core.ops.random_numbers import policy_of
from lightning_tp.testing import fake_world

SIZES: dict[str, dict[str, Any]] = {
    "8b": dict(hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8),
    "70b": dict(hidden_size=8192, intermediate_size=28672, num_attention_heads=64, num_key_value_heads=8),
    "small": dict(hidden_size=128, intermediate_size=256, num_attention_heads=8, num_key_value_heads=8),
}
VOCABULARY = 1024
SEQUENCE = 64 if SMALL else 4096
ROUNDS = 3 if SMALL else 8
COMPILER = "aot_eager" if SMALL else "inductor"
SECONDS_TO_COMPILE = 110  # after which no further size is begun
Step = Callable[[], None]


@contextlib.contextmanager
def world(tp: int) -> Iterator[DeviceMesh | None]:
    """A world of so many ranks, of which this is the first; none of one."""
    if tp == 1:
        yield None
        return
    with fake_world(tp):
        yield make_mesh(DEVICE, 1, tp)


def two_blocks(size: str, device: str = DEVICE) -> nn.Module:
    config = LlamaConfig(
        **SIZES[size],
        num_hidden_layers=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=8192,
        use_cache=False,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    with torch.device(device):
        return LlamaForCausalLM(config)


def split(size: str, tp: int, mesh: DeviceMesh | None, **options: Any) -> nn.Module:
    """Two blocks; with a mesh, the shards of its first rank."""
    model = two_blocks(size)
    if mesh is not None:
        plan = ltp.infer_plan(two_blocks(size, "meta"), {"input_ids": torch.zeros(1, 32, dtype=torch.long)}, tp=tp)
        ltp.parallelize(model, mesh, plan, **options)
        looked_at(model)
    return model


def looked_at(model: nn.Module) -> None:
    """Let a step be one that nothing looks at any more: what a fake collective leaves is not equal on all ranks."""
    if "_tp_registry" in model.__dict__:
        model.__dict__["_tp_registry"].gradients.passes = 1
    policy = policy_of(model)
    if policy is not None:
        policy.steps = 3


def step_of(model: nn.Module, tokens: Tensor, optimizer: Any = None, *, clip: bool = False, **inputs: Any) -> Step:
    def step() -> None:
        looked_at(model)
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            loss = language_loss(model(input_ids=tokens, **inputs).logits, tokens)
        loss.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if optimizer is not None:
            optimizer.step()
        for p in model.parameters():
            p.grad = None

    return step


def interleaved(steps: dict[str, Step], rounds: int = ROUNDS) -> dict[str, float]:
    """Median milliseconds of each, in turns."""
    for step in steps.values():
        step(), step()
    wait_for_device()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            begin = time.perf_counter()
            step()
            wait_for_device()
            times[name].append(1000 * (time.perf_counter() - begin))
    return {name: statistics.median(t) for name, t in times.items()}


def tokens_of(batch: int, length: int, words: int = WORDS) -> Tensor:
    return torch.randint(0, words, (batch, length), device=DEVICE)


def kernels() -> dict[str, Any]:
    """Two blocks of Llama 3 8B and 70B: a rank of tp = 1, 2, 4, 8, against torch's styles."""
    found: dict[str, Any] = {}
    tokens = tokens_of(1, SEQUENCE, VOCABULARY)
    for size in ("small",) if SMALL else ("8b", "70b"):
        for tp in (1, 2, 4, 8):
            try:
                with world(tp) as mesh:
                    steps = {"lightning_tp" if mesh else "whole": step_of(split(size, tp, mesh), tokens)}
                    if mesh is not None:
                        steps["torch styles"] = step_of(split(size, tp, mesh, backend="dtensor"), tokens)
                    found[f"{size}, tp={tp}, ms"] = interleaved(steps)
                    steps.clear()
            except Exception as error:
                found[f"{size}, tp={tp}"] = short(error)
            _free()
    return found


def compiled() -> dict[str, Any]:
    """Two blocks of Llama 3 8B compiled by inductor: a rank of tp = 4, 2, 8, against eager and torch's styles compiled."""
    found: dict[str, Any] = {}
    size, began = "small" if SMALL else "8b", time.perf_counter()
    tokens = tokens_of(1, SEQUENCE, VOCABULARY)
    for tp in (4, 2, 8):
        if time.perf_counter() - began > SECONDS_TO_COMPILE:
            found[f"{size}, tp={tp}"] = "no time was left"
            continue
        try:
            with world(tp) as mesh, warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                begin = time.perf_counter()
                steps = {"lightning_tp": step_of(split(size, tp, mesh, compile=COMPILER), tokens)}
                steps["lightning_tp"]()
                found[f"{size}, tp={tp}, first step, s"] = time.perf_counter() - begin
                theirs: Any = split(size, tp, mesh, backend="dtensor")
                for layer in theirs.model.layers:
                    layer.compile(backend=COMPILER)
                steps["torch styles"] = step_of(theirs, tokens)
                steps["lightning_tp, eager"] = step_of(split(size, tp, mesh), tokens)
                found[f"{size}, tp={tp}, ms"] = interleaved(steps)
                steps.clear()
            found[f"{size}, tp={tp}, warnings"] = [str(w.message)[:200] for w in said if "compil" in str(w.message)]
        except Exception as error:
            found[f"{size}, tp={tp}"] = short(error)
        _free()
    return found


def _free() -> None:
    if ON_GPU:
        torch.cuda.empty_cache()


def dispatch() -> dict[str, Any]:
    """Eight blocks of width 64 and few tokens, bound by launches: what the split costs on the host, against torch's styles."""

    def model() -> nn.Module:
        return llama(num_hidden_layers=8, hidden_size=64, intermediate_size=176)

    plan = ltp.infer_plan(model(), {"input_ids": torch.zeros(1, 32, dtype=torch.long)}, tp=2)
    tokens = tokens_of(2, 64)
    with world(2) as mesh:
        assert mesh is not None
        steps = {"whole": step_of(model().to(DEVICE), tokens)}
        for name, options in {"lightning_tp": {}, "torch styles": {"backend": "dtensor"}}.items():
            steps[name] = step_of(ltp.parallelize(model().to(DEVICE), mesh, plan, **options), tokens)  # type: ignore[arg-type]
        ms = interleaved(steps, 5 if SMALL else 30)
    return {"ms": ms, "ratio": {name: value / ms["whole"] for name, value in ms.items()}}


def waits() -> dict[str, Any]:
    """Host waits of a steady step, by `torch.cuda.set_sync_debug_mode`: autocast, clipped, recomputed, with dropout."""
    found = {}
    tokens = tokens_of(2, 32)
    inputs = {  # given, so that transformers need not look at a mask
        "position_ids": torch.arange(32, device=DEVICE).unsqueeze(0).expand(2, -1),
        "attention_mask": torch.ones(2, 1, 32, 32, dtype=torch.bool, device=DEVICE).tril(),
    }
    models: dict[str, Make] = {"llama": llama, "gpt2 with dropout": lambda: gpt2(0.1)}
    for name, make in models.items():
        plan = ltp.infer_plan(make(), {"input_ids": torch.zeros(1, 32, dtype=torch.long)}, tp=2)
        with world(2) as mesh:
            assert mesh is not None
            model = ltp.parallelize(make().to(DEVICE), mesh, plan, activation_checkpointing="block")
            step = step_of(model, tokens, torch.optim.AdamW(model.parameters(), fused=True), clip=True, **inputs)
            step()
            wait_for_device()
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                if ON_GPU:
                    torch.cuda.set_sync_debug_mode("warn")
                try:
                    step(), step()
                finally:
                    if ON_GPU:
                        torch.cuda.set_sync_debug_mode("default")
        of_host = [w for w in said if "synchronizing" in str(w.message)]
        places = collections.Counter(f"{os.sep.join(w.filename.split(os.sep)[-3:])}:{w.lineno}" for w in of_host)
        found[name] = {"waits in a step": len(of_host) / 2, "places": places, "ok": not of_host}
    return found


def memory() -> dict[str, Any]:
    """The peak memory of a step against what `estimate` says."""
    found: dict[str, Any] = {}
    size = "small" if SMALL else "8b"
    tokens = tokens_of(1, SEQUENCE, VOCABULARY)
    for tp, recomputed in ((1, None), (2, None), (2, "block"), (8, None), (8, "block")):
        name = f"tp={tp}, activation_checkpointing={recomputed}"
        try:
            measured = _peak(size, tp, recomputed, tokens)
            said = ltp.estimate(
                two_blocks(size, "meta"),
                {"input_ids": torch.zeros(1, SEQUENCE, dtype=torch.long)},
                (1, tp),
                precision="bf16-mixed",
                activation_checkpointing=recomputed,  # type: ignore[arg-type]
                loss_fn=lambda output, inputs: language_loss(output.logits, inputs["input_ids"]),
            ).memory.peak.total
            ratio = round(said / measured, 3) if measured else None
            found[name] = {"measured": measured, "estimate": said, "estimate / measured": ratio}
        except Exception as error:
            found[name] = short(error)
        _free()
    return found


def _peak(size: str, tp: int, recomputed: str | None, tokens: Tensor) -> int:
    with world(tp) as mesh:
        model = split(size, tp, mesh, **({"activation_checkpointing": recomputed} if mesh is not None else {}))
        step = step_of(model, tokens, torch.optim.AdamW(model.parameters(), fused=True), clip=True)
        step()
        if ON_GPU:
            torch.cuda.reset_peak_memory_stats()
        step()
        wait_for_device()
        return torch.cuda.max_memory_allocated() if ON_GPU else 0


def attention() -> dict[str, Any]:
    """Which kernels of scaled dot-product attention take a rank's heads: each alone, against the math kernel."""
    found = {}
    tokens, dtype = tokens_of(2, 32), torch.bfloat16 if ON_GPU else torch.float32
    models: dict[str, Make] = {"llama": llama, "gpt2": gpt2}
    for name, make in models.items():
        plan = ltp.infer_plan(make(), {"input_ids": torch.zeros(1, 32, dtype=torch.long)}, tp=2)
        for padded in (False, True):
            mask = torch.ones(2, 32, dtype=torch.long, device=DEVICE)
            mask[0, 20:] = 0 if padded else 1
            reference: Tensor | None = None
            for kernel in (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION):
                key = f"{name}{', padded' if padded else ''}, {kernel.name}"
                try:
                    with world(2) as mesh, sdpa_kernel(kernel):
                        assert mesh is not None
                        model: Any = ltp.parallelize(make().to(DEVICE, dtype), mesh, plan)
                        looked_at(model)
                        logits = model(input_ids=tokens, attention_mask=mask if padded else None).logits
                        shard = getattr(logits, "local", logits)
                        shard.float().square().mean().backward()
                        shard = shard.detach().float()[1 if padded else slice(None)]
                        reference = shard if reference is None else reference
                        off, largest = (shard - reference).abs().max().item(), reference.abs().max().item()
                        found[key] = f"runs, differs by {off:.1e} of {largest:.1e}"
                except Exception as error:
                    found[key] = short(error, 90)
    return found


def losses() -> dict[str, Any]:
    """The loss of split logits of an uneven vocabulary on the device, with deterministic algorithms as well."""
    found = {}
    kinds: dict[str, dict[str, Any]] = {
        "plain": {},
        "smooth": {"label_smoothing": 0.1},
        "weights": {"weight": torch.rand(103, device=DEVICE)},
        "ignored": {"ignore_index": 5},
    }
    with fake_world(2):
        assert dist.group.WORLD is not None
        axis = Axis(dist.group.WORLD)
        for name, options in kinds.items():
            logits = torch.randn(8, len(even_shard(103, 0, 2)), device=DEVICE, requires_grad=True)
            targets = torch.randint(0, 103, (8,), device=DEVICE)
            for strict in (False, True):
                torch.use_deterministic_algorithms(strict)
                try:
                    vocab_parallel_cross_entropy(logits, targets, axis, 103, **options).backward()
                    found[f"{name}, deterministic={strict}"] = {"ok": True}
                except Exception as error:
                    found[f"{name}, deterministic={strict}"] = {"ok": False, "error": short(error)}
                finally:
                    torch.use_deterministic_algorithms(False)
    return found
