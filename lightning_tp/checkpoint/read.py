"""What lies in a checkpoint, without reading it into memory: every tensor is a `Stored`, which is read when it is asked for.

It knows folders of torch's distributed checkpoint (ours, and those that Lightning's ModelParallelStrategy and FSDPStrategy write), single
files of `torch.save`, and files and folders of safetensors. Nothing in a checkpoint is executed: the pickle of a folder's `.metadata` may name
torch's own metadata classes only, and everything else is read with `weights_only`.
"""

from __future__ import annotations

import ctypes
import errno
import io
import json
import math
import mmap
import os
import pickle
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from lightning_tp._compat import fake_tensors, offset_in_file
from lightning_tp.checkpoint.place import Place
from lightning_tp.checkpoint.safe import read_metadata
from lightning_tp.errors import TPError

Box = tuple[tuple[int, ...], tuple[int, ...]]  # (offset, size) in a whole tensor
METADATA = ".metadata"  # of torch's distributed checkpoint
META = "meta.pt"  # what is not a tensor of the model or the optimizers, as in Lightning
ELSEWHERE = "lightning_tp_sharded"  # tensors of callbacks: see `sharded.py`
INDEX = "model.safetensors.index.json"

DTYPES = {  # of safetensors
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "BOOL": torch.bool, "C64": torch.complex64,
}  # fmt: skip


@dataclass(frozen=True)
class Stored:
    """A tensor on disk.

    Args:
        shape: its whole shape.
        dtype: as it lies there.
        load: reads a box of it, or with None all, as a contiguous tensor on the CPU; perhaps in a dtype that it is told.
        key: two that have the same one are the same memory (tied weights in one file).
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[Box | None, torch.dtype], Tensor] = field(repr=False, compare=False)
    key: Any = field(default=None, repr=False)

    @property
    def numel(self) -> int:
        """Its elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Its bytes."""
        return self.numel * self.dtype.itemsize

    def read(self, box: Box | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """All of it, or the box at `box`; the caller owns the memory, of which there is one copy, or a part more while it is read."""
        return self.load(box, dtype or self.dtype)

    def cast(self, dtype: torch.dtype | None) -> Stored:
        """The same in another dtype, if it has floating-point numbers."""
        if dtype is None or not self.dtype.is_floating_point or dtype == self.dtype:
            return self
        return Stored(self.shape, dtype, self.load, self.key)


def in_memory(t: Tensor) -> Stored:
    """A tensor that is there already, as one that is on disk."""
    t = t.detach()
    storage = t.untyped_storage()
    key = (storage.data_ptr(), t.storage_offset(), tuple(t.shape), t.stride(), t.dtype) if storage.nbytes() else None
    return Stored(tuple(t.shape), t.dtype, lambda box, dtype: narrow(t, box).to("cpu", dtype).contiguous(), key)


def narrow(t: Tensor, box: Box | None) -> Tensor:
    """The view of a box."""
    if box is not None:
        for dim, (offset, size) in enumerate(zip(*box, strict=True)):
            t = t.narrow(dim, offset, size)
    return t


def bytes_of(t: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU; valid for as long as the tensor is."""
    n = t.numel() * t.element_size()
    assert t.is_contiguous() and t.device.type == "cpu"
    return memoryview((ctypes.c_char * n).from_address(t.data_ptr())).cast("B") if n else memoryview(b"")


# ------------------------------------------------------------------------------------------------------ kinds of checkpoints


@dataclass
class Contents:
    """What a checkpoint has.

    Args:
        kind: "folder", "file" or "safetensors".
        path: where.
        model: the model's tensors by their names in its state dict.
        optimizers: for each one {"state": {name or number: {field: Stored or a value}}, "param_groups": [..]}.
        rest: everything else (epoch, step, loops, callbacks, hyperparameters, ..); with `Stored` in the place of tensors.
        by: who wrote it, as far as one can see.
    """

    kind: str
    path: Path
    model: dict[str, Stored]
    optimizers: list[dict[str, Any]] = field(default_factory=list)
    rest: dict[str, Any] = field(default_factory=dict)
    by: str = ""

    @property
    def nbytes(self) -> int:
        """Of the model's tensors, tied ones once where that is known."""
        return sum(s.nbytes for s in unique(self.model).values())


