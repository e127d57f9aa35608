"""`lightning-tp`: what it prints and writes, and the exit status."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh

import lightning_tp as ltp
from examples.llama import PLAN, Llama, LlamaConfig
from lightning_tp.cli.main import _parser, main
from lightning_tp.cli.target import load
from lightning_tp.estimate.rank.inputs import default_loss
from lightning_tp.testing import run_ranks

TARGETS = """
import lightning as L
import torch
import torch.nn.functional as F
from torch import nn
from examples.llama import PLAN, Llama, LlamaConfig

TOKENS = torch.randint(0, 130, (4, 13), generator=torch.Generator().manual_seed(0))

def llama():
    model = Llama(LlamaConfig(vocab_size=130, dim=32, num_layers=2, num_heads=4, num_kv_heads=2, hidden_dim=54))
    model.plan = PLAN
    return model, TOKENS

def with_loss():
    return nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8)), (torch.ones(2, 4, 8),), lambda y: y.square().mean()

class Fused(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (4, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

def fused():
    return Fused(), {"x": torch.ones(2, 3, 16)}

class Module(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = llama()[0]
        self.example_input_array = TOKENS

    def forward(self, tokens):
        return self.net(tokens)

class Bare(L.LightningModule):
    pass

def vit():
    from transformers import ViTConfig, ViTForImageClassification
    sizes = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128)
    model = ViTForImageClassification(ViTConfig(**sizes, image_size=32, patch_size=8, num_labels=10))
    labels, weight = torch.tensor([3, 7]), torch.ones(10)
    return model, {"pixel_values": torch.randn(2, 3, 32, 32)}, lambda out: F.cross_entropy(out.logits, labels, weight)

def mixtral():
    from transformers import MixtralConfig, MixtralForCausalLM
    sizes = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, vocab_size=130)
    model = MixtralForCausalLM(MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=4))
    return model, {"input_ids": TOKENS, "labels": TOKENS, "use_cache": False}

def wrong():
    return 3

def leaves():
    raise SystemExit("I leave")

def no_loss():
    return (*with_loss()[:2], 3.0)

def loss_fails():
    return (*with_loss()[:2], lambda y: y.no_such_thing)

class Fails(nn.Linear):
    def forward(self, x):
        raise ValueError("my mistake")

def fails_forward():
    return Fails(4, 4), torch.ones(2, 4)

def fails():
    raise KeyError("no such thing")
"""
LLAMA_7B: dict[str, Any] = dict(
    architectures=["LlamaForCausalLM"],
    model_type="llama",
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    vocab_size=32000,
    max_position_embeddings=4096,
    tie_word_embeddings=False,
    dtype="bfloat16",
)
TINY = dict(hidden_size=32, intermediate_size=54, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=130)


@pytest.fixture
def targets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`targets("llama")`: a TARGET in a file of its own."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    file = tmp_path / "targets_of_test_cli.py"
    file.write_text(TARGETS)
    yield lambda name: f"{file}:{name}"
    sys.modules.pop("targets_of_test_cli", None)


def config(folder: Path, **changes: Any) -> str:
    (folder / "config.json").write_text(json.dumps({**LLAMA_7B, **changes}))
    return str(folder / "config.json")


# ---------------------------------------------------------------------------------------------------------------------- plan


def test_plan_of_a_function(targets: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", targets("llama"), "--tp", "2", "--dp", "3"]) == 0
    out, err = capsys.readouterr()
    assert not err
    first, *_, held, sent = out.splitlines()
    assert first.startswith("Plan (user-provided), tp=2: ") and "sequence parallelism on" in first
    assert "layers.{0-1}.attention.wq" in out
    assert held.startswith("One rank of 6 (tp=2 x dp=3) holds ") and held.endswith("KiB in float32")
    # a block: gather and scatter at attention and MLP, both ways; around them the embedding, the head and the loss
    assert sent.startswith(
        "Collectives of one forward and backward on the tensor-parallel axis: 10 all-gather, 3 all-reduce, 10 reduce-scatter"
    )
    assert "FSDP2" in sent


def test_what_a_rank_holds_is_what_it_holds(targets: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", targets("llama"), "--tp", "2", "--dp", "2"]) == 0
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("One rank"))
    model = load(targets("llama")).build

    def numel() -> int:
        from lightning_tp._compat import local_tensor
        from lightning_tp.core.comm.mesh import make_mesh

        return sum(local_tensor(p).numel() for p in ltp.parallelize(model(), make_mesh("cpu", 2, 2), PLAN).parameters())

    assert f"holds {max(run_ranks(numel, 4)):,} of" in line


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


def test_a_large_model_at_a_size_that_is_not_here(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    began = time.process_time()  # of this process: the machine may be busy
    assert main(["plan", config(tmp_path), "--tp", "8", "--dp", "256"]) == 0
    assert time.process_time() - began < 20
    out = capsys.readouterr().out
    assert out.startswith("Plan (inferred: as declared by LlamaForCausalLM, and with sequence parallelism), tp=8: ")
    assert "6,738,415,616 parameters, up to 842,534,912 per rank (12.5%)" in out
    assert "One rank of 2048 (tp=8 x dp=256) holds 3,458,064 of 6,738,415,616 parameters (0.05%), 6.6 MiB in bfloat16" in out
    assert re.search(r"tensor-parallel axis: \d+ all-gather, \d+ all-reduce, 128 reduce-scatter", out)  # 2 a block, and 2 back


def test_a_small_hugging_face_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    target = config(tmp_path, **TINY)
    assert main(["plan", str(tmp_path), "--declared"]) == 0  # its folder will do
    out = capsys.readouterr().out
    assert "Plan (declared" in out and "all-reduce" in out.splitlines()[-1]
    assert main(["verify", target, "--dp", "1"]) == 0
    assert "As in one process" in capsys.readouterr().out


def test_collectives_of_models_that_decide_by_values(targets: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Labels that a loss holds, and experts behind a router: what a rank computes alone has to mean something."""
    pytest.importorskip("transformers")
    for name, sent in (("vit", "11 all-gather, 1 all-reduce, 8 reduce-scatter"), ("mixtral", "10 all-gather, 5 all-reduce")):
        assert main(["plan", targets(name)]) == 0
        out = capsys.readouterr().out
        assert f"Collectives of one forward and backward on the tensor-parallel axis: {sent}" in out, out


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


