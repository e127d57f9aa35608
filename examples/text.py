"""Bytes of text files as language data that needs no download, and the bigram model that a trained model has to beat.

`ByteText` reads any files or folders; `StdlibText` reads the source of Python's own standard library, which is on every
machine: about 12 MB of code in Python 3.11, a little more or less in other versions. A token is a byte (vocabulary of 256).

The files are concatenated and split once: the first nine tenths are for training, the last tenth for validation. No
window crosses the border. Not covered: tokenizers, shuffling (see DataLoader), files larger than memory.
"""

from __future__ import annotations

import fnmatch
import operator
import os
import sysconfig
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_tp import TPError

VOCAB_SIZE = 256
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test"}


class ByteText(Dataset[dict[str, Tensor]]):
    """Windows of the bytes of text files: `{"tokens": (seq_len,), "targets": (seq_len,)}`, int64 in 0 .. 255.

    `targets` is `tokens` shifted by one; window i starts at byte i * stride of the split. `.bytes` is the whole split as
    a uint8 tensor of shape (num_bytes,).

    Args:
        paths: a file, a folder, or a list of them, read in this order. A folder is read with everything below it,
            sorted by path; names that start with a dot are skipped.
        seq_len: tokens in a window.
        split: "train" is the first nine tenths of the bytes, "val" the rest.
        pattern: which files of a folder to read.
        max_bytes: read at most this many bytes, before the split. None reads all.
        stride: bytes from the start of a window to the start of the next; `seq_len` unless given.

    Example:
        >>> text = ByteText(__file__, seq_len=16)
        >>> bytes(text[0]["tokens"].tolist())[3:]
        b'Bytes of text'
        >>> bytes(text[0]["targets"].tolist())[3:]
        b'ytes of text '
    """

    def __init__(
        self,
        paths: str | Path | Sequence[str | Path],
        seq_len: int,
        split: Literal["train", "val"] = "train",
        *,
        pattern: str = "*",
        max_bytes: int | None = None,
        stride: int | None = None,
    ) -> None:
        for name, value in {"seq_len": seq_len, "max_bytes": max_bytes, "stride": stride}.items():
            if value is not None and value < 1:
                raise TPError(f"{type(self).__name__}: `{name}={value}` is less than 1. Use a whole number above 0.")
        if split not in ("train", "val"):
            raise TPError(f'{type(self).__name__}: there is no `split={split!r}`. Use "train" or "val".')
        everything = _read(_files(paths, pattern), max_bytes)
        cut = len(everything) * 9 // 10
        self.bytes = everything[:cut] if split == "train" else everything[cut:]
        self.seq_len = seq_len
        self.stride = stride or seq_len
        if len(self.bytes) < seq_len + 1:
            raise TPError(
                f"{type(self).__name__}: a window of `seq_len={seq_len}` needs {seq_len + 1} bytes, and the {split!r} "
                f"split has {len(self.bytes)} of the {len(everything)} that were read. Use a shorter `seq_len`, more "
                f"files or a larger `max_bytes` (now {max_bytes})."
            )

    def __len__(self) -> int:
        return (len(self.bytes) - self.seq_len - 1) // self.stride + 1

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        index = operator.index(index)
        if not 0 <= index < len(self):  # an IndexError, because it is what ends a `for` loop over the dataset
            raise IndexError(f"{type(self).__name__}: window {index} is not in 0 .. {len(self) - 1}.")
        start = index * self.stride
        window = self.bytes[start : start + self.seq_len + 1].long()  # (seq_len + 1,)
        return {"tokens": window[:-1], "targets": window[1:]}


