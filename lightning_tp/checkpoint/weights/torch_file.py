"""Read and write files of `torch.save` with at most one tensor in memory."""

from __future__ import annotations

import pickle
import re
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from torch import Tensor

from lightning_tp._compat import fake_like, fake_tensors, offset_in_file, saved_without_data
from lightning_tp.checkpoint.weights.stored import Box, Stored, StoredTensors, bytes_of, in_memory, mapped, narrow, own, readable
from lightning_tp.errors import TPError

AT_ONCE = 2**24  # bytes that are written at once


def write_torch(tree: Any, path: Path) -> None:
    """`torch.save` of a nesting of dicts, lists and tuples in which tensors may be `Stored`: read and written one after the other."""
    leaves: list[Stored] = []
    bare = _without_data(tree, leaves, {})
    try:
        saved_without_data(bare, path)
    except (AttributeError, TypeError, pickle.PicklingError) as error:
        raise TPError(f"The checkpoint has something in it that does not pickle: {error}") from error
    except RuntimeError as error:  # of torch's writer
        text = str(error).partition("strerror: ")[2] or (str(error).splitlines() or [""])[0]
        raise TPError(f"`{path.parent}` can't be written to: {text}") from error
    with TorchFile(path) as file:
        for i, stored in enumerate(leaves):
            file.fill(i, stored)


class TorchFile:
    """A file of `torch.save` whose storages get their bytes afterwards. It is a zip file: their checksums come with the bytes."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> TorchFile:
        self._file = self.path.open("r+b")
        with zipfile.ZipFile(self._file) as archive:
            infos = {info.filename.partition("/data/")[2]: info for info in archive.infolist() if "/data/" in info.filename}
            directory = archive.start_dir
        self._records: dict[str, tuple[int, int, int]] = {}  # storage -> (begin of its local header, of its data, its size)
        for name, info in infos.items():
            self._file.seek(info.header_offset + 26)
            names, extra = struct.unpack("<HH", self._file.read(4))
            self._records[name] = (info.header_offset, info.header_offset + 30 + names + extra, info.file_size)
        self._central = self._central_headers(directory)
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()

    def _central_headers(self, at: int) -> dict[str, int]:
        """Where the central directory speaks of each storage."""
        found = {}
        self._file.seek(at)
        while (head := self._file.read(46))[:4] == b"PK\x01\x02":
            names, extra, comment = struct.unpack("<HHH", head[28:34])
            name = self._file.read(names).decode()
            found[name.partition("/data/")[2]] = at
            at += 46 + names + extra + comment
            self._file.seek(at)
        return found

    def fill(self, number: int, stored: Stored) -> None:
        """Write a tensor's bytes into the storage that was saved as the `number`-th."""
        header, begin, size = self._records[str(number)]
        assert size == stored.nbytes, f"storage {number} has {size} bytes, and the tensor {stored.nbytes}"
        value = stored.read()
        view = bytes_of(value)
        check = 0
        self._file.seek(begin)
        for i in range(0, len(view), AT_ONCE):
            check = zlib.crc32(view[i : i + AT_ONCE], check)
            self._file.write(view[i : i + AT_ONCE])
        self._check(header, self._central[str(number)], check, begin + size)

    def _check(self, header: int, central: int, check: int, end: int) -> None:
        self._file.seek(header + 6)
        flags = int.from_bytes(self._file.read(2), "little")
        places = [header + 14, central + 16]
        if flags & 8:  # again behind the data
            self._file.seek(end)
            places.append(end + 4 if self._file.read(4) == b"PK\x07\x08" else end)
        for place in places:
            self._file.seek(place)
            self._file.write(check.to_bytes(4, "little"))


def _without_data(node: Any, leaves: list[Stored], made: dict[Any, Tensor]) -> Any:
    """The same nesting with tensors without memory; what they stand for goes to `leaves`, in the order in which `torch.save` meets them."""
    if isinstance(node, Tensor):
        node = in_memory(node)
    if isinstance(node, Stored):
        key = (node.key, node.dtype) if node.key is not None else None
        if key is not None and key in made:
            return made[key]
        fake = fake_like(node.shape, node.dtype)
        leaves.append(node)
        if key is not None:
            made[key] = fake
        return fake
    if isinstance(node, dict):
        items = {k: _without_data(v, leaves, made) for k, v in node.items()}
        return items if type(node) is dict else type(node)(items)
    if type(node) in (list, tuple):
        return type(node)(_without_data(v, leaves, made) for v in node)
    return node


