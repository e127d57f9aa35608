"""A real Trainer under `TPStrategy`, in real processes, against the same Trainer in one process."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch.callbacks import BaseFinetuning, EarlyStopping, ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

import lightning_tp as ltp
from examples.llama import PLAN, Llama, LlamaConfig
from lightning_tp import errors
from lightning_tp.core.ops.rng import rng_state
from lightning_tp.testing import assert_trees_close, randomize_, run_ranks
from lightning_tp.testing.fixtures import run_if
from lightning_tp.trainer.resume import TRAINABLE

CONFIG = LlamaConfig(vocab_size=103, dim=64, num_layers=2, num_heads=8, num_kv_heads=4, hidden_dim=90, max_seq_len=32, bias=True)
QUIET = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
TP2, MESH_2X2 = (1, 2), (2, 2)
both = pytest.mark.parametrize("mesh", [TP2, MESH_2X2], ids=["tp2", "2x2"])


def build(seed: int = 0, config: LlamaConfig = CONFIG) -> Llama:
    return randomize_(Llama(config), seed)


class Net(L.LightningModule):
    """An ordinary LightningModule, which knows nothing of ranks."""

    def __init__(self, seed: int = 0, fused: bool = False) -> None:
        super().__init__()
        self.seed, self.fused = seed, fused
        self.losses: list[float] = []
        self.make()

    def make(self) -> None:
        self.model = build(self.seed)

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(self.model(batch["tokens"]).flatten(0, 1), batch["targets"].flatten())

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("loss", loss, on_step=False, on_epoch=True, sync_dist=True)
        self.log("items", float(len(batch["tokens"])), reduce_fx="sum", on_step=False, on_epoch=True, sync_dist=True)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(outputs["loss"].item())  # here: a plan may be looked for by calling the step

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), sync_dist=True)
        self.log("val_items", float(len(batch["tokens"])), reduce_fx="sum", sync_dist=True)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch), sync_dist=True)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.model(batch["tokens"]).argmax(-1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2, eps=1e-3, fused=self.fused)


class Mixed(ltp.TensorParallel, Net):
    """With the mixin, and its own plan."""

    plan = PLAN

    def configure_model(self) -> None:
        super().configure_model()
        if self.trainer.world_size > 1:
            assert self.model.tok_embeddings.weight.to_local().shape != (103, 64)  # split here already, for who wants to look


class Late(Net):
    """Makes its layers in its own `configure_model`, as Lightning recommends it for large models."""

    def make(self) -> None:
        self.model = None

    def configure_model(self) -> None:
        if self.model is None:
            self.model = build(self.seed)


class LateMixed(ltp.TensorParallel, Late):
    def configure_model(self) -> None:
        if self.model is None:
            self.model = build(self.seed)
        super().configure_model()


class Flat(Net):
    """The layers are the LightningModule's own, and so is the forward: it is FSDP2's root itself."""

    def make(self) -> None:
        model = build(self.seed)
        for name, child in model.named_children():
            self.add_module(name, child)
        self.register_buffer("rope", model.rope, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return Llama.forward(self, tokens)

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(self(batch["tokens"]).flatten(0, 1), batch["targets"].flatten())

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self(batch["tokens"]).argmax(-1)


class Direct(Flat):
    """The step does not go through the LightningModule's own `__call__`, on which FSDP2 has its hooks."""

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(self.forward(batch["tokens"]).flatten(0, 1), batch["targets"].flatten())


@dataclass
class Result:
    losses: list[float]
    weights: dict[str, Tensor]
    metrics: dict[str, float]


