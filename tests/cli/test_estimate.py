from __future__ import annotations

import json
from pathlib import Path

import pytest

from lightning_tp.cli.main import main
from lightning_tp.cli.options import Progress


@pytest.fixture
def config(tmp_path: Path) -> str:
    values = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 256, "hidden_size": 64, "intermediate_size": 160,
        "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 4096,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(values))
    return str(tmp_path / "config.json")


def test_estimate(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", config, "--tp", "2", "--dp", "256", "--seq", "128", "--batch", "3", "--hardware", "a100"]) == 0
    text = capsys.readouterr().out
    assert "512 x NVIDIA A100" in text and "tokens/s" in text and "Assumed" in text
    assert main(["estimate", config, "--tp", "2", "--seq", "64", "--json", "--activation-checkpointing", "block"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["tp"] == 2 and values["activation_checkpointing"] == "block" and values["tokens"] == 128


def test_tune(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", config, "--gpus", "2", "--global-batch", "1", "--hardware", "t4", "--precision", "16-mixed,32-true"]) == 0
    text = capsys.readouterr().out
    assert "configurations fit on 2 devices" in text and "32-true" in text and "16-mixed" in text


@pytest.mark.slow
def test_tune_says_what_it_does_when_it_takes_long(
    config: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["tune", config, "--gpus", "2", "--global-batch", "2", "--json"]
    monkeypatch.setattr(Progress, "QUIET_S", 1e9)
    assert main(arguments) == 0 and not capsys.readouterr().err
    monkeypatch.setattr(Progress, "QUIET_S", 0.0)
    assert main(arguments) == 0
    found = capsys.readouterr()
    assert "tp=2 (2 of 2): bf16-mixed, checkpointing block" in found.err and json.loads(found.out)["fits"]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["estimate", "CONFIG", "--hardware", "x100"], "There are t4"),
        (["estimate", "CONFIG", "--tp", "0"], "`tp=0`"),
        (["estimate", "CONFIG", "--seq", "-4"], "`seq=-4`"),
        (["estimate", "CONFIG", "--batch", "0"], "`batch=0`"),
        (["estimate", "CONFIG", "--precision", "fp4"], "bf16-mixed"),
        (["estimate", "CONFIG", "--precision", "bf16"], "did you mean bf16-"),
        (["estimate", "CONFIG", "--optimizer", "adamv"], "did you mean adam"),
        (["estimate", "CONFIG", "--hardware", "h100-pcie"], "Did you mean h100"),
        (["estimate", "CONFIG", "--plan", "none.json"], "`--plan none.json`: there is no such file"),
        (["estimate", "CONFIG", "--html", "/proc/none.html"], "can't be written"),
        (["estimate", "nowhere/config.json"], "no such file"),
        (["estimate", "CONFIG", "--optimizer", "lion"], "adamw"),
        (["tune", "CONFIG", "--gpus", "4", "--global-batch", "8", "--optimizer", "lion"], "adamw"),
        (["tune", "CONFIG", "--gpus", "-1", "--global-batch", "8"], "`gpus=-1`"),
        (["tune", "CONFIG", "--gpus", "4", "--global-batch", "8", "--precision", "fp4"], "bf16-mixed"),
    ],
)
def test_mistakes_end_with_status_2(config: str, arguments: list[str], word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([config if a == "CONFIG" else a for a in arguments]) == 2
    found = capsys.readouterr()
    assert word in found.err and found.err.count("\n") == 1 and not found.out