def load_file(path: Path, *, weights_only: bool = True) -> Any:
    """What `torch.save` wrote, with `Stored` in the place of tensors, which stay on disk.

    Raises:
        TPError: if it is no such file, or has classes in it that `weights_only` refuses.
    """
    try:
        with readable(path):
            if is_zipfile(path):  # what `torch.save` writes since 1.6: tensors have a place there
                with fake_tensors():
                    return _as_stored(torch.load(path, map_location="cpu", weights_only=weights_only), path)
            return _as_stored(torch.load(path, map_location="cpu", weights_only=weights_only), None)
    except pickle.UnpicklingError as error:
        raise _refused(path, error, weights_only) from None
    except TPError:
        raise
    except Exception as error:  # of whatever stands there in the place of a checkpoint
        text = (str(error).splitlines() or [""])[0]
        raise TPError(
            f"`{path}` is no checkpoint that `torch.load` can read: {type(error).__name__} {text}".rstrip() + "."
        ) from None


def _refused(path: Path, error: Exception, weights_only: bool) -> TPError:
    text = str(error)
    if weights_only and (match := re.search(r"Unsupported (?:global: GLOBAL|class) (\S+)", text)):
        return TPError(
            f"`{path}` has the class {match[1]} in it, which is no plain data, so it is not loaded. If you trust who wrote it: "
            "`weights_only=False`, on the command line `--trust`."
        )
    return TPError(f"`{path}` is no checkpoint that `torch.load` can read: `torch.save` has not written it, or it is damaged.")


def _as_stored(node: Any, path: Path | None) -> Any:
    if isinstance(node, Tensor):
        if path is None:
            return in_memory(node)
        offset = offset_in_file(node)
        if offset is None:
            raise TPError(
                f"`{path}` has a {type(node).__name__} in it that does not lie there as plain numbers, and can't be read here."
            )
        return _in_file(node, path, offset)
    if isinstance(node, dict):
        return {k: _as_stored(v, path) for k, v in node.items()}
    if type(node) in (list, tuple):
        return type(node)(_as_stored(v, path) for v in node)
    return node


def _in_file(fake: Tensor, path: Path, offset: int) -> Stored:
    """The tensor whose storage begins at this byte of the file."""
    shape, stride, dtype = tuple(fake.shape), fake.stride(), fake.dtype
    start = offset + int(fake.storage_offset()) * dtype.itemsize
    span: int = 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) if all(shape) else 0

    def load(box: Box | None, to: torch.dtype) -> Tensor:
        if not span:
            return torch.empty(box[1] if box else shape, dtype=to)
        with mapped(path, start, span * dtype.itemsize, dtype) as flat:
            return own(narrow(flat.as_strided(shape, stride), box), to)

    return Stored(shape, dtype, load, (str(path), start, shape, stride, dtype))


def open_file(path: Path, *, weights_only: bool = True) -> StoredTensors:
    """See `open_checkpoint`: a Lightning checkpoint in one file, or a state dict."""
    tree = load_file(path, weights_only=weights_only)
    if not isinstance(tree, dict):
        kind = "Tensor" if isinstance(tree, Stored) else type(tree).__name__
        raise TPError(f"`{path}` has a {kind} in it; a checkpoint is a dict of tensors, or one with a `state_dict`.")
    key = next((k for k in ("state_dict", "model", "module") if isinstance(tree.get(k), dict)), None)
    if key is None:
        model = {k: v for k, v in tree.items() if isinstance(v, Stored)}
        if not model:
            raise TPError(f"`{path}` has no tensors in it: {', '.join(map(str, list(tree)[:6]))}.")
        return StoredTensors("file", path, model, [], {k: v for k, v in tree.items() if k not in model}, "torch.save")
    optimizers = tree.get("optimizer_states") or []
    rest = {k: v for k, v in tree.items() if k not in (key, "optimizer_states")}
    by = "a Lightning Trainer" if "pytorch-lightning_version" in tree else "torch.save"
    return StoredTensors("file", path, {k: v for k, v in tree[key].items() if isinstance(v, Stored)}, list(optimizers), rest, by)
