"""Read and write safetensors, one file or several with an index."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_tp.checkpoint.weights.stored import DTYPES, INDEX, Box, Stored, bytes_of, mapped, narrow, own
from lightning_tp.checkpoint.weights.torch_file import AT_ONCE
from lightning_tp.errors import TPError

NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_safetensors(folder: Path, tensors: Mapping[str, Stored], limit: int) -> None:
    """`model.safetensors`, or several files of at most `limit` bytes (but one tensor each) with an index, as Hugging Face names them."""
    unknown = [f"`{n}` ({s.dtype})" for n, s in tensors.items() if s.dtype not in NAMES]
    if unknown:
        raise TPError(f"safetensors has no word for the dtype of {', '.join(unknown[:4])}. Use `format='torch'`.")
    shards: list[dict[str, Stored]] = [{}]
    held = 0
    for name, stored in tensors.items():
        if shards[-1] and held + stored.nbytes > limit:
            shards.append({})
            held = 0
        shards[-1][name] = stored
        held += stored.nbytes
    if len(shards) == 1:
        _write_file(folder / "model.safetensors", shards[0])
        return
    files = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for file, shard in zip(files, shards, strict=True):
        _write_file(folder / file, shard)
    weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
    total = {"total_size": sum(s.nbytes for s in tensors.values()), "total_parameters": sum(s.numel for s in tensors.values())}
    (folder / INDEX).write_text(json.dumps({"metadata": total, "weight_map": dict(sorted(weight_map.items()))}, indent=2) + "\n")


def _write_file(path: Path, tensors: Mapping[str, Stored]) -> None:
    in_order = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)  # so that each is aligned
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, s in in_order:
        header[name] = {"dtype": NAMES[s.dtype], "shape": list(s.shape), "data_offsets": [at, at + s.nbytes]}
        at += s.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for _, stored in in_order:
            value = stored.read()
            view = bytes_of(value)
            for i in range(0, len(view), AT_ONCE):
                f.write(view[i : i + AT_ONCE])
            del value, view


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
