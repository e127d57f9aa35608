"""Read a folder written by `torch.distributed.checkpoint`, tensor by tensor."""

from __future__ import annotations

import io
import math
import os
import pickle
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from lightning_tp.checkpoint.safe import read_metadata
from lightning_tp.checkpoint.storage import StoragePath
from lightning_tp.checkpoint.weights.stored import ELSEWHERE, META, METADATA, Box, Stored, StoredTensors, narrow
from lightning_tp.checkpoint.weights.torch_file import load_file
from lightning_tp.errors import TPError


class _Window(io.RawIOBase):
    """A part of a file as a file, so that `torch.load` reads a tensor's bytes to where they stay."""

    def __init__(self, path: Path, offset: int, length: int) -> None:
        self.name = str(path)
        self._fd = os.open(path, os.O_RDONLY)
        self._offset, self._length, self._at = offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, to: int, whence: int = os.SEEK_SET) -> int:
        self._at = to + (0, self._at, self._length)[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        view = view[: max(0, min(len(view), self._length - self._at))]
        done = 0
        while done < len(view):  # a call reads 2 GiB at most
            n = os.preadv(self._fd, [view[done:]], self._offset + self._at + done)
            if not n:
                break
            done += n
        self._at += done
        return done

    def close(self) -> None:
        if not self.closed:
            os.close(self._fd)
        super().close()


def model_key(names: Iterable[str]) -> str | None:
    """Under what name a model's state dict was saved, from the keys of a folder; see `Folder.model_key`."""
    names = list(names)
    return next((k for k in ("state_dict", "model") if any(name.startswith(f"{k}.") for name in names)), None)


class Folder:
    """A folder of torch's distributed checkpoint.

    Example:
        >>> Folder("no/such/folder")
        Traceback (most recent call last):
        ...
        lightning_tp.errors.TPError: `no/such/folder` is no distributed checkpoint: there is no `.metadata` in it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.metadata = read_metadata(StoragePath(path))

    @cached_property
    def _where(self) -> dict[tuple[str, tuple[int, ...] | None], Any]:
        data: Any = self.metadata.storage_data or {}
        return {(i.fqn, tuple(i.offset) if i.offset is not None else None): info for i, info in data.items()}

    @cached_property
    def entries(self) -> dict[tuple[str | int, ...], str]:
        """The place in the nested state dict that was saved -> key."""
        planner: Mapping[str, Any] = self.metadata.planner_data or {}
        keys = self.metadata.state_dict_metadata
        return {tuple(planner[key]) if key in planner else (key,): key for key in keys}

    @cached_property
    def model_key(self) -> str | None:
        """Under what name the model's state dict was saved: "state_dict" by Trainers, "model" by FSDPStrategy and Fabric; None: at the top."""
        return model_key(self.metadata.state_dict_metadata)

    def value(self, key: str) -> Any:
        """A `Stored` for a tensor, anything else itself.

        Raises:
            TPError: if a file is missing or broken.
        """
        there = self.metadata.state_dict_metadata[key]
        if isinstance(there, TensorStorageMetadata):
            meta = there

            def load(box: Box | None, dtype: torch.dtype) -> Tensor:
                return self._assemble(key, meta, box, dtype)

            return Stored(tuple(meta.size), meta.properties.dtype, load, (str(self.path), key))
        return self._load_piece(key, None)

    def _load_piece(self, key: str, offset: tuple[int, ...] | None) -> Any:
        info = self._where.get((key, offset))
        if info is None:
            raise TPError(f"`{self.path}`: `{METADATA}` does not say where `{key}` lies. The checkpoint is broken.")
        if getattr(info, "transform_descriptors", None):
            raise TPError(
                f"`{self.path}`: `{key}` is compressed ({', '.join(info.transform_descriptors)}), which can't be read here."
            )
        if os.path.isabs(info.relative_path) or ".." in Path(info.relative_path).parts:
            raise TPError(f"`{self.path}`: `{key}` lies outside of the folder, in {info.relative_path}.")
        try:
            with _Window(self.path / info.relative_path, info.offset, info.length) as window:
                return torch.load(window, map_location="cpu", weights_only=True)  # type: ignore[arg-type]
        except FileNotFoundError:
            raise TPError(
                f"`{self.path}` lacks the file {info.relative_path}, which has `{key}`. The checkpoint is not complete."
            ) from None
        except (RuntimeError, EOFError, pickle.UnpicklingError, OSError) as error:
            raise TPError(
                f"`{self.path / info.relative_path}` can't be read at `{key}`: the file is broken or cut off ({str(error).splitlines()[0]})."
            ) from None

    def _assemble(self, key: str, meta: TensorStorageMetadata, box: Box | None, dtype: torch.dtype) -> Tensor:
        whole = ((0,) * len(meta.size), tuple(meta.size))
        offset, size = box or whole
        covered, out = 0, None
        for chunk in meta.chunks:
            at, length = tuple(chunk.offsets), tuple(chunk.sizes)
            low = [max(a, b) for a, b in zip(at, offset, strict=True)]
            high = [min(a + n, b + m) for a, n, b, m in zip(at, length, offset, size, strict=True)]
            if any(a >= b for a, b in zip(low, high, strict=True)):
                continue
            extent = tuple(b - a for a, b in zip(low, high, strict=True))
            piece = self._load_piece(key, at)
            if not isinstance(piece, Tensor) or tuple(piece.shape) != length:
                raise TPError(f"`{self.path}`: `{key}` is another tensor than `{METADATA}` says. The checkpoint is broken.")
            piece = narrow(piece, (tuple(a - b for a, b in zip(low, at, strict=True)), extent))
            if extent == size:
                return piece.to(dtype).contiguous()
            out = torch.empty(size, dtype=dtype) if out is None else out
            narrow(out, (tuple(a - b for a, b in zip(low, offset, strict=True)), extent)).copy_(piece)
            covered += math.prod(extent)
        if covered < math.prod(size):
            raise TPError(f"`{self.path}` has {covered} of {math.prod(size)} elements of `{key}`. The checkpoint is not complete.")
        return torch.empty(size, dtype=dtype) if out is None else out

    def tree(self, top: str) -> Any:
        """What was saved under this name, nested as it was, with `Stored` in the place of tensors."""
        root: dict[Any, Any] = {}
        for where, key in self.entries.items():
            if where[0] == top:
                _put(root, where, self.value(key))
        return _with_lists(root.get(top, {}))


def _put(tree: dict[Any, Any], where: tuple[str | int, ...], value: Any) -> None:
    for name in where[:-1]:
        tree = tree.setdefault(name, {})
    tree[where[-1]] = value


def _with_lists(tree: Any) -> Any:
    """Dicts whose keys are numbers back into the lists that they were."""
    if not isinstance(tree, dict):
        return tree
    values = {k: _with_lists(v) for k, v in tree.items()}
    if values and all(isinstance(k, int) for k in values):
        return [values[k] for k in sorted(values)]
    return values


def open_folder(path: Path, *, weights_only: bool = True) -> StoredTensors:
    """See `open_checkpoint`."""
    folder = Folder(path)
    key = folder.model_key
    model: dict[str, Stored] = {}
    for name in folder.metadata.state_dict_metadata:
        if key is None or name.startswith(f"{key}."):
            value = folder.value(name)
            if isinstance(value, Stored):
                model[name if key is None else name[len(key) + 1 :]] = value
    tops = sorted(
        {str(w[0]) for w in folder.entries if str(w[0]).startswith("optimizer_")}, key=lambda t: int(t.rpartition("_")[2])
    )
    optimizers = [{"state": {}, "param_groups": [], **folder.tree(top)} for top in tops]
    rest: dict[str, Any] = {}
    if (path / META).is_file():
        rest = fill_marks(load_file(path / META, weights_only=weights_only), path)
    by = (
        "lightning_tp" if (path / "plan.json").is_file() or (path / "manifest.json").is_file()
        else "Lightning's FSDPStrategy" if key == "model" and "loops" in rest
        else "Lightning's ModelParallelStrategy" if key == "state_dict"
        else "Fabric" if key == "model"
        else "torch's distributed checkpoint"
    )  # fmt: skip
    return StoredTensors("folder", path, model, optimizers, rest, by)


def fill_marks(tree: Any, path: Path) -> Any:
    """With `Stored` where a callback's tensors lie in a folder of their own."""
    folder: list[Folder] = []

    def fill(node: Any) -> Any:
        if isinstance(node, dict):
            if isinstance(where := node.get(ELSEWHERE), str):
                if not folder:
                    folder.append(Folder(path / ELSEWHERE))
                return folder[0].value(where)
            return {k: fill(v) for k, v in node.items()}
        return type(node)(fill(v) for v in node) if type(node) in (list, tuple) else node

    return fill(tree)
