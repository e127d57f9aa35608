"""`lightning-tp plan --emit-python`: a file for plain PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh

import lightning_tp as ltp
from examples.llama import Llama, LlamaConfig
from lightning_tp.cli.main import main
from lightning_tp.cli.targets.load import load
from lightning_tp.testing import run_ranks


@pytest.mark.parametrize("options", [[], ["--no-sequence-parallel"], ["--inferred"]], ids=["given", "no sequence", "inferred"])
def test_python_for_plain_pytorch(targets: Any, tmp_path: Path, options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """It runs without this package, and gives the loss of one process."""
    file = tmp_path / "split.py"
    assert main(["plan", targets("llama"), "--emit-python", str(file), *options]) == 0
    source = file.read_text()
    assert "import lightning_tp" not in source and "layers.*.attention.wq" in source
    tokens = load(targets("llama")).inputs[0]  # type: ignore[index]
    sizes = LlamaConfig(vocab_size=130, dim=32, num_layers=2, num_heads=4, num_kv_heads=2, hidden_dim=54)

    def loss() -> tuple[float, float]:
        names: dict[str, Any] = {}
        exec(compile(source, str(file), "exec"), names)
        torch.manual_seed(0)
        whole = Llama(sizes)
        torch.manual_seed(0)
        split = names["parallelize"](Llama(sizes), init_device_mesh("cpu", (2,)))
        assert next(split.parameters()).to_local().shape[0] == 65  # type: ignore[operator]
        values = [F.cross_entropy(m(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()) for m in (whole, split)]
        values[1].backward()
        return values[0].item(), values[1].item()

    for one, two in run_ranks(loss, 2):
        assert two == pytest.approx(one, rel=1e-5)


def test_python_where_torch_has_no_counterpart(targets: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "split.py"
    assert main(["plan", targets("fused"), "--emit-python", str(file)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "no counterpart of" in err and "local_ops" in err
    assert not file.exists()
    plan = tmp_path / "fused.json"
    plan.write_text(ltp.Plan({"qkv": {"style": "fused_colwise", "parts": 3}, "out": "rowwise"}).to_json())
    assert main(["plan", targets("fused"), "--plan", str(plan), "--emit-python", "-"]) == 2
    assert "`qkv` (`fused_colwise`)" in capsys.readouterr().err
