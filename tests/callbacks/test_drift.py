"""DriftWatch: what one rank changes by itself is named, on real ranks; what nobody changed is not."""

from __future__ import annotations

import warnings
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_tp as ltp
from examples.llama import PLAN, Llama, LlamaConfig
from lightning_tp._compat import local_tensor
from lightning_tp.callbacks import DriftWatch
from lightning_tp.testing import RankError, randomize_, run_ranks

CONFIG = LlamaConfig(vocab_size=103, dim=64, num_layers=2, num_heads=8, num_kv_heads=1, hidden_dim=90, max_seq_len=32, bias=True)
NORM = "model.layers.1.attention_norm.weight"


class Net(L.LightningModule):
    def __init__(self, change: str = "", rank: int = 1, step: int = 4) -> None:
        super().__init__()
        self.change, self.rank, self.step = change, rank, step
        self.model = randomize_(Llama(CONFIG))
        self.dropout = nn.Dropout(0.1)
        self.register_buffer("seen", torch.zeros(3))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        logits = self.model(batch["tokens"])
        loss = F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten())
        self.seen = self.seen + 1  # a new tensor each time
        return loss + self.dropout(torch.ones(5)).sum() * 0

    def optimizer_step(self, epoch: int, batch_idx: int, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(epoch, batch_idx, *args, **kwargs)
        if batch_idx + 1 != self.step or self.global_rank != self.rank:
            return
        parameters = {name: local_tensor(p) for name, p in self.named_parameters()}
        if self.change == "norm":
            parameters[NORM].data[3] += 1e-6
        elif self.change == "shared heads":
            parameters["model.layers.0.attention.wk.weight"].data.mul_(1.0001)
        elif self.change == "moment":
            self.trainer.optimizers[0].state[dict(self.named_parameters())[NORM]]["exp_avg"].add_(1e-7)
        elif self.change == "buffer":
            self.seen[1] = 7
        elif self.change == "rng":
            torch.rand(1)
        elif self.change == "shard":
            parameters["model.layers.0.attention.wo.weight"].data.mul_(1.1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def fit(net: Net, watch: DriftWatch, tp: int, dp: int, steps: int = 6, shuffle: bool = False) -> str:
    """The error, or the warnings."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        trainer = L.Trainer(
            accelerator="cpu",
            devices=tp * dp,
            strategy=ltp.TPStrategy(tp=tp, plan={f"model.{k}": v for k, v in PLAN.items()}) if tp > 1 else ltp.TPStrategy(tp=1),
            max_steps=steps,
            callbacks=[watch],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        try:
            trainer.fit(net, DataLoader(ltp.RandomTokens(64, 16, 103), batch_size=2, shuffle=shuffle))
        except (ltp.TPError, SystemExit) as error:
            return str(error)
    return "\n".join(str(w.message) for w in seen if "Replicated values have drifted" in str(w.message))


CASES = ["norm", "shared heads", "moment", "buffer", "rng"]


def several(tp: int, dp: int) -> dict[str, str]:
    """One launch for all that only warns, since an error ends the ranks."""
    found = {}
    for change in ["", *CASES, "shard"]:
        steps = 4 if change == "rng" else 6  # the draws of the fifth step are compared, too, and refused
        found[change] = fit(Net(change), DriftWatch(every_n_steps=2, on_drift="warn"), tp, dp, steps)
    found["shuffled"] = fit(Net(), DriftWatch(every_n_steps=1, on_drift="warn"), tp, dp, shuffle=True)
    found["ignored"] = fit(Net("buffer"), DriftWatch(every_n_steps=2, on_drift="warn", ignore="se*"), tp, dp)
    return found


@pytest.mark.parametrize(("tp", "dp"), [pytest.param(2, 1, marks=pytest.mark.slow), (2, 2)], ids=["tp2", "2x2"])
def test_what_drifts_is_named(tp: int, dp: int) -> None:
    found = run_ranks(several, tp * dp, tp, dp, init=False, timeout=120)[0]  # warnings are rank 0's
    for quiet in ("", "shard", "shuffled", "ignored"):
        assert found[quiet] == "", quiet
    between = "differs between rank(s) 1 and rank(s) 0"
    assert f"at step 4: `{NORM}` {between}." in found["norm"]
    assert f"`model.layers.0.attention.wk.weight` {between}." in found["shared heads"]
    assert f"the optimizer state of `{NORM}` {between}." in found["moment"]
    assert f"the buffer `seen` {between}." in found["buffer"]
    assert f"the random state {between}." in found["rng"]
    assert all(len(found[c].splitlines()) <= 4 for c in CASES)


def test_it_stops_with_one_error() -> None:
    with pytest.raises(RankError) as error:
        run_ranks(raising, 2, init=False)
    failures = error.value.errors
    assert failures[0].type_name == "TPError" and f"at step 4: `{NORM}`" in failures[0].message
    assert "Replicated values have drifted" not in error.value.output[1]


def raising() -> None:
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=ltp.TPStrategy(tp=2, plan={f"model.{k}": v for k, v in PLAN.items()}),
        max_steps=6,
        callbacks=[DriftWatch(every_n_steps=4)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(Net("norm"), DataLoader(ltp.RandomTokens(64, 16, 103), batch_size=2))


def test_arguments_and_one_process() -> None:
    with pytest.raises(ltp.TPError, match="every_n_steps=0"):
        DriftWatch(0)
    with pytest.raises(ltp.TPError, match="pass 'raise' or 'warn'"):
        DriftWatch(on_drift="stop")  # type: ignore[arg-type]
    trainer = L.Trainer(accelerator="cpu", devices=1, max_steps=2, callbacks=[DriftWatch(1)], logger=False, barebones=True)
    trainer.fit(Net(), DataLoader(ltp.RandomTokens(8, 16, 103), batch_size=2))
