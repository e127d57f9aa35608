from __future__ import annotations

import ast
import threading
from pathlib import Path

import torch

import lightning_tp
from lightning_tp.core.threads import start_thread
from lightning_tp.testing import run_ranks
from lightning_tp.testing.fixtures import run_if

ROOT = Path(lightning_tp.__file__).parent


def test_a_thread_runs_what_it_is_given() -> None:
    ran = threading.Event()
    thread = start_thread(ran.set, "setter", daemon=True)
    assert thread.name == "setter" and thread.daemon
    thread.join(10)
    assert ran.is_set()


def test_no_other_file_starts_threads() -> None:
    starting = {
        path.relative_to(ROOT).as_posix()
        for path in ROOT.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in ("Thread", "Timer", "ThreadPoolExecutor")
    }
    assert starting == {"core/threads.py"}, "start_thread lets a thread work on the GPU of its rank"


@run_if(min_gpus=2)
def test_a_thread_has_the_device_of_its_starter() -> None:
    def body() -> int:
        torch.cuda.set_device(1)
        torch.cuda.init()
        found: list[int] = []
        start_thread(lambda: found.append(torch.cuda.current_device()), "looks", daemon=True).join(10)
        return found[0]

    assert run_ranks(body, 1) == [1]