def data(dp: int = 1, *, items: int = 12, batch: int = 4, seed: int = 0, **options: Any) -> DataLoader:
    """Items are dealt out in turn, so that the batches of the `dp` ranks together are the batch of one process."""
    dataset = ltp.RandomTokens(items, 12, 103, seed=seed)
    if dp > 1:  # Lightning's own sampler would shuffle
        tp = int(os.environ["WORLD_SIZE"]) // dp
        options["sampler"] = DistributedSampler(dataset, dp, int(os.environ["RANK"]) // tp, shuffle=False)
    return DataLoader(dataset, batch_size=batch // dp, **options)


def trainer_of(strategy: Any, **options: Any) -> L.Trainer:
    world = int(os.environ["WORLD_SIZE"])
    return L.Trainer(accelerator="cpu", devices=world, strategy=strategy, **{**QUIET, "max_epochs": 1, **options})


def result_of(trainer: L.Trainer, module: Any) -> Result:
    weights = {n.removeprefix("model."): t for n, t in ltp.full_state_dict(module).items()}
    return Result(module.losses, weights, {k: v.item() for k, v in trainer.callback_metrics.items()})


def fit(make: Callable[[], Any] = Net, strategy: Any = "auto", dp: int = 1, **options: Any) -> Result:
    trainer, module = trainer_of(strategy, **options), make()
    trainer.fit(module, data(dp))
    return result_of(trainer, module)


def on(world: int, body: Callable[[], Any]) -> list[Any]:
    return run_ranks(body, world, init=False, timeout=100)


_references: dict[Any, Result] = {}


def reference(**options: Any) -> Result:
    """One process, an ordinary Trainer."""
    key = repr(sorted(options.items()))
    if key not in _references:
        _references[key] = on(1, lambda: fit(**options))[0]
    return _references[key]


def assert_same(results: list[Result], ref: Result, rtol: float = 1e-4, what: str = "") -> None:
    print(what)  # pytest shows it if the rest fails
    mean = torch.tensor([r.losses for r in results], dtype=torch.float64).mean(0)
    torch.testing.assert_close(mean, torch.tensor(ref.losses, dtype=torch.float64), rtol=rtol, atol=0)
    for r in results:
        assert_trees_close(r.weights, ref.weights, rtol=rtol, name="weights")
        assert r.metrics == pytest.approx(ref.metrics, rel=rtol)
        for name, t in results[0].weights.items():
            assert torch.equal(t, r.weights[name]), name


def strategy(mesh: tuple[int, int] = TP2, **options: Any) -> ltp.TPStrategy:
    return ltp.TPStrategy(tp=mesh[1], **{"plan": PLAN, **options})


# ------------------------------------------------------------------------------------------------------------------ fit


@both
def test_fit_as_in_one_process(mesh: tuple[int, int]) -> None:
    """The same losses, weights and logged metrics; every rank shows the whole of them."""
    makes = [Net, Mixed, Late, LateMixed, Flat, Direct]
    ranks = on(mesh[0] * mesh[1], lambda: [fit(make, strategy(mesh), mesh[0]) for make in makes])
    for make, *results in zip(makes, *ranks):
        assert_same(results, reference(), what=make.__name__)
    assert reference().metrics["items"] == 12


def test_ways_to_name_the_strategy_and_the_plan(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(ltp.Plan(PLAN).to_json())

    class Attribute(Net):
        plan = PLAN

    def body() -> list[Result]:
        ways: list[tuple[Any, Any]] = [
            (Net, ltp.TPStrategy(plan=path)),
            (Net, ltp.TPStrategy(tp=2, dp=1, plan=str(path))),
            (Net, ltp.TPStrategy(dp=1, plan=ltp.Plan(PLAN))),
            (Attribute, ltp.TPStrategy(tp=2)),
            (Attribute, "tp"),
            (Mixed, "tp"),
            (Net, "tp"),  # nobody says it: found by running the step on the first batch
            (Net, strategy(sequence_parallel=False)),
            (Net, strategy(loss_parallel=False)),
            (Net, strategy(activation_checkpointing="block")),
            (Net, strategy(backend="dtensor")),
        ]
        return [fit(make, how) for make, how in ways]

    for i, results in enumerate(zip(*on(2, body))):
        assert_same(list(results), reference(), what=f"way {i}")


def test_the_plans_source_is_said() -> None:
    _, output = run_ranks(lambda: fit(strategy=strategy()) and None, 2, init=False, return_output=True)[0]
    assert "Plan (user-provided), tp=2" in output and "layers.{0-1}.attention.wq" in output


@both
def test_options_of_the_trainer(mesh: tuple[int, int]) -> None:
    tried: list[dict[str, Any]] = [
        dict(accumulate_grad_batches=3),
        dict(gradient_clip_val=0.3),
        dict(gradient_clip_val=1e-3, gradient_clip_algorithm="value"),
    ]
    ranks = on(mesh[0] * mesh[1], lambda: [fit(Net, strategy(mesh), mesh[0], **options) for options in tried])
    for options, *results in zip(tried, *ranks):
        assert_same(results, reference(**options), what=str(options))
        assert reference(**options).losses[-1] != reference().losses[-1]


@both
def test_in_float64_to_the_last_digits(mesh: tuple[int, int]) -> None:
    class Double(Net):
        def make(self) -> None:
            self.model = build().double()

    options = dict(accumulate_grad_batches=2, gradient_clip_val=0.3)
    ref = on(1, lambda: fit(Double, **options))[0]
    assert_same(on(mesh[0] * mesh[1], lambda: fit(Double, strategy(mesh), mesh[0], **options)), ref, rtol=1e-9)


@both
def test_manual_optimization(mesh: tuple[int, int]) -> None:
    """The same steps, taken by hand."""

    class Manual(Net):
        automatic_optimization = False

        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            loss, optimizer = self.loss(batch), self.optimizers()
            self.manual_backward(loss)
            self.clip_gradients(optimizer, 0.3, "norm")
            optimizer.step()
            optimizer.zero_grad()
            return loss

    for r in (results := on(mesh[0] * mesh[1], lambda: fit(Manual, strategy(mesh), mesh[0]))):
        r.metrics = {}
    ref = reference(gradient_clip_val=0.3)
    assert_same(results, Result(ref.losses, ref.weights, {}))


def test_dtensor_backend_on_both_axes() -> None:
    assert_same(on(4, lambda: fit(Net, strategy(MESH_2X2, backend="dtensor"), 2)), reference())


MIXED, BY_NORM = dict(precision="bf16-mixed"), dict(gradient_clip_val=0.3)
HALF: dict[tuple[int, int], list[dict[str, Any]]] = {
    TP2: [MIXED, {**MIXED, **BY_NORM}, {**MIXED, "gradient_clip_val": 1e-3, "gradient_clip_algorithm": "value"}],
    MESH_2X2: [{**MIXED, **BY_NORM}, {"precision": "bf16-true", **BY_NORM}],
}


@both
def test_half_precision_with_a_fused_optimizer(mesh: tuple[int, int]) -> None:
    """Lightning by itself refuses to clip there; the reference has an optimizer that is not fused."""

    def body() -> list[tuple[Result, set[torch.dtype]]]:
        found = []
        for options in HALF[mesh]:
            trainer, module = trainer_of(strategy(mesh), **options), Net(fused=True)
            trainer.fit(module, data(mesh[0]))
            found.append((result_of(trainer, module), {p.dtype for p in module.parameters()}))
        return found

    start = build().double().state_dict()
    for options, *results in zip(HALF[mesh], *on(mesh[0] * mesh[1], body)):
        print(options)
        dtype = torch.bfloat16 if options["precision"] == "bf16-true" else torch.float32
        assert all(dtypes == {dtype} for _, dtypes in results)
        mean = torch.tensor([r.losses for r, _ in results]).mean(0)
        torch.testing.assert_close(mean, torch.tensor(reference(**options).losses), rtol=2e-2, atol=0)
        exact = reference(**{k: v for k, v in options.items() if k != "precision"})
        for name, t in results[0][0].weights.items():  # they went the same way, if not to the same digit
            moves = (t.double() - start[name], exact.weights[name].double() - start[name])
            if "wk.bias" not in name:  # whose gradient is all rounding
                assert F.cosine_similarity(*(m.flatten() for m in moves), 0) > 0.8, name


def test_hugging_face_llama_by_its_declared_plan() -> None:
    transformers = pytest.importorskip("transformers")
    config = dict(
        vocab_size=103, hidden_size=64, intermediate_size=90, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=1
    )

    class HF(Net):
        def make(self) -> None:
            self.model = randomize_(transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)))

        def loss(self, batch: dict[str, Tensor]) -> Tensor:
            return self.model(batch["tokens"], labels=batch["tokens"]).loss

    ref = on(1, lambda: fit(HF))[0]
    assert_same(on(2, lambda: fit(HF, ltp.TPStrategy(tp=2))), ref)
    assert_same(on(4, lambda: fit(HF, "tp")), ref)


# -------------------------------------------------------------------------------------- other entry points of the Trainer


@both
def test_fit_validate_test_predict_in_one_process(mesh: tuple[int, int]) -> None:
    """In any order, twice, with one Trainer and with several; sums count an item once."""

    def body(how: Any, dp: int) -> list[Any]:
        module, trainer = Net(), trainer_of(how(), num_sanity_val_steps=1)
        found: list[Any] = [trainer.validate(module, data(dp, seed=1), verbose=False)]
        trainer.fit(module, data(dp), data(dp, seed=1))
        found.append({k: v.item() for k, v in trainer.callback_metrics.items()})
        found.append(trainer.test(module, data(dp, seed=2), verbose=False))
        trainer.fit_loop.max_epochs = 2
        trainer.fit(module, data(dp))
        other = trainer_of(how())
        found.append(other.validate(module, data(dp, seed=1), verbose=False))
        other.fit(module, data(dp))
        found.append(torch.cat(other.predict(module, data(dp, seed=3))))
        assert len(module.losses) == 9
        found.append(ltp.full_state_dict(module))
        return found

    *ref, tokens, weights = on(1, lambda: body(lambda: "auto", 1))[0]
    ranks = on(mesh[0] * mesh[1], lambda: body(lambda: strategy(mesh), mesh[0]))
    assert ref[0][0]["val_items"] == 12 and ref[1]["val_items"] == 12
    for i, (*found, mine, end) in enumerate(ranks):
        for got, there in zip(found, ref, strict=True):
            for a, b in zip(*((x,) if isinstance(x, dict) else x for x in (got, there)), strict=True):
                assert a == pytest.approx(b, rel=1e-4)
        dealt = tokens.view(12, -1)[i // mesh[1] :: mesh[0]]  # each data-parallel rank predicts for its own items
        assert (mine.view(dealt.shape) == dealt).float().mean() > 0.99
        assert_trees_close(end, weights, rtol=1e-3)


def test_nothing_is_left_behind() -> None:
    """Threads, and a process group for each run that nobody closes."""

    def body() -> None:
        counts = []
        for _ in range(3):
            fit(strategy=strategy())
            counts.append(len(dist.distributed_c10d._world.pg_map))
        assert [t.name for t in threading.enumerate() if not t.daemon] == ["MainThread"]
        assert counts[2] - counts[1] <= 2  # of the mesh, one an axis; torch caches none

    on(2, body)


def test_order_of_the_data_is_the_users_own() -> None:
    """Without a data-parallel axis a shuffled loader stays as it is: the same batches as in one process."""

    def body(how: Any) -> Result:
        trainer, module = trainer_of(how, num_sanity_val_steps=0), Net()
        L.seed_everything(3, verbose=False)
        trainer.fit(module, data(shuffle=True), data(seed=1))
        assert type(trainer.train_dataloader.sampler).__name__ == "RandomSampler"
        return result_of(trainer, module)

    assert_same(on(2, lambda: body(strategy())), on(1, lambda: body("auto"))[0])


def test_model_built_on_meta() -> None:
    """`init_module(empty_init=True)`: no rank ever holds the whole model, and the weights are the usual ones."""

    class Plain(Net):
        def make(self) -> None:
            torch.manual_seed(5)
            self.model = Llama(CONFIG)

    def body(mesh: tuple[int, int]) -> Result:
        trainer = trainer_of(strategy(mesh))
        with trainer.init_module(empty_init=True):
            module = Plain()
        assert all(p.is_meta for p in module.parameters())
        trainer.fit(module, data(mesh[0]))
        assert not any(b.is_meta for b in module.buffers())
        return result_of(trainer, module)

    ref = on(1, lambda: fit(Plain))[0]
    for mesh in (TP2, MESH_2X2):
        assert_same(on(mesh[0] * mesh[1], lambda mesh=mesh: body(mesh)), ref)


def test_average_of_the_weights() -> None:
    """Lightning copies the module before the strategy splits it, unless it splits itself; over FSDP2 a module can't be copied."""
    averaging = pytest.importorskip("lightning.pytorch.callbacks").EMAWeightAveraging

    def body(how: Any) -> Result:
        return fit(Mixed, how, callbacks=[averaging(decay=0.5, update_every_n_steps=1)])

    ref = on(1, lambda: body("auto"))[0]
    assert not torch.equal(ref.weights["norm.weight"], reference().weights["norm.weight"])
    assert_same(on(2, lambda: body(strategy())), ref)


def test_early_stopping_and_best_checkpoint_agree_on_all_ranks(tmp_path: Path) -> None:
    class Worse(Net):
        def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
            self.log("val_loss", float(self.current_epoch) + self.global_rank // 2, sync_dist=True)

    def body() -> tuple[int, str, float]:
        best = ModelCheckpoint(tmp_path, monitor="val_loss", filename="{epoch}")
        trainer = trainer_of(
            strategy(MESH_2X2), max_epochs=5, enable_checkpointing=True, callbacks=[EarlyStopping("val_loss", patience=1), best]
        )
        trainer.fit(Worse(), data(2), data(2))
        return trainer.current_epoch, best.best_model_path, best.best_model_score.item()

    assert on(4, body) == [(2, str(tmp_path / "epoch=0.ckpt"), 0.5)] * 4


# ------------------------------------------------------------------------------------------------------------ checkpoints


def save_each_epoch(folder: Path) -> dict[str, Any]:
    callback = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    return dict(enable_checkpointing=True, callbacks=[callback], max_epochs=2)


@pytest.mark.parametrize(
    "source, target, distributed",
    [
        pytest.param(TP2, MESH_2X2, True, id="tp2 to 2x2, folder"),
        pytest.param(MESH_2X2, TP2, False, id="2x2 to tp2, file"),
        pytest.param(TP2, MESH_2X2, False, id="tp2 to 2x2, file", marks=pytest.mark.slow),
        pytest.param(MESH_2X2, TP2, True, id="2x2 to tp2, folder", marks=pytest.mark.slow),
    ],
)
def test_resume(source: tuple[int, int], target: tuple[int, int], distributed: bool, tmp_path: Path) -> None:
    """As if it had never stopped: bitwise on the same mesh, closely on another one."""

    def first() -> tuple[Result, Result]:
        how = lambda: strategy(source, save_distributed_checkpoint=distributed)  # noqa: E731
        whole = fit(Net, how(), source[0], **save_each_epoch(tmp_path))
        checkpoint = tmp_path / "epoch=0.ckpt"
        assert checkpoint.is_dir() == distributed
        trainer, module = trainer_of(how(), max_epochs=2), Net(seed=1)
        trainer.fit(module, data(source[0]), ckpt_path=checkpoint)
        return whole, result_of(trainer, module)

    def second(mesh: tuple[int, int]) -> Result:
        trainer, module = trainer_of(strategy(mesh), max_epochs=2), Net(seed=1)
        trainer.fit(module, data(mesh[0]), ckpt_path=tmp_path / "epoch=0.ckpt")
        return result_of(trainer, module)

    runs = on(source[0] * source[1], first)
    for whole, again in runs:
        assert again.losses == whole.losses[3:]
        assert all(torch.equal(t, whole.weights[n]) for n, t in again.weights.items())
    wholes = [whole for whole, _ in runs]
    mean = torch.tensor([w.losses for w in wholes], dtype=torch.float64).mean(0).tolist()
    ref = Result(mean[3:], wholes[0].weights, wholes[0].metrics)
    assert_same(on(target[0] * target[1], lambda: second(target)), ref)
    if distributed:
        assert ltp.Plan.from_json((tmp_path / "epoch=0.ckpt" / "plan.json").read_text()) == ltp.Plan(PLAN)
    else:  # what one process would have saved: an ordinary Trainer goes on from it
        saved = torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)
        assert {n.removeprefix("model."): tuple(t.shape) for n, t in saved["state_dict"].items()} == {
            n: tuple(t.shape) for n, t in build().state_dict().items()
        }

        def plain() -> Result:
            trainer, module = trainer_of("auto", max_epochs=2), Net(seed=1)
            trainer.fit(module, data(), ckpt_path=tmp_path / "epoch=0.ckpt")
            return result_of(trainer, module)

        assert_same(on(1, plain), ref)


def test_resume_what_one_process_began(tmp_path: Path) -> None:
    ref = on(1, lambda: fit(**save_each_epoch(tmp_path)))[0]
    ref.losses = ref.losses[3:]

    def body(mesh: tuple[int, int]) -> Result:
        trainer, module = trainer_of(strategy(mesh), max_epochs=2), Net(seed=1)
        trainer.fit(module, data(mesh[0]), ckpt_path=tmp_path / "epoch=0.ckpt")
        return result_of(trainer, module)

    assert_same(on(2, lambda: body(TP2)), ref)
    assert_same(on(4, lambda: body(MESH_2X2)), ref)


def test_random_states_of_a_checkpoint_are_those_of_the_next_step() -> None:
    """Where batches were prefetched, its loader is behind them already."""

    class Draws(Net):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            torch.manual_seed(3)
            self.trainer.strategy.resume.rng_at_step = rng_state(self.trainer.strategy.device_mesh)
            self.expected = torch.rand(2)

        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            if hasattr(self, "expected"):  # else it is traced for a plan
                assert torch.equal(torch.rand(2), self.expected) and self.trainer.strategy.resume.rng_at_step is None
            return super().training_step(batch, batch_idx)

    on(2, lambda: trainer_of(strategy(), max_steps=2).fit(Draws(), data()))


def test_which_weights_are_trained_is_saved(tmp_path: Path) -> None:
    class Finetunes(BaseFinetuning):
        def freeze_before_training(self, module: L.LightningModule) -> None:
            self.freeze(module.model.layers[0])

        def finetune_function(self, *args: Any) -> None:
            pass

    def body() -> list[str]:
        trainer, module = trainer_of(strategy(), max_steps=1, callbacks=[Finetunes()]), Net()
        trainer.fit(module, data())
        trainer.save_checkpoint(tmp_path / "a.ckpt")
        return torch.load(tmp_path / "a.ckpt" / "meta.pt", weights_only=False)[TRAINABLE]

    names = on(2, body)[0]
    assert "model.layers.1.attention.wq.weight" in names and not any("layers.0." in name for name in names)


def test_validate_a_checkpoint(tmp_path: Path) -> None:
    def body() -> None:
        fit(strategy=strategy(), **save_each_epoch(tmp_path))
        trainer, module = trainer_of(strategy()), Net(seed=1)
        first = trainer.validate(module, data(seed=1), ckpt_path=tmp_path / "epoch=0.ckpt", verbose=False)
        last = trainer.validate(module, data(seed=1), ckpt_path=tmp_path / "epoch=1.ckpt", verbose=False)
        again = trainer.validate(module, data(seed=1), ckpt_path=tmp_path / "epoch=0.ckpt", verbose=False)
        assert first == again != last
        errors.HEAD_START = 0.0
        with pytest.raises((ltp.TPError, SystemExit)) as info:
            trainer.validate(module, data(), ckpt_path=tmp_path)
        assert "is no checkpoint" in str(info.value) or dist.get_rank() == 1

    on(2, body)


# ---------------------------------------------------------------------------------------------------- real launchers

SCRIPT = """
import sys
import lightning as L, torch, lightning_tp as ltp
from torch.utils.data import DataLoader
from examples.llama import LlamaConfig, LlamaModule, PLAN

if __name__ == "__main__":
    L.seed_everything(0, verbose=False)
    module = LlamaModule(LlamaConfig(vocab_size=103, dim=32, num_layers=2, hidden_dim=48))
    trainer = L.Trainer(accelerator="cpu", devices={devices}, strategy={strategy}, max_steps=3, logger=False,
                        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer.fit(module, DataLoader(ltp.RandomTokens(12, 8, 103), batch_size=4))
    weights = ltp.full_state_dict(module)
    if trainer.is_global_zero:
        torch.save((trainer.callback_metrics["loss"].item(), weights), sys.argv[1])
"""


def run_script(command: list[str], script: Path, text: str, *args: str, timeout: float = 100) -> subprocess.CompletedProcess[str]:
    script.write_text(text)
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "MASTER_ADDR": "127.0.0.1",
    }
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "NODE_RANK", "MASTER_PORT", "PL_GLOBAL_SEED"):
        environment.pop(name, None)
    return subprocess.run(
        [*command, str(script), *args],
        env=environment,
        timeout=timeout,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


@pytest.mark.parametrize(
    "launcher", [pytest.param("lightning", marks=pytest.mark.slow), "torchrun"]
)  # test_examples.py does it, too
def test_real_launchers(launcher: str, tmp_path: Path) -> None:
    """Lightning starts the second process itself, or finds two that torchrun has started."""

    def plain() -> None:
        code = SCRIPT.format(devices=1, strategy="'auto'")
        sys.argv = ["script", str(tmp_path / "ref.pt")]
        exec(compile(code, "script", "exec"), {"__name__": "__main__"})

    on(1, plain)
    command = {
        "lightning": [sys.executable],
        "torchrun": [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0", "--standalone"],
    }[launcher]
    text = SCRIPT.format(devices=2, strategy="ltp.TPStrategy(tp=2, plan=PLAN)")
    done = run_script(command, tmp_path / "script.py", text, str(tmp_path / "got.pt"))
    assert done.returncode == 0, done.stdout
    (loss, weights), (ref_loss, ref) = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("got", "ref"))
    assert loss == pytest.approx(ref_loss, rel=1e-4)
    assert_trees_close(weights, ref, rtol=1e-2)  # Adam with its usual eps: steps of tiny gradients are of any sign


# ------------------------------------------------------------------------------------------------------------------- GPUs


def fit_on_gpus(mesh: tuple[int, int], **options: Any) -> Result:
    trainer = L.Trainer(accelerator="gpu", devices=mesh[0] * mesh[1], strategy=strategy(mesh), max_epochs=1, **{**QUIET, **options})
    module = Net()
    trainer.fit(module, data(mesh[0]))
    return result_of(trainer, module)


@run_if(min_gpus=2)
@pytest.mark.parametrize("mesh", [TP2, (2, 1)], ids=["tp2", "dp2"])
def test_fit_as_in_one_process_on_gpus(mesh: tuple[int, int]) -> None:
    assert_same(run_ranks(fit_on_gpus, 2, mesh, init=False, start_method="spawn"), reference(), rtol=1e-3)


@run_if(min_gpus=4)
def test_fit_as_in_one_process_on_four_gpus() -> None:
    assert_same(run_ranks(fit_on_gpus, 4, MESH_2X2, init=False, start_method="spawn"), reference(), rtol=1e-3)


@run_if(min_gpus=2)
def test_half_precision_on_gpus() -> None:
    got = run_ranks(fit_on_gpus, 2, TP2, precision="bf16-mixed", gradient_clip_val=0.3, init=False, start_method="spawn")
    ref = reference(gradient_clip_val=0.3)
    torch.testing.assert_close(torch.tensor(got[0].losses), torch.tensor(ref.losses), rtol=5e-2, atol=0)


# ---------------------------------------------------------------------------------------------------------- small things


def test_parameters_are_counted_whole() -> None:
    def body() -> int:
        trainer, module = trainer_of(strategy(MESH_2X2)), Net()
        trainer.fit(module, data(2))
        return trainer.strategy.num_global_parameters

    assert on(4, body) == [sum(p.numel() for p in build().parameters())] * 4


def test_adafactor_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Factored(Net):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adafactor(self.parameters())

    monkeypatch.setattr(errors, "HEAD_START", 0.0)

    def refused(*mesh: Any) -> str:
        with pytest.raises((ltp.TPError, SystemExit)) as info:
            fit(Factored, strategy(*mesh[:1]), *mesh[1:])
        return str(info.value)

    assert "Adafactor does not work element by element" in on(2, refused)[0]
    assert "Adafactor can't step on FSDP2's shards" in on(4, lambda: refused(MESH_2X2, 2))[0]


def test_checkpoint_io_is_torn_down() -> None:
    """It may have threads that still write, as Lightning's `AsyncCheckpointIO`."""

    def body() -> list[str]:
        said: list[str] = []
        trainer = trainer_of(strategy(), fast_dev_run=True)
        trainer.strategy.checkpoint_io.teardown = lambda: said.append("down")
        trainer.fit(Net(), data())
        return said

    assert on(2, body) == [["down"]] * 2
