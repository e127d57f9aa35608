from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lightning_tp import TPError
from lightning_tp.estimate.cost.hardware import guess, hardware, known_hardware


def test_all_known_are_whole() -> None:
    assert {"t4", "a100", "a100-40gb", "h100", "h200", "b200", "cpu"} <= set(known_hardware())
    for h in known_hardware().values():
        assert 0 < h.usable_bytes <= h.memory_bytes
        assert h.peak(torch.bfloat16) > 0 and h.peak(torch.float32) > 0


def test_names_of_devices() -> None:
    names = {"Tesla T4": "t4", "NVIDIA A100-SXM4-40GB": "a100-40gb", "NVIDIA A100 80GB PCIe": "a100", "NVIDIA H200": "h200"}
    assert {name: guess(name).key for name in names} == names  # type: ignore[union-attr]
    assert guess("NVIDIA GeForce RTX 4090") is None


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("H100", "h100"),
        ("h100-sxm", "h100"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("a100-80gb", "a100"),
        ("A100-SXM4-40GB", "a100-40gb"),
        ("Tesla T4", "t4"),
        ("h200-141gb", "h200"),
    ],
)
def test_names_as_vendors_write_them(name: str, key: str) -> None:
    assert hardware(name).key == key


@pytest.mark.parametrize(
    ("name", "near"), [("h100-pcie", "Did you mean h100 or"), ("a10", "Did you mean a100?"), ("", "`hardware=''`. There are t4")]
)
def test_a_name_that_is_not_known_gets_the_nearest(name: str, near: str) -> None:
    with pytest.raises(TPError, match=near.replace("?", r"\?")):
        hardware(name)


def test_files_of_users(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"mine": {"like": "h100", "memory_bytes": 1e9}}))
    assert hardware(file).memory_bytes == 1e9 and hardware(f"{file}:mine").peak(torch.bfloat16) == 989e12
    for content, word in (
        ("{", "not valid JSON"),
        ("[]", "object"),
        ('{"x": {"like": "h100", "speed": 3}}', "speed"),
        ('{"x": {"like": "h1"}}', "'h1'"),
        ('{"x": {"memory_bytes": 1}}', "lacks"),
        ('{"x": {"like": "h100", "memory_bytes": -1}}', "above 0"),
        ('{"x": {"like": "h100"}, "y": {"like": "h100"}}', "Say which"),
    ):
        file.write_text(content)
        with pytest.raises(TPError, match=word):
            hardware(file)
    with pytest.raises(TPError, match="could not read"):
        hardware(tmp_path / "none.json")
