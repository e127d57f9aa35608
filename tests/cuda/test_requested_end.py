"""On GPUs: where the host waits in a steady step, on which stream collectives run, and who is named where waiting does not stop the host."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import lightning as L
import pytest
import torch

import lightning_tp as ltp
from lightning_tp.testing import RankError, run_ranks
from tests.checkpoint.runs import PLAN, QUIET, Net

pytestmark = pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.device_count() < 2, reason="needs two GPUs")
FIRST, STEPS = 10, 4  # the batches that are looked at: in the first ones plans, batches and gradients are compared


class StepsMayNotWait(L.Callback):
    """Lets torch raise where the host waits for the device, in some steady steps."""

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, i: int) -> None:
        if i in (FIRST, FIRST + STEPS):
            torch.cuda.set_sync_debug_mode("error" if i == FIRST else "default")


class Streams(L.Callback):
    """Counts host waits, collectives by stream, and streams of their own that were of no use; on pretended GPUs only."""

    def __init__(self) -> None:
        self.waits = pytest.importorskip("pretend_cuda").HostWaits(collectives=True)

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, i: int) -> None:
        if i == FIRST:
            self.waits.__enter__()
        if i == FIRST + STEPS:
            self.waits.__exit__()


def fit(*callbacks: Any, tp: int = 2, dp: int = 1, timeout: float = 600, module: Any = None, **options: Any) -> Any:
    strategy = ltp.TPStrategy(tp=tp, dp=dp, plan=PLAN, timeout=timedelta(seconds=timeout))
    run = L.Trainer(
        accelerator="gpu",
        devices=tp * dp,
        strategy=strategy,
        callbacks=list(callbacks),
        max_epochs=1,
        log_every_n_steps=100,
        **{**QUIET, "enable_checkpointing": False, **options},
    )
    loader = torch.utils.data.DataLoader(ltp.RandomTokens(64 * dp, 8, 11), batch_size=2, pin_memory=True)
    run.fit(Net() if module is None else module, loader)
    return run


@pytest.mark.parametrize(
    "options", [{}, {"precision": "bf16-mixed", "gradient_clip_val": 0.1}, {"accumulate_grad_batches": 2}], ids=str
)
def test_the_host_waits_nowhere_in_a_steady_step(options: dict[str, Any]) -> None:
    def body() -> int:
        return int(fit(StepsMayNotWait(), **options).global_step)

    run_ranks(body, 2, init=False, backend="nccl")


def test_collectives_run_on_the_current_stream() -> None:
    def body() -> dict[Any, int]:
        streams = Streams()
        fit(streams, gradient_clip_val=0.1)
        return dict(streams.waits.found)

    for found in run_ranks(body, 2, init=False, backend="nccl"):
        sent = {what: n / STEPS for (kind, what, _), n in found.items() if kind == "collective"}
        assert sent and not [what for what in sent if "stream of its own" in what]
        assert not [key for key in found if key[0] != "collective"]


class Sleeps(Net):
    """A rank does not come to the backward pass of its third step."""

    def __init__(self, who: int) -> None:
        super().__init__()
        self.who = who

    def training_step(self, batch: Any, i: int) -> Any:
        pretended = pytest.importorskip("pretend_cuda")
        if i == 1:
            pretended.ext.set_patience(4000)  # the host goes on after a collective that does not complete
        loss = super().training_step(batch, i)
        if i == 3 and self.global_rank == self.who:
            time.sleep(1000)
        return loss


@pytest.mark.slow
@pytest.mark.parametrize("who", [0, 1])
def test_a_hang_names_the_rank_that_did_not_come(who: int) -> None:
    pytest.importorskip("pretend_cuda")
    with pytest.raises(RankError) as raised:
        run_ranks(lambda: fit(module=Sleeps(who), timeout=20) and None, 2, init=False, backend="nccl", timeout=110)
    screens = "\n".join([*raised.value.output.values(), str(raised.value)])
    named = [line for line in screens.splitlines() if line.startswith("Collective mismatch")]
    assert named and all(f"rank(s) {who} did not come." in line for line in named), screens[-3000:]
