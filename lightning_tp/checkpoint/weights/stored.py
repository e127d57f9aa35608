"""A tensor that is stored in a checkpoint: name, shape, dtype, and how to read any slice of it."""

from __future__ import annotations

import ctypes
import errno
import math
import mmap
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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


@dataclass
class StoredTensors:
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
