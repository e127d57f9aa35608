"""A config.json as TARGET: its inputs, and when it has weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_tp import TPError
from lightning_tp.cli.main import main
from lightning_tp.cli.targets import hugging_face
from lightning_tp.cli.targets.hugging_face import load_config

pytest.importorskip("transformers")
TINY = dict(hidden_size=32, intermediate_size=54, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=130)


def test_a_small_hugging_face_model(llama_config: Any, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    target = llama_config(**TINY)
    assert main(["plan", str(Path(target).parent), "--declared"]) == 0  # its folder will do
    out = capsys.readouterr().out
    assert "Plan (declared" in out and "all-reduce" in out.splitlines()[-1]
    assert main(["verify", target, "--dp", "1"]) == 0
    assert "Matches a single process" in capsys.readouterr().out


def test_a_large_model_has_weights_only_where_they_are_needed(llama_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(llama_config(**TINY))
    assert next(load_config(path, weights=False).model.parameters()).dtype == torch.bfloat16  # as the config has it
    monkeypatch.setattr(hugging_face, "SMALL", 10)
    assert all(p.is_meta for p in load_config(path, weights=False).model.parameters())
    target = load_config(path, weights=True)
    assert {(p.device.type, p.dtype) for p in target.model.parameters()} == {("cpu", torch.float32)}
    assert next(target.build().parameters()).dtype == torch.float32


def test_inputs_and_labels(llama_config: Any) -> None:
    inputs: Any = load_config(Path(llama_config(**TINY, max_position_embeddings=7)), weights=False).inputs
    assert inputs["input_ids"].shape == (2, 7) and inputs["input_ids"].max() < 130
    assert inputs["labels"] is inputs["input_ids"] and inputs["use_cache"] is False and "decoder_input_ids" not in inputs


def test_a_model_that_reads_no_tokens(tmp_path: Path) -> None:
    from transformers import ViTConfig

    ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8).save_pretrained(tmp_path)
    with pytest.raises(TPError, match="reads `pixel_values` instead of tokens"):
        load_config(tmp_path / "config.json", weights=False)
