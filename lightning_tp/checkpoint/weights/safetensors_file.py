"""Read and write safetensors, one file or several with an index.

The library `safetensors` reads: it checks the header against the file, and maps slices. It writes a file from tensors that are all in memory
(`serialize_file`), as Hugging Face's and torch's writers on top of it do (`HuggingFaceStorageWriter`). Here they are read and written one
after the other, so the few lines that write the format are our own; huggingface_hub says which tensor goes into which file.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_tp.checkpoint.weights.stored import StoredTensor
from lightning_tp.core.boxes import Box
from lightning_tp.errors import TPError

INDEX = "model.safetensors.index.json"
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "BOOL": torch.bool, "C64": torch.complex64,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_CHUNK = 2**24  # bytes that are written at once


def _needs(package: str) -> TPError:
    return TPError(f"safetensors files need the package {package}: pip install 'lightning-tp[hf]'.")


def write_safetensors(folder: Path, tensors: Mapping[str, StoredTensor], limit: int) -> None:
    """Write `model.safetensors`, or several files of at most `limit` bytes (but one tensor each) with an index, as Hugging Face names them.

    `TPError` if safetensors has no such dtype.
    """
    try:
        from huggingface_hub import split_state_dict_into_shards_factory
    except ImportError:
        raise _needs("huggingface_hub") from None
    unknown = [f"`{n}` ({s.dtype})" for n, s in tensors.items() if s.dtype not in NAMES]
    if unknown:
        raise TPError(f"safetensors can't store the dtype of {', '.join(unknown[:4])}. Use `format='torch'`.")
    plan = split_state_dict_into_shards_factory(
        dict(tensors),
        get_storage_size=lambda stored: stored.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=limit,
    )
    for file, names in plan.filename_to_tensors.items():
        _write_file(folder / file, {name: tensors[name] for name in names})
    if plan.is_sharded:
        total = {**plan.metadata, "total_parameters": sum(stored.numel for stored in tensors.values())}
        index = {"metadata": total, "weight_map": dict(sorted(plan.tensor_to_filename.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _write_file(path: Path, tensors: Mapping[str, StoredTensor]) -> None:
    """Write the length of the header, the header, and the tensors one after the other."""
    in_order = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)  # so that each is aligned
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, stored in in_order:
        header[name] = {"dtype": NAMES[stored.dtype], "shape": list(stored.shape), "data_offsets": [at, at + stored.nbytes]}
        at += stored.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, stored in in_order:
            value = stored.read()
            view = _bytes_of(value)
            for i in range(0, len(view), _CHUNK):
                file.write(view[i : i + _CHUNK])
            del value, view


def _bytes_of(t: Tensor) -> memoryview:
    """Return the memory of a contiguous tensor on the CPU, of any dtype; valid for as long as the tensor is."""
    n = t.numel() * t.element_size()
    assert t.is_contiguous() and t.device.type == "cpu"
    return memoryview((ctypes.c_char * n).from_address(t.data_ptr())).cast("B") if n else memoryview(b"")


def is_safetensors(path: Path) -> bool:
    """Return whether it is a file of safetensors, or a folder with such (as Hugging Face writes them)."""
    return bool(_files_of(path))


def _files_of(path: Path) -> list[Path]:
    if path.is_file():
        is_index = path.name.endswith(".safetensors.index.json")
        return _files_of_index(path) if is_index else [path] if path.suffix == ".safetensors" else []
    if (path / INDEX).is_file():
        return _files_of_index(path / INDEX)
    if (path / "model.safetensors").is_file():
        return [path / "model.safetensors"]
    return sorted(path.glob("*.safetensors"))


def _files_of_index(index: Path) -> list[Path]:
    try:
        files = dict.fromkeys(json.loads(index.read_text())["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise TPError(f"`{index}` is no index of safetensors: {type(error).__name__}: {error}.") from None
    if any(Path(name).name != name for name in files):
        raise TPError(f"`{index}` names files outside of its folder.")
    return [index.parent / name for name in files]


def open_safetensors(path: Path) -> dict[str, StoredTensor]:
    """Open a file of safetensors, the index of several, or a folder; a box of a tensor is read without the rest of it.

    `TPError` if a file is missing or broken, or a tensor is in two.
    """
    found: dict[str, StoredTensor] = {}
    for file in _files_of(path):
        for name, stored in _open_file(file).items():
            if name in found:
                raise TPError(f"`{path}` has `{name}` in two files.")
            found[name] = stored
    if not found:
        raise TPError(
            f"`{path}` has no safetensors: it should be a `.safetensors` file, or a folder with `model.safetensors` or `{INDEX}`."
        )
    return found


def _open_file(path: Path) -> dict[str, StoredTensor]:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise _needs("safetensors") from None
    try:
        with path.open("rb"):  # whether it may be read; the library does not say it as Python does
            pass
        file: Any = safe_open(path, framework="pt")
    except FileNotFoundError:
        raise TPError(f"`{path}` is missing, and the folder's index names it.") from None
    except SafetensorError as error:
        raise TPError(f"`{path}` is no safetensors file, or it is cut off ({error}; it has {path.stat().st_size} bytes).") from None
    return {name: _stored(file, path, name) for name in file.keys()}  # noqa: SIM118


def _stored(file: Any, path: Path, name: str) -> StoredTensor:
    entry = file.get_slice(name)
    shape = tuple(entry.get_shape())
    if entry.get_dtype() not in DTYPES:
        raise TPError(f"`{path}`: `{name}` has dtype {entry.get_dtype()}, which torch does not have.")
    dtype = DTYPES[entry.get_dtype()]

    def load(box: Box, to: torch.dtype) -> Tensor:
        out = torch.empty(box.size, dtype=to)
        if box.numel:
            slices = tuple(slice(offset, offset + size) for offset, size in zip(*box, strict=True))
            out.copy_(entry[slices] if shape else file.get_tensor(name))
        return out

    return StoredTensor(shape, dtype, load, (str(path), name) if all(shape) else None)
