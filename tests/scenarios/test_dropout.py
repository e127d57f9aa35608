"""Dropout in runs of a Trainer: models that nobody here wrote, and runs that are resumed."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_tp as ltp
from lightning_tp.testing import assert_trees_close, randomize_, run_ranks
from tests.core.ops.dropout_models import VOCAB
from tests.core.ops.test_rng import Net


def of_others(name: str, attention: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    p, common = 0.2, dict(num_hidden_layers=2, num_attention_heads=4, hidden_size=32, intermediate_size=48)
    drop = dict(hidden_dropout_prob=p, attention_probs_dropout_prob=p, attn_implementation=attention)
    if name == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=VOCAB,
            n_embd=32,
            n_layer=2,
            n_head=4,
            resid_pdrop=p,
            embd_pdrop=p,
            attn_pdrop=p,
            use_cache=False,
            attn_implementation=attention,
        )
        return transformers.GPT2LMHeadModel(config)
    if name == "bert":
        return transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=VOCAB, **common, **drop))
    if name == "bart":
        config = transformers.BartConfig(
            vocab_size=VOCAB, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
            encoder_ffn_dim=48, decoder_ffn_dim=48, dropout=p, attention_dropout=p, activation_dropout=p, use_cache=False,
            attn_implementation=attention,
        )  # fmt: skip
        return transformers.BartForConditionalGeneration(config)
    if name == "encoder":
        return Encoder(need_weights=attention == "eager")
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(image_size=8, patch_size=2, num_labels=VOCAB, **common, **drop)
    )


class Encoder(nn.Module):
    """Layers of torch, whose attention is one call that is written out when it is split."""

    def __init__(self, need_weights: bool) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, 32), nn.Linear(32, VOCAB)
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(32, 4, 48, 0.2, batch_first=True, norm_first=True) for _ in range(2))
        self.need_weights = need_weights
        if need_weights:
            for block in self.blocks:
                block._sa_block = lambda x, *_, b=block, **__: b.dropout1(b.self_attn(x, x, x, need_weights=True)[0])

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return SimpleNamespace(loss=F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten()))


class Module(L.LightningModule):
    def __init__(self, name: str, attention: str) -> None:
        super().__init__()
        self.name, self.model, self.losses = name, randomize_(of_others(name, attention)), []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        tokens = batch["tokens"]
        if self.name == "vit":
            images = F.one_hot(tokens, VOCAB).float()[:, :, :12].reshape(len(tokens), 3, 8, 8)  # 16 tokens
            return self.model(pixel_values=images, labels=tokens[:, 0]).loss
        return self.model(input_ids=tokens, labels=tokens).loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(outputs["loss"].item())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(name: str, attention: str, how: Any) -> tuple[list[float], dict[str, Tensor]]:
    L.seed_everything(3, verbose=False)  # before anything of the Trainer: nothing of ours may draw
    module = Module(name, attention)
    trainer = L.Trainer(
        accelerator="cpu", devices=int(os.environ["WORLD_SIZE"]), strategy=how, max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(ltp.RandomTokens(20, 16, VOCAB), batch_size=4))
    return module.losses, ltp.full_state_dict(module)


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_models_of_others_under_a_trainer(attention: str) -> None:
    """Derived plans: exact masks are those of one process; independent ones are others, and keep what is whole equal."""
    names = ["gpt2", "bert", "vit", "bart", "encoder"]
    refs = run_ranks(lambda: [fit(n, attention, "auto") for n in names], 1, init=False)[0]

    def body() -> list[Any]:
        exact = [fit(n, attention, ltp.TPStrategy(tp=2, dropout="exact")) for n in names]
        return [exact, [fit(n, attention, ltp.TPStrategy(tp=2, activation_checkpointing="block")) for n in names]]

    (exact, one), (_, other) = run_ranks(body, 2, init=False, timeout=150)
    for i, (name, (losses, weights)) in enumerate(zip(names, refs)):
        assert exact[i][0] == pytest.approx(losses, rel=1e-5), name
        assert_trees_close(exact[i][1], weights, rtol=1e-4, name=name)
        assert one[i][0] == other[i][0] and one[i][0] != pytest.approx(losses, rel=1e-3), name
        assert one[i][0] == pytest.approx(losses, rel=0.3), name
        assert all(torch.equal(t, other[i][1][n]) for n, t in one[i][1].items()), name


# ------------------------------------------------------------------------------------------------------------ resumed


class Dropped(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = randomize_(MLP())
        self.losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        tokens = batch["tokens"]
        return F.cross_entropy(self.model(tokens).flatten(0, 1), tokens.flatten())

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(outputs["loss"].item())

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class MLP(Net):
    """Dropout on whole activations, and on shards."""

    def forward(self, tokens: Tensor) -> Tensor:
        x = F.dropout(self.embed(tokens), 0.5, self.training)
        return self.head(self.down(F.dropout(self.up(x).relu(), 0.5, self.training)))


PLAN = {"embed": "vocab_embedding", "up": "colwise", "down": "rowwise", "head": "vocab_head"}
QUIET = dict(logger=False, enable_progress_bar=False, enable_model_summary=False)


@pytest.mark.parametrize(
    ("mesh", "distributed"),
    [((1, 2), True), ((1, 2), False), ((2, 2), True), pytest.param((2, 2), False, marks=pytest.mark.slow)],
    ids=["tp2-folder", "tp2-file", "2x2-folder", "2x2-file"],
)
def test_a_resumed_run_drops_what_the_uninterrupted_one_did(mesh: tuple[int, int], distributed: bool, tmp_path: Path) -> None:
    """From the end of an epoch and from the middle of one; on another mesh it goes on, differently."""

    def fit(mesh: tuple[int, int], start: Path | None, save: bool = False) -> tuple[list[float], dict[str, Tensor]]:
        torch.manual_seed(5)
        saves = ModelCheckpoint(tmp_path, filename="{epoch}-{step}", save_top_k=-1, every_n_train_steps=1)
        trainer = L.Trainer(
            accelerator="cpu",
            devices=mesh[0] * mesh[1],
            strategy=ltp.TPStrategy(tp=mesh[1], plan=PLAN, save_distributed_checkpoint=distributed),
            max_epochs=2,
            callbacks=[saves] if save else [],
            enable_checkpointing=save,
            **QUIET,
        )
        module = Dropped()
        items = [ltp.RandomTokens(1, 6, 11)[0]] * 12  # all alike: Lightning begins the data anew in the middle of an epoch
        trainer.fit(module, DataLoader(items, batch_size=4 // mesh[0], num_workers=0), ckpt_path=start)
        return module.losses, ltp.full_state_dict(module)

    def body() -> None:
        losses, weights = fit(mesh, None, save=True)
        saved = {int(p.stem.rpartition("=")[2]): p for p in tmp_path.glob("*.ckpt")}
        assert sorted(saved) == [1, 2, 3, 4, 5, 6]
        for step in (3, 2, 4):
            again, end = fit(mesh, saved[step])
            assert again == losses[step:], (step, again, losses)
            assert all(torch.equal(t, weights[n]) for n, t in end.items())
        if mesh == (2, 2):
            again, _ = fit((4, 1), saved[3])
            assert again != losses[3:] and len(again) == 3

    run_ranks(body, mesh[0] * mesh[1], init=False)
