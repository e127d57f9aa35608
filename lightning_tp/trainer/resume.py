"""Resume a run: random states and the positions of data loaders."""

from __future__ import annotations

from typing import Any

from lightning_tp.checkpoint import to_bytes

RNG_STATE = "lightning_tp_rng_state"  # in a checkpoint


LOADERS = "lightning_tp_loaders"  # likewise: where the training loaders of each data-parallel rank stood


def _is_mid_epoch(loaded: dict[str, Any]) -> bool:
    """Whether a checkpoint is from between two batches of one epoch."""
    batch = loaded.get("loops", {}).get("fit_loop", {}).get("epoch_loop.batch_progress", {})
    return bool(batch.get("current", {}).get("ready") and not batch.get("is_last_batch"))


def _same(a: Any, b: Any) -> bool:
    """Whether two nestings of plain data and tensors are equal."""
    return to_bytes(a) == to_bytes(b)
