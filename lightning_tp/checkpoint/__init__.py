"""Checkpoints: what is written, how it is committed, and the way to and from other meshes and libraries."""

from lightning_tp.checkpoint.background import Background as Background
from lightning_tp.checkpoint.background import HostCopy as HostCopy
from lightning_tp.checkpoint.background import group_for_saving as group_for_saving
from lightning_tp.checkpoint.commit import SaveContent as SaveContent
from lightning_tp.checkpoint.commit import recoverable as recoverable
from lightning_tp.checkpoint.commit import remove as remove
from lightning_tp.checkpoint.commit import save_file as save_file
from lightning_tp.checkpoint.commit import save_folder as save_folder
from lightning_tp.checkpoint.commit import to_bytes as to_bytes
from lightning_tp.checkpoint.find import candidates as candidates
from lightning_tp.checkpoint.find import newer as newer
from lightning_tp.checkpoint.find import select_intact as select_intact
from lightning_tp.checkpoint.manifest import Manifest as Manifest
from lightning_tp.checkpoint.manifest import versions as versions
from lightning_tp.checkpoint.sharded import load_model as load_model
from lightning_tp.checkpoint.sharded import load_optimizer as load_optimizer
from lightning_tp.checkpoint.sharded import with_dtensors as with_dtensors
from lightning_tp.checkpoint.storage.dcp import dcp_load as dcp_load
from lightning_tp.checkpoint.storage.nested import without_dtensors as without_dtensors
from lightning_tp.checkpoint.storage.path import StoragePath as StoragePath
from lightning_tp.checkpoint.storage.unpickle import load as load
from lightning_tp.checkpoint.storage.unpickle import read_metadata as read_metadata
from lightning_tp.core.comm.agree import Peers as Peers
