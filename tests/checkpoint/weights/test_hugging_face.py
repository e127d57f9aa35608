"""The Hugging Face model in a checkpoint: its config is found, and tensors and ties are those of its class. Folders: `test_export.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lightning_tp as ltp
from lightning_tp.checkpoint.weights.hugging_face import (
    HF_CONFIG,
    as_hugging_face,
    config_in,
    find_config,
    save_config,
    select_tensors,
)
from lightning_tp.checkpoint.weights.stored import StoredCheckpoint, in_memory

transformers = pytest.importorskip("transformers")


def llama(**changes: Any) -> Any:
    sizes = dict(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, vocab_size=11
    )
    return transformers.LlamaForCausalLM._from_config(transformers.LlamaConfig(**{**sizes, **changes}), dtype=torch.float32)


def checkpoint(module: nn.Module, **rest: Any) -> StoredCheckpoint:
    return StoredCheckpoint("file", Path("a.ckpt"), {n: in_memory(t) for n, t in module.state_dict().items()}, rest=rest)


def test_configs_of_the_outermost_models() -> None:
    outer = nn.ModuleDict({"a": llama(), "b": nn.ModuleDict({"c": llama(vocab_size=12)}), "d": nn.Linear(2, 2)})
    found = config_in(outer)
    assert {name: config["vocab_size"] for name, config in found.items()} == {"a": 11, "b.c": 12}
    assert found["a"]["architectures"] == ["LlamaForCausalLM"] and found["a"]["model_type"] == "llama"
    assert set(config_in(llama())) == {""}, "not the models inside of it"

    class Own(transformers.LlamaForCausalLM):
        """A class of the user's, which transformers does not have."""

    assert config_in(Own(llama().config))[""]["architectures"] == ["LlamaForCausalLM"]


def test_where_a_config_comes_from(tmp_path: Path) -> None:
    """The argument, the checkpoint itself, a folder's `config.json`, the hyperparameters; which one if there are several."""
    one, two = {"model_type": "llama", "vocab_size": 1}, {"model_type": "llama", "vocab_size": 2}
    empty = nn.Linear(1, 1)
    (tmp_path / "config.json").write_text(json.dumps(two))
    both = checkpoint(empty, **{HF_CONFIG: {"a": one, "b": two}})
    assert find_config(both, tmp_path, None) == (two, None) and find_config(both, tmp_path / "config.json", "b") == (two, "b")
    assert find_config(both, None, "a") == (one, "a")
    with pytest.raises(ltp.TPError, match=r"contains 2 Hugging Face models: 'a', 'b'\. Choose one by `prefix`"):
        find_config(both, None, None)
    assert find_config(checkpoint(empty, **{HF_CONFIG: {"a": one}}), None, None) == (one, "a")
    folder = StoredCheckpoint("safetensors", tmp_path, {})
    assert find_config(folder, None, None) == (two, None)
    hyper = checkpoint(empty, hyper_parameters={"lr": 1, "config": {**one, "architectures": ["X"]}})
    assert find_config(hyper, None, None)[0]["vocab_size"] == 1
    with pytest.raises(ltp.TPError, match=r"contains no config of a Hugging Face model at 'c'"):
        find_config(checkpoint(empty, **{HF_CONFIG: {"a": one}}), None, "c")
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ltp.TPError, match="is no config of Hugging Face"):
        find_config(both, tmp_path, None)


@pytest.mark.parametrize("tied", [False, True])
def test_tensors_are_those_of_the_class(tied: bool) -> None:
    """Below the name of the model, tied ones once, also if the checkpoint has only the later of their names."""
    outer = nn.ModuleDict({"net": (model := llama(tie_word_embeddings=tied)), "scale": nn.Linear(1, 1)})
    contents = checkpoint(outer, **{HF_CONFIG: config_in(outer)})
    with pytest.warns(UserWarning, match=r"2 tensors are outside of the LlamaForCausalLM in `net` and are left out: scale\.weight"):
        _, tensors = as_hugging_face(contents, None, None, torch.bfloat16)
    expected = {n for n in model.state_dict() if not (tied and n == "lm_head.weight")}
    assert set(tensors) == expected and all(s.dtype == torch.bfloat16 for s in tensors.values())
    assert torch.equal(tensors["model.norm.weight"].read(), model.model.norm.weight.detach().bfloat16())
    if tied:
        del contents.model["net.model.embed_tokens.weight"]
        with pytest.warns(UserWarning, match="left out"):
            assert "lm_head.weight" in select_tensors(model, contents, None)
    del contents.model["net.model.norm.weight"]
    with pytest.raises(ltp.TPError, match=r"\(looked for at `net`\): `net\.model\.norm\.weight` is missing"):
        select_tensors(model, contents, "net")


def test_a_class_that_can_not_be_built() -> None:
    config = config_in(llama())[""]
    for change, says in (
        ({"architectures": ["NoSuchModel"]}, "names the class 'NoSuchModel', which transformers"),
        ({"architectures": ["NoSuchModel"], "auto_map": {}}, "does not have. Pass"),
        ({"architectures": ["NoSuchModel"], "auto_map": {"x": "y"}}, "custom code is not run"),
        ({"num_attention_heads": "many"}, "transformers can't build LlamaForCausalLM from the config: "),
    ):
        with pytest.raises(ltp.TPError, match=says):
            as_hugging_face(checkpoint(llama(), **{HF_CONFIG: {"": {**config, **change}}}), None, None, None)


def test_the_config_names_the_dtype_of_most_tensors(tmp_path: Path) -> None:
    model = llama()
    save_config(*as_hugging_face(checkpoint(model, **{HF_CONFIG: config_in(model)}), None, None, torch.float16), tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["dtype"] == "float16" and written["architectures"] == ["LlamaForCausalLM"]
    assert (tmp_path / "generation_config.json").exists()
