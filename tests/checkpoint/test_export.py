"""Exports: bitwise the weights of the sharded model, under the names that others read; or nothing at all."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import lightning_tp as ltp
from lightning_tp.checkpoint.weights.open import open_checkpoint
from lightning_tp.checkpoint.weights.stored import StoredTensor
from lightning_tp.cli.main import main
from lightning_tp.testing import assert_trees_close, randomize_, run_ranks
from tests.checkpoint.lit import QUIET, TOKENS, Lit, loader, train, train_alone

transformers = pytest.importorskip("transformers")
SMALL: dict[str, Any] = dict(
    hidden_size=64,
    intermediate_size=90,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=1,
    vocab_size=103,
    max_position_embeddings=64,
)


def llama(tied: bool = False) -> Any:
    return randomize_(
        transformers.LlamaForCausalLM._from_config(transformers.LlamaConfig(tie_word_embeddings=tied, **SMALL), dtype=torch.float32)
    )


class Llama(L.LightningModule):
    """Holds a Hugging Face model, and a weight of its own."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = llama(tied)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.net(input_ids=tokens).logits

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        tokens = TOKENS.to(self.device)
        return F.cross_entropy((self.net(input_ids=tokens[:, :-1]).logits * self.scale).flatten(0, 1), tokens[:, 1:].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2, eps=1e-3)


def train_llama(path: Path, tp: int, world: int, distributed: bool, weights_only: bool) -> Tensor:
    """Two steps; the logits of the split model."""
    for tied in (False, True):
        strategy = ltp.TPStrategy(tp=tp, save_distributed_checkpoint=distributed)
        t = L.Trainer(accelerator="cpu", devices=world, strategy=strategy, max_steps=2, **QUIET)
        t.fit(module := Llama(tied), loader())
        t.save_checkpoint(path / f"{tied}.ckpt", weights_only=weights_only)
    with torch.no_grad():
        return (module.eval()(TOKENS.to(module.device)) + 0).cpu()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor]:
    """Weights alone, of 2 x 2 ranks."""
    path = tmp_path_factory.mktemp("folders")
    return path, run_ranks(train_llama, 4, path, 2, 4, True, True, init=False)[0]


def logits(path: Path, **kwargs: Any) -> Tensor:
    model, info = transformers.AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **kwargs)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits


