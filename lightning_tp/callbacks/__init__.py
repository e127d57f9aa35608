"""Callbacks that say how fast a run is and what each rank holds; they work with every Lightning strategy."""

from lightning_tp.callbacks.shards import ShardSummary
from lightning_tp.callbacks.throughput import Throughput

__all__ = ["ShardSummary", "Throughput"]
