"""`verify` finds no fault where there is none, and names the place where there is one."""

from __future__ import annotations

import math
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import lightning_tp as ltp
from examples.llama import PLAN, Llama, LlamaConfig
from lightning_tp import ParityReport, Plan, TPError, verify
from lightning_tp.styles import Rowwise
from lightning_tp.testing import RankError
from lightning_tp.verify.compare import Row
from lightning_tp.verify.training import Run
from lightning_tp.verify.verify import SHOWN, _compare, _report

CONFIG = LlamaConfig(vocab_size=130, dim=32, num_layers=2, num_heads=4, num_kv_heads=2, hidden_dim=54)
TOKENS = torch.randint(0, 130, (4, 11), generator=torch.Generator().manual_seed(0))


def llama() -> Llama:
    return Llama(CONFIG)


def next_token(logits: Tensor, inputs: Any) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), inputs[0][:, 1:].flatten())


class NanoBlock(nn.Module):
    """As nanoGPT has it: one projection for queries, keys and values, heads counted from the whole width."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.c_attn(self.ln_1(x)).split(C, dim=2)
        q, k, v = (t.view(B, T, self.heads, C // self.heads).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).contiguous().view(B, T, C)
        x = x + self.c_proj(y)
        return x + self.down(F.gelu(self.up(self.ln_2(x))))


class NanoGPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(130, 32), nn.Embedding(16, 32)
        self.h = nn.ModuleList(NanoBlock(32, 4) for _ in range(2))
        self.ln_f, self.lm_head = nn.LayerNorm(32), nn.Linear(32, 130, bias=False)

    def forward(self, idx: Tensor) -> Tensor:
        x = self.wte(idx) + self.wpe(torch.arange(idx.shape[1], device=idx.device))
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))


def assert_ok(report: ParityReport, of: type[nn.Module]) -> None:
    assert report.ok, str(report)
    kinds = [row.kind for row in report.rows]
    assert kinds.count("loss") == 3
    names = {name for name, _ in of().named_parameters()}
    assert {row.name for row in report.rows if row.kind == "grad"} == names
    assert {row.name for row in report.rows if row.kind == "weight"} >= names
    assert [r.error for r in report.rows] == sorted((r.error for r in report.rows), reverse=True)
    assert report.rows[0].error < 2e-4  # rounding, well below what is allowed


@pytest.mark.parametrize(("tp", "dp"), [(2, 1), (1, 2), (2, 2)])
def test_a_given_plan(tp: int, dp: int) -> None:
    report = verify(llama, (TOKENS,), next_token, tp=tp, dp=dp, plan=PLAN)
    assert_ok(report, llama)  # type: ignore[arg-type]
    assert report.plan.source == "user-provided" and report.plan.tp == tp
    assert report.held == pytest.approx(1 / (tp * dp), abs=0.02)
    first, *_, last = str(report).splitlines()
    assert first.startswith(f"Matches a single process: {len(report.rows)} tensors compared, largest relative error ")
    assert first.endswith(f"(tp={tp} x dp={dp}, 3 SGD steps, lr={report.lr:.2g})")
    assert "Plan (user-provided)" in last


def test_a_declared_plan() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=32, intermediate_size=54, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    config = transformers.LlamaConfig(vocab_size=130, attention_bias=True, **sizes)
    inputs = {"input_ids": TOKENS, "labels": TOKENS, "use_cache": False}
    report = verify(lambda: transformers.LlamaForCausalLM(config), inputs, lambda out: out.loss, tp=2, dp=2)
    assert report.ok, str(report)
    assert report.plan.source == "inferred: as declared by LlamaForCausalLM, and with sequence parallelism"


def test_an_inferred_plan() -> None:
    report = verify(NanoGPT, (TOKENS,), next_token, tp=2)
    assert_ok(report, NanoGPT)
    assert report.plan.source == "inferred" and report.held < 0.6


def test_data_that_is_drawn_at_each_step() -> None:
    report = verify(llama, lambda: (torch.randint(0, 130, (2, 7)),), lambda y: y.square().mean(), plan=PLAN, lr=0.01, steps=2)
    assert report.ok and report.lr == 0.01
    first, second = (verify(llama, lambda: (torch.randint(0, 130, (2, 7)),), next_token, plan=PLAN, seed=s).lr for s in (0, 1))
    assert first != second


# ------------------------------------------------------------------------------------------------------- what is wrong is found


def test_a_style_that_forgets_a_sum_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """`w2` of the second block hands on what this rank has, and no rank adds the others'."""
    monkeypatch.setattr(Rowwise, "bind", _without_sum(Rowwise.bind, "layers.1.feed_forward.w2"))
    report = verify(llama, (TOKENS,), next_token, plan=PLAN, sequence_parallel=False)
    assert not report.ok
    assert str(report).startswith("DIFFERS from a single process: ")
    assert "BAD" in str(report) and not report.rows[0].ok


