"""Checkpoints: what is written, how it is committed, and the way to and from other meshes and libraries."""

from lightning_tp.checkpoint.sharded import load_model, load_optimizer, save_apart, with_dtensors, without_dtensors

__all__ = ["load_model", "load_optimizer", "save_apart", "with_dtensors", "without_dtensors"]
