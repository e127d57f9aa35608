"""Ways to start ranks: forked and spawned from one process, by a script, by the variables of SLURM; one rank alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from lightning.fabric.utilities import imports
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.connectors import accelerator_connector
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.utils.data import DataLoader

import lightning_tp as ltp
from examples.llama import PLAN, LlamaConfig, LlamaModule
from lightning_tp.testing import assert_trees_close, randomize_, run_ranks
from lightning_tp.trainer.launch import processes as launch
from lightning_tp.trainer.launch.processes import ProcessLauncher

CONFIG = LlamaConfig(vocab_size=103, dim=32, num_layers=2, num_heads=8, num_kv_heads=4, hidden_dim=48, max_seq_len=32, bias=True)
QUIET: dict[str, Any] = dict(logger=False, enable_progress_bar=False, enable_model_summary=False)
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks")


class Net(LlamaModule):
    """Steps of Adam with this eps don't depend on rounding."""

    def __init__(self) -> None:
        super().__init__(CONFIG)
        randomize_(self)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2, eps=1e-3)


class Late(Net):
    def configure_model(self) -> None:
        if not hasattr(self, "more"):
            self.more = torch.nn.Linear(2, 2)


def trainer_of(strategy: Any, devices: int, **options: Any) -> L.Trainer:
    return L.Trainer(accelerator="cpu", devices=devices, strategy=strategy, **{**QUIET, "max_epochs": 1, **options})


def data(batch: int = 4) -> DataLoader:
    return DataLoader(ltp.RandomTokens(12, 12, 103, seed=0), batch_size=batch)