def _without_sum(bind: Any, where: str) -> Any:
    def forgets(self: Any, module: nn.Module, site: Any) -> None:
        bind(self, module, site)
        if site.where == where:
            module._leave = lambda y, axis: y  # type: ignore[assignment]

    return forgets


def test_a_gradient_that_is_not_summed_is_found_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """A norm over this rank's tokens: its gradient is a share, and nothing else is wrong before the first step."""
    from lightning_tp.shards.gradients import PartialGradients

    watch = PartialGradients.watch
    monkeypatch.setattr(
        PartialGradients, "watch", lambda self, ps: watch(self, [p for p in ps if p._tp_shard.name != "layers.0.ffn_norm.weight"])
    )
    report = verify(llama, (TOKENS,), next_token, plan=PLAN)
    assert not report.ok
    bad = [(row.kind, row.name) for row in report.rows if not row.ok]
    assert {name for _, name in bad[:2]} == {"layers.0.ffn_norm.weight"}
    assert [name for kind, name in bad if kind == "grad"] == ["layers.0.ffn_norm.weight"]


def test_a_wrong_plan_is_found() -> None:
    """A norm on whole activations, its gradient said to be a share: the first backward pass sees it before the comparison does."""
    whole = Plan(PLAN).without_sequence_parallel()
    rules = [r for r in whole.rules if r.pattern != "layers.*.ffn_norm"]
    rules += [ltp.Rule(f"layers.{i}.ffn_norm", {"style": "replicate", "state": "RI"[i == 0]}) for i in range(2)]
    with pytest.raises(TPError, match=r"`layers\.1\.ffn_norm\.weight`: the plan says"):
        verify(llama, (TOKENS,), next_token, plan=Plan(rules))


def test_a_rank_that_fails_is_a_rank_error() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.up(x)
            assert y.shape[-1] == 16, "half of it is here"
            return self.down(y)

    with pytest.raises(RankError, match="half of it is here"):
        verify(Counts, (torch.ones(2, 3, 8),), lambda y: y.square().mean(), plan={"up": "colwise", "down": "rowwise"})


