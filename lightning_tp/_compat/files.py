"""Private parts of torch for files of checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint._fsspec_filesystem import FileSystem as FsspecFiles  # noqa: F401
from torch.distributed.checkpoint.utils import _create_file_view as view_of_file  # noqa: F401

# What torch pickles into the `.metadata` of a distributed checkpoint, by module and name; and what makes a dtype, a layout.
METADATA_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", "device"},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"},
    "pathlib._local": {"PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"},
}  # fmt: skip


class LateTensor:
    """Pickled by `torch.save` as a contiguous tensor on the CPU, whose bytes are read when they are written.

    `torch.save` writes the storages one after the other, and calls `cpu()` of those that are on another device; this one's is on the meta device,
    and its `cpu` reads.

    Args:
        shape: of the tensor.
        dtype: of the tensor.
        read: returns the tensor; called once a save.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, read: Callable[[], Tensor]) -> None:
        self.shape, self.dtype, self.read = shape, dtype, read

    def __reduce_ex__(self, protocol: Any) -> Any:
        untyped: Any = torch.UntypedStorage(torch.Size(self.shape).numel() * self.dtype.itemsize, device="meta")
        untyped.cpu = self._storage
        rebuild, (storage, offset, _, _, *rest) = torch.empty(0, dtype=self.dtype).__reduce_ex__(protocol)
        if not isinstance(storage, torch.UntypedStorage):
            untyped = torch.storage.TypedStorage(wrap_storage=untyped, dtype=self.dtype, _internal=True)
        untyped._fake_device = "cpu"  # where it is loaded to
        return rebuild, (untyped, offset, tuple(self.shape), torch.empty(self.shape, device="meta").stride(), *rest)

    def _storage(self) -> torch.UntypedStorage:
        value = self.read()
        if value.untyped_storage().nbytes() != value.nbytes:  # a view: what is around it in memory is not written
            value = value.clone()
        return value.untyped_storage()
