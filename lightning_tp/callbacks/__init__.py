"""Callbacks that report how fast a run is, what each rank holds, and whether replicated values are still equal."""

from lightning_tp.callbacks.drift import DriftWatch as DriftWatch
from lightning_tp.callbacks.shards import ShardSummary as ShardSummary
from lightning_tp.callbacks.throughput import Throughput as Throughput
