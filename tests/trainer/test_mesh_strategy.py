"""What both strategies share: sizes, options, launchers, names."""

from __future__ import annotations

import os
import random
from datetime import timedelta
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.pytorch import Trainer

import lightning_tp as ltp
from lightning_tp.core.comm.mesh import make_mesh
from lightning_tp.testing import run_ranks
from lightning_tp.trainer.launch import processes
from lightning_tp.trainer.mesh_strategy import NAMES, MeshStrategyMixin, check_choice, register, start_method, too_few_devices
from lightning_tp.trainer.patches import private

BOTH = [ltp.TPStrategy, ltp.FabricTPStrategy]


@pytest.mark.parametrize(
    "tp, world, advice",
    [
        (2, 1, "Pass `Trainer(devices=2)`."),
        (3, 4, "Pass `Trainer(devices=6)`, or use tp=2 or 4."),
        (16, 8, "Pass `Trainer(devices=16)`, or use tp=2, 4 or 8."),
        (2, 7, "Pass `Trainer(devices=8)`, or use tp=7."),
    ],
)
def test_sizes_that_do_not_fit(tp: int, world: int, advice: str) -> None:
    assert (
        too_few_devices("Trainer", tp, world) == f"tp={tp} needs a multiple of {tp} devices, but the Trainer has {world}. {advice}"
    )


@pytest.mark.parametrize("make", [Trainer, Fabric])
def test_sizes_are_refused_before_a_process_is_started(make: Any) -> None:
    host = make.__name__
    strategy = {"Trainer": ltp.TPStrategy, "Fabric": ltp.FabricTPStrategy}[host]
    with pytest.raises(ltp.TPError, match=rf"the {host} has 2. Pass `{host}\(devices=3\)`, or use tp=2"):
        make(accelerator="cpu", devices=2, strategy=strategy(tp=3))
    with pytest.raises(ltp.TPError, match="give a number of ranks"):
        make(accelerator="cpu", devices=2, strategy=strategy(tp=0))
    with pytest.raises(ltp.TPError, match="`dp=3` x `tp=2` are 6 ranks"):
        make(accelerator="cpu", devices=2, strategy=strategy(tp=2, dp=3))
    assert make(accelerator="cpu", devices=6, strategy=strategy(tp=3)).strategy.sizes == (2, 3)


@pytest.mark.parametrize("strategy", BOTH)
def test_options(strategy: Any) -> None:
    made = strategy(tp=2, sequence_parallel=False, compile="eager", timeout=timedelta(seconds=7), safe_globals=[set])
    assert made.model_options == {
        "sequence_parallel": False,
        "loss_parallel": True,
        "activation_checkpointing": None,
        "compile": "eager",
        "dropout": "independent",
        "backend": "local",
    }
    assert (made.requested_sizes, made.collective_timeout, made.safe_globals) == ((2, "auto"), timedelta(seconds=7), [set])
    for wrong in (dict(launcher="thread"), dict(dropout="none"), dict(activation_checkpointing="all")):
        with pytest.raises(ltp.TPError, match=str(next(iter(wrong)))):
            strategy(**wrong)


def test_choices() -> None:
    with pytest.raises(ltp.TPError, match=r"`backend='fast'` is unknown\. Valid values: 'local', 'dtensor'\."):
        ltp.TPStrategy(backend="fast")  # type: ignore[arg-type]
    with pytest.raises(ltp.TPError, match=r"`on_save_error='ignore'` is unknown\. Valid values: 'raise', 'warn'\."):
        ltp.TPStrategy(on_save_error="ignore")  # type: ignore[arg-type]
    check_choice("backend", "local", Literal["local"])


@pytest.mark.parametrize("interactive", [False, True])
def test_how_ranks_are_started(interactive: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(private, "is_interactive", lambda: interactive)
    assert start_method("auto") == ("fork" if interactive else "popen") and start_method("fork") == "fork"
    if not interactive:
        assert (start_method("spawn"), start_method("popen")) == ("spawn", "popen")


LAUNCHERS: dict[str, tuple[Any, Any]] = {
    "external": (processes.ExternalLauncher, type(None)),
    "popen": (processes.ScriptLauncher, private.FabricScriptLauncher),
    "fork": (processes.ProcessLauncher, processes.FabricProcessLauncher),
    "spawn": (processes.ProcessLauncher, processes.FabricProcessLauncher),
}


@pytest.mark.parametrize("method", LAUNCHERS)
def test_launchers(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if method == "external":
        for name, value in {
            "TORCHELASTIC_RUN_ID": "x",
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "2",
            "GROUP_RANK": "0",
        }.items():
            monkeypatch.setenv(name, value)
    options: Any = {} if method in ("external", "popen") else {"launcher": method}
    trainer = Trainer(accelerator="cpu", devices=2, strategy=ltp.TPStrategy(tp=2, **options), logger=False)
    fabric = Fabric(accelerator="cpu", devices=2, strategy=ltp.FabricTPStrategy(tp=2, **options))
    of_trainer, of_fabric = LAUNCHERS[method]
    assert type(trainer.strategy.launcher) is of_trainer and type(fabric.strategy.launcher) is of_fabric
    if method in ("fork", "spawn"):
        assert trainer.strategy.launcher.start_method == fabric.strategy.launcher.start_method == method


def test_names_are_registered_once() -> None:
    class Registry(dict):
        def register(self, name: str, strategy: type, description: str, **options: Any) -> None:
            assert name not in self
            self[name] = strategy, options, description

    registry = Registry(tp_spawn="of another package")
    for _ in range(2):
        register(registry, ltp.TPStrategy)
    assert set(registry) == set(NAMES) and registry["tp_spawn"] == "of another package"
    assert registry["tp_notebook"][:2] == (ltp.TPStrategy, {"launcher": "fork"}) and "launcher: auto" in registry["tp"][2]


def test_joining_leaves_the_random_state_and_sets_the_timeout() -> None:
    class Strategy(MeshStrategyMixin):
        launcher, host, root_device = None, "Trainer", torch.device("cpu")
        num_nodes, num_processes = 1, 2
        cluster_environment = SimpleNamespace(global_rank=lambda: int(os.environ["RANK"]))
        _data_parallel_size = _tensor_parallel_size = _device_mesh = None

        @property
        def device_mesh(self) -> Any:
            return self._device_mesh

    def body() -> tuple[bool, float]:
        strategy: Any = Strategy()
        strategy.set_mesh_options(2, "auto", "auto", timedelta(seconds=123))
        state, state_of_python = torch.get_rng_state(), random.getstate()
        with strategy.joining_process_group():
            assert (strategy._data_parallel_size, strategy._tensor_parallel_size) == (1, 2)
            torch.manual_seed(77), random.seed(77)  # as Lightning does
            dist.init_process_group("gloo")
            strategy._device_mesh = make_mesh("cpu", 1, 2)
        group = strategy.device_mesh.get_group("tensor_parallel")
        timeout = group._get_backend(torch.device("cpu")).options._timeout.total_seconds()
        return torch.equal(torch.get_rng_state(), state) and random.getstate() == state_of_python, timeout

    assert run_ranks(body, 2, init=False) == [(True, 123.0)] * 2