def unique(tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """Without the later names of tensors that have several in one memory."""
    seen: set[Any] = set()
    first: dict[str, Stored] = {}
    for name, stored in tensors.items():
        if stored.key is None or stored.key not in seen:
            first[name] = stored
        if stored.key is not None:
            seen.add(stored.key)
    return first


def open_checkpoint(path: str | Path, *, weights_only: bool = True) -> Contents:
    """Look into a checkpoint of any of these kinds; no tensor is read.

    Args:
        path: a folder or a file.
        weights_only: False lets `torch.load` run what `meta.pt` or a single file has pickled (classes of your own in hyperparameters). Only for
            checkpoints that you trust.

    Raises:
        TPError: if it is none, or is broken.
    """
    path = local(path)
    with readable(path):
        if (path / METADATA).is_file():
            return open_folder(path, weights_only=weights_only)
        if is_safetensors(path):
            return Contents("safetensors", path, open_safetensors(path), by="safetensors")
        if path.is_file():
            return open_file(path, weights_only=weights_only)
        raise TPError(f"`{path}` is no checkpoint: {_what_it_is(path)}")


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """While this lasts, what may not be read is a `TPError`."""
    try:
        yield
    except PermissionError as error:
        raise TPError(f"`{error.filename or path}` can't be read: {error.strerror}.") from None


def local(path: str | Path) -> Path:
    """A path on this machine's file system, of which there may be nothing.

    Raises:
        TPError: if it can't be one.

    Example:
        >>> local("s3://runs/last.ckpt")
        Traceback (most recent call last):
        ...
        lightning_tp.errors.TPError: `s3://runs/last.ckpt` is a URL, and this takes files of this machine. Copy it here, or name another path.
    """
    text = os.fspath(path)
    if re.match(r"[A-Za-z][\w+.-]*:/", text):  # `Path` makes one stroke of two
        raise TPError(f"`{text}` is a URL, and this takes files of this machine. Copy it here, or name another path.")
    if not text or "\0" in text:
        raise TPError(f"{text!r} is no path.")
    try:
        os.lstat(text)
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES):
            raise TPError(f"`{text[:200]}{'..' if len(text) > 200 else ''}` can't be opened: {error.strerror}.") from None
    if os.path.isdir(text) and not os.access(text, os.R_OK | os.X_OK):
        raise TPError(f"`{text}` can't be opened: no permission.")
    return Path(path)


def _what_it_is(path: Path) -> str:
    if path.exists() and not path.is_dir():
        return "it is neither a file nor a folder."
    if not path.exists():
        near = sorted(p.name for p in path.parent.iterdir()) if path.parent.is_dir() else []
        return "there is no such file or folder." + (f" Beside it: {', '.join(near[:6])}." if near else "")
    has = sorted(p.name for p in path.iterdir())
    if any(name.endswith(".distcp") for name in has):
        return f"it has shards but no `{METADATA}`, which is written last: its save did not come to its end."
    inside = [name for name in has if (path / name / METADATA).is_file() or name.endswith((".ckpt", ".safetensors"))]
    if inside:
        return f"the folder has {', '.join(inside[:4])} in it. Name one of these."
    return (
        f"a folder without `{METADATA}` (a distributed checkpoint) and without `model.safetensors`"
        + (f"; it has {', '.join(has[:6])}." if has else "; it is empty.")
    )  # fmt: skip


# ------------------------------------------------------------------------------------------ folders of distributed checkpoint


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
        self.metadata = read_metadata(Place(path))

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


def open_folder(path: Path, *, weights_only: bool = True) -> Contents:
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
    return Contents("folder", path, model, optimizers, rest, by)


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


# ----------------------------------------------------------------------------------------------------- files of torch.save


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


def own(view: Tensor, dtype: torch.dtype) -> Tensor:
    """A contiguous tensor with memory of its own."""
    return torch.empty(view.shape, dtype=dtype).copy_(view)


class mapped:
    """A part of a file as a flat tensor, whose pages come from the file and go when it is left.

    Raises:
        TPError: if the file is too short.
    """

    def __init__(self, path: Path, start: int, nbytes: int, dtype: torch.dtype) -> None:
        self.path, self.start, self.nbytes, self.dtype = path, start, nbytes, dtype

    def __enter__(self) -> Tensor:
        before = self.start % mmap.ALLOCATIONGRANULARITY
        with self.path.open("rb") as f:
            if os.fstat(f.fileno()).st_size < self.start + self.nbytes:
                raise TPError(f"`{self.path}` is cut off: a tensor should end at byte {self.start + self.nbytes}.")
            self._map = mmap.mmap(f.fileno(), self.nbytes + before, access=mmap.ACCESS_COPY, offset=self.start - before)
        raw = torch.frombuffer(self._map, dtype=torch.uint8)[before:]
        if self.start % self.dtype.itemsize:  # not aligned: a copy is
            raw = raw.clone()
        return raw.view(self.dtype)

    def __exit__(self, *_: Any) -> None:
        del self._map  # unmapped with the last tensor that looks at it


