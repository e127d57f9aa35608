"""Fine-tuning under a Trainer against one process: frozen weights, adapters, thawing in mid-run, checkpoints of adapters alone."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import BackboneFinetuning, BaseFinetuning
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemReader
from torch.utils.data import DataLoader, DistributedSampler

import lightning_tp as ltp
from examples.llama import PLAN, Llama, LlamaConfig
from lightning_tp import errors
from lightning_tp.core.comm.mesh import make_mesh
from lightning_tp.testing import assert_trees_close, randomize_, run_ranks
from tests.apply.test_parallelize import Sent

QUIET = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
CONFIG = LlamaConfig(vocab_size=103, dim=32, num_layers=2, num_heads=4, num_kv_heads=2, hidden_dim=45, max_seq_len=32, bias=True)
RULES = {f"model.{name}": style for name, style in PLAN.items()}
MESHES = pytest.mark.parametrize("mesh", [pytest.param((1, 2), id="tp2"), pytest.param((2, 2), id="2x2", marks=pytest.mark.slow)])


class Lora(nn.Module):
    """A hand-written adapter beside a linear layer."""

    def __init__(self, base: nn.Linear, rank: int = 3) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 2 * self.up(self.down(x))


class Net(L.LightningModule):
    """Trains what requires gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[float] = []
        self.model = self.make()

    def make(self) -> nn.Module:
        return randomize_(Llama(CONFIG))

    def logits(self, tokens: Tensor) -> Tensor:
        return self.model(tokens)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.logits(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(outputs["loss"].item())

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2, eps=1e-3)


class Frozen(Net):
    """Embedding and first block are frozen before fit."""

    def make(self) -> nn.Module:
        model = randomize_(Llama(CONFIG))
        model.tok_embeddings.requires_grad_(False)
        model.layers[0].requires_grad_(False)
        return model


class HandWritten(Net):
    def make(self) -> nn.Module:
        model = Llama(CONFIG).requires_grad_(False)
        for layer in model.layers:
            for of, name in ((layer.attention, "wq"), (layer.attention, "wv"), (layer.attention, "wo"), (layer.feed_forward, "w2")):
                setattr(of, name, Lora(getattr(of, name)))
        return randomize_(model)


class Peft(Net):
    """An adapted model of Hugging Face; its state dict has the adapters alone, as Lightning recommends it."""

    kind = "llama"

    def __init__(self) -> None:
        super().__init__()
        self.strict_loading = False

    def make(self) -> nn.Module:
        from peft import LoraConfig, get_peft_model
        from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM
        from transformers import LlamaConfig as Config

        base: Any
        if self.kind == "llama":
            base = LlamaForCausalLM(
                Config(
                    vocab_size=103, hidden_size=32, intermediate_size=44, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                    max_position_embeddings=64,
                )
            )  # fmt: skip
            lora = LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"])
        else:
            base = GPT2LMHeadModel(
                GPT2Config(
                    vocab_size=103, n_positions=32, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
                )
            )
            lora = LoraConfig(r=3, lora_alpha=6, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)
        model: nn.Module = randomize_(get_peft_model(base, lora))
        return model

    def logits(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=tokens).logits
        return logits

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return {name: t for name, t in super().state_dict(*args, **kwargs).items() if "lora_" in name}


class PeftGPT2(Peft):
    kind = "gpt2"


class OtherAdapter(Net):
    """One more kind of peft's, on a model of Hugging Face; magnitudes (DoRA) and scales (IA3) are random, too."""

    kind = "dora"

    def make(self) -> nn.Module:
        import peft
        from transformers import LlamaConfig as Config
        from transformers import LlamaForCausalLM

        sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4)
        torch.manual_seed(0)  # prefix tuning and DoRA look at the weights when they are made
        base = LlamaForCausalLM(Config(vocab_size=103, max_position_embeddings=64, **sizes))
        every, how = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"], {"r": 3, "lora_alpha": 6}
        task: dict[str, Any] = {"task_type": "CAUSAL_LM"}
        config: Any = {
            "dora": lambda: peft.LoraConfig(**how, use_dora=True, target_modules=every),
            "dora_columns": lambda: peft.LoraConfig(**how, use_dora=True, target_modules=["q_proj", "k_proj", "v_proj", "up_proj"]),
            "rslora": lambda: peft.LoraConfig(r=3, lora_alpha=2, use_rslora=True, target_modules=every),
            "ia3": lambda: peft.IA3Config(
                **task, target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
            ),
            "prompt": lambda: peft.PromptTuningConfig(**task, num_virtual_tokens=5),
            "prefix": lambda: peft.PrefixTuningConfig(**task, num_virtual_tokens=5),
        }[self.kind]()
        model: nn.Module = peft.get_peft_model(base, config)
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        randomize_(model)
        draw = torch.Generator().manual_seed(1)
        for name, p in model.named_parameters():
            if name in trained and ("magnitude" in name or "ia3" in name):
                p.data = 0.5 + torch.rand(p.shape, generator=draw)
        return model

    def logits(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=tokens).logits
        return logits[:, -tokens.shape[1] :]  # behind virtual tokens


