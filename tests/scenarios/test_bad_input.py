"""What users get wrong: each mistake is one `TPError`, within seconds, on one rank's screen, and nobody hangs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

import lightning_tp as ltp
from examples.llama import PLAN, Llama, LlamaConfig
from lightning_tp import errors
from lightning_tp.styles import Replicate
from lightning_tp.testing import RankError, run_ranks

CONFIG = LlamaConfig(vocab_size=103, dim=32, num_layers=2, num_heads=4, num_kv_heads=2, hidden_dim=48)
QUIET = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
SECONDS = 40  # most of which this machine takes to start processes when it is busy


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """`run_ranks` stops no rank early, so the others need not wait for the one that speaks."""
    monkeypatch.setattr(errors, "HEAD_START", 0.0)


class Net(L.LightningModule):
    def __init__(self, config: LlamaConfig = CONFIG) -> None:
        super().__init__()
        self.model = Llama(config)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.model(batch["tokens"]).flatten(0, 1), batch["targets"].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters())


def data() -> DataLoader:
    return DataLoader(ltp.RandomTokens(8, 8, 103), batch_size=2)


def trainer(**options: Any) -> L.Trainer:
    options = {**QUIET, "max_steps": 4, **options}
    return L.Trainer(accelerator="cpu", devices=int(os.environ["WORLD_SIZE"]), **options)


def message_of(body: Callable[[], Any], world: int = 2) -> str:
    """The one error that a user sees of what all ranks run; checked to be one."""
    start = time.monotonic()
    with pytest.raises(RankError) as info:
        run_ranks(body, world, init=False, timeout=60)
    assert time.monotonic() - start < SECONDS
    failures = info.value.errors
    shown = [rank for rank, failure in failures.items() if failure.type_name == "TPError"]
    assert len(shown) == 1 and set(failures) == set(range(world)), info.value
    assert all(f.type_name == "SystemExit" for rank, f in failures.items() if rank not in shown), info.value
    assert not any("Traceback" in output for output in info.value.output.values())
    return failures[shown[0]].message


def fit(
    make: Callable[[], L.LightningModule] = Net, loader: Callable[[], Any] = data, plan: Any = PLAN, **options: Any
) -> Callable[[], None]:
    def body() -> None:
        trainer(strategy=ltp.TPStrategy(**{"tp": 2, "plan": plan, **options})).fit(make(), loader())

    return body


# ------------------------------------------------------------------------------------------------------- sizes of the mesh


def test_tp_does_not_divide_the_world() -> None:
    """When the Trainer is made, before any process is started."""
    with pytest.raises(
        ltp.TPError,
        match=r"tp=3 needs a multiple of 3 devices, but the Trainer has 4\. Pass `Trainer\(devices=6\)`, or",
    ):
        L.Trainer(accelerator="cpu", devices=4, strategy=ltp.TPStrategy(tp=3), **QUIET)
    with pytest.raises(ltp.TPError, match=r"`dp=2` x `tp=4` are 8 ranks, and the world size is 4"):
        L.Trainer(accelerator="cpu", devices=4, strategy=ltp.TPStrategy(tp=4, dp=2), **QUIET)
    with pytest.raises(ltp.TPError, match=r"`tp=0`: give a number of ranks"):
        L.Trainer(accelerator="cpu", devices=4, strategy=ltp.TPStrategy(tp=0), **QUIET)
    assert "tp=3 needs a multiple of 3 devices, but the Trainer has 2" in message_of(lambda: trainer(strategy=ltp.TPStrategy(tp=3)))


def test_tp_is_larger_than_the_heads() -> None:
    config = LlamaConfig(vocab_size=103, dim=32, num_layers=2, num_heads=2, num_kv_heads=2, hidden_dim=48)
    message = message_of(fit(lambda: Net(config), tp=4), 4)
    assert "`model.layers.0.attention.wq`: 2 heads do not split over tp=4: tp is larger than the 2 heads. Use tp=1, 2" in message


# -------------------------------------------------------------------------------------------------------------- the plan


@pytest.mark.parametrize(
    "change, message",
    [
        ({"layers.*.attention.q_proj": "colwise"}, "`layers.*.attention.q_proj` -> `colwise` matches no module or parameter"),
        (
            {"layers.*.ffn_norm": "colwise"},
            "`model.layers.0.ffn_norm`: the style `colwise` splits a linear layer, and this is a RMSNorm",
        ),
        ({"layers.*.attention": "replicate"}, "two rules for one weight"),
        ({"layers.0.attention.w*": "rowwise"}, "`model.layers.0.attention.wq`: two rules for one module"),
        ({"norm": None}, "1 of 21 parameters of Net are not covered by any rule of the plan: `model.norm.weight` (32,)"),
        (
            {"output": "replicate", "tok_embeddings": "rowwise", "layers.*.ffn_norm": "upwards"},
            "unknown style 'upwards'. Valid styles are colwise,",
        ),
    ],
    ids=["matches nothing", "module that can't", "two for one weight", "two for one module", "left out", "no such style"],
)
def test_rules_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    plan = {pattern: style for pattern, style in {**PLAN, **change}.items() if style is not None}
    assert message in message_of(fit(plan=plan))


def test_a_plan_that_splits_nothing_or_is_none(tmp_path: Path) -> None:
    assert "would replicate every parameter of Net" in message_of(fit(plan={"**": "replicate"}))
    assert "there is no such file" in message_of(fit(plan=tmp_path / "plan.json"))
    (tmp_path / "plan.json").write_text("{}")
    assert "This is not a plan: KeyError: 'rules'" in message_of(fit(plan=tmp_path / "plan.json"))


def test_no_plan_and_nothing_to_find_one_by() -> None:
    message = message_of(fit(plan=None, loader=lambda: iter(data())))
    assert (
        "There is no plan for this module, and none can be inferred from its first batch, since its data can be read only once"
        in message
    )
    assert "`example_input_array`" in message


def test_a_module_without_blocks() -> None:
    message = message_of(lambda: trainer(strategy=ltp.TPStrategy(tp=2)).fit(BoringModel()))
    assert "would replicate every parameter of BoringModel" in message and "use tp=1" in message


def test_what_that_error_recommends_works() -> None:
    """With tp=1 a model needs no plan: FSDP2 over all ranks is left."""

    def body() -> None:
        trainer(strategy=ltp.TPStrategy(tp=1)).fit(BoringModel())

    run_ranks(body, 2, init=False)
    run_ranks(body, 1, init=False)


def test_a_share_that_the_plan_calls_whole() -> None:
    """Found in the first backward."""

    class Between(nn.Module):
        """A norm on the heads of one rank, between split layers."""

        def __init__(self, linear: nn.Linear) -> None:
            super().__init__()
            self.scale, self.linear = nn.Parameter(torch.ones(8)), linear

        def forward(self, x: Tensor) -> Tensor:
            return self.linear((x.unflatten(-1, (-1, 8)) * self.scale).flatten(-2))

    class Scaled(Net):
        def __init__(self) -> None:
            super().__init__()
            for layer in self.model.layers:
                layer.attention.wo = Between(layer.attention.wo)

    plan = {p: s for p, s in PLAN.items() if "wo" not in p}
    plan |= {"layers.*.attention.wo.linear": "rowwise", "layers.*.attention.wo.scale": Replicate(state="I")}
    message = message_of(fit(Scaled, plan=plan))
    assert re.match(r"`model\.layers\.\d\.attention\.wo\.scale` is replicated, but its gradient is not", message)


# ------------------------------------------------------------------------------------------------------------- the module


@pytest.mark.parametrize("wrap", [DistributedDataParallel, FullyShardedDataParallel, nn.DataParallel])
def test_a_module_that_is_wrapped_already(wrap: type[nn.Module]) -> None:
    class Wrapped(Net):
        def configure_model(self) -> None:
            options = {"device_id": torch.device("cpu")} if wrap is FullyShardedDataParallel else {}
            self.model = wrap(self.model, **options)

    assert f"`model` is wrapped by {wrap.__name__} already. Pass the plain module" in message_of(fit(Wrapped))


def test_an_optimizer_made_before_the_split() -> None:
    class Early(Net):
        def __init__(self) -> None:
            super().__init__()
            self.optimizer = torch.optim.AdamW(self.parameters())

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return self.optimizer

    def steps() -> float:
        module = Early()
        before = module.model.output.weight.detach().clone()
        trainer(strategy=ltp.TPStrategy(tp=2, plan=PLAN)).fit(module, data())
        return float((module.model.output.weight.detach() - before).norm())

    assert all(moved > 0 for moved in run_ranks(steps, 2, init=False))  # its parameters are the same objects after the split


def test_the_mixin_in_the_wrong_place() -> None:
    with pytest.raises(ltp.TPError, match="put it first"):

        class Wrong(L.LightningModule, ltp.TensorParallel):
            pass


def test_other_models_on_other_ranks() -> None:
    def make() -> Net:
        hidden = 48 + 2 * int(os.environ["RANK"])
        return Net(LlamaConfig(vocab_size=103, dim=32, num_layers=2, num_heads=4, num_kv_heads=2, hidden_dim=hidden))

    assert "The ranks have 2 different plans" in message_of(fit(make))


def test_a_module_that_is_split_for_another_tp() -> None:
    def body() -> None:
        module = Net()
        trainer(strategy=ltp.TPStrategy(tp=4, plan=PLAN)).fit(module, data())
        trainer(strategy=ltp.TPStrategy(tp=2, plan=PLAN)).fit(module, data())

    assert "split for tp=4 already, and the strategy has tp=2" in message_of(body, 4)


def test_words_that_there_are_not() -> None:
    with pytest.raises(ltp.TPError, match="backend='fast'"):
        ltp.TPStrategy(backend="fast")  # type: ignore[arg-type]
    with pytest.raises(ltp.TPError, match=r"activation_checkpointing='all'.*selective"):
        ltp.TPStrategy(activation_checkpointing="all")  # type: ignore[arg-type]


def test_a_checkpoint_of_another_model(tmp_path: Path) -> None:
    def body() -> None:
        saver = trainer(strategy=ltp.TPStrategy(tp=2, plan=PLAN))
        saver.fit(Net(), data())
        saver.save_checkpoint(tmp_path / "small.ckpt")
        wider = LlamaConfig(vocab_size=103, dim=32, num_layers=2, num_heads=4, num_kv_heads=2, hidden_dim=64)
        trainer(strategy=ltp.TPStrategy(tp=2, plan=PLAN)).fit(Net(wider), data(), ckpt_path=tmp_path / "small.ckpt")

    message = message_of(body)
    assert "`model.layers.0.feed_forward.w1.weight`" in message and "has shape (48, 32), the model (64, 32)" in message


# --------------------------------------------------------------------------------------------------------------- the data


class Unseeded:
    """A mixin: what arrives on the device is another batch on these ranks."""

    ranks: tuple[str, ...] = ("1",)

    def on_after_batch_transfer(self, batch: dict[str, Tensor], dataloader_idx: int) -> dict[str, Tensor]:
        rank = os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))
        return {**batch, "tokens": (batch["tokens"] + (rank in self.ranks)) % 103}


@pytest.mark.parametrize(
    "world, given", [(2, ("1",)), (4, ("1", "3")), (4, ("2",))], ids=["tp2", "2x2", "2x2, the second group only"]
)
def test_data_that_differs_inside_a_group(world: int, given: tuple[str, ...]) -> None:
    class Other(Unseeded, Net):
        ranks = given

    message = message_of(fit(Other), world)
    assert "`training_step`, batch 0: " in message and "['tokens']` (2, 8) differs inside a tensor-parallel group" in message
    assert "on_after_batch_transfer" in message


# ---------------------------------------------------------------------------------------------------------- real launchers

SCRIPT = """
import lightning as L, lightning_tp as ltp
from torch.utils.data import DataLoader
from examples.llama import LlamaConfig, LlamaModule, PLAN
from tests.scenarios.test_bad_input import Unseeded

