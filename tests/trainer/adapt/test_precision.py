"""Precisions of a Trainer under `TPStrategy`, each against one process in the same precision; the scaler; clipping after it."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities import grad_norm  # imported before anything of ours is used
from torch import Tensor
from torch.amp import GradScaler
from torch.utils.data import DataLoader, DistributedSampler

import lightning_tp as ltp
from examples.llama import PLAN, Llama, LlamaConfig
from lightning_tp import errors
from lightning_tp.core.comm.mesh import make_mesh
from lightning_tp.testing import assert_trees_close, randomize_, run_ranks
from lightning_tp.trainer.adapt.precision import MeshGradScaler, MeshMixedPrecision, fsdp_policy
from tests.device import ON
from tests.harness import Sent

CONFIG = LlamaConfig(vocab_size=103, dim=64, num_layers=2, num_heads=8, num_kv_heads=4, hidden_dim=90, max_seq_len=32, bias=True)
QUIET = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
ONE, TP2, MESH_2X2 = (1, 1), (1, 2), (2, 2)
both = pytest.mark.parametrize("mesh", [pytest.param(TP2, id="tp2"), pytest.param(MESH_2X2, id="2x2", marks=pytest.mark.slow)])
STEPS = 6


class Net(L.LightningModule):
    """An ordinary LightningModule; `seen` is what its hooks saw, `scales` what the loss was scaled by after each batch."""

    def __init__(self, **optimizer: Any) -> None:
        super().__init__()
        self.model = randomize_(Llama(CONFIG))
        self.options = optimizer
        self.losses: list[float] = []
        self.seen: list[dict[str, float]] = []
        self.scales: list[float] = []

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        logits = self.model(batch["tokens"]).flatten(0, 1)
        if logits.dtype != torch.float64:
            logits = logits.float()
        return F.cross_entropy(logits, batch["targets"].flatten())

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
        return self.loss(batch)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if isinstance(outputs, dict) and "loss" in outputs:
            self.losses.append(outputs["loss"].item())
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is not None:
            self.scales.append(scaler.get_scale())

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.seen.append({n: float(v) for n, v in grad_norm(self, 2).items()})

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), **{"lr": 1e-2, "eps": 1e-3, **self.options})


def data(dp: int) -> DataLoader:
    dataset = ltp.RandomTokens(4 * STEPS, 12, 103)
    sampler = None
    if dp > 1:
        tp = int(os.environ["WORLD_SIZE"]) // dp
        sampler = DistributedSampler(dataset, dp, int(os.environ["RANK"]) // tp, shuffle=False)
    return DataLoader(dataset, batch_size=4 // dp, sampler=sampler)


def scaled(**options: Any) -> Callable[[], MixedPrecision]:
    return lambda: MixedPrecision("16-mixed", ON, GradScaler(ON, **options))


def fit(
    mesh: tuple[int, int], make: Callable[[], Net] = Net, plugin: Any = None, start: Path | None = None, **options: Any
) -> dict[str, Any]:
    """On one mesh, or by an ordinary Trainer in one process."""
    how = "auto" if mesh == ONE else ltp.TPStrategy(tp=mesh[1], plan=PLAN)
    if options.get("precision") == "16-mixed":  # Lightning takes bfloat16 for it on a CPU, unless it is given the plugin
        plugin, options = plugin or scaled(), {k: v for k, v in options.items() if k != "precision"}
    if plugin is not None:
        options["plugins"] = [plugin()]
    trainer = L.Trainer(accelerator="cpu", devices=mesh[0] * mesh[1], strategy=how, **{"max_epochs": 1, **QUIET, **options})
    module = make()
    trainer.fit(module, data(mesh[0]), ckpt_path=start)
    return {
        "losses": module.losses,
        "weights": {n.removeprefix("model."): t for n, t in ltp.full_state_dict(module).items()},
        "seen": module.seen,
        "scales": module.scales,
        "steps": trainer.global_step,
        "dtypes": {str(p.dtype) for p in module.parameters()},
        "rates": [
            s["scheduler"].get_last_lr() if hasattr(s["scheduler"], "get_last_lr") else None
            for s in map(vars, trainer.lr_scheduler_configs)
        ],
    }


def on(mesh: tuple[int, int], body: Callable[[], Any]) -> list[Any]:
    return run_ranks(body, mesh[0] * mesh[1], init=False, timeout=150)


def assert_same(ranks: list[dict[str, Any]], ref: dict[str, Any], rtol: float = 1e-4, what: str = "") -> None:
    """Losses (the mean over data-parallel ranks), weights, norms that hooks saw, steps: as in one process."""
    mean = torch.tensor([r["losses"] for r in ranks], dtype=torch.float64).mean(0)
    torch.testing.assert_close(
        mean, torch.tensor(ref["losses"], dtype=torch.float64), rtol=min(rtol, 1e-5), atol=0, msg=lambda m: f"{what}: {m}"
    )
    for r in ranks:
        assert r["steps"] == ref["steps"], what
        assert r["rates"] == ref["rates"], what
        assert_trees_close(r["weights"], ref["weights"], rtol=rtol, name=what)
        assert len(r["seen"]) == len(ref["seen"]), what
        for mine, there in zip(r["seen"], ref["seen"]):
            top = max(there.values())
            assert mine == pytest.approx(there, rel=rtol, abs=1e-3 * top * rtol / 1e-4), what
        for n, t in ranks[0]["weights"].items():
            assert torch.equal(t, r["weights"][n]), (what, n)


# ------------------------------------------------------------------------------------------------------------- precisions

PRECISIONS: dict[str, str] = {
    "32-true": "torch.float32",
    "64-true": "torch.float64",
    "bf16-mixed": "torch.float32",
    "16-mixed": "torch.float32",
    "bf16-true": "torch.bfloat16",
    "16-true": "torch.float16",
}


@both
def test_precisions(mesh: tuple[int, int]) -> None:
    refs = on(ONE, lambda: {p: fit(ONE, precision=p, gradient_clip_val=0.3) for p in PRECISIONS})[0]
    ranks = on(mesh, lambda: {p: fit(mesh, precision=p, gradient_clip_val=0.3) for p in PRECISIONS})
    start = randomize_(Llama(CONFIG)).double().state_dict()
    exact = refs["64-true"]["weights"]
    for p, dtype in PRECISIONS.items():
        got, ref = [r[p] for r in ranks], refs[p]
        assert all(r["dtypes"] == {dtype} for r in got), p
        if p in ("32-true", "64-true"):
            assert_same(got, ref, 1e-4 if p == "32-true" else 1e-9, p)
            continue
        mean = torch.tensor([r["losses"] for r in got]).mean(0)
        torch.testing.assert_close(mean, torch.tensor(ref["losses"]), rtol=2e-2, atol=0, msg=lambda m, p=p: f"{p}: {m}")
        assert all(r["scales"] == ref["scales"] and r["steps"] == ref["steps"] for r in got), p
        for r in got:
            for seen, there in zip(r["seen"], ref["seen"]):  # unscaled, and of the whole gradient
                assert seen["grad_2.0_norm_total"] == pytest.approx(there["grad_2.0_norm_total"], rel=5e-2), p
        off, off_ref = (
            torch.cat([(w[n].double() - exact[n]).flatten() for n in exact]).norm() for w in (got[0]["weights"], ref["weights"])
        )
        moved = torch.cat([(exact[n] - start[n]).flatten() for n in exact]).norm()
        assert off < 1.5 * off_ref + 0.02 * moved, (p, off, off_ref, moved)  # as far from float64 as one process is
        assert off < 0.5 * moved or p == "16-true", p  # whose optimizer loses what is below 6e-8


def test_what_lightning_does_not_know_stays_refused() -> None:
    with pytest.raises(ValueError, match="transformer-engine"):
        L.Trainer(accelerator="cpu", devices=2, strategy=ltp.TPStrategy(tp=2), precision="transformer-engine", logger=False)
    with pytest.raises(ValueError, match="does not support"):  # and for Lightning's own strategy
        from lightning.pytorch.strategies import ModelParallelStrategy

        L.Trainer(accelerator="cpu", devices=2, strategy=ModelParallelStrategy(), precision="64-true", logger=False)


# ----------------------------------------------------------------------------------------------------------------- scaler


class Infinite(Net):
    """One element of one shard on the last rank overflows in the second and fifth batch."""

    def on_after_backward(self) -> None:
        if self.global_step + len(self.losses) and len(self.losses) in (1, 4) and self.global_rank == self.trainer.world_size - 1:
            grad = self.model.layers[0].feed_forward.w1.weight.grad
            getattr(grad, "_local_tensor", grad)[0, 0] = math.inf


@both
def test_all_ranks_skip_a_step_and_agree_on_the_scale(mesh: tuple[int, int]) -> None:
    def body(mesh: tuple[int, int]) -> list[dict[str, Any]]:
        own = scaled(init_scale=2.0**10, growth_interval=2)
        large = scaled(init_scale=2.0**30, backoff_factor=2.0**-9, growth_interval=100)  # overflows by itself
        fused: Any = Infinite if mesh == ONE else lambda: Infinite(fused=True)  # Lightning by itself refuses to clip there
        return [
            fit(mesh, Infinite, own, gradient_clip_val=0.3),
            fit(mesh, fused, own, gradient_clip_val=0.3),
            fit(mesh, fused, own),
            fit(mesh, Net, large, gradient_clip_val=0.3),
        ]

    refs = on(ONE, lambda: body(ONE)[::3])[0]
    ranks = on(mesh, lambda: body(mesh))
    for r in ranks:
        for got, ref in zip(r, (refs[0], refs[0], refs[0], refs[1])):
            assert got["scales"] == ref["scales"]
        assert r[0]["scales"] == [2.0**n for n in (10, 9, 9, 10, 9, 9)]
        assert r[3]["scales"][0] < 2.0**30
        for a, b in zip(r, ranks[0]):
            assert all(torch.equal(t, b["weights"][n]) for n, t in a["weights"].items())
        torch.testing.assert_close(torch.tensor(r[1]["losses"]), torch.tensor(r[0]["losses"]), rtol=1e-3, atol=0)  # fused or not


def test_the_scale_is_in_the_checkpoint(tmp_path: Path) -> None:
    """Also in that of one process."""

    def first(mesh: tuple[int, int]) -> None:
        saves = ModelCheckpoint(tmp_path / str(mesh), filename="end", save_last=False)
        found = fit(mesh, Infinite, scaled(init_scale=2.0**10, growth_interval=5), enable_checkpointing=True, callbacks=[saves])
        assert found["scales"][-1] == 2.0**8

    def second(start: tuple[int, int]) -> list[float]:
        path = tmp_path / str(start) / "end.ckpt"
        return fit(TP2, Net, scaled(init_scale=2.0**10, growth_interval=5), max_epochs=2, start=path)["scales"]

    for mesh in (ONE, TP2):
        on(mesh, lambda mesh=mesh: first(mesh))
        assert on(TP2, lambda mesh=mesh: second(mesh)) == [[2.0**n for n in (8, 8, 8, 9, 9, 9)]] * 2


@both
def test_one_all_reduce_an_axis_finds_what_is_not_finite(mesh: tuple[int, int]) -> None:
    class Counted(Net):
        def on_after_backward(self) -> None:
            plugin = self.trainer.precision_plugin
            assert isinstance(plugin, MeshMixedPrecision) and isinstance(plugin.scaler, MeshGradScaler)
            with Sent() as sent:
                plugin._unscale(self.optimizers())
            with Sent() as again:
                plugin._unscale(self.optimizers())
            assert sent.all == ["allreduce"] * sum(n > 1 for n in mesh) and not again.all

    on(mesh, lambda: fit(mesh, Counted, precision="16-mixed") and None)


def test_ranks_of_both_axes_agree_on_what_is_not_finite() -> None:
    """Whichever rank of a 2 x 2 mesh finds it, none takes the step, and all halve the scale."""

    def body() -> list[Any]:
        mesh, seen = make_mesh("cpu", 2, 2), []
        for rank in range(4):
            scaler = MeshGradScaler("cpu", init_scale=8.0)
            scaler.groups = tuple(mesh.get_all_groups())
            p = torch.nn.Parameter(torch.ones(2))
            optimizer = torch.optim.SGD([p], lr=1.0)
            scaler.scale((p * (math.inf if dist.get_rank() == rank else 1.0)).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
            seen.append((scaler.get_scale(), p.tolist()))
        return seen

    assert run_ranks(body, 4) == [[(4.0, [1.0, 1.0])] * 4] * 4


def test_half_parameters_and_lbfgs_are_refused_with_a_scaler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors, "HEAD_START", 0.0)

    class Half(Net):
        def configure_model(self) -> None:
            self.model.half()

    class Quasi(Net):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters())

    def body() -> list[str]:
        said = []
        for make in (Half, Quasi):
            with pytest.raises((ltp.TPError, SystemExit)) as info:
                fit(TP2, make, precision="16-mixed" if make is Half else "32-true")
            said.append(str(info.value))
        return said

    first = on(TP2, body)[0]
    assert "is float16, so the parameter is" in first[0] and "LBFGS computes its steps from dot products" in first[1]


# ------------------------------------------------------------------------------------------------- steps taken by hand


class Manual(Net):
    """Two optimizers, each for a part, with toggling, clipping and accumulation by hand."""

    automatic_optimization = False

    def configure_optimizers(self) -> Any:
        layers = list(self.model.layers.parameters())
        ids = {id(p) for p in layers}
        rest = [p for p in self.model.parameters() if id(p) not in ids]
        one, two = torch.optim.AdamW(layers, lr=1e-2, eps=1e-3), torch.optim.SGD(rest, lr=1e-1, momentum=0.9)
        return [one, two], [torch.optim.lr_scheduler.StepLR(one, 2, 0.5), torch.optim.lr_scheduler.ExponentialLR(two, 0.9)]

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        for optimizer, scheduler in zip(self.optimizers(), self.lr_schedulers()):
            self.toggle_optimizer(optimizer)
            loss = self.loss(batch)
            self.manual_backward(loss)
            if batch_idx % 2:
                self.clip_gradients(optimizer, 0.3, "norm")
                optimizer.step()
                optimizer.zero_grad()
            self.untoggle_optimizer(optimizer)
            scheduler.step()
        self.losses.append(loss.item())


class Scheduled(Net):
    """A scheduler a step, one an epoch, and one that waits for a metric; warm-up in the step itself."""

    kind = "step"

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("loss", loss, sync_dist=True, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2, eps=1e-3, foreach=True)
        if self.kind == "step":
            return [optimizer], [
                {"scheduler": torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-2, total_steps=20), "interval": "step"}
            ]
        if self.kind == "epoch":
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.3, patience=0, threshold=10.0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "loss"}}


class OnEpoch(Scheduled):
    kind = "epoch"


class OnPlateau(Scheduled):
    kind = "plateau"


class ByHand(Net):
    """A step inside of a closure, and a gradient that a hook changes."""

    automatic_optimization = False

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        optimizer = self.optimizers()

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = self.loss(batch)
            self.manual_backward(loss)
            self.losses.append(loss.item())
            return loss

        optimizer.step(closure=closure)

    def on_after_backward(self) -> None:
        torch._foreach_mul_([getattr(p.grad, "_local_tensor", p.grad) for p in self.parameters()], 0.5)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, nesterov=True)


LOOPS: dict[str, tuple[Callable[[], Net], dict[str, Any]]] = {
    "manual, two optimizers": (Manual, {}),
    "schedulers by step": (Scheduled, {"accumulate_grad_batches": 2}),
    "schedulers by epoch": (OnEpoch, {"max_epochs": 3}),
    "plateau": (OnPlateau, {"max_epochs": 3, "gradient_clip_val": 0.3}),
    "closure by hand": (ByHand, {}),
    "accumulate 4, a rest of 2": (Net, {"accumulate_grad_batches": 4, "gradient_clip_val": 0.3}),
    "accumulate, by value": (Net, {"accumulate_grad_batches": 2, "gradient_clip_val": 1e-3, "gradient_clip_algorithm": "value"}),
    "fused": (lambda: Net(fused=True), {"gradient_clip_val": 0.3}),
}


@both
def test_loops_as_in_one_process(mesh: tuple[int, int]) -> None:
    refs = on(ONE, lambda: {n: fit(ONE, make, **options) for n, (make, options) in LOOPS.items()})[0]
    ranks = on(mesh, lambda: {n: fit(mesh, make, **options) for n, (make, options) in LOOPS.items()})
    for name in LOOPS:
        assert_same([r[name] for r in ranks], refs[name], what=name)
    assert refs["plateau"]["rates"] != [[1e-2]]


@both
def test_manual_steps_with_a_scaler(mesh: tuple[int, int]) -> None:
    """Clipped after they were unscaled: as in float32, to what float16 has of digits."""
    ref = on(ONE, lambda: fit(ONE, Manual))[0]
    ranks = on(mesh, lambda: fit(mesh, Manual, precision="16-mixed"))
    assert all(r["steps"] == ref["steps"] for r in ranks)
    mean = torch.tensor([r["losses"] for r in ranks]).mean(0)
    torch.testing.assert_close(mean, torch.tensor(ref["losses"]), rtol=2e-2, atol=0)


@both
def test_collectives_of_accumulation(mesh: tuple[int, int]) -> None:
    """FSDP2 reduces, and shares are summed, in the last micro-batch alone."""

    class Counted(Net):
        def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
            with Sent() as sent:
                super().backward(loss, *args, **kwargs)
            counts.append({name: sent.all.count(name) for name in set(sent.all)})

    counts: list[dict[str, int]] = []

    def body() -> list[dict[str, int]]:
        fit(mesh, Counted, accumulate_grad_batches=3)
        return counts

    for first, second, third, *others in on(mesh, body):
        assert first != third and second == others[1], (first, second, third)
        # the norms that shards of the sequence share are summed in one all-reduce
        assert third.get("allreduce", 0) - second.get("allreduce", 0) == 1
        if mesh == MESH_2X2:  # one reduce-scatter for each of FSDP2's units: the two blocks, and the root
            names = [n for n in third if "reduce_scatter" in n]
            assert sum(third[n] for n in names) - sum(second.get(n, 0) for n in names) == 3, (second, third)


@both
def test_norms_of_whole_gradients(mesh: tuple[int, int]) -> None:
    """By Lightning's `grad_norm`, whenever it was imported, and ours: for every order, one all-reduce an axis."""
    orders = (1, 2, 3.0, "inf")

    class Norms(Net):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            from lightning.pytorch.utilities import grad_norm as imported_late

            for order in orders:
                with Sent() as sent:
                    found = grad_norm(self, order)
                assert imported_late(self, order) == found
                if dist.is_initialized():
                    assert sent.all == ["allreduce"] * sum(n > 1 for n in mesh)
                self.seen.append({n: float(v) for n, v in found.items()})

    ref = on(ONE, lambda: fit(ONE, Norms))[0]
    assert_same(on(mesh, lambda: fit(mesh, Norms)), ref)
    with pytest.raises(ltp.TPError, match="above 0"):
        ltp.grad_norms(torch.nn.Linear(1, 1), 0)


@pytest.mark.parametrize(
    "precision, computes, reduces",
    [
        ("16-mixed", torch.float16, torch.float32),
        ("bf16-mixed", torch.bfloat16, torch.float32),
        ("bf16-true", None, torch.float32),
        ("32-true", None, None),
    ],
)
def test_the_policy_of_fsdp2(precision: str, computes: torch.dtype | None, reduces: torch.dtype | None) -> None:
    policy = fsdp_policy(precision)
    assert (policy.param_dtype, policy.reduce_dtype) == (computes, reduces)