def kind(name: str) -> type[OtherAdapter]:
    return type(name, (OtherAdapter,), {"kind": name})


class Thaw(BaseFinetuning):
    """Trains the head first, the second block from epoch 1 on."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze([pl_module.model.tok_embeddings, pl_module.model.layers])

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.model.layers[1], optimizer, lr=1e-3)


def data(dp: int = 1) -> DataLoader[Any]:
    """The batches of the `dp` ranks together are the batch of one process; Lightning's own sampler would shuffle."""
    items: Any = torch.randint(0, 103, (16, 14), generator=torch.Generator().manual_seed(0))
    rank = int(os.environ.get("RANK", 0)) // (int(os.environ.get("WORLD_SIZE", 1)) // dp or 1)
    sampler: Any = DistributedSampler(items, dp, rank, shuffle=False) if dp > 1 else None
    return DataLoader(items, batch_size=4 // dp, sampler=sampler)


def trainer(mesh: tuple[int, int] | None, plan: Any, **how: Any) -> L.Trainer:
    strategy = "auto" if mesh is None else ltp.TPStrategy(tp=mesh[1], plan=plan)
    devices = 1 if mesh is None else mesh[0] * mesh[1]
    return L.Trainer(accelerator="cpu", devices=devices, strategy=strategy, **{**QUIET, "max_epochs": 2, **how})


def whole_of(module: nn.Module) -> dict[str, Tensor]:
    """All weights, whatever the module's own state dict leaves out."""
    return ltp.full_state_dict(module.model)  # type: ignore[arg-type]


def fit(cls: type[Net], mesh: tuple[int, int] | None, plan: Any = None, **how: Any) -> dict[str, Any]:
    module = cls()
    frozen = {n for n, p in module.named_parameters() if not p.requires_grad}
    before = {n: t.clone() for n, t in whole_of(module).items()}
    run = trainer(mesh, plan, **how)
    run.fit(module, data(mesh[0] if mesh else 1))
    after = whole_of(module)
    if "callbacks" not in how:
        assert {n for n, p in module.named_parameters() if not p.requires_grad} == frozen
        assert all(torch.equal(after[n.removeprefix("model.")], before[n.removeprefix("model.")]) for n in frozen)
        assert all(p.grad is None for n, p in module.named_parameters() if n in frozen)
    elements = sum(len(g["params"]) for o in run.optimizers for g in o.param_groups)
    return dict(losses=module.losses, weights=after, groups=elements)


def assert_same(got: dict[str, Any], ref: dict[str, Any], dp: int, name: str) -> None:
    if dp == 1:  # else each rank has the loss of its own items
        torch.testing.assert_close(torch.tensor(got["losses"]), torch.tensor(ref["losses"]), rtol=2e-4, atol=0)
    assert got["groups"] == ref["groups"]
    assert_trees_close(got["weights"], ref["weights"], rtol=5e-4, name=name)


@MESHES
def test_frozen_weights_and_adapters(mesh: tuple[int, int]) -> None:
    pytest.importorskip("peft")
    cases: list[tuple[type[Net], Any]] = [(Frozen, RULES), (HandWritten, None), (Peft, None), (PeftGPT2, None)]
    refs = [fit(cls, None) for cls, _ in cases]
    for results in run_ranks(lambda: [fit(cls, mesh, plan) for cls, plan in cases], mesh[0] * mesh[1], init=False, timeout=300):
        for (cls, _), got, ref in zip(cases, results, refs, strict=True):
            assert_same(got, ref, mesh[0], cls.__name__)


@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param((1, 2), id="tp2"),
        *(pytest.param(m, id=i, marks=pytest.mark.slow) for m, i in (((1, 4), "tp4"), ((2, 2), "2x2"))),
    ],
)
def test_other_adapters_of_peft(mesh: tuple[int, int]) -> None:
    pytest.importorskip("peft")
    quick, slow = ["dora", "ia3"], ["rslora", "prompt", "prefix", "dora_columns"]  # the plan of the last takes long to find
    cases = [kind(name) for name in (quick if mesh == (1, 2) else quick + slow)]
    refs = [fit(cls, None) for cls in cases]
    for results in run_ranks(lambda: [fit(cls, mesh) for cls in cases], mesh[0] * mesh[1], init=False, timeout=400):
        for cls, got, ref in zip(cases, results, refs, strict=True):
            assert_same(got, ref, mesh[0], cls.__name__)


@MESHES
def test_blocks_that_are_thawed_in_mid_run(mesh: tuple[int, int]) -> None:
    ref = fit(Net, None, callbacks=[Thaw()], max_epochs=3)
    for got in run_ranks(
        lambda: fit(Net, mesh, RULES, callbacks=[Thaw()], max_epochs=3), mesh[0] * mesh[1], init=False, timeout=200
    ):
        assert_same(got, ref, mesh[0], "thawed")


