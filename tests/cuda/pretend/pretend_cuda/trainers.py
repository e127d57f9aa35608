"""Let Trainers and Fabrics that ask for the CPU train on GPUs, pretended or real: the tests of CPU ranks, there."""

from __future__ import annotations

import os
from typing import Any

from pretend_cuda.imports import once_imported

GPU_TRAINERS = "PRETEND_CUDA_TRAINERS"  # environment variable: processes that are started from here do so as well


def cpu_trainers_take_gpus() -> None:
    """Run `Trainer(accelerator="cpu")` and `Fabric(accelerator="cpu")` on GPUs from now on, here and in processes started from here."""
    os.environ[GPU_TRAINERS] = "1"
    for package, fabric in (("lightning.pytorch", "lightning.fabric"), ("pytorch_lightning", "lightning_fabric")):
        once_imported(f"{package}.trainer.connectors.accelerator_connector", lambda m: _take_gpus(m._AcceleratorConnector))
        once_imported(f"{fabric}.connector", lambda m: _take_gpus(m._Connector))


def _take_gpus(connector: Any) -> None:
    if "_on_gpus" in connector.__dict__:
        return
    connector._on_gpus = True
    own = connector.__init__

    def __init__(self: Any, *args: Any, **options: Any) -> None:
        if options.get("accelerator") == "cpu" and not args:
            options["accelerator"] = "gpu"
            if options.get("devices", "auto") == "auto":
                options["devices"] = 1  # what "auto" is on the CPU
        own(self, *args, **options)

    connector.__init__ = __init__