def whole_run(make: Callable[[], Any], devices: int, folder: Path, dp: int = 1) -> dict[str, Any]:
    """What a notebook does in its cells, one after the other."""
    module, best = Net(), ModelCheckpoint(folder / "run", monitor="loss")
    trainer = trainer_of(make(), devices, callbacks=[best])
    trainer.fit(module, data(4 // dp))
    weights = {name: t.clone() for name, t in module.state_dict().items()}
    trainer.save_checkpoint(folder / "one.ckpt")
    assert Path(best.best_model_path).exists()
    found = {
        "weights": weights,
        "loss": trainer.callback_metrics["loss"].item(),
        "progress": (trainer.global_step, trainer.current_epoch),
        "val": trainer.validate(module, data(4 // dp), verbose=False)[0]["val_loss"],
        "saved": torch.load(folder / "one.ckpt", weights_only=False)["state_dict"],
    }
    second = trainer_of(make(), devices, enable_checkpointing=False)  # the next cell goes on with the trained weights
    second.fit(module, data(4 // dp))
    return {**found, "second": dict(module.state_dict())}


def reference(folder: Path) -> dict[str, Any]:
    return run_ranks(whole_run, 1, lambda: "auto", 1, folder, init=False)[0]


def assert_same(got: dict[str, Any], ref: dict[str, Any], rtol: float = 1e-4) -> None:
    for name, value in ref.items():
        if isinstance(value, dict):
            assert_trees_close(got[name], value, rtol=rtol, name=name)
        else:
            torch.testing.assert_close(torch.as_tensor(got[name]), torch.as_tensor(value), rtol=rtol, atol=1e-4)


@pytest.mark.parametrize("name", ["tp_fork", "tp_notebook", pytest.param("tp_spawn", marks=pytest.mark.slow)])
def test_cells_as_in_one_process(name: str, tmp_path: Path) -> None:
    """Weights come back whole, results too, and another fit goes on."""
    (tmp_path / "ref").mkdir()
    plan = {f"model.{pattern}": style for pattern, style in PLAN.items()}
    make = lambda: ltp.TPStrategy(tp=2, plan=plan, launcher=name[3:]) if name != "tp_notebook" else name  # type: ignore[arg-type]  # noqa: E731
    assert_same(whole_run(make, 2, tmp_path), reference(tmp_path / "ref"))


@pytest.mark.slow
def test_spawned() -> None:
    module, trainer = Net(), trainer_of("tp_spawn", 2, enable_checkpointing=False)
    trainer.fit(module, data())
    loss, weights = run_ranks(plain, 1, init=False)[0]
    assert trainer.callback_metrics["loss"].item() == pytest.approx(loss, rel=1e-4)
    assert_trees_close(dict(module.state_dict()), weights, rtol=1e-4)


@pytest.mark.slow
def test_cells_on_a_mesh_of_two_by_two(tmp_path: Path) -> None:
    (tmp_path / "ref").mkdir()
    got, ref = whole_run(lambda: ltp.TPStrategy(tp=2, launcher="fork"), 4, tmp_path, dp=2), reference(tmp_path / "ref")
    # Lightning's sampler shuffles: other batches, so near and not equal
    assert got["loss"] == pytest.approx(ref["loss"], rel=0.1) and got["val"] == pytest.approx(ref["val"], rel=0.1)
    assert {n: t.shape for n, t in got["weights"].items()} == {n: t.shape for n, t in ref["weights"].items()}
    assert_trees_close(got["saved"], got["weights"], rtol=0)


@pytest.mark.timeout(60)
def test_threads_before_a_fork_do_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    """A forked rank that asks for a pool of threads, which its parent has used and a fork does not copy, would wait for ever."""
    monkeypatch.setenv("OMP_NUM_THREADS", "4")  # as a machine with more cores than this one would have it
    torch.set_num_threads(4)
    a = torch.randn(600, 600)
    assert (a @ a).relu().isfinite().all()
    module = Net()
    module.model(torch.zeros(32, 32, dtype=torch.long))
    trainer_of("tp_notebook", 2, enable_checkpointing=False).fit(module, data())


def test_an_error_of_a_rank_is_seen_as_itself() -> None:
    with pytest.raises(ltp.TPError, match=r"^The rule `nope` -> `colwise` matches no module") as info:
        trainer_of(ltp.TPStrategy(plan={"nope": "colwise"}, launcher="fork"), 2).fit(Net(), data())
    assert "Traceback" not in str(info.value)


@pytest.mark.parametrize("name", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_a_signal_that_ends_the_ranks_ends_this_process_likewise(name: Any, tmp_path: Path) -> None:
    """With the weights as trained so far; it would wait for ever."""
    module, before = Net(), {n: t.clone() for n, t in Net().state_dict().items()}
    trainer = trainer_of(ltp.TPStrategy(tp=2, launcher=name), 2, max_epochs=-1, callbacks=[Asked()], enable_checkpointing=False)
    with pytest.raises(SIGTERMException):
        trainer.fit(module, data())
    assert trainer.received_sigterm and trainer.interrupted and trainer.global_step >= 3
    assert not any(torch.equal(t, before[name]) for name, t in module.state_dict().items())


class Asked(L.Callback):
    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == 3 and trainer.global_rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def test_weights_without_a_place_are_said() -> None:
    with pytest.warns(UserWarning, match=r"2 of \d+ trained weights \(`more.weight`, ..\) have no place"):
        trainer_of(ltp.TPStrategy(launcher="fork"), 2, enable_checkpointing=False).fit(Late(), data())


def test_ranks_are_left_time_to_say_who_was_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning's launcher looks after its children, and kills all others when one is dead."""
    monkeypatch.setattr(launch, "HEAD_START", 4.0)
    monkeypatch.setattr(launch.atexit, "register", lambda *args: None)
    main = subprocess.Popen(["sleep", "30"])
    children = [subprocess.Popen(["false"])]
    observer = _ChildProcessObserver(main.pid, children, sleep_period=0.2)  # type: ignore[arg-type]
    observer.start()
    launch.end_with_children(SimpleNamespace(procs=children))
    with pytest.raises(subprocess.TimeoutExpired):
        main.wait(2)
    assert main.wait(20) == -signal.SIGKILL
    observer.join()


def test_cuda_before_a_fork_is_refused_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_of("tp_notebook", 2)
    trainer.strategy.parallel_devices = [torch.device("cuda", i) for i in range(2)]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(ltp.TPError, match="has used a GPU already"):
        trainer.strategy.launcher.launch(print, trainer=trainer)


def test_a_notebook_forks_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imports, "_IS_INTERACTIVE", True)
    monkeypatch.setattr(accelerator_connector, "_IS_INTERACTIVE", True)
    for strategy in (ltp.TPStrategy(tp=2), "tp", "tp_notebook"):
        launcher = trainer_of(strategy, 2).strategy.launcher
        assert isinstance(launcher, ProcessLauncher) and launcher._start_method == "fork"
    for launcher in ("popen", "spawn"):
        with pytest.raises(ltp.TPError, match=r"launcher='fork'.*tp_notebook"):
            trainer_of(ltp.TPStrategy(tp=2, launcher=launcher), 2)  # type: ignore[arg-type]
    with pytest.raises(ltp.TPError, match="Valid values: 'auto', 'popen', 'fork', 'spawn'"):
        ltp.TPStrategy(launcher="thread")  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------------------------------- scripts

SCRIPT = """
import sys
import lightning as L, torch
import lightning_tp as ltp
from tests.trainer.launch.test_processes import Net, data

if __name__ == "__main__":
    tp, devices, nodes, out = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    module = Net()
    trainer = L.Trainer(accelerator="cpu", devices=devices, num_nodes=nodes, strategy=ltp.TPStrategy(tp=tp), max_epochs=1,
                        default_root_dir=out + ".d", logger=False, enable_progress_bar=False, enable_model_summary=False)
    trainer.fit(module, data())
    weights = ltp.full_state_dict(module)
    if trainer.is_global_zero:
        torch.save((trainer.callback_metrics["loss"].item(), trainer.strategy.sizes, weights), out)
"""


def run_scripts(tmp_path: Path, arguments: list[Any], environments: list[dict[str, Any]], out: str) -> Any:
    """One process for each environment, side by side; what rank 0 has saved."""
    (tmp_path / "train.py").write_text(SCRIPT)
    root = str(Path(__file__).parents[3])
    base = {
        k: v
        for k, v in os.environ.items()
        if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "NODE_RANK", "MASTER_PORT", "PL_GLOBAL_SEED")
    }
    base |= {"PYTHONPATH": root, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "MASTER_ADDR": "127.0.0.1"}
    command = [sys.executable, str(tmp_path / "train.py"), *map(str, arguments), str(tmp_path / out)]
    processes = [
        subprocess.Popen(
            command, env=base | {k: str(v) for k, v in env.items()}, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        for env in environments
    ]
    for process in processes:
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output[-4000:]
    return torch.load(tmp_path / out, weights_only=True)


def slurm(rank: int, nodes: int) -> dict[str, Any]:
    """What `srun --ntasks=2` sets, on one node or two."""
    return {
        "SLURM_JOB_ID": 7123,
        "SLURM_JOB_NAME": "train",
        "SLURM_NTASKS": 2,
        "SLURM_NTASKS_PER_NODE": 2 // nodes,
        "SLURM_NNODES": nodes,
        "SLURM_NODELIST": "localhost" if nodes == 1 else "localhost,other",
        "SLURM_PROCID": rank,
        "SLURM_LOCALID": rank if nodes == 1 else 0,
        "SLURM_NODEID": 0 if nodes == 1 else rank,
    }


def elastic(rank: int, port: int) -> dict[str, Any]:
    """What an operator of Kubernetes sets for a pod, without torchrun."""
    of_torchrun = {"TORCHELASTIC_RUN_ID": "job", "GROUP_RANK": 0, "LOCAL_WORLD_SIZE": 2}
    return {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port, **of_torchrun}


slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("arguments", "environments"),
    [
        pytest.param([1, 1, 1], [{}], id="one process", marks=slow),
        pytest.param([2, 2, 1], [{}], id="started by Lightning", marks=slow),  # test_strategy.py does it, too
        pytest.param([2, 2, 1], [slurm(r, 1) for r in range(2)], id="slurm"),
        pytest.param([2, 1, 2], [slurm(r, 2) for r in range(2)], id="slurm, two nodes", marks=slow),
        pytest.param([2, 2, 1], [elastic(r, 29511) for r in range(2)], id="elastic", marks=slow),  # `run_ranks` sets these, too
    ],
)
def test_one_script_for_all(arguments: list[int], environments: list[dict[str, Any]], tmp_path: Path) -> None:
    """The same script: with one device, started by Lightning, and found to be started already."""
    loss, sizes, weights = run_scripts(tmp_path, arguments, environments, "out")
    ref = run_ranks(plain, 1, init=False)[0]
    assert loss == pytest.approx(ref[0], rel=1e-4) and tuple(sizes) == (1, arguments[0])
    assert_trees_close(weights, ref[1], rtol=1e-4)


def plain(epochs: int = 1) -> tuple[float, dict[str, torch.Tensor]]:
    module, trainer = Net(), trainer_of("auto", 1, enable_checkpointing=False, max_epochs=epochs)
    trainer.fit(module, data())
    return trainer.callback_metrics["loss"].item(), dict(module.state_dict())


# -------------------------------------------------------------------------------------------------------------- one rank


def test_one_rank_saves_and_resumes_like_any_other(tmp_path: Path) -> None:
    """`devices=1`, for debugging: saved here, resumed here and on two ranks, and the other way round."""

    def run(folder: Path, resume: Path | None) -> dict[str, torch.Tensor]:
        devices = int(os.environ["WORLD_SIZE"])
        module = Net()
        keep = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
        trainer = trainer_of("tp", devices, callbacks=[keep], max_epochs=2)
        trainer.fit(module, data(), ckpt_path=resume)
        assert trainer.global_step == 6
        return ltp.full_state_dict(module)

    ref = run_ranks(plain, 1, 2, init=False)[0][1]
    for source, target in ((1, 1), (1, 2), (2, 1)):
        folder = tmp_path / f"{source}-{target}"
        first = run_ranks(run, source, folder, None, init=False)
        assert_trees_close(first[0], ref, rtol=1e-4, name=f"{source} rank(s)")
        resumed = run_ranks(run, target, tmp_path / "again", folder / "epoch=0.ckpt", init=False)
        assert_trees_close(resumed[0], ref, rtol=1e-4, name=f"from {source} to {target}")