class Backbone(Net):
    """What `BackboneFinetuning` asks for; the blocks have two names by it."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = self.model.layers


@MESHES
def test_a_run_goes_on_behind_the_thawing(mesh: tuple[int, int], tmp_path: Path) -> None:
    """Groups, their rates, and what is trained: as if it had not stopped, from a folder and from a file."""

    def run(mesh: tuple[int, int] | None, path: Path | None = None, **how: Any) -> tuple[L.Trainer, Any]:
        of = BackboneFinetuning(unfreeze_backbone_at_epoch=1, backbone_initial_ratio_lr=0.2, lambda_func=lambda epoch: 1.5)
        module, made = Backbone(), trainer(mesh, RULES, callbacks=[of], **how)
        made.fit(module, data(mesh[0] if mesh else 1), ckpt_path=path)
        return made, module

    def found(made: L.Trainer, module: nn.Module) -> Any:
        groups = [(len(g["params"]), g["lr"]) for g in made.optimizers[0].param_groups]
        return whole_of(module), groups, [n for n, p in module.named_parameters() if p.requires_grad]

    def body() -> Any:
        errors.HEAD_START, ends = 0.0, []
        for one_file in (False, True):
            path = tmp_path / f"{one_file}.ckpt"
            first, _ = run(mesh, max_epochs=2)
            first.strategy._save_distributed_checkpoint = not one_file  # type: ignore[attr-defined]
            first.save_checkpoint(path)
            ends.append(found(*run(mesh, path, max_epochs=3)))
        with pytest.raises((ltp.TPError, SystemExit), match=r"has 2 group\(s\) of parameters, and this AdamW has 1|^1$"):
            trainer(mesh, RULES, max_epochs=3).fit(Backbone(), data(mesh[0]), ckpt_path=tmp_path / "False.ckpt")
        return ends

    weights, groups, trained = found(*run(None, max_epochs=3))
    assert len(groups) == 2 and len(trained) > 4
    for ends in run_ranks(body, mesh[0] * mesh[1], init=False, timeout=300):
        for got in ends:
            assert_trees_close(got[0], weights, rtol=5e-4, name="gone on")
            assert got[1] == [(n, pytest.approx(lr)) for n, lr in groups] and got[2] == trained


@pytest.mark.parametrize("distributed", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_checkpoints_of_adapters_alone(tmp_path: Path, distributed: bool) -> None:
    pytest.importorskip("peft")
    whole = fit(Peft, None, max_epochs=2)

    def body() -> Any:
        from peft import get_peft_model_state_dict

        def run(**how: Any) -> L.Trainer:
            made = trainer((1, 2), None, **how)
            made.strategy._save_distributed_checkpoint = distributed  # type: ignore[attr-defined]
            return made

        first = run(max_epochs=1)
        module = Peft()
        first.fit(module, data())
        path = tmp_path / "adapters.ckpt"
        first.save_checkpoint(path)
        keys = torch.load(path)["state_dict"] if path.is_file() else FileSystemReader(path).read_metadata().state_dict_metadata
        second, module = run(max_epochs=2), Peft()
        second.fit(module, data(), ckpt_path=path)
        adapters = get_peft_model_state_dict(module.model, state_dict=whole_of(module))
        return whole_of(module), adapters, list(keys)

    for weights, adapters, keys in run_ranks(body, 2, init=False, timeout=200):
        assert_trees_close(weights, whole["weights"], rtol=5e-4)
        assert set(adapters) == {n.replace(".default", "") for n in whole["weights"] if "lora_" in n}
        weight_keys = [k for k in keys if "optimizer_0." not in k and "weight" in k]
        assert len(weight_keys) == len(adapters) and all("lora_" in key for key in weight_keys)


def test_nothing_is_sent_for_what_is_frozen() -> None:
    """Gradients stop at the last weight that needs one: no collective of the backward lies behind it."""

    def body() -> list[Counter[str]]:
        sent = []
        for first in (0, 1, 2):  # the first block that is trained; 2: the head alone
            model = randomize_(Llama(CONFIG))
            model.tok_embeddings.requires_grad_(False)
            model.layers[:first].requires_grad_(False)
            ltp.parallelize(model, make_mesh("cpu", 1, 2), PLAN)
            tokens = torch.randint(0, 103, (2, 9), generator=torch.Generator().manual_seed(0))
            for _ in range(3):
                loss = F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
                with Sent() as back:
                    loss.backward()
            sent.append(Counter(op for op, _ in back.all))
        return sent

    for all_blocks, one_block, head in run_ranks(body, 2):
        # gathers are the conjugates of the scatters at the ends of attention and MLP, scatters of the gathers before them
        assert all_blocks == {"allgather_base": 4, "reduce_scatter_base": 5, "allreduce": 1}
        assert one_block == {"allgather_base": 2, "reduce_scatter_base": 3, "allreduce": 1}
        assert head == {"reduce_scatter_base": 1, "allreduce": 1}