# -------------------------------------------------------------------------------------------------------------------- verify


def test_verify(targets: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", targets("llama"), "--tp", "2", "--dp", "2", "--steps", "2"]) == 0
    assert "As in one process (tp=2 x dp=2, 2 steps" in capsys.readouterr().out
    assert main(["verify", targets("with_loss")]) == 0
    assert "Plan (inferred" in capsys.readouterr().out


def test_verify_fails(targets: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_tp.shards.gradients import PartialGradients

    watch = PartialGradients.watch
    monkeypatch.setattr(
        PartialGradients, "watch", lambda self, ps: watch(self, [p for p in ps if p._tp_shard.name != "norm.weight"])
    )
    assert main(["verify", targets("llama")]) == 1
    lines = capsys.readouterr().out.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("NOT as in one process"))
    assert "`norm.weight`" in lines[at] and lines[at + 2].split()[0] == "BAD" and "norm.weight" in lines[at + 2]


def test_a_model_that_does_not_run_split(targets: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A plan that fits the sizes, and not the code: the sizes of a fused projection in it are whole."""
    plan = tmp_path / "plan.json"
    plan.write_text(ltp.Plan({"qkv": {"style": "fused_colwise", "parts": 3}, "out": "rowwise"}).to_json())
    assert main(["verify", targets("fused"), "--plan", str(plan)]) == 1
    assert "the split model does not run" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------- what goes wrong


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
        (["verify", "{llama}", "--steps", "0"], "--steps 0"),
        (["verify", "{llama}", "--rtol", "-1"], "--rtol -1"),
        (["estimate", "{loss_fails}", "--tp", "1"], "`loss_fn` raised AttributeError"),
        (["estimate", "{fails_forward}"], "ended with ValueError: my mistake"),
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


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "--help"),
        (["plann", "x"], "invalid choice: 'plann'"),
        (["plan", "x", "--tp", "two"], "argument --tp: invalid int value: 'two'"),
        (["estimate", "x", "--precison", "fp4"], "there is no `--precison fp4`, did you mean `--precision`?"),
        (["estimate", "x", "--activation-checkpointing", "full"], "invalid choice: 'full'"),
        (["tune", "x", "--gpus", "8"], "required: --global-batch. `lightning-tp tune --help`"),
    ],
)
def test_a_mistake_in_the_options_is_one_line(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(arguments)
    out, err = capsys.readouterr()
    assert left.value.code == 2 and not out
    assert err.startswith("lightning-tp: ") and err.count("\n") == 1 and says in err


@pytest.mark.parametrize("command", ["plan", "verify", "estimate", "tune", "export", "consolidate", "inspect"])
def test_help_explains_every_option(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    out = capsys.readouterr().out
    assert f"\nexamples:\n  lightning-tp {'inspect' if command in ('export', 'consolidate') else command}" in out
    parser = (
        _parser()
        .parse_args(
            [
                command,
                *{"tune": ["x", "--gpus", "1", "--global-batch", "1"], "export": ["a", "b"]}.get(
                    command, ["a", "b"] if command == "consolidate" else ["x"]
                ),
            ]
        )
        .parser
    )
    for action in parser._actions:
        assert action.help and len(action.help) > 3, action.dest
        if isinstance(action.default, (int, float, str)) and not isinstance(action.default, bool) and action.dest != "help":
            assert "%(default)" in action.help, action.dest


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


def test_the_command(targets: Any, tmp_path: Path) -> None:
    """In a process of its own, as a shell starts it."""
    python = [sys.executable, "-m", "lightning_tp"]
    run = lambda *a: subprocess.run([*python, *a], capture_output=True, text=True, timeout=120)  # noqa: E731
    done = run("plan", "--help")
    assert done.returncode == 0 and "examples:" in done.stdout and "TARGET is one of" in done.stdout
    done = run("plan", targets("nothing"))
    assert done.returncode == 2 and "Traceback" not in done.stderr and done.stderr.count("\n") == 1


def test_colour_on_a_terminal(targets: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rich")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert main(["plan", targets("llama")]) == 0
    out = capsys.readouterr().out
    assert "\u2502" in out and "layers.{0-1}.attention.wq" in out and "rowwise(output=S(1))" in out


def test_the_loss_of_an_output() -> None:
    tokens = torch.randint(0, 9, (2, 5))
    logits = torch.randn(2, 5, 9)
    expected = F.cross_entropy(logits.flatten(0, 1)[:-1], tokens.flatten()[1:])
    torch.testing.assert_close(default_loss(logits, (tokens,)), expected)
    torch.testing.assert_close(default_loss({"loss": expected, "logits": logits}, (tokens,)), expected)
    assert default_loss((logits,), (torch.ones(2, 5),)).ndim == 0
    with pytest.raises(ltp.TPError, match="without a floating-point tensor"):
        default_loss(tokens, (tokens,))