def test_names_of_the_state_dict(monkeypatch: pytest.MonkeyPatch) -> None:
    apply = ltp.parallelize

    def renames(model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        apply(model, *args, **kwargs)
        model.register_buffer("extra", torch.zeros(2))
        return model

    monkeypatch.setattr(sys.modules["lightning_tp.verify.verify"], "parallelize", renames)  # `ltp.verify` is the function
    report = verify(llama, (TOKENS,), next_token, plan=PLAN)
    assert [row.name for row in report.rows if not row.ok] == ["extra"]
    assert math.isinf(report.rows[0].error)


def run_of(start: dict[str, float], weights: dict[str, float], *losses: float) -> Run:
    tensors = [{name: torch.tensor([value]) for name, value in values.items()} for values in (start, weights)]
    return Run(Plan({}), 0.1, tensors[0], list(losses), {}, tensors[1])  # type: ignore[arg-type]


def test_runs_are_compared_by_names_losses_and_how_far_weights_moved() -> None:
    reference = run_of({"w": 1.0, "missing": 0.0}, {"w": 1.5, "missing": 0.0}, 2.0, 1.0)
    run = run_of({"w": 1.0, "extra": 0.0}, {"w": 1.6, "extra": 0.0}, 2.0, 1.1)
    errors = {(row.kind, row.name): row.error for row in _compare(run, reference, 1e-3)}
    assert errors["loss", "step 0"] == 0 and errors["loss", "step 1"] == pytest.approx(0.1)
    assert errors["weight", "w"] == pytest.approx(0.2, rel=1e-5)  # 0.6 and not 0.5
    names = [row.name for row in _compare(run, reference, 1e-3) if math.isinf(row.error)]
    assert sorted(names) == ["extra", "missing"]


def test_the_worst_of_all_ranks_is_reported() -> None:
    task: Any = SimpleNamespace(tp=2, dp=1)
    of_ranks = [
        ([Row("w", "grad", error, 1e-3, f"{error}"), Row("b", "grad", 0.0, 1e-3)], held)
        for error, held in ((0, 0.4), (0.5, 0.6), (0, 0.5))
    ]
    report = _report(task, run_of({}, {}, 1.0), of_ranks)
    assert [(row.name, row.error) for row in report.rows] == [("w", 0.5), ("b", 0)] and not report.ok and report.held == 0.6


# ------------------------------------------------------------------------------------------------------------ what users get wrong


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (dict(tp=0), "tp=0"),
        (dict(steps=True), "steps=True"),
        (dict(dp=3), "4 rows"),
        (dict(loss_fn=lambda y: y), "has to return a scalar"),
        (dict(loss_fn=lambda y: y.mean() * 0), "norm of all gradients is 0"),
        (dict(loss_fn=lambda y: y.mean() / 0), "norm of all gradients is nan|norm of all gradients is inf"),
        (dict(model_fn=lambda: 3), "returned a int"),
        (dict(inputs=(TOKENS + 1000,)), "does not run in a single process: IndexError"),
        (dict(plan={"nothing": "colwise"}), "nothing"),
    ],
)
def test_mistakes(arguments: dict[str, Any], says: str) -> None:
    defaults: dict[str, Any] = dict(model_fn=llama, inputs=(TOKENS,), loss_fn=next_token, plan=PLAN)
    with pytest.raises(TPError, match=says):
        verify(**{**defaults, **arguments})


def test_a_model_on_the_meta_device_has_no_weights_to_compare() -> None:
    def meta() -> nn.Module:
        with torch.device("meta"):
            return llama()

    with pytest.raises(TPError, match="meta device"):
        verify(meta, (TOKENS,), next_token, plan=PLAN)


def test_nothing_of_this_process_changes() -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    verify(llama, (TOKENS,), next_token, plan=PLAN, steps=1)
    assert torch.equal(state, torch.get_rng_state()) and not dist.is_initialized()


def report_of(*errors: float) -> ParityReport:
    rows = [Row("step 0", "loss", 1e-7, 1e-3, "detail of the loss")]
    rows += [Row(f"w{i}", "grad", error, 1e-3, f"error {error}") for i, error in enumerate(errors)]
    rows.sort(key=lambda row: -row.severity)
    return ParityReport(all(row.ok for row in rows), tuple(rows), Plan({"*": "replicate"}), 0.271, 2, 4, 0.0123)


def test_the_report_of_a_match() -> None:
    lines = str(report_of(3.5e-5, 1e-6)).splitlines()
    assert lines[0] == (
        "Matches a single process: 3 tensors compared, largest relative error 3.5e-05 (tp=2 x dp=4, 1 SGD steps, lr=0.012)"
    )
    assert lines[1].split() == ["kind", "name", "tolerance", "difference"]
    assert lines[2].split() == ["ok", "grad", "w0", "0.001", "error", "3.5e-05"]
    assert lines[-1].endswith("; with dp=4, a rank holds at most 27.1%") and len(lines) == 6


def test_the_report_of_a_difference() -> None:
    bad = report_of(*[0.5] * (SHOWN + 2))
    lines = str(bad).splitlines()
    assert lines[0].startswith("DIFFERS from a single process: 14 of 15 tensors, the worst is the grad of `w0` (tp=2 x dp=4")
    assert [line.split()[0] for line in lines[2 : 2 + SHOWN]] == ["BAD"] * SHOWN
    assert lines[2 + SHOWN] == "  .. and 3 more, 2 of them out of tolerance"