def test_hugging_face(folders: tuple[Path, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`from_pretrained` of what the command line wrote gives the split model's logits; tied weights once; names and config found."""
    path, split = folders
    with pytest.warns(UserWarning, match=r"1 tensors are outside of the LlamaForCausalLM in `net` and are left out: scale"):
        assert main(["export", str(path / "True.ckpt"), str(tmp_path / "hf"), "--format", "hf", "--max-shard-size", "100KB"]) == 0
    assert capsys.readouterr().out.startswith(f"Wrote {tmp_path / 'hf'}: 6 files, ")
    torch.testing.assert_close(logits(tmp_path / "hf"), split, rtol=1e-4, atol=1e-5)
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    assert "lm_head.weight" not in index["weight_map"] and len(set(index["weight_map"].values())) == 3
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / "hf" / file)
    assert index["metadata"]["total_size"] == sum(
        t.nbytes for f in (tmp_path / "hf").glob("*.safetensors") for t in load_file(f).values()
    )
    with pytest.warns(UserWarning, match="left out"):
        ltp.export(path / "False.ckpt", tmp_path / "bf16", "hf", dtype="bf16")
    half = load_file(tmp_path / "bf16" / "model.safetensors")
    assert (
        half["lm_head.weight"].dtype == torch.bfloat16
        and json.loads((tmp_path / "bf16" / "config.json").read_text())["dtype"] == "bfloat16"
    )
    weights = ltp.load_from_checkpoint(Llama, path / "False.ckpt").net.state_dict()
    assert all(torch.equal(half[n], weights[n].bfloat16()) for n in half)


def test_a_config_from_elsewhere(folders: tuple[Path, Tensor], tmp_path: Path) -> None:
    """A checkpoint without one; a config of another model is refused, and names what differs."""
    state = ltp.load_from_checkpoint(Llama, folders[0] / "False.ckpt").state_dict()
    torch.save({"state_dict": state}, tmp_path / "plain.ckpt")
    with pytest.raises(ltp.TPError, match=r"contains no config of a Hugging Face model.*--config"):
        ltp.export(tmp_path / "plain.ckpt", tmp_path / "hf", "hf")
    llama().save_pretrained(tmp_path / "config")
    with pytest.warns(UserWarning, match="left out"):
        ltp.export(tmp_path / "plain.ckpt", tmp_path / "hf", "hf", config=tmp_path / "config")
    assert torch.equal(load_file(tmp_path / "hf" / "model.safetensors")["lm_head.weight"], state["net.lm_head.weight"])
    config = json.loads((tmp_path / "config" / "config.json").read_text())
    for change, text in (
        (
            {"intermediate_size": 92},
            r"`model.layers.0.mlp.gate_proj.weight` has shape \(90, 64\) in the checkpoint, but \(92, 64\) in the model",
        ),
        ({"num_hidden_layers": 3}, r"`net.model.layers.2.self_attn.q_proj.weight` is missing from the checkpoint"),
        ({"num_hidden_layers": 1}, r"`net.model.layers.1.self_attn.q_proj.weight` is not in the model"),
        ({"architectures": ["NoSuchModel"]}, r"names the class 'NoSuchModel', which transformers \S+ does not have"),
    ):
        (tmp_path / "other.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ltp.TPError, match=text):
            ltp.export(tmp_path / "plain.ckpt", tmp_path / "wrong", "hf", config=tmp_path / "other.json")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config", "hf", "other.json", "plain.ckpt"]


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """Folder and file of the same run on 2 x 2 ranks."""
    path = tmp_path_factory.mktemp("mesh")

    def both() -> dict[str, Tensor]:
        train(2, 4, 2, save=path / "file.ckpt", tied=True, save_distributed_checkpoint=False)
        return train(2, 4, 2, save=path / "folder.ckpt", tied=True)

    return path, run_ranks(both, 4, init=False)[0]


@pytest.mark.parametrize("source", ["folder.ckpt", "file.ckpt"])
def test_safetensors_and_torch(source: str, mesh: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    path, weights = mesh
    ltp.export(path / source, tmp_path / "st")
    got = load_file(tmp_path / "st" / "model.safetensors")
    assert all(torch.equal(got[n], weights[n]) for n in got) and set(weights) - set(got) <= {"model.output.weight"}
    ltp.export(path / source, tmp_path / "a.ckpt", "torch", dtype=torch.float16)
    one = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert one["hyper_parameters"]["tied"] and one["global_step"] == 2 and "optimizer_states" not in one
    assert all(torch.equal(one["state_dict"][n], w.half()) for n, w in weights.items())
    assert_trees_close(dict(Lit.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True).state_dict()), weights, rtol=1e-3)
    assert zipfile.ZipFile(tmp_path / "a.ckpt").testzip() is None


@pytest.mark.parametrize("source", ["folder.ckpt", "file.ckpt"])
def test_a_plain_trainer_goes_on(source: str, mesh: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    """From a folder as one file, and from the file that a strategy wrote: to the weights of a run that was never split."""
    path, _ = mesh
    file = ltp.consolidate(path / source, tmp_path / "one.ckpt")
    state = torch.load(file, weights_only=True)["optimizer_states"][0]
    assert state["param_groups"][0]["params"] == list(state["state"])
    assert_trees_close(train_alone(4, resume=file, tied=True), train_alone(4, tied=True), rtol=1e-4)
    assert zipfile.ZipFile(file).testzip() is None

    def ours() -> dict[str, Tensor]:
        return train(2, 2, 4, resume=file, tied=True)

    if source == "folder.ckpt":
        assert_trees_close(run_ranks(ours, 2, init=False)[0], train_alone(4, tied=True), rtol=1e-4)


def test_mistakes_leave_nothing(mesh: tuple[Path, dict[str, Tensor]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = mesh[0] / "folder.ckpt"
    (tmp_path / "there").mkdir()
    for arguments, text in (
        (["export", str(path), str(tmp_path / "there")], "already exists"),
        (["export", str(path), str(path)], "is, or contains, the checkpoint that is read"),
        (["export", str(path), str(path / "out")], "is inside the checkpoint that is read"),
        (["export", str(path), str(tmp_path / "x"), "--dtype", "int7"], "`dtype='int7'`"),
        (["export", str(path), str(tmp_path / "x"), "--max-shard-size", "big"], "`max_shard_size='big'`"),
        (["export", str(path), str(tmp_path / "x"), "--format", "hf"], "contains no config of a Hugging Face model"),
        (["export", str(tmp_path / "none"), str(tmp_path / "x")], "there is no such file or folder"),
        (["consolidate", str(path), str(tmp_path / "there")], "already exists"),
    ):
        assert main(arguments) == 2
        assert text in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["there"]
    (tmp_path / "there" / "thesis.tex").write_text("mine")
    assert main(["export", str(path), str(tmp_path / "there"), "--overwrite"]) == 2
    assert "other things in it than a checkpoint" in capsys.readouterr().err
    (tmp_path / "there" / "thesis.tex").unlink()
    for _ in range(2):
        assert main(["export", str(path), str(tmp_path / "there"), "--overwrite"]) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["there"] and (tmp_path / "there" / "model.safetensors").is_file()


def test_a_full_disk_leaves_what_was_there(
    mesh: tuple[Path, dict[str, Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out.ckpt").write_text("old")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(StoredTensor, "read", full)
    with pytest.raises(ltp.TPError, match=r"can't be written: No space left on device"):
        ltp.consolidate(mesh[0] / "folder.ckpt", tmp_path / "out.ckpt", overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["out.ckpt"] and (tmp_path / "out.ckpt").read_text() == "old"


def test_a_checkpoint_in_one_file(mesh: tuple[Path, dict[str, Tensor]]) -> None:
    """Rank 0 writes what the others send: the same as the folder has; tied weights in one place."""
    one, many = open_checkpoint(mesh[0] / "file.ckpt"), open_checkpoint(mesh[0] / "folder.ckpt")
    assert set(one.model) == set(many.model) and set(one.rest) == set(many.rest)
    assert all(torch.equal(one.model[n].read(), s.read()) for n, s in many.model.items())
    assert one.model["model.output.weight"].key == one.model["model.tok_embeddings.weight"].key
    for name, of in many.optimizers[0]["state"].items():
        assert all(torch.equal(one.optimizers[0]["state"][name][f].read(), s.read()) for f, s in of.items())