if __name__ == "__main__":
    class Other(Unseeded, LlamaModule):
        pass

    module = {module}(LlamaConfig(vocab_size=103, dim=32, num_layers=2, hidden_dim=48))
    trainer = L.Trainer(accelerator="cpu", devices=2, strategy=ltp.TPStrategy({strategy}), max_steps=3, logger=False,
                        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer.fit(module, DataLoader(ltp.RandomTokens(12, 8, 103), batch_size=4))
"""
MISTAKES = {
    "rule": ("tp=2, plan={'attention.wrong': 'colwise'}", "LlamaModule", "matches no module or parameter"),
    "data": ("tp=2, plan=PLAN", "Other", "differs inside a tensor-parallel group"),
    "size": ("tp=3, plan=PLAN", "LlamaModule", "but the Trainer has 2"),
}


@pytest.mark.parametrize(
    "launcher, mistake",
    [
        pytest.param("lightning", "rule", marks=pytest.mark.slow),
        ("torchrun", "data"),
        pytest.param("lightning", "data", marks=pytest.mark.slow),
        pytest.param("torchrun", "rule", marks=pytest.mark.slow),
        pytest.param("lightning", "size", marks=pytest.mark.slow),
        pytest.param("torchrun", "size", marks=pytest.mark.slow),
    ],
)
def test_one_traceback_on_the_screen(launcher: str, mistake: str, tmp_path: Path) -> None:
    strategy, module, message = MISTAKES[mistake]
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(strategy=strategy, module=module))
    command = [sys.executable, str(script)]
    if launcher == "torchrun":
        command[1:1] = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    start = time.monotonic()
    done = subprocess.run(
        command, env=environment, timeout=100, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )
    assert time.monotonic() - start < 2 * SECONDS
    assert done.returncode != 0
    torchruns_own = done.stdout.count("torch.distributed.elastic.multiprocessing.errors.ChildFailedError")
    assert done.stdout.count("Traceback (most recent call last)") == 1 + torchruns_own, done.stdout
    assert done.stdout.count("lightning_tp.errors.TPError: ") == 1 and message in done.stdout, done.stdout