def open_file(path: Path, *, weights_only: bool = True) -> Contents:
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
        return Contents("file", path, model, [], {k: v for k, v in tree.items() if k not in model}, "torch.save")
    optimizers = tree.get("optimizer_states") or []
    rest = {k: v for k, v in tree.items() if k not in (key, "optimizer_states")}
    by = "a Lightning Trainer" if "pytorch-lightning_version" in tree else "torch.save"
    return Contents("file", path, {k: v for k, v in tree[key].items() if isinstance(v, Stored)}, list(optimizers), rest, by)


# ---------------------------------------------------------------------------------------------------------- safetensors


def is_safetensors(path: Path) -> bool:
    """Whether it is a file of safetensors, or a folder with such (as Hugging Face writes them)."""
    return (
        (path.suffix == ".safetensors" and path.is_file()) or path.name.endswith(".safetensors.index.json") or bool(_files_of(path))
    )


def _files_of(path: Path) -> list[Path]:
    if path.name.endswith(".safetensors.index.json") and path.is_file():
        return _of_index(path)
    if path.suffix == ".safetensors" and not path.is_dir():
        return [path]
    if (path / INDEX).is_file():
        return _of_index(path / INDEX)
    if (path / "model.safetensors").is_file():
        return [path / "model.safetensors"]
    return sorted(path.glob("*.safetensors")) if path.is_dir() else []


def _of_index(index: Path) -> list[Path]:
    try:
        files = dict.fromkeys(json.loads(index.read_text())["weight_map"].values())
    except (json.JSONDecodeError, KeyError, AttributeError) as error:
        raise TPError(f"`{index}` is no index of safetensors: {error}.") from None
    if any(Path(name).name != name for name in files):
        raise TPError(f"`{index}` names files outside of its folder.")
    return [index.parent / name for name in files]


def open_safetensors(path: str | Path, count: Callable[[int], None] | None = None) -> dict[str, Stored]:
    """The tensors of a file of safetensors or of a folder with such; a box of one is read without the rest of it.

    Args:
        path: the file, the folder, or the index.
        count: told how many bytes each read takes.

    Raises:
        TPError: if a file is missing or broken, or a tensor stands in two.
    """
    found: dict[str, Stored] = {}
    for file in _files_of(Path(path)):
        for name, stored in _of_file(file, count or (lambda n: None)):
            if name in found:
                raise TPError(f"`{path}` has `{name}` in two files.")
            found[name] = stored
    if not found:
        raise TPError(
            f"`{path}` has no safetensors: it should be a `.safetensors` file, or a folder with `model.safetensors` or `{INDEX}`."
        )
    return found


def _of_file(file: Path, count: Callable[[int], None]) -> Iterator[tuple[str, Stored]]:
    try:
        size = file.stat().st_size
        with file.open("rb") as f:
            length = int.from_bytes(f.read(8), "little")
            if length > min(size - 8, 100_000_000):
                raise TPError(
                    f"`{file}` is no safetensors file, or cut off: its header should have {length} bytes, the file has {size}."
                )
            header = json.loads(f.read(length))
        entries = [(n, DTYPES[e["dtype"]], tuple(e["shape"]), *e["data_offsets"]) for n, e in header.items() if n != "__metadata__"]
    except FileNotFoundError:
        raise TPError(f"`{file}` is not there, and the folder's index names it.") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, TPError):
            raise
        raise TPError(f"`{file}` is no safetensors file: its header can't be read ({error}).") from None
    for name, dtype, shape, start, stop in entries:
        if stop - start != math.prod(shape) * dtype.itemsize or 8 + length + stop > size:
            raise TPError(
                f"`{file}`: `{name}` should end at byte {8 + length + stop}, and the file has {size}. It is cut off or broken."
            )
        yield name, _of_bytes(file, 8 + length + start, shape, dtype, count)


def _of_bytes(file: Path, start: int, shape: tuple[int, ...], dtype: torch.dtype, count: Callable[[int], None]) -> Stored:
    def load(box: Box | None, to: torch.dtype) -> Tensor:
        size = box[1] if box else shape
        count(math.prod(size) * dtype.itemsize)
        if not math.prod(size):
            return torch.empty(size, dtype=to)
        low, high = 0, math.prod(shape)
        if box and shape:  # the rows of dim 0 that it is about
            row = math.prod(shape[1:])
            low, high = box[0][0] * row, (box[0][0] + size[0]) * row
        with mapped(file, start + low * dtype.itemsize, (high - low) * dtype.itemsize, dtype) as flat:
            view = flat.view(-1, *shape[1:]) if shape else flat.view(())
            return own(narrow(view, ((0, *box[0][1:]), size) if box and shape else None), to)

    return Stored(shape, dtype, load, (str(file), start, shape) if math.prod(shape) else None)
