"""Callbacks that say how fast a run is, what each rank holds, and whether ranks still hold the same."""

from lightning_tp.callbacks.drift import DriftWatch
from lightning_tp.callbacks.shards import ShardSummary
from lightning_tp.callbacks.throughput import Throughput

__all__ = ["DriftWatch", "ShardSummary", "Throughput"]
