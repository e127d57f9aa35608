"""Trainers on GPUs: the losses of one process in each precision and on each mesh; saved and resumed in each form; verified; optimized."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler

import lightning_tp as ltp
from lightning_tp.testing import RankError, run_ranks

WORDS, WIDTH = 32, 16
QUIET: dict[str, Any] = dict(
    logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False
)
Losses = list[float]
MESHES = [(1, 2), (2, 2)]
TOLERANCE = {"32-true": 1e-4, "bf16-mixed": 2e-2, "16-mixed": 5e-3}


def on(mesh: tuple[int, int], body: Callable[..., Any], *args: Any) -> list[Any]:
    ranks = mesh[0] * mesh[1]
    if ranks > torch.cuda.device_count():
        pytest.skip(f"needs {ranks} GPUs")
    return run_ranks(body, ranks, *args, init=False, timeout=120)


class Block(nn.Module):
    """Attention with a fused projection, and an MLP; dropout on whole activations."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2, self.drop = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH), nn.Dropout(dropout)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 48), nn.Linear(48, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (-1, 4)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.drop(self.out(y.transpose(1, 2).flatten(2)))
        return x + self.drop(self.down(F.gelu(self.up(self.norm2(x)))))


class Net(L.LightningModule):
    def __init__(self, dropout: float = 0.0, optimizer: str = "adamw") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WORDS)
        self.blocks, self.optimizer = nn.ModuleList(Block(dropout) for _ in range(2)), optimizer
        self.losses: list[Tensor] = []

    def training_step(self, batch: Tensor, i: int) -> Tensor:
        x = self.embed(batch.to(self.device))  # also while a plan is inferred, on the CPU
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(x)[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten())

    def on_train_batch_end(self, outputs: Any, *_: Any) -> None:  # `verify` runs steps of its own before
        self.losses.append(outputs["loss"].detach())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.optimizer == "sgd":
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        return torch.optim.AdamW(self.parameters(), lr=1e-2, eps=1e-4, fused=self.optimizer == "fused adamw")


def loader(mesh: tuple[int, int], size: int = 4) -> DataLoader:
    """The same `size` items in each step on every mesh; Lightning's own sampler would shuffle them on the data-parallel axis."""
    tokens: Any = list(torch.randint(0, WORDS, (8, 12), generator=torch.Generator().manual_seed(1)).repeat(3, 1))
    sampler = DistributedSampler(tokens, mesh[0], int(os.environ["RANK"]) // mesh[1], shuffle=False)
    return DataLoader(tokens, batch_size=size // mesh[0], sampler=sampler, pin_memory=True)


def fit(mesh: tuple[int, int], strategy: dict[str, Any], net: dict[str, Any], options: dict[str, Any]) -> Losses:
    """The losses of a rank."""
    L.seed_everything(3, verbose=False)
    module = Net(**net)
    how: Any = "auto" if mesh == (1, 1) else ltp.TPStrategy(tp=mesh[1], dp=mesh[0], **strategy)
    trainer = L.Trainer(accelerator="gpu", devices=mesh[0] * mesh[1], strategy=how, **{**QUIET, "max_steps": 4, **options})
    trainer.fit(module, loader(mesh))
    return [float(x) for x in module.losses]


def of_the_mesh(losses: list[Losses], mesh: tuple[int, int]) -> Losses:
    """Ranks of a group have the same losses; the mean over groups is that of the whole batch."""
    dp, tp = mesh
    for rank, found in enumerate(losses):
        assert found == losses[rank - rank % tp]
    return [sum(step) / dp for step in zip(*losses[::tp], strict=True)]


def assert_as_one_process(mesh: tuple[int, int], tolerance: float, strategy: Any = None, net: Any = None, **options: Any) -> None:
    one = on((1, 1), fit, (1, 1), {}, net or {}, options)[0]
    found = of_the_mesh(on(mesh, fit, mesh, strategy or {}, net or {}, options), mesh)
    assert one[2] < one[0] and found == pytest.approx(one, rel=tolerance)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("precision", TOLERANCE)
def test_losses_of_one_process(precision: Any, mesh: tuple[int, int]) -> None:
    assert_as_one_process(mesh, TOLERANCE[precision], precision=precision, gradient_clip_val=0.5)


OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "fused optimizer, float16": ({}, {"optimizer": "fused adamw"}, {"precision": "16-mixed"}),
    "blocks recomputed, dropout": ({"activation_checkpointing": "block", "dropout": "exact"}, {"dropout": 0.3}, {}),
    "no sequence parallelism": ({"sequence_parallel": False}, {"dropout": 0.3}, {}),
    "accumulated": ({}, {}, {"accumulate_grad_batches": 2, "max_steps": 3}),
    "compiled": ({"compile": "aot_eager"}, {}, {}),
}


@pytest.mark.parametrize("what", OPTIONS)
def test_options(what: str) -> None:
    strategy, net, options = OPTIONS[what]
    assert_as_one_process((1, 2), TOLERANCE[options.get("precision", "32-true")], strategy, net, **options)


FORMS: dict[str, dict[str, Any]] = {
    "folder": {},
    "folder, beside training": {"async_checkpoint": True},
    "file": {"save_distributed_checkpoint": False},
    "file, beside training": {"save_distributed_checkpoint": False, "async_checkpoint": True},
}


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_saved_and_resumed(form: str, mesh: tuple[int, int], tmp_path: Path) -> None:
    """In float16, with dropout: what the scaler, the optimizer and the GPU's random stream hold is saved, too."""

    def run(path: str | None) -> Losses:
        saves: list[Callback] = [ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)]
        options: dict[str, Any] = {"callbacks": saves if path is None else [], "enable_checkpointing": path is None}
        L.seed_everything(3 if path is None else 4, verbose=False)
        module = Net(dropout=0.3)
        strategy = ltp.TPStrategy(tp=mesh[1], dp=mesh[0], **FORMS[form])
        trainer = L.Trainer(
            accelerator="gpu",
            devices=mesh[0] * mesh[1],
            strategy=strategy,
            precision="16-mixed",
            max_steps=5,
            **{**QUIET, **options},
        )
        trainer.fit(module, loader(mesh), ckpt_path=path)
        return [float(x) for x in module.losses]

    whole = of_the_mesh(on(mesh, run, None), mesh)
    assert (tmp_path / "step=2.ckpt").is_dir() == form.startswith("folder")
    assert of_the_mesh(on(mesh, run, f"{tmp_path}/step=2.ckpt"), mesh) == whole[2:]


class Wrong(ltp.TPStrategy):
    """Changes a weight on one rank, as a wrong plan might."""

    def model_to_device(self) -> None:
        super().model_to_device()
        if self.global_rank == 1:
            with torch.no_grad():
                next(p for n, p in self.lightning_module.named_parameters() if n.endswith("out.weight")).mul_(3)


@pytest.mark.parametrize("precision", TOLERANCE)
def test_verified_beside_autocast(precision: Any) -> None:
    """A right plan trains as without it, a wrong one is refused."""
    plain, verified = (on((1, 2), fit, (1, 2), how, {}, {"precision": precision}) for how in ({}, {"verify": True}))
    assert verified == plain

    def body() -> None:
        options: dict[str, Any] = {"precision": precision, "max_steps": 1, **QUIET}
        L.Trainer(accelerator="gpu", devices=2, strategy=Wrong(tp=2, verify=True), **options).fit(Net(), loader((1, 2)))

    with pytest.raises(RankError, match="does not match one process"):
        on((1, 2), body)
