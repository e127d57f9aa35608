"""What a TARGET is taken for; functions and classes as TARGET, and the loss that is taken where none is given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import lightning_tp as ltp
from lightning_tp import TPError
from lightning_tp.cli.targets import load as module
from lightning_tp.cli.targets.load import load, load_function
from lightning_tp.estimate.rank.inputs import default_loss


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    calls: list[tuple[str, str]] = []
    for name in ("load_config", "load_script", "load_function"):
        monkeypatch.setattr(module, name, lambda text, name=name, **options: calls.append((name, str(text))))
    return calls


@pytest.mark.parametrize(
    ("text", "loader"),
    [
        ("package.module:build", "load_function"),
        ("file.py:build", "load_function"),
        ("train.py", "load_script"),
        ("train.py fit --config a:b.yaml", "load_script"),
        ("'my folder/train.py' --x 3", "load_script"),
        ("model/config.json", "load_config"),
        ("nowhere.json", "load_config"),
    ],
)
def test_by_its_form(text: str, loader: str, taken: list[Any]) -> None:
    load(text)
    assert taken == [(loader, text)]


def test_a_folder(tmp_path: Path, taken: list[Any]) -> None:
    with pytest.raises(TPError, match=r"the folder has no config\.json"):
        load(str(tmp_path))
    (tmp_path / "config.json").touch()
    load(str(tmp_path))
    assert taken == [("load_config", str(tmp_path / "config.json"))]


@pytest.mark.parametrize(
    ("text", "words"), [("file.py:", "such as file.py:build"), ("llama", "a TARGET is"), (":f", "a TARGET is")]
)
def test_mistakes(text: str, words: str, taken: list[Any]) -> None:
    with pytest.raises(TPError, match=words):
        load(text)
    assert not taken


def test_a_function(targets: Any) -> None:
    target = load_function(targets("with_loss"))
    assert [tuple(x.shape) for x in target.inputs] == [(2, 4, 8)] and target.plan is None and target.batch is None
    assert target.loss_fn(torch.full((2,), 3.0)) == 9
    again = target.build()
    assert again is not target.model and type(again) is type(target.model)


def test_a_plan_of_the_model_and_a_single_input(targets: Any) -> None:
    target = load_function(targets("llama"))
    assert target.plan["output"] == "vocab_head" and target.loss_fn is default_loss
    assert isinstance(target.inputs, tuple) and target.inputs[0].shape == (4, 13)


def test_a_class(targets: Any) -> None:
    target = load_function(targets("Module"))
    assert target.inputs[0].shape == (4, 13) and torch.equal(
        target.build().net.norm.weight,
        target.model.net.norm.weight,  # type: ignore[union-attr,arg-type]
    )


def test_the_loss_of_an_output() -> None:
    tokens = torch.randint(0, 9, (2, 5))
    logits = torch.randn(2, 5, 9)
    expected = F.cross_entropy(logits.flatten(0, 1)[:-1], tokens.flatten()[1:])
    torch.testing.assert_close(default_loss(logits, (tokens,)), expected)
    torch.testing.assert_close(default_loss({"loss": expected, "logits": logits}, (tokens,)), expected)
    assert default_loss((logits,), (torch.ones(2, 5),)).ndim == 0
    with pytest.raises(ltp.TPError, match="without a floating-point tensor"):
        default_loss(tokens, (tokens,))
