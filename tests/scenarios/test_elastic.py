"""torchrun restarts workers, goes on with the nodes that are left, and takes in those that come: two network namespaces joined by a pair of
virtual devices.

Tensor parallelism inside a node, data parallelism across. The weights are those of the uninterrupted run on one node, since the global batch
stays. Needs root and Linux's `ip`.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest
import torch

from lightning_tp.testing import assert_trees_close, run_ranks
from lightning_tp.trainer.launch.watchdog import has_ended
from tests.scenarios.elastic_worker import STEPS, train

ROOT = Path(__file__).parents[2]
TCP_RETRIES = 8  # of Linux: a connection with nobody at its other end fails after 102 s at most; by default 15, after 924 s
CONF = "last_call_timeout=3,keep_alive_interval=1,keep_alive_max_attempt=3,join_timeout=90,close_timeout=10"


def _ip(*words: str, check: bool = True) -> None:
    subprocess.run(["ip", *words], check=check, capture_output=True, timeout=20)


def _why_not() -> str:
    if shutil.which("ip") is None or not hasattr(os, "geteuid") or os.geteuid():
        return "needs root and `ip` to make network namespaces"
    try:
        _ip("netns", "add", "ltp_probe")
        _ip("netns", "del", "ltp_probe")
    except (subprocess.SubprocessError, OSError):
        return "this kernel or container does not let us make network namespaces"
    return ""


class Nodes:
    """Two nodes of two workers each, `a` (with the rendezvous) and `b`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pause = 0.2  # seconds after each batch
        self.own_store = True  # workers' own: see docs/checkpoints.md
        self.names = {n: f"ltp{os.getpid()}{n}" for n in "ab"}
        self.agents: dict[str, subprocess.Popen[str]] = {}
        self.outputs: list[IO[str]] = []
        for n in "ab":
            _ip("netns", "add", self.names[n])
            _ip("netns", "exec", self.names[n], "sh", "-c", f"echo {TCP_RETRIES} > /proc/sys/net/ipv4/tcp_retries2")
        _ip("link", "add", "va", "netns", self.names["a"], "type", "veth", "peer", "name", "vb", "netns", self.names["b"])
        for i, n in enumerate("ab", 1):
            _ip("-n", self.names[n], "link", "set", "lo", "up")
            _ip("-n", self.names[n], "addr", "add", f"10.99.0.{i}/24", "dev", f"v{n}")
            _ip("-n", self.names[n], "link", "set", f"v{n}", "up")

    def start(self, node: str) -> None:
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1:2", "--nproc-per-node=2", "--max-restarts=3"]
        command += ["--rdzv-backend=c10d", "--rdzv-endpoint=10.99.0.1:29400", "--rdzv-id=job"]
        command += [f"--rdzv-conf={CONF},is_host={int(node == 'a')}", f"--local-addr=10.99.0.{'ab'.index(node) + 1}"]
        command += [str(ROOT / "tests" / "elastic_worker.py"), str(self.folder)]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "GLOO_SOCKET_IFNAME": f"v{node}",
            "PAUSE": str(self.pause),
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": str(int(self.own_store)),
        }
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"):
            environment.pop(name, None)
        self.outputs.append((self.folder / f"out.{node}").open("w"))
        self.agents[node] = subprocess.Popen(
            ["ip", "netns", "exec", self.names[node], *command],
            env=environment,
            stdout=self.outputs[-1],
            stderr=subprocess.STDOUT,
            text=True,
        )

    def steps(self, rank: int = 0) -> list[tuple[int, int, int]]:
        log = self.folder / f"log.{rank}"
        return [tuple(json.loads(line)) for line in log.read_text().splitlines()] if log.exists() else []

    def wait_for_step(self, step: int, world: int, seconds: float = 90) -> None:
        until = time.monotonic() + seconds
        while not any(s >= step and w == world for s, w, _ in self.steps()):
            assert time.monotonic() < until, self.said()
            time.sleep(0.1)

    def wait(self, node: str, seconds: float) -> int:
        try:
            return self.agents[node].wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"node {node} hangs\n{self.said()}") from None

    def wait_for_end(self, pids: list[int], seconds: float) -> None:
        until = time.monotonic() + seconds
        while not all(has_ended(pid) for pid in pids):
            assert time.monotonic() < until, f"workers are left\n{self.said()}"
            time.sleep(0.5)

    def kill_node(self, node: str) -> None:
        pids = subprocess.run(["ip", "netns", "pids", self.names[node]], capture_output=True, text=True, check=True).stdout.split()
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)

    def cut(self) -> None:
        _ip("-n", self.names["b"], "link", "set", "vb", "down")

    def said(self) -> str:
        return "\n".join(f"--- {p.name}\n{p.read_text()[-6000:]}" for p in sorted(self.folder.glob("out.*")))

    def close(self) -> None:
        for node in self.names:
            with contextlib.suppress(subprocess.SubprocessError):
                self.kill_node(node)
            if node in self.agents:
                self.agents[node].wait(20)
            _ip("netns", "del", self.names[node], check=False)
        for output in self.outputs:
            output.close()


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    if why := _why_not():
        pytest.skip(why)
    made = Nodes(tmp_path)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    folder = tmp_path_factory.mktemp("whole")
    run_ranks(train, 2, folder, init=False)
    found: dict[str, torch.Tensor] = torch.load(folder / "weights.pt")
    return found


