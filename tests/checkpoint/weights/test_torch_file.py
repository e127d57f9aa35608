"""Files of `torch.save`: read where they are, written one tensor after the other, byte by byte as torch writes them."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lightning_tp as ltp
from benchmarks.checkpoint_memory import Peak
from lightning_tp.checkpoint.weights.stored import StoredTensor, in_memory
from lightning_tp.checkpoint.weights.torch_file import load_file, open_file, write_torch
from lightning_tp.core.boxes import Box
from tests.checkpoint.weights.counted import CountedReads


class Mine:
    pass


DTYPES = [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.uint16, torch.bool, torch.complex64]


def test_files_of_torch_save(tmp_path: Path) -> None:
    """Views, tied weights, empty and scalar tensors, the old format; classes only where they are trusted."""
    base = torch.randn(6, 4)
    tensors = {
        "a": base,
        "tied": base,
        "t": base.t(),
        "rows": base[2:4, 1:],
        "scalar": torch.tensor(3),
        "none": torch.empty(0, 4),
        "b": torch.ones(3, dtype=torch.bool),
    }
    torch.save({"state_dict": tensors, "epoch": 3}, tmp_path / "new.ckpt")
    torch.save({"state_dict": tensors, "epoch": 3}, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    for name in ("new.ckpt", "old.ckpt"):
        contents = open_file(tmp_path / name)
        got = {n: s.read() for n, s in contents.model.items()}
        assert all(torch.equal(got[n], t) for n, t in tensors.items()) and contents.rest == {"epoch": 3}
        assert torch.equal(contents.model["t"].read(Box((1, 0), (2, 3))), base.t()[1:3, :3])
        assert contents.model["a"].key == contents.model["tied"].key != contents.model["rows"].key
    torch.save({"state_dict": tensors, "hyper_parameters": {"x": Mine()}}, tmp_path / "mine.ckpt")
    with pytest.raises(ltp.TPError, match=r"contains objects of `\S*Mine`, which are not loaded by default.*weights_only=False"):
        open_file(tmp_path / "mine.ckpt")
    assert isinstance(open_file(tmp_path / "mine.ckpt", weights_only=False).rest["hyper_parameters"]["x"], Mine)


@pytest.mark.parametrize(
    ("saved", "says"),
    [
        ([1, 2], "contains a list; a checkpoint is a dict of tensors"),
        (torch.zeros(3), "contains a Tensor; a checkpoint is a dict of tensors"),
        ({"a": 1, "b": 2}, "contains no tensors, but: a, b"),
        ({"state_dict": {"w": torch.eye(2).to_sparse()}}, r"contains a Tensor \(sparse_coo\), which can't be read here"),
    ],
)
def test_what_is_no_checkpoint(saved: Any, says: str, tmp_path: Path) -> None:
    torch.save(saved, tmp_path / "a.pt")
    with pytest.raises(ltp.TPError, match=says):
        open_file(tmp_path / "a.pt")


def test_a_plain_state_dict(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2), "step": 4}, tmp_path / "a.pt")
    contents = open_file(tmp_path / "a.pt")
    assert set(contents.model) == {"w"} and contents.rest == {"step": 4} and contents.by == "torch.save"


def test_a_tensor_stays_on_the_disk(tmp_path: Path) -> None:
    """32 MiB, of which 16 KiB are read."""
    torch.save({"w": torch.ones(2048, 4096)}, tmp_path / "a.pt")
    with Peak() as peak:
        stored = load_file(tmp_path / "a.pt")["w"]
        assert stored.read(Box((7, 0), (1, 4096))).sum() == 4096
    assert peak.extra < 2**23, peak.extra


def test_what_is_written_is_what_torch_writes(tmp_path: Path) -> None:
    """Byte by byte, in all kinds of dtype, with ties; the library that reads zip files finds its checksums right."""
    tensors = {str(dtype): torch.randn(3, 5).to(dtype) for dtype in DTYPES}
    tensors |= {"scalar": torch.tensor(2.5), "none": torch.empty(0, 3)}
    rest = {"epoch": 1, "list": [torch.arange(3), ("x", None)]}
    stored = {name: in_memory(t) for name, t in tensors.items()}
    (tmp_path / "a").mkdir()
    with (tmp_path / "a" / "file.pt").open("wb") as file:
        write_torch({"state_dict": {**stored, "tied": stored["scalar"].cast(None)}, **rest}, file)
    (tmp_path / "b").mkdir()
    torch.save({"state_dict": {**tensors, "tied": tensors["scalar"]}, **rest}, tmp_path / "b" / "file.pt")
    got = torch.load(tmp_path / "a" / "file.pt", weights_only=True)
    for name, t in tensors.items():
        assert got["state_dict"][name].dtype == t.dtype and got["state_dict"][name].shape == t.shape
        assert torch.equal(got["state_dict"][name].reshape(-1).view(torch.uint8), t.reshape(-1).view(torch.uint8))
    assert got["state_dict"]["tied"].data_ptr() == got["state_dict"]["scalar"].data_ptr()
    ours, theirs = (zipfile.ZipFile(tmp_path / name / "file.pt") for name in "ab")
    assert ours.testzip() is None
    data = [{i.filename.partition("/")[2]: archive.read(i) for i in archive.infolist()} for archive in (ours, theirs)]
    assert {k: v for k, v in data[0].items() if k.startswith("data/")} == {
        k: v for k, v in data[1].items() if k.startswith("data/")
    }


def test_views_are_written_without_what_is_around_them(tmp_path: Path) -> None:
    base = torch.arange(1000.0)
    torch.save({"rows": base[2:5], "end": base[990:].view(2, 5)}, tmp_path / "a.pt")
    with (tmp_path / "b.pt").open("wb") as file:
        write_torch(load_file(tmp_path / "a.pt"), file)
    got = torch.load(tmp_path / "b.pt")
    assert torch.equal(got["rows"], base[2:5]) and torch.equal(got["end"], base[990:].view(2, 5))
    assert (tmp_path / "b.pt").stat().st_size < 3000


def test_one_tensor_at_a_time(tmp_path: Path) -> None:
    """Of a folder in shards no two full tensors live at once."""
    reads = CountedReads(20)
    with (tmp_path / "a.pt").open("wb") as file:
        write_torch({"state_dict": reads.tensors}, file)
    assert 0 < reads.peak <= 2 * 4000
    assert all(t.eq(1).all() for t in torch.load(tmp_path / "a.pt")["state_dict"].values())


def test_tied_tensors_are_read_once() -> None:
    """In each dtype: what they are cast to is theirs alone."""
    reads: list[torch.dtype] = []

    def load(box: Any, dtype: torch.dtype) -> Tensor:
        reads.append(dtype)
        return torch.ones(2, dtype=dtype)

    one, two, other = (StoredTensor((2,), torch.float32, load, key) for key in ("same", "same", None))
    file = io.BytesIO()
    write_torch({"a": one, "b": two, "half": two.cast(torch.float16), "other": other}, file)
    assert reads == [torch.float32, torch.float16, torch.float32]
    file.seek(0)
    got = torch.load(file)
    assert got["a"].data_ptr() == got["b"].data_ptr() != got["other"].data_ptr() and got["half"].dtype == torch.float16


def test_what_does_not_pickle() -> None:
    with pytest.raises(ltp.TPError, match="something that can't be pickled"):
        write_torch({"a": lambda: 0, "b": torch.ones(2)}, io.BytesIO())


def test_errors_are_those_of_the_disk_or_of_what_is_read() -> None:
    class Full(io.BytesIO):
        def write(self, data: Any) -> int:
            if self.tell() + len(data) > 20_000:
                raise OSError(28, "No space left on device")
            return super().write(data)

    with pytest.raises(OSError, match="No space left on device"):
        write_torch({str(i): in_memory(torch.ones(1000)) for i in range(10)}, Full())

    def broken(box: Any, dtype: Any) -> Tensor:
        raise ltp.TPError("this shard is missing")

    with pytest.raises(ltp.TPError, match="this shard is missing"):
        write_torch({"a": StoredTensor((2,), torch.float32, broken)}, io.BytesIO())
