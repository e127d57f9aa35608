"""A training script as TARGET: stopped where it would train."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lightning_tp.cli.main import main
from lightning_tp.cli.target import load

SCRIPT = """
import argparse
import lightning as L
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from lightning_tp import RandomTokens, TPStrategy
from lightning.pytorch.loggers.logger import Logger


class Tracking(Logger):  # such as those that start a run on a server
    name, version = "tracking", 0

    def log_hyperparams(self, *args, **kwargs):
        raise RuntimeError("a run was started")

    log_metrics = log_hyperparams


class Net(L.LightningModule):
    def __init__(self, dim):
        super().__init__()
        self.save_hyperparameters()
        self.embed, self.head = nn.Embedding(64, dim), nn.Linear(dim, 64)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x):
        x = self.embed(x)
        return self.head(x + self.down(F.gelu(self.up(x))))

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self(batch["tokens"]).flatten(0, 1), batch["targets"].flatten())
        self.log("loss", loss, prog_bar=True, sync_dist=True)
        return {"loss": loss}

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--dim", type=int, default=32)
    parser.add_argument("--empty", action="store_true")
    args = parser.parse_args()
    plan = {"up": "colwise", "down": "rowwise", "**": "replicate"} if args.dim == 48 else None
    trainer = L.Trainer(
        accelerator="gpu", devices=8, num_nodes=4, precision="16-mixed", strategy=TPStrategy(tp=8, plan=plan), logger=Tracking()
    )
    print("on", trainer.num_devices)
    with trainer.init_module(empty_init=args.empty):
        module = Net(args.dim)
    trainer.validate(module)
    trainer.fit(module, DataLoader(RandomTokens(num_items=64, seq_len=16, vocab_size=64), batch_size=8), ckpt_path="none.ckpt")
    raise RuntimeError("it has trained")


if __name__ == "__main__":
    main()
"""


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "train.py").write_text(SCRIPT)
    monkeypatch.chdir(tmp_path)
    return "train.py"


def test_a_script_is_stopped_where_it_would_train(script: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", script, "--tp", "4", "--dp", "256"]) == 0
    found = capsys.readouterr()
    assert "Plan (inferred), tp=4" in found.out and "1024 (tp=4 x dp=256)" in found.out and "all-reduce" in found.out
    assert "on 1" in found.err and [p.name for p in tmp_path.iterdir()] == ["train.py"]
    assert main(["plan", script, "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)  # what the script prints is not among it


def test_arguments_of_the_script_and_the_plan_of_its_strategy(script: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", f"{script} --dim 48"]) == 0
    text = capsys.readouterr().out
    assert "Plan (user-provided)" in text and "(192, 48) -> (96, 48)" in text
    assert main(["plan", f"{script} --size 3"]) == 2
    assert "sys.exit(2)" in capsys.readouterr().err


def test_estimates_take_the_batch_of_the_script(script: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", f"{script} --empty", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == 8 * 16
    assert main(["estimate", f"{script} --empty", "--json", "--batch", "3"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == 3 * 16


def test_a_module_without_weights_stays_so_except_for_verify(script: str) -> None:
    assert all(p.is_meta for p in load(f"{script} --empty").model.parameters())
    assert not any(p.is_meta for p in load(f"{script} --empty", weights=True).model.parameters())


def test_verify_trains_the_step_of_a_script(script: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", script, "--steps", "2"]) == 0
    assert "As in one process" in capsys.readouterr().out


def test_an_example_comes_before_the_first_batch(script: str, tmp_path: Path) -> None:
    text = SCRIPT.replace("self.save_hyperparameters()", "self.example_input_array = torch.zeros(1, 4, dtype=torch.long)")
    (tmp_path / "train.py").write_text(text)
    target = load(script)
    assert [t.shape for t in target.inputs] == [(1, 4)] and target.model(*target.inputs).shape == (1, 4, 64)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("trainer.fit(module, ", "dict(x=", "ran to its end without"),
        ("self.save_hyperparameters()", "self.automatic_optimization = False", "steps its optimizers by itself"),
        ('return {"loss": loss}', "return None", "returned no loss"),
        ("self.save_hyperparameters()", "1 / 0", "ZeroDivisionError"),
        ("trainer.validate(module)", "L.Fabric().launch()", "a script with Fabric"),
    ],
)
def test_mistakes(old: str, new: str, words: str, script: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "train.py").write_text(SCRIPT.replace(old, new).replace('raise RuntimeError("it has trained")', ""))
    assert main(["plan", script]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("lightning-tp: ") and words in error


def test_lightnings_own_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    example = Path(__file__).parents[2] / "examples" / "04_lightning_cli.py"
    monkeypatch.chdir(tmp_path)
    assert main(["plan", f"{example} fit --trainer.devices=2 --trainer.strategy=tp --model.config.dim=64"]) == 0
    assert "(512, 64) -> (256, 64)" in capsys.readouterr().out
