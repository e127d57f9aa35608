"""Values of options are checked before any work begins."""

from __future__ import annotations

from argparse import Namespace

import pytest

from lightning_tp.cli.main import main
from lightning_tp.cli.options import activation_checkpointing, check
from lightning_tp.errors import TPError


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["estimate", "CONFIG", "--hardware", "x100"], "There are t4"),
        (["estimate", "CONFIG", "--tp", "0"], "`--tp 0`: pass a number, 1 or more"),
        (["estimate", "CONFIG", "--seq", "-4"], "`--seq -4`"),
        (["estimate", "CONFIG", "--batch", "0"], "`--batch 0`"),
        (["estimate", "CONFIG", "--precision", "fp4"], "bf16-mixed"),
        (["estimate", "CONFIG", "--precision", "bf16"], "did you mean bf16-"),
        (["estimate", "CONFIG", "--optimizer", "adamv"], "did you mean adam"),
        (["estimate", "CONFIG", "--hardware", "h100-pcie"], "Did you mean h100"),
        (["estimate", "CONFIG", "--plan", "none.json"], "`--plan none.json`: there is no such file"),
        (["estimate", "CONFIG", "--html", "/proc/none.html"], "can't be written"),
        (["estimate", "nowhere/config.json"], "no such file"),
        (["estimate", "CONFIG", "--optimizer", "lion"], "adamw"),
        (["tune", "CONFIG", "--gpus", "4", "--global-batch", "8", "--optimizer", "lion"], "adamw"),
        (["tune", "CONFIG", "--gpus", "-1", "--global-batch", "8"], "`--gpus -1`"),
        (["tune", "CONFIG", "--gpus", "4", "--global-batch", "8", "--precision", "fp4"], "bf16-mixed"),
        (["tune", "CONFIG", "--gpus", "4", "--global-batch", "0"], "`--global-batch 0`"),
        (
            ["tune", "CONFIG", "--gpus", "4", "--global-batch", "8", "--precision", "32-true,fp4"],
            "`--precision fp4`: unknown precision",
        ),
    ],
)
def test_mistakes_end_with_status_2(config: str, arguments: list[str], word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([config if a == "CONFIG" else a for a in arguments]) == 2
    found = capsys.readouterr()
    assert word in found.err and found.err.count("\n") == 1 and not found.out


def test_counts_may_be_left_out() -> None:
    check(Namespace(gpus=None, seq=1, json=False))
    with pytest.raises(TPError, match="`--global-batch 0`"):
        check(Namespace(global_batch=0))


def test_activation_checkpointing_as_the_strategy_has_it() -> None:
    values = [activation_checkpointing(Namespace(activation_checkpointing=x)) for x in ("none", "block", "selective")]
    assert values == [None, "block", "selective"]
