"""Every example and the README's quick start, run as a person would: a script, its processes started by Lightning itself."""

from __future__ import annotations

import ast
import os
import re
import shlex
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from lightning_tp.cli.main import main

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
OF_A_RUN = ("RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PL_GLOBAL_SEED")


def run(script: Path | str, *arguments: str, cwd: Path = ROOT, timeout: float = 240) -> str:
    """What the script printed, on the CPU; it has to end with status 0."""
    env = {name: value for name, value in os.environ.items() if name not in OF_A_RUN}
    env |= {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "COLUMNS": "120",
        "PYTHONFAULTHANDLER": "1",
    }
    process = subprocess.Popen(
        [sys.executable, str(script), *arguments],
        cwd=cwd,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGABRT)  # both ranks write where they stand
        output, _ = process.communicate()
        pytest.fail(f"{script} still runs after {timeout} s\n{output[-8000:]}")
    assert process.returncode == 0, output[-8000:]
    return output


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.M | re.S)


@pytest.mark.slow
def test_random_tokens() -> None:
    output = run("examples/01_llama_random_tokens.py", "--fast")
    assert "Plan (user-provided), tp=2" in output
    assert "2 ranks" in output and "50.1%" in output  # the table of shards
    assert re.search(r"Throughput: [\d,]+ tokens/s", output)
    assert re.search(r"Loss \d\.\d+ after 8 steps", output)


@pytest.mark.slow
def test_text() -> None:
    output = run("examples/02_llama_text.py", "--fast")
    bigram, llama = (re.search(rf"^{name}.* (\d\.\d+) +(\d\.\d+)$", output, re.M) for name in ("counting pairs", "Llama after"))
    assert bigram and 1.5 < float(bigram[1]) < 3
    assert llama and float(llama[1]) < 5  # ln 256 = 5.545 is guessing
    for nats, bits in (bigram.groups(), llama.groups()):
        assert float(bits) == pytest.approx(float(nats) / 0.693147, abs=2e-3)


@pytest.mark.slow
def test_hugging_face() -> None:
    pytest.importorskip("transformers")
    output = run("examples/03_hugging_face_llama.py", "--fast")
    assert "declared by LlamaForCausalLM, and with sequence parallelism, tp=2" in output
    assert re.search(r"Loss \d\.\d+ after 8 steps", output)
    difference = re.search(r"logits differ by (\S+) at most", output)
    assert difference and float(difference[1]) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("by", ["itself", "fabric run"])
def test_fabric(by: str) -> None:
    if by == "itself":
        output = run("examples/06_fabric.py", "--fast")
    else:
        pytest.importorskip("click")
        command = Path(sys.executable).with_name("fabric")
        output = run(command, "run", "--devices=2", "--accelerator=cpu", "examples/06_fabric.py", "--fast")
    assert "Plan (inferred), tp=2" in output and re.search(r"Loss \d\.\d+ after 8 steps", output)
    before, after = re.search(r"loaded into a new model: loss (\S+) and (\S+)", output).groups()  # type: ignore[union-attr]
    assert before == after


@pytest.mark.slow
def test_cli() -> None:
    pytest.importorskip("jsonargparse")
    output = run("examples/04_lightning_cli.py", "fit", "--trainer.devices=2", "--trainer.strategy=tp", "--trainer.max_steps=4")
    assert "Plan (user-provided), tp=2" in output
    assert re.search(r"Throughput: [\d,]+ tokens/s", output)


@pytest.mark.slow
def test_cli_reads_the_yaml_of_its_docstring(tmp_path: Path) -> None:
    pytest.importorskip("jsonargparse")
    script = ROOT / "examples/04_lightning_cli.py"
    docstring = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or ""
    config = textwrap.dedent(docstring[docstring.index("    trainer:\n") :])
    assert "class_path: lightning_tp.TPStrategy" in config
    (tmp_path / "config.yaml").write_text(config)
    output = run(script, "fit", "--config=config.yaml", "--model.config.dim=64", "--trainer.max_steps=4", cwd=tmp_path)
    assert "Plan (user-provided), tp=2" in output and "(64, 64) -> (32, 64)" in output
    assert "`max_steps=4` reached" in output


def quick_start(folder: Path, *, plan: bool = False) -> None:
    script, written = blocks("python")
    assert "max_steps=20" in script and "TPStrategy(tp=2)" in script
    script = script.replace("max_steps=20", "max_steps=4")
    (folder / "train.py").write_text(written + script.replace("tp=2", "tp=2, plan=plan") if plan else script)


@pytest.mark.parametrize("plan", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["inferred", "given"])
def test_quick_start_of_the_readme(plan: bool, tmp_path: Path) -> None:
    quick_start(tmp_path, plan=plan)
    output = run("train.py", cwd=tmp_path)
    assert f"Plan ({'user-provided' if plan else 'inferred'}), tp=2" in output and "sequence parallelism on" in output
    assert "`max_steps=4` reached" in output


def test_commands_of_the_readme_take_the_quick_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick_start(tmp_path)
    monkeypatch.chdir(tmp_path)
    commands = [shlex.split(line, comments=True) for block in blocks("bash") for line in block.splitlines()]
    commands = [command[1:] for command in commands if command[:1] == ["lightning-tp"]]
    assert {command[0] for command in commands} == {"plan", "verify", "estimate"}
    for command in commands:
        assert main(command) == 0


def test_commands_of_the_readme_name_what_is_there() -> None:
    install, test = blocks("bash")[:2]
    for block in (install, test):  # each from nothing, by itself
        assert block.startswith("python -m venv .venv && . .venv/bin/activate && pip install -c constraints.txt torch && ")
    assert install.rstrip().endswith("python examples/01_llama_random_tokens.py")
    assert test.rstrip().endswith(" pytest -n 2 --dist loadfile")
    words = shlex.split(install) + shlex.split(test)
    for name in [word for word in words if word.endswith((".py", ".txt"))]:
        assert (ROOT / name).is_file(), name


def test_links_of_the_readme_lead_somewhere() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert links and not [link for link in links if not (ROOT / link).exists()]


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_text_beats_the_bigram_model() -> None:
    output = run("examples/02_llama_text.py", timeout=900)  # else status 1
    assert "counting pairs of bytes" in output


@pytest.mark.slow
def test_random_tokens_on_a_mesh_of_two_by_two() -> None:
    output = run("examples/01_llama_random_tokens.py", "--tp=2", "--dp=2", "--fast")
    assert "4 ranks" in output
