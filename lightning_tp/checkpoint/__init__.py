"""Checkpoints: what is written, how it is committed, and the way to and from other meshes and libraries."""

from lightning_tp.checkpoint.background import Background, HostCopy, group_for_saving
from lightning_tp.checkpoint.commit import Content, put_aside, recover, remove, save_file, save_folder, to_bytes
from lightning_tp.checkpoint.find import candidates, choose, newer
from lightning_tp.checkpoint.manifest import Manifest, versions
from lightning_tp.checkpoint.safe import dcp_load, load, read_metadata
from lightning_tp.checkpoint.sharded import load_model, load_optimizer, with_dtensors, without_dtensors
from lightning_tp.checkpoint.storage import Place
from lightning_tp.core.comm.agree import World

__all__ = [
    "Background",
    "Content",
    "HostCopy",
    "Manifest",
    "Place",
    "World",
    "candidates",
    "choose",
    "dcp_load",
    "group_for_saving",
    "load",
    "load_model",
    "load_optimizer",
    "newer",
    "put_aside",
    "read_metadata",
    "recover",
    "remove",
    "save_file",
    "save_folder",
    "to_bytes",
    "versions",
    "with_dtensors",
    "without_dtensors",
]
