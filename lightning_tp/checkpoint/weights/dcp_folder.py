"""Read a folder of `torch.distributed.checkpoint`, tensor by tensor and slice by slice; torch's own reader fills a whole state dict."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterable, Mapping
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from lightning_tp._compat import view_of_file
from lightning_tp.checkpoint.storage.nested import replace_references
from lightning_tp.checkpoint.storage.path import MANIFEST, META, METADATA, PLAN, SHARDED, StoragePath
from lightning_tp.checkpoint.storage.unpickle import first_line, read_metadata
from lightning_tp.checkpoint.weights.stored import StoredCheckpoint, StoredTensor
from lightning_tp.checkpoint.weights.torch_file import load_file
from lightning_tp.core.boxes import Box, assemble, narrow
from lightning_tp.errors import TPError


def model_key(names: Iterable[str]) -> str | None:
    """Return under what name the model's state dict was saved: "state_dict" by Trainers, "model" by FSDPStrategy and Fabric; None: at the top."""
    names = list(names)
    return next((k for k in ("state_dict", "model") if any(name.startswith(f"{k}.") for name in names)), None)


class DcpFolder:
    """A folder of torch's distributed checkpoint."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata = read_metadata(StoragePath(path))

    @cached_property
    def _pieces(self) -> dict[tuple[str, tuple[int, ...] | None], Any]:
        """(key, offset of the piece; None for what is no tensor) -> file, offset and length in it."""
        data: Any = self.metadata.storage_data or {}
        return {(i.fqn, tuple(i.offset) if i.offset is not None else None): info for i, info in data.items()}

    @cached_property
    def entries(self) -> dict[tuple[str | int, ...], str]:
        """The path in the nested state dict that was saved -> key."""
        planner: Mapping[str, Any] = self.metadata.planner_data or {}
        keys = self.metadata.state_dict_metadata
        return {tuple(planner[key]) if key in planner else (key,): key for key in keys}

    def missing(self) -> list[str]:
        """Say which files of those that the metadata names are missing, or too short."""
        ends: dict[str, int] = {}
        for piece in self._pieces.values():
            ends[piece.relative_path] = max(ends.get(piece.relative_path, 0), piece.offset + piece.length)
        problems = []
        for name, end in sorted(ends.items()):
            file = self.path / name
            if not file.is_file():
                problems.append(f"`{name}` is missing")
            elif (size := file.stat().st_size) < end:
                problems.append(f"`{name}` has {size} bytes, but should have {end}")
        return problems

    def value(self, key: str) -> Any:
        """Return a stored tensor for a tensor, and read anything else; `TPError` if a file is missing or broken."""
        entry = self.metadata.state_dict_metadata[key]
        if not isinstance(entry, TensorStorageMetadata):
            return self._load_piece(key, None)
        shape = tuple(entry.size)

        def load(box: Box, dtype: torch.dtype) -> Tensor:
            pieces = (Box(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in entry.chunks)
            readers = ((piece, partial(self._load_box, key, piece)) for piece in pieces)
            return assemble(box, readers, dtype, f"`{self.path}`, `{key}`")

        return StoredTensor(shape, entry.properties.dtype, load, (str(self.path), key))

    def _load_box(self, key: str, piece: Box, inner: Box) -> Tensor:
        """Read a box of a stored piece of a tensor."""
        value = self._load_piece(key, piece.offset)
        if not isinstance(value, Tensor) or tuple(value.shape) != piece.size:
            raise TPError(f"`{self.path}`: `{key}` is another tensor than `{METADATA}` says. The checkpoint is broken.")
        return narrow(value, inner)

    def _load_piece(self, key: str, offset: tuple[int, ...] | None) -> Any:
        info = self._pieces.get((key, offset))
        if info is None:
            raise TPError(f"`{self.path}`: `{METADATA}` does not say where `{key}` is. The checkpoint is broken.")
        if getattr(info, "transform_descriptors", None):
            raise TPError(
                f"`{self.path}`: `{key}` is compressed ({', '.join(info.transform_descriptors)}), which can't be read here."
            )
        if os.path.isabs(info.relative_path) or ".." in Path(info.relative_path).parts:
            raise TPError(f"`{self.path}`: `{key}` is outside of the folder, in {info.relative_path}.")
        try:
            with (self.path / info.relative_path).open("rb") as file:
                view: Any = view_of_file(file, info.offset, info.length)
                return torch.load(view, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            raise TPError(
                f"`{self.path}` lacks the file {info.relative_path}, which has `{key}`. The checkpoint is not complete."
            ) from None
        except (RuntimeError, EOFError, pickle.UnpicklingError, OSError) as error:
            raise TPError(
                f"`{self.path / info.relative_path}` can't be read at `{key}`: the file is broken or cut off ({first_line(error)})."
            ) from None

    def tree(self, top: str) -> Any:
        """Return what was saved under a name, nested as it was, with stored tensors in place of tensors."""
        root: dict[Any, Any] = {}
        for path, key in self.entries.items():
            if path[0] == top:
                node = root
                for name in path[:-1]:
                    node = node.setdefault(name, {})
                node[path[-1]] = self.value(key)
        return _with_lists(root.get(top, {}))


def _with_lists(tree: Any) -> Any:
    """Turn dicts whose keys are numbers back into the lists that they were."""
    if not isinstance(tree, dict):
        return tree
    values = {k: _with_lists(v) for k, v in tree.items()}
    if values and all(isinstance(k, int) for k in values):
        return [values[k] for k in sorted(values)]
    return values


def open_folder(path: Path, *, weights_only: bool = True) -> StoredCheckpoint:
    """Open the folder of a distributed checkpoint (see `open_checkpoint`); `TPError` if it is none, or is broken."""
    folder = DcpFolder(path)
    key = model_key(folder.metadata.state_dict_metadata)
    prefix = "" if key is None else f"{key}."
    values = {name: folder.value(name) for name in folder.metadata.state_dict_metadata if name.startswith(prefix)}
    model = {name.removeprefix(prefix): value for name, value in values.items() if isinstance(value, StoredTensor)}
    tops = {str(path[0]) for path in folder.entries if str(path[0]).startswith("optimizer_")}
    in_order = sorted(tops, key=lambda top: int(top.rpartition("_")[2]))
    optimizers = [{"state": {}, "param_groups": [], **folder.tree(top)} for top in in_order]
    rest: dict[str, Any] = {}
    if (path / META).is_file():
        apart = cache(partial(DcpFolder, path / SHARDED))  # with the DTensors of callbacks, if there are any
        loaded = load_file(path / META, weights_only=weights_only)
        rest = replace_references(loaded, lambda where, _: apart().value(where))
    return StoredCheckpoint("folder", path, model, optimizers, rest, _writer(path, key, rest))


def _writer(path: Path, key: str | None, rest: Mapping[str, Any]) -> str:
    if (path / PLAN).is_file() or (path / MANIFEST).is_file():
        return "lightning_tp"
    if key == "model":
        return "Lightning's FSDPStrategy" if "loops" in rest else "Fabric"
    return "Lightning's ModelParallelStrategy" if key == "state_dict" else "torch's distributed checkpoint"