class StdlibText(ByteText):
    """`ByteText` over the `*.py` files of Python's standard library, without its tests and installed packages.

    The same on every rank and in every run of one Python version; arguments as in `ByteText`.

    Example:
        >>> train, val = (StdlibText(128, split, max_bytes=100_000) for split in ("train", "val"))
        >>> len(train.bytes), len(val.bytes), len(train)
        (90000, 10000, 703)
    """

    def __init__(
        self,
        seq_len: int,
        split: Literal["train", "val"] = "train",
        *,
        max_bytes: int | None = None,
        stride: int | None = None,
    ) -> None:
        library = Path(sysconfig.get_path("stdlib"))
        files = _walk(library, "*.py", _NOT_LIBRARY)
        if not files:
            raise TPError(f"StdlibText: `{library}` holds no *.py files. Use ByteText with a folder that has text.")
        super().__init__(files, seq_len, split, max_bytes=max_bytes, stride=stride)


def bigram_loss(
    train_bytes: Tensor | bytes,
    val_bytes: Tensor | bytes,
    *,
    smoothing: Sequence[float] = (1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0),
) -> float:
    """Return the validation loss of a bigram model of bytes: the mean of -ln p(next | byte), in nats per byte.

    p(next | byte) = (count(byte, next) + k) / (count(byte) + 256 k), with the k of `smoothing` that is best on the
    validation bytes themselves, in favour of the baseline.

    Args:
        train_bytes: uint8 of shape (num_bytes,), or bytes; the pairs to count.
        val_bytes: likewise; the bytes to predict, all but the first.
        smoothing: the values of k to try, all above 0.

    Example:
        >>> round(bigram_loss(b"ab" * 1000, b"ab" * 100), 3)
        0.0
    """
    if not smoothing or min(smoothing) <= 0:
        raise TPError(f"bigram_loss: `smoothing={tuple(smoothing)}` must hold numbers above 0, such as (0.1, 1).")
    train, val = _count_pairs("train_bytes", train_bytes), _count_pairs("val_bytes", val_bytes)
    row = train.sum(1, keepdim=True)  # (256, 1)
    losses = [-(val * ((train + k).log() - (row + VOCAB_SIZE * k).log())).sum() / val.sum() for k in smoothing]
    return min(float(loss) for loss in losses)


def _count_pairs(name: str, data: Tensor | bytes) -> Tensor:
    """Count how often each byte follows each: (num_bytes,) -> (256, 256), float64."""
    if len(data) < 2:
        raise TPError(f"bigram_loss: `{name}` has {len(data)} bytes, which make no pair. Give 2 or more.")
    flat = (data if isinstance(data, Tensor) else torch.frombuffer(bytearray(data), dtype=torch.uint8)).long()
    counts = torch.bincount(flat[:-1] * VOCAB_SIZE + flat[1:], minlength=VOCAB_SIZE**2)
    return counts.view(VOCAB_SIZE, VOCAB_SIZE).double()


def _files(paths: str | Path | Sequence[str | Path], pattern: str) -> list[Path]:
    """All files of `paths`, and those below its folders."""
    files: list[Path] = []
    for path in [Path(paths)] if isinstance(paths, (str, Path)) else [Path(p) for p in paths]:
        if not path.exists():
            raise TPError(f"ByteText: there is no `{path}` (seen from {Path.cwd()}). Give a path that exists.")
        found = _walk(path, pattern) if path.is_dir() else [path]
        if not found:
            raise TPError(f'ByteText: no file below `{path}` matches `pattern="{pattern}"`. Use another pattern.')
        files += found
    return files


def _walk(folder: Path, pattern: str, skip: Collection[str] = ()) -> list[Path]:
    """The files below `folder` whose names match, sorted by path, without hidden ones and the folders in `skip`."""
    found: list[Path] = []
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in skip and not name.startswith(".")]
        found += [Path(root, n) for n in names if fnmatch.fnmatch(n, pattern) and not n.startswith(".")]
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def _read(files: list[Path], max_bytes: int | None) -> Tensor:
    """Concatenate the files, at most `max_bytes` of them: (num_bytes,), uint8."""
    data = bytearray()
    for file in files:
        data += file.read_bytes()
        if max_bytes is not None and len(data) >= max_bytes:
            break
    data = data[:max_bytes]
    return torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
