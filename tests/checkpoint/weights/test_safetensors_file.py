"""Safetensors: as the library writes and reads them; slices are read alone, and one tensor at a time is written."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lightning_tp as ltp
from lightning_tp.checkpoint.weights.safetensors_file import DTYPES, is_safetensors, open_safetensors, write_safetensors
from lightning_tp.checkpoint.weights.stored import StoredTensor, in_memory
from lightning_tp.core.boxes import Box
from tests.checkpoint.weights.counted import CountedReads


def stored(**tensors: torch.Tensor) -> dict[str, StoredTensor]:
    return {name: in_memory(t) for name, t in tensors.items()}


def test_what_the_library_writes_is_read(tmp_path: Path) -> None:
    """A box is read alone, into memory of its own."""
    tensors = {
        "a": torch.randn(7, 5),
        "b": torch.ones((), dtype=torch.bfloat16),
        "c": torch.arange(6).view(2, 3),
        "e": torch.empty(0, 3),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    found = open_safetensors(tmp_path)
    assert all(torch.equal(s.read(), tensors[n]) for n, s in found.items()) and set(found) == set(tensors)
    part = found["a"].read(Box((2, 1), (3, 2)))
    assert torch.equal(part, tensors["a"][2:5, 1:3])
    assert part.untyped_storage().nbytes() == 3 * 2 * 4, "memory of its own"
    assert found["a"].cast(torch.float16).read().dtype == torch.float16
    assert found["a"].read(Box((2, 1), (0, 2))).shape == (0, 2)


@pytest.mark.parametrize("name", DTYPES)
def test_what_is_written_the_library_reads(name: str, tmp_path: Path) -> None:
    """All dtypes; next to one of another size, so that each has to be aligned."""
    t = torch.randint(0, 2, (3, 5)).to(DTYPES[name])
    write_safetensors(tmp_path, stored(byte=torch.ones(3, dtype=torch.uint8), t=t, s=t[0, 0].clone(), none=t[:0]), 10**9)
    got = load_file(tmp_path / "model.safetensors")
    assert got["t"].dtype == t.dtype and torch.equal(got["t"].view(torch.uint8), t.view(torch.uint8))
    assert got["s"].shape == () and got["none"].shape == (0, 5) and got["byte"].tolist() == [1, 1, 1]
    again = open_safetensors(tmp_path)["t"]
    assert again.dtype == t.dtype and torch.equal(again.read().view(torch.uint8), t.view(torch.uint8))
    with (tmp_path / "model.safetensors").open("rb") as file:
        length = struct.unpack("<Q", file.read(8))[0]
        assert length % 8 == 0, "the tensors begin at a multiple of 8 bytes"
        assert json.loads(file.read(length))["t"]["data_offsets"][0] % t.itemsize == 0, "and each at a multiple of its size"


def test_one_tensor_at_a_time_into_several_files(tmp_path: Path) -> None:
    reads = CountedReads(20)
    write_safetensors(tmp_path, reads.tensors, 30_000)
    assert 0 < reads.peak <= 2 * 4000
    files = sorted(tmp_path.glob("*.safetensors"))
    assert [f.name for f in files] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert [len(load_file(f)) for f in files] == [7, 7, 6]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 80_000, "total_parameters": 20_000}
    assert index["weight_map"] == {name: f.name for f in files for name in load_file(f)}
    for path in (tmp_path, tmp_path / "model.safetensors.index.json", files[0]):
        assert is_safetensors(path)
    assert all(s.read().eq(1).all() for s in open_safetensors(tmp_path).values()) and len(open_safetensors(tmp_path)) == 20


def test_what_is_broken_is_named(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.randn(7, 5)}, file)
    whole = file.read_bytes()

    def with_header(**entry: Any) -> bytes:
        text = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **entry}}).encode()
        return struct.pack("<Q", len(text)) + text + bytes(8)

    file.write_bytes(with_header())
    assert open_safetensors(tmp_path)["a"].read().tolist() == [0, 0]
    for broken, says in (
        (whole[:-1], "cut off .*not fully covered"),
        (whole[:5], "no safetensors file.*header too small.*has 5 bytes"),
        (b"\xff" * 80, "no safetensors file, or it is cut off .*header too large"),
        (with_header(shape=[2**40], data_offsets=[0, 2**42]), "cut off"),  # declared sizes are not trusted
        (with_header(shape=[3]), "no safetensors file"),
        (with_header(dtype="Q7"), "no safetensors file"),
    ):
        file.write_bytes(broken)
        with pytest.raises(ltp.TPError, match=says):
            open_safetensors(tmp_path)
    file.unlink()
    with pytest.raises(ltp.TPError, match=r"has no safetensors: it should be a `\.safetensors` file, or a folder"):
        open_safetensors(tmp_path)


@pytest.mark.parametrize(
    ("index", "says"),
    [
        ("{", "is no index of safetensors: JSONDecodeError"),
        ("[]", "is no index of safetensors: TypeError"),
        ('{"weight_map": {"a": "../a.safetensors"}}', "names files outside of its folder"),
        ('{"weight_map": {"a": "x.safetensors"}}', r"x\.safetensors` is missing, and the folder's index names it"),
        ('{"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}', "has `a` in two files"),
    ],
)
def test_an_index_that_is_wrong(index: str, says: str, tmp_path: Path) -> None:
    for name in ("1", "2"):
        save_file({"a": torch.ones(1)}, tmp_path / f"{name}.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ltp.TPError, match=says):
        open_safetensors(tmp_path)


def test_what_safetensors_can_not_hold(tmp_path: Path) -> None:
    with pytest.raises(ltp.TPError, match=r"can't store the dtype of `z` \(torch\.complex128\)\. Use `format='torch'`"):
        write_safetensors(tmp_path, stored(a=torch.ones(1), z=torch.ones(2, dtype=torch.complex128)), 10**9)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("package", ["safetensors", "huggingface_hub"])
def test_the_packages_are_extras(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ltp.TPError, match=rf"need the package {package}: pip install 'lightning-tp\[hf\]'"):
        if package == "safetensors":
            open_safetensors(tmp_path)
        else:
            write_safetensors(tmp_path, stored(a=torch.ones(1)), 10**9)
