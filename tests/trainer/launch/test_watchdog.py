"""A rank fails, dies or hangs; run as a script by each launcher, in real processes."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import lightning_tp as ltp
from lightning_tp.testing import run_ranks

TIMEOUT = 15
QUICK = [("step", "script"), ("kill", "fork"), ("late", "script")]
SLOW = [
    ("all", "torchrun"),
    ("step", "torchrun"),
    ("step", "spawn"),
    ("callback", "torchrun"),
    ("loader", "torchrun"),
    ("loader", "script"),
    ("loader1", "script"),
    ("end", "script"),
    ("late", "torchrun"),
    ("first", "script"),
    ("all", "script"),
    ("kill", "script"),
    ("kill", "torchrun"),
    ("kill0", "script"),
    ("saves", "script"),
]


def fails(text: str) -> None:
    print(f"FAILS AT {time.time()}", flush=True)
    raise ValueError(text)


def sleeps() -> None:
    print(f"FAILS AT {time.time()}", flush=True)
    time.sleep(1000)


class Data(Dataset[Tensor]):
    def __init__(self, what: str) -> None:
        self.what = what

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> Tensor:
        of = {"loader": "0", "loader1": "1"}.get(self.what)
        if of is not None and index >= 8 and os.environ.get("LOCAL_RANK", "0") == of:
            fails("boom in the loader")
        return torch.full((8,), index / 64)


class Net(L.LightningModule):
    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        rank = self.global_rank
        what = self.what if batch_idx == 3 else ""
        if what == "step" and rank == 1:
            fails("boom in the step")
        if what == "first" and rank == 0:
            fails("boom on rank 0")
        if what == "all":
            fails("boom on all")
        if (what == "kill" and rank == 1) or (what == "kill0" and rank == 0):
            print(f"FAILS AT {time.time()}", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "sleep" and rank == 1:
            sleeps()
        if what == "only" and rank == 0:
            dist.all_reduce(torch.ones(3))
        if what == "only" and rank == 1:
            sleeps()
        return self.mlp(batch).square().mean()

    def on_train_end(self) -> None:
        if self.what == "end" and self.global_rank == 1:
            fails("boom at the end")

    def on_fit_end(self) -> None:
        if self.what == "late" and self.global_rank == 1:  # the others have come to their end by now
            time.sleep(1.0)
            fails("boom behind the end")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Fails(L.Callback):
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 3 and trainer.global_rank == 1:
            fails("boom in a callback")


class SavesOnException(L.Callback):
    """As `ModelCheckpoint(save_on_exception=True)` does: a collective, to which the others don't come."""

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        trainer.strategy.barrier()


def main(what: str, launcher: str) -> None:
    plan = {"mlp.0": "colwise", "mlp.2": "rowwise"}
    strategy = ltp.TPStrategy(tp=2, plan=plan, timeout=timedelta(seconds=TIMEOUT if what in ("sleep", "only") else 600))
    if launcher in ("fork", "spawn"):
        from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher

        def configure() -> None:
            strategy._launcher = _MultiProcessingLauncher(strategy, start_method=launcher)  # type: ignore[arg-type]

        strategy._configure_launcher = configure  # type: ignore[method-assign]
    callbacks: list[L.Callback] = {"callback": [Fails()], "saves": [SavesOnException()]}.get(what, [])
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=strategy,
        max_epochs=1,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    if launcher in ("fork", "spawn"):
        del strategy._configure_launcher  # does not pickle
    trainer.fit(Net("step" if what == "saves" else what), DataLoader(Data(what), batch_size=2))
    print("came to the end", flush=True)


def launch(what: str, launcher: str, tmp_path: Path) -> tuple[int, str, float]:
    """(exit status, all output, seconds since the failure): also fails the test if a process is left."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    script = [str(Path(__file__)), what, launcher]
    command = [sys.executable, *script]
    if launcher == "torchrun":
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}", *script]
    mark = f"ltp-test-{os.getpid()}-{time.monotonic_ns()}"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3]), "OMP_NUM_THREADS": "1", "LTP_MARK": mark}
    environment.pop("MASTER_PORT", None)
    log = tmp_path / "log"
    with log.open("wb") as out:
        code = subprocess.run(command, stdout=out, stderr=out, env=environment, timeout=100, check=False).returncode
        ended = time.time()
        until = time.monotonic() + 10
        while (left := marked(mark)) and time.monotonic() < until:
            time.sleep(0.2)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    output = log.read_text(errors="replace")
    assert not left, f"processes are left\n{output}"
    times = [float(t) for t in re.findall(r"FAILS AT ([\d.]+)", output)]
    return code, output, ended - times[0] if times else 0.0


def marked(mark: str) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if f"LTP_MARK={mark}".encode() in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def test_user_code_finds_its_own_callbacks() -> None:
    class Looks(L.Callback):
        seen: bool = False

        def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
            self.seen = trainer.callbacks == [self]  # type: ignore[attr-defined]

    def body() -> bool:
        quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
        strategy = ltp.TPStrategy(tp=2, plan={"mlp.0": "colwise", "mlp.2": "rowwise"})
        trainer = L.Trainer(accelerator="cpu", devices=2, strategy=strategy, max_steps=2, callbacks=[looks := Looks()], **quiet)
        trainer.fit(Net("none"), DataLoader(Data("none"), batch_size=2))
        return looks.seen

    assert run_ranks(body, 2, init=False) == [True, True]


@pytest.mark.parametrize(("what", "launcher"), [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)])
def test_the_others_stop(what: str, launcher: str, tmp_path: Path) -> None:
    code, output, seconds = launch(what, launcher, tmp_path)
    assert code != 0 and ("came to the end" not in output or what == "late"), output
    assert seconds < 30, output  # of which a launcher takes its share; on an idle machine 2 to 10
    shown = re.findall(r"^(?:\[rank\d\]: )?ValueError: boom.*$", output, flags=re.MULTILINE)
    assert len(set(shown)) == (0 if what.startswith("kill") else 1), output
    if launcher != "fork":  # its parent shows the one that it saw
        assert len(shown) == (0 if what.startswith("kill") else 1), output
    if what == "kill0" or (what == "kill" and launcher == "script"):
        assert "died without an error message" in output


@pytest.mark.parametrize(
    ("what", "launcher"),
    [
        pytest.param("sleep", "torchrun", marks=pytest.mark.slow),
        pytest.param("only", "script", marks=pytest.mark.slow),
        ("sleep", "spawn"),
    ],
)
def test_a_hang_is_named(what: str, launcher: str, tmp_path: Path) -> None:
    code, output, seconds = launch(what, launcher, tmp_path)
    assert code != 0 and seconds < TIMEOUT + 30
    assert (
        len(re.findall(r"Collective mismatch: rank 0 timed out after 15 s in all_?reduce while rank 1 did not join it\.", output))
        == 1
    ), output
    assert re.search(r"rank 1 is in no collective, step 3, at .*test_watchdog.py:\d+ in sleeps: `time.sleep\(1000\)`", output), (
        output
    )
    assert "Timed out waiting" not in output


if __name__ == "__main__":
    main(*sys.argv[1:])
