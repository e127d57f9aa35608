"""`lightning-tp estimate | plan | tune --plot FILE --html FILE`, from the options to the files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lightning_tp.cli.main import main
from tests.estimate.drawn.html_page import parsed_page


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--plot", "x.bmp"], "Use one of .svg, .png, .pdf"),
        (["--plot", "x"], "Use one of .svg"),
        (["--plot", "nowhere/x.svg"], "no folder nowhere"),
        (["--html", "nowhere/x.html"], "no folder nowhere"),
        (["--html", "x.txt"], "Name the file .html"),
        (["--html", "folder.html"], "a folder"),
    ],
)
def test_files_are_refused_before_the_work_begins(
    options: list[str], word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.html").mkdir()
    commands = [["estimate"], ["plan"], *([["tune", "--gpus", "2", "--global-batch", "2"]] if "--html" in options else [])]
    for command in commands:  # there is no such model, which would be the second mistake
        assert main([*command, "nowhere.py:build", *options]) == 2
        found = capsys.readouterr()
        assert word in found.err and found.err.count("\n") == 1 and not found.out


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "m.py").write_text(
        "import torch\nfrom torch import nn\n\n\ndef build():\n"
        "    model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))\n"
        "    return model, (torch.ones(2, 4, 8),), lambda y: y.mean()\n"
    )
    target, svg, page = f"{tmp_path}/m.py:build", str(tmp_path / "x.svg"), str(tmp_path / "x.html")
    for command in ("estimate", "plan"):
        assert main([command, target, "--tp", "2", "--plot", svg, "--html", page]) == 0
        assert f"Wrote {svg}\nWrote {page}" in capsys.readouterr().out
        words = " ".join(parsed_page(Path(page).read_text()).text)
        assert f"lightning-tp {command} " in words and "column-wise" in words
    assert main(["estimate", target, "--html", page, "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["tp"] == 2 and f"Wrote {page}" in printed.err
    assert main(["plan", target, "--json", "-", "--html", page]) == 0
    assert json.loads(capsys.readouterr().out)["rules"]
