"""What a training step of a Trainer sends is waited for at once, so it is sent on the current stream: no collective is asynchronous."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_tp.testing import run_ranks
from tests.checkpoint.runs import Net, data, trainer


class Asynchronous(TorchDispatchMode):
    """How many collectives were sent while it is on, and the names of those of them that are asynchronous."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = 0
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.sent += 1
            names = [a.name for a in func._schema.arguments]
            given = {**dict(zip(names, args, strict=False)), **(kwargs or {})}
            if given.get("async_op", given.get("asyncOp", True)):
                self.found.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


class Looks(L.Callback):
    def __init__(self) -> None:
        self.mode = Asynchronous()

    def on_train_batch_start(self, *args: Any) -> None:
        self.mode.__enter__()

    def on_train_batch_end(self, *args: Any) -> None:
        self.mode.__exit__(None, None, None)


@pytest.mark.parametrize("options", [{}, {"sequence_parallel": False}, {"loss_parallel": False}, {"dropout": "exact"}], ids=str)
def test_no_collective_of_a_step_is_asynchronous(options: dict[str, Any], tmp_path: Path) -> None:
    def body() -> Any:
        looks = Looks()
        how = {"gradient_clip_val": 0.1, "precision": "bf16-mixed", "accumulate_grad_batches": 2}
        run = trainer(looks, max_epochs=4, default_root_dir=tmp_path, enable_checkpointing=False, strategy=options, **how)
        with torch.autograd.set_multithreading_enabled(False):
            run.fit(Net(), data())
        return looks.mode.sent, looks.mode.found

    for sent, found in run_ranks(body, 2, init=False):
        assert sent > 8 and not found
