"""`lightning-tp`: its exit status, and one line for each mistake."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from lightning_tp.cli.main import main, make_parser


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["plan", "{wrong}"], "has to be (model, inputs)"),
        (["plan", "{fails}"], "KeyError: 'no such thing'"),
        (["plan", "{nothing}"], "has no `nothing`. It has llama, with_loss"),
        (["plan", "{Bare}"], "no `example_input_array`"),
        (["plan", "{llama}", "--tp", "3"], "tp=3"),
        (["plan", "{llama}", "--dp", "0"], "--dp 0"),
        (["plan", "{llama}", "--declared"], "declares no plan"),
        (["plan", "{llama}", "--plan", "nowhere.json"], "there is no such file"),
        (["plan", "{llama}", "--json", "/nowhere/at/all.json"], "there is no folder /nowhere/at"),
        (["plan", "{llama}", "--emit-python", "/proc/all.py"], "can't be written"),
        (["plan", "{llama}", "--plan", "{file}"], "This is not a plan"),
        (["plan", __file__ + ":"], "name the function in it"),
        (["plan", "{file}"], "ran to its end without `Trainer.fit`"),
        (["plan", "{leaves}"], "sys.exit('I leave')"),
        (["plan", "{no_loss}"], "the third value is a float"),
        (["plan", "{TOKENS}"], "is a Tensor. Name a function"),
        (["plan", "."], "no config.json"),
        (["verify", "{llama}", "--steps", "0"], "`--steps 0`: pass a number, 1 or more"),
        (["verify", "{llama}", "--rtol", "-1"], "--rtol -1"),
        (["estimate", "{loss_fails}", "--tp", "1"], "`loss_fn` raised AttributeError"),
        (["estimate", "{fails_forward}"], "raised ValueError: my mistake"),
        (["verify", "{llama}", "--dp", "3"], "4 rows"),
        (["plan", "no_such_package.of_mine:build"], "ModuleNotFoundError"),
        (["plan", "nowhere.py:build"], "there is no file nowhere.py"),
        (["plan", "nowhere.json"], "no such file"),
        (["plan", "llama"], "a TARGET is"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    targets: Any, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = targets("").removesuffix(":")
    filled = [file if a == "{file}" else targets(a.strip("{}")) if a.startswith("{") else a for a in arguments]
    assert main(filled) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("lightning-tp: ") and err.count("\n") == 1 and says in err


def test_interrupted_and_without_a_reader(
    targets: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*args: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("lightning_tp.cli.plan.load", interrupt)
        assert main(["plan", targets("llama")]) == 130
    assert capsys.readouterr().err == "lightning-tp: interrupted.\n"
    shell = f"{sys.executable} -m lightning_tp plan {targets('llama')} | head -c 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, timeout=120)
    assert not done.stderr and done.returncode in (0, 141)


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--version"])
    assert left.value.code == 0 and capsys.readouterr().out.startswith("lightning-tp ")


def test_all_commands_and_examples_are_in_the_help() -> None:
    text = make_parser().format_help()
    for command in ("plan", "verify", "estimate", "tune", "export", "consolidate", "inspect"):
        assert f"\n    {command}  " in text and f"\n  lightning-tp {command} " in text
