"""Lightning's command line, in the words of examples/04: every subcommand, on ranks and in one process."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import lightning_tp as ltp
from examples.llama import PLAN
from lightning_tp.testing import run_ranks

pytest.importorskip("jsonargparse")

EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL = ["--seed_everything=1", "--data.num_items=16", "--data.seq_len=12", "--data.vocab_size=103", "--model.config.dim=64",
         "--model.config.num_layers=2", "--trainer.enable_progress_bar=false", "--model.lr=0.01"]  # fmt: skip
YAML = """
trainer:
  strategy:
    class_path: lightning_tp.TPStrategy
    init_args:
      tp: 2
      plan: {plan}
      activation_checkpointing: block
"""


def cli(*args: str) -> Any:
    sys.path.insert(0, str(EXAMPLES))
    try:
        spec = importlib.util.spec_from_file_location("lightning_cli_example", EXAMPLES / "04_lightning_cli.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        sys.argv = ["04"]
        return module.main(list(args))
    finally:
        sys.path.remove(str(EXAMPLES))


def subcommands(devices: int, *strategy: str, folder: Path) -> dict[str, Any]:
    options = [*SMALL, f"--trainer.devices={devices}", *strategy]
    fit = cli("fit", *options, "--trainer.enable_checkpointing=true", f"--trainer.default_root_dir={folder}")
    checkpoint = fit.trainer.checkpoint_callback.best_model_path
    assert checkpoint
    found = {name: float(v) for name, v in fit.trainer.callback_metrics.items()}
    found["steps"] = fit.trainer.global_step
    for name in ("validate", "test"):
        metrics = cli(name, *options, f"--ckpt_path={checkpoint}").trainer.callback_metrics
        found |= {f"{name}: {k}": float(v) for k, v in metrics.items()}
    ranks = cli("predict", *options, f"--ckpt_path={checkpoint}").trainer
    found["predicted"] = torch.cat(ranks.predict_loop.predictions)
    found["sizes"] = getattr(ranks.strategy, "sizes", None)
    return found


def test_subcommands_as_in_one_process(tmp_path: Path) -> None:
    with_model = {f"model.{pattern}": style for pattern, style in PLAN.items()}
    (tmp_path / "tp.yaml").write_text(YAML.format(plan=json.dumps(with_model)))
    ref = run_ranks(subcommands, 1, 1, folder=tmp_path / "ref", init=False)[0]
    assert ref["steps"] == 2 and ref["predicted"].shape == (16, 12)
    for name, strategy in {
        "its name": ["--trainer.strategy=tp"],
        "its class": ["--trainer.strategy=TPStrategy", "--trainer.strategy.tp=2"],
        "in YAML": [f"--config={tmp_path / 'tp.yaml'}"],
    }.items():
        for got in run_ranks(subcommands, 2, 2, *strategy, folder=tmp_path / name, init=False):
            assert got.pop("sizes") == (1, 2), name
            assert (got.pop("predicted") == ref["predicted"]).float().mean() > 0.97, name  # but for ties
            assert got == pytest.approx({k: v for k, v in ref.items() if k not in ("predicted", "sizes")}, rel=1e-3), name


@pytest.mark.slow
def test_a_mesh_of_two_by_two(tmp_path: Path) -> None:
    strategy = ["--trainer.strategy=lightning_tp.TPStrategy", "--trainer.strategy.init_args.tp=2"]
    for got in run_ranks(subcommands, 4, 4, *strategy, folder=tmp_path, init=False):
        assert got["sizes"] == (2, 2) and got["steps"] == 1 and got["test: test_loss"] < 5


def said(*args: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out), pytest.raises(SystemExit):
        cli(*args)
    return out.getvalue()


def test_help_and_config_show_the_arguments() -> None:
    text = said("fit", "--trainer.strategy.help=TPStrategy")
    for name in ("tp", "dp", "plan", "sequence_parallel", "launcher"):
        assert f"--trainer.strategy.{name} " in text
    assert "how many ranks share one model" in text
    config = said("fit", "--trainer.strategy=TPStrategy", "--trainer.strategy.tp=2", "--print_config")
    assert "class_path: lightning_tp.TPStrategy" in config and "      tp: 2\n" in config and "      launcher: auto\n" in config


def test_mistakes() -> None:
    assert "tpp" in said("fit", "--trainer.strategy=TPStrategy", "--trainer.strategy.tpp=2")
    with pytest.raises(ltp.TPError, match="tp=3 needs a multiple of 3 devices, but the Trainer has 2"):
        cli("fit", "--trainer.strategy=TPStrategy", "--trainer.strategy.tp=3", "--trainer.devices=2")