def check(nodes: Nodes, weights: dict[str, torch.Tensor]) -> None:
    got = torch.load(nodes.folder / "weights.pt")
    assert_trees_close(got, weights, rtol=1e-3, name="weights")
    taken = [step for step, _, _ in nodes.steps()]
    assert taken[-1] == STEPS and set(range(1, STEPS + 1)) <= set(taken)


@pytest.mark.slow
@pytest.mark.timeout(290)
@pytest.mark.parametrize("own_store", [True, False])
def test_a_worker_is_killed(own_store: bool, nodes: Nodes, weights: dict[str, torch.Tensor]) -> None:
    """All workers start again, on both nodes, and go on from the last checkpoint."""
    nodes.own_store = own_store
    nodes.start("a")
    nodes.start("b")
    nodes.wait_for_step(5, world=4)
    os.kill(nodes.steps(rank=3)[-1][2], signal.SIGKILL)
    assert (nodes.wait("a", 120), nodes.wait("b", 60)) == (0, 0), nodes.said()
    assert len({pid for _, _, pid in nodes.steps()}) == 2 and {w for _, w, _ in nodes.steps()} == {4}
    check(nodes, weights)


@pytest.mark.slow
@pytest.mark.timeout(700)
@pytest.mark.parametrize("what", ["kill", "cut"])
def test_a_node_is_lost(what: str, nodes: Nodes, weights: dict[str, torch.Tensor]) -> None:
    """The other one goes on alone, by the same global batch; the lost one ends, and never trains on."""
    nodes.start("a")
    nodes.start("b")
    nodes.wait_for_step(5, world=4)
    if what == "kill":
        nodes.kill_node("b")
    else:
        nodes.cut()
    assert nodes.wait("a", 180) == 0, nodes.said()
    worlds = [w for _, w, _ in nodes.steps()]
    assert worlds == sorted(worlds, reverse=True) and worlds[-1] == 2
    check(nodes, weights)
    if what == "cut":  # the workers after ours and torch's time-outs, torchrun itself once Linux has given up its connection
        nodes.wait_for_end([nodes.steps(rank=r)[-1][2] for r in (2, 3)], seconds=120)
        assert nodes.wait("b", 120) != 0
    else:
        assert nodes.wait("b", 30) != 0
    assert max(step for step, _, _ in nodes.steps(rank=2)) < STEPS


@pytest.mark.slow
@pytest.mark.timeout(290)
def test_a_node_comes_later(nodes: Nodes, weights: dict[str, torch.Tensor]) -> None:
    """The run goes on from its last checkpoint on both, in the middle of an epoch, by the same global batch."""
    nodes.pause = 1.0
    nodes.start("a")
    nodes.wait_for_step(3, world=2)
    nodes.start("b")
    assert (nodes.wait("a", 200), nodes.wait("b", 30)) == (0, 0), nodes.said()
    worlds = [w for _, w, _ in nodes.steps()]
    assert worlds == sorted(worlds) and (worlds[0], worlds[-1]) == (2, 4)
    taken = [step for step, w, _ in nodes.steps() if w == 4]
    assert taken == list(range(taken[0], STEPS + 1)), "a step is one batch on two nodes"
    check(nodes, weights)
