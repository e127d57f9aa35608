"""`lightning-tp plan`: what it prints and writes."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import lightning_tp as ltp
from examples.llama import PLAN
from lightning_tp.cli.main import main
from lightning_tp.cli.targets.load import load
from lightning_tp.testing import run_ranks


def test_plan_of_a_function(targets: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", targets("llama"), "--tp", "2", "--dp", "3"]) == 0
    out, err = capsys.readouterr()
    assert not err
    first, *_, held, sent = out.splitlines()
    assert first.startswith("Plan (user-provided), tp=2: ") and "sequence parallelism on" in first
    assert "layers.{0-1}.attention.wq" in out
    assert held.startswith("A rank of 6 (tp=2 x dp=3) holds up to ") and held.endswith("KiB in float32")
    # a block: gather and scatter at attention and MLP, both ways; around them the embedding, the head and the loss
    assert sent.startswith(
        "Tensor-parallel collectives of one forward and backward pass: 10 all-gather, 3 all-reduce, 10 reduce-scatter"
    )
    assert "FSDP2" in sent


def test_what_a_rank_holds_is_what_it_holds(targets: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", targets("llama"), "--tp", "2", "--dp", "2"]) == 0
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("A rank of 4 "))
    model = load(targets("llama")).build

    def numel() -> int:
        from lightning_tp._compat import local_tensor
        from lightning_tp.core.comm.mesh import make_mesh

        return sum(local_tensor(p).numel() for p in ltp.parallelize(model(), make_mesh("cpu", 2, 2), PLAN).parameters())

    assert f"holds up to {max(run_ranks(numel, 4)):,} of" in line


def test_other_targets(targets: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", targets("Module")]) == 0
    assert "net.layers.{0-1}.attention.wq" in capsys.readouterr().out
    assert main(["plan", targets("llama"), "--inferred", "--no-sequence-parallel"]) == 0
    assert "Plan (inferred" in capsys.readouterr().out
    assert main(["plan", targets("fused")]) == 0
    assert "sequence parallelism off" in capsys.readouterr().out


def test_a_module_by_its_name(targets: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(targets("llama").partition(":")[0]).parent)
    assert main(["plan", "targets_of_test_cli:llama"]) == 0
    assert "Plan (user-provided)" in capsys.readouterr().out


def test_a_large_model_at_a_size_that_is_not_here(llama_config: Any, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    began = time.process_time()  # of this process: the machine may be busy
    assert main(["plan", llama_config(), "--tp", "8", "--dp", "256"]) == 0
    assert time.process_time() - began < 20
    out = capsys.readouterr().out
    assert out.startswith("Plan (inferred: as declared by LlamaForCausalLM, and with sequence parallelism), tp=8: ")
    assert "6,738,415,616 parameters, up to 842,534,912 per rank (12.5%)" in out
    assert "A rank of 2,048 (tp=8 x dp=256) holds up to 3,458,064 of 6,738,415,616 parameters (0.05%), 6.6 MiB in bfloat16" in out
    assert re.search(r"backward pass: \d+ all-gather, \d+ all-reduce, 128 reduce-scatter", out)  # 2 a block, and 2 back


def test_collectives_of_models_that_decide_by_values(targets: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Labels that a loss holds, and experts behind a router: what a rank computes alone has to mean something."""
    pytest.importorskip("transformers")
    for name, sent in (("vit", "11 all-gather, 1 all-reduce, 8 reduce-scatter"), ("mixtral", "10 all-gather, 5 all-reduce")):
        assert main(["plan", targets(name)]) == 0
        out = capsys.readouterr().out
        assert f"Tensor-parallel collectives of one forward and backward pass: {sent}" in out, out


def test_json_there_and_back(targets: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", targets("llama"), "--inferred", "--json", "-"]) == 0
    text = capsys.readouterr().out
    plan = ltp.Plan.from_json(text)
    target = load(targets("llama"))
    assert plan == ltp.infer_plan(target.model, target.inputs, tp=2)
    file = tmp_path / "plan.json"
    assert main(["plan", targets("llama"), "--inferred", "--json", str(file)]) == 0
    assert ltp.Plan.from_json(file.read_text()) == plan
    assert f"Wrote {file}" in capsys.readouterr().out
    assert main(["plan", targets("llama"), "--plan", str(file)]) == 0
    assert "Plan (inferred" in capsys.readouterr().out


def test_colour_on_a_terminal(targets: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rich")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert main(["plan", targets("llama")]) == 0
    out = capsys.readouterr().out
    assert "\u2502" in out and "layers.{0-1}.attention.wq" in out and "rowwise(output=S(1))" in out


def test_a_model_whose_collectives_cannot_be_counted_still_has_a_plan(targets: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", targets("loss_fails"), "--inferred"]) == 0
    out = capsys.readouterr().out
    assert "Plan (inferred" in out and "backward pass: not counted (AttributeError: " in out
    assert main(["plan", targets("with_loss"), "--tp", "1"]) == 0
    assert "backward pass: none" in capsys.readouterr().out
