"""Checkpoints: what is written, how it is committed, and the way to and from other meshes and libraries."""

from lightning_tp.checkpoint.background import Background, HostCopy, group_for_saving
from lightning_tp.checkpoint.commit import SaveContent, recover, recoverable, remove, save_file, save_folder, to_bytes
from lightning_tp.checkpoint.find import candidates, newer, select_intact
from lightning_tp.checkpoint.manifest import Manifest, versions
from lightning_tp.checkpoint.sharded import load_model, load_optimizer, with_dtensors
from lightning_tp.checkpoint.storage.dcp import dcp_load
from lightning_tp.checkpoint.storage.nested import without_dtensors
from lightning_tp.checkpoint.storage.path import StoragePath
from lightning_tp.checkpoint.storage.unpickle import load, read_metadata
from lightning_tp.core.comm.agree import Peers

__all__ = [
    "Background",
    "HostCopy",
    "Manifest",
    "Peers",
    "SaveContent",
    "StoragePath",
    "candidates",
    "dcp_load",
    "group_for_saving",
    "load",
    "load_model",
    "load_optimizer",
    "newer",
    "read_metadata",
    "recover",
    "recoverable",
    "remove",
    "save_file",
    "save_folder",
    "select_intact",
    "to_bytes",
    "versions",
    "with_dtensors",
    "without_dtensors",
]
