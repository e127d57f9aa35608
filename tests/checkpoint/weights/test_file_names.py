"""Names in files and in memory: what transformers holds in one tensor and writes in pieces."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import lightning_tp as ltp
from lightning_tp.checkpoint.weights.file_names import TensorSlice, merge_from_files, slices_in_files, split_for_files
from lightning_tp.checkpoint.weights.hugging_face import HF_CONFIG, config_in
from lightning_tp.checkpoint.weights.stored import StoredTensor, in_memory
from lightning_tp.core.boxes import Box
from lightning_tp.testing import randomize_

transformers = pytest.importorskip("transformers")


def mixtral() -> Any:
    config = transformers.MixtralConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=103,
        num_local_experts=4,
    )
    return randomize_(transformers.MixtralForCausalLM._from_config(config, dtype=torch.float32))


def test_experts_have_the_names_of_files(tmp_path: Path) -> None:
    """transformers holds a layer's experts in one tensor, and writes them one by one: so does the export."""
    lit = L.LightningModule()
    lit.net = mixtral()
    lit.net.save_pretrained(tmp_path / "theirs")
    torch.save({"state_dict": lit.state_dict(), HF_CONFIG: config_in(lit)}, tmp_path / "a.ckpt")
    ltp.export(tmp_path / "a.ckpt", tmp_path / "ours", "hf")
    theirs, ours = load_file(tmp_path / "theirs" / "model.safetensors"), load_file(tmp_path / "ours" / "model.safetensors")
    assert set(ours) == set(theirs) and all(torch.equal(ours[n], t) for n, t in theirs.items())
    assert "model.layers.0.block_sparse_moe.experts.3.w2.weight" in ours


def test_there_and_back() -> None:
    """All tensors of a model into pieces and together again; a box of a merged one reads the pieces that have some of it, and no others."""
    outer = nn.Module()
    outer.net = mixtral()
    slices = slices_in_files(outer)
    name = "net.model.layers.0.mlp.experts.down_proj"
    assert slices["net.model.layers.0.block_sparse_moe.experts.2.w2.weight"] == TensorSlice(
        name, Box((2, 0, 0), (1, 32, 48)), (32, 48)
    )
    full = {n: t.detach() for n, t in outer.state_dict().items()}
    apart = split_for_files({n: in_memory(t) for n, t in full.items()}, slices)
    assert set(apart) == set(slices) and set(slices) != set(full)
    back = merge_from_files(apart, slices)
    assert set(back) == set(full) and all(torch.equal(back[n].read(), t) for n, t in full.items())
    assert torch.equal(back[name].read(Box((1, 3, 5), (2, 20, 7))), full[name][1:3, 3:23, 5:12])
    read: list[str] = []

    def counted(n: str, s: StoredTensor) -> StoredTensor:
        return StoredTensor(s.shape, s.dtype, lambda box, dtype: (read.append(n), s.load(box, dtype))[1])

    back = merge_from_files({n: counted(n, s) for n, s in apart.items()}, slices)
    back[name].read(Box((2, 0, 0), (1, 32, 4)))
    assert read == ["net.model.layers.0.block_sparse_moe.experts.2.w2.weight"]
    del apart["net.model.layers.0.block_sparse_moe.experts.2.w2.weight"]
    assert name not in merge_from_files(apart, slices), "what is not complete stays as it is"


def test_a_tensor_is_read_once_for_all_its_pieces() -> None:
    read: list[int] = []

    def load(box: Any, dtype: torch.dtype) -> Tensor:
        read.append(1)
        return torch.arange(6.0).view(3, 2)

    slices = {f"e{i}": TensorSlice("experts", Box((i, 0), (1, 2)), (2,)) for i in range(3)}
    apart = split_for_files({"experts": StoredTensor((3, 2), torch.float32, load)}, slices)
    assert [s.read().tolist() for s in apart.values()] == [[0, 1], [2, 3], [4, 5]] and len(read) == 1
    assert apart["e1"].read(Box((1,), (1,))).tolist() == [3]


def test_most_models_have_their_own_names() -> None:
    small = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=11)
    assert slices_in_files(transformers.LlamaForCausalLM(transformers.LlamaConfig(**small))) == {}
    assert slices_in_files(nn.Linear(2, 2)) == {}
