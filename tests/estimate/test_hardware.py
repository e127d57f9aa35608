from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lightning_tp import TPError
from lightning_tp.estimate.hardware import guess, hardware, known_hardware


def test_all_known_are_whole() -> None:
    assert {"t4", "a100", "a100-40gb", "h100", "h200", "b200", "cpu"} <= set(known_hardware())
    for h in known_hardware().values():
        assert 0 < h.usable_bytes <= h.memory_bytes
        assert h.peak(torch.bfloat16) > 0 and h.peak(torch.float32) > 0


def test_names_of_devices() -> None:
    names = {"Tesla T4": "t4", "NVIDIA A100-SXM4-40GB": "a100-40gb", "NVIDIA A100 80GB PCIe": "a100", "NVIDIA H200": "h200"}
    assert {name: guess(name).key for name in names} == names  # type: ignore[union-attr]
    assert guess("NVIDIA GeForce RTX 4090") is None


def test_files_of_users(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"mine": {"like": "h100", "memory_bytes": 1e9}}))
    assert hardware(file).memory_bytes == 1e9 and hardware(f"{file}:mine").peak(torch.bfloat16) == 989e12
    for content, word in (
        ("{", "no JSON"),
        ("[]", "object"),
        ('{"x": {"like": "h100", "speed": 3}}', "speed"),
        ('{"x": {"like": "h1"}}', "'h1'"),
        ('{"x": {"memory_bytes": 1}}', "lacks"),
        ('{"x": {"like": "h100", "memory_bytes": -1}}', "above 0"),
        ('{"x": {"like": "h100"}, "y": {"like": "h100"}}', "say which"),
    ):
        file.write_text(content)
        with pytest.raises(TPError, match=word):
            hardware(file)
    with pytest.raises(TPError, match="can't be read"):
        hardware(tmp_path / "none.json")
