"""`lightning-tp shapes`: its lists of numbers, and the length that a config.json allows."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from lightning_tp.cli.main import main
from lightning_tp.cli.shapes import LONGEST, _default_length


def test_lists_and_the_default_length(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["shapes", config, "--gpus", "4", "--local-batch", "0.5,2", "--tp", "1,2", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["seq"] == LONGEST
    assert {(row["tp"], row["local_batch"]) for row in values["cells"]} == {(1, 0.5), (2, 0.5), (1, 2), (2, 2)}


def test_lengths() -> None:
    model = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=512))
    assert _default_length(model, "gpt2/config.json") == 512
    assert _default_length(model, "file.py:function") is None  # its inputs are the user's
    assert _default_length(object(), "train.py") is None
    text = SimpleNamespace(get_text_config=lambda: SimpleNamespace(max_position_embeddings=10**6))
    assert _default_length(SimpleNamespace(config=text), "config.json") == LONGEST


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tp", "1,x"], "`--tp 1,x`: pass whole numbers separated by commas, such as 1,2,4"),
        (["--local-batch", "a"], "`--local-batch a`: pass numbers separated by commas, such as 0.5,1,2"),
        (["--seconds", "0"], "`--seconds 0`: pass a time above 0"),
    ],
)
def test_mistakes(arguments: list[str], words: str, config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["shapes", config, *arguments]) == 2
    assert words in capsys.readouterr().err
