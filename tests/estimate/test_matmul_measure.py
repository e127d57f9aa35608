"""Matmuls that are timed on this machine."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lightning_tp as ltp
from lightning_tp.errors import TPError
from lightning_tp.estimate import matmul_measure
from lightning_tp.estimate.matmul_measure import ProductKey, _operands, key_of, measure, present_device
from lightning_tp.estimate.report.matmul import Shapes


def studied() -> Shapes:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64), nn.GELU(), nn.Linear(64, 2**17))
    return ltp.shapes(model, (torch.empty(1, 64),), gpus=2, local_batches=[32], tps=[1, 2], loss_fn=lambda y: y.mean())


def test_measured_beside_predicted() -> None:
    found = studied()
    measured = measure(found, seconds=0.05, device="cpu")  # enough for the small ones
    keys = {key_of(s) for c in found.cells for s in c.products}
    assert measured.seconds.keys() | measured.left_out.keys() == keys and not measured.seconds.keys() & measured.left_out.keys()
    assert ProductKey("x @ w.T", 1, 32, 256, 64) in measured.seconds and all(t > 0 for t in measured.seconds.values())
    assert any("too long" in why for why in measured.left_out.values())
    one, two = found.cells
    compared = measured.compared(two, one)
    assert compared is not None and compared[0] < 1 and 0 < compared[2] < 0.5  # the head has most of the FLOPs
    text = measured.text(found)
    assert "Left out" in text and "GFLOP/s" in text and "saves" in text
    with pytest.raises(TPError, match="above 0"):
        measure(found, seconds=0)


@pytest.mark.parametrize("layout", ["x @ w.T", "x.T @ g", "g @ w", "batched"])
def test_operands_have_the_layout_of_their_role(layout: str) -> None:
    key = ProductKey(layout, 3 if layout == "batched" else 1, 4, 5, 6)
    a, b = _operands(key, torch.float32, "cpu")
    assert (a @ b).shape[-2:] == (4, 5) and a.shape[-1] == 6
    assert (a.is_contiguous(), b.is_contiguous()) == {"x @ w.T": (True, False), "x.T @ g": (False, True)}.get(layout, (True, True))
    assert key.flops == 2 * key.batch * 4 * 5 * 6 and key.bytes(2) == 2 * key.batch * (24 + 30 + 20)


def test_what_does_not_fit_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    found = studied()
    monkeypatch.setattr(matmul_measure, "rate_of", lambda dtype, device: 1e12)
    monkeypatch.setattr(matmul_measure, "once_of", lambda key, dtype, device: 0.5)
    monkeypatch.setattr(matmul_measure, "free_bytes", lambda device: 2**20)
    measured = measure(found, seconds=60, device="cpu")
    assert measured.left_out and all("needs" in why and "512.0 KiB are available" in why for why in measured.left_out.values())
    assert set(measured.seconds.values()) == {0.5}
    monkeypatch.setattr(matmul_measure, "free_bytes", lambda device: 2**40)
    slow = measure(found, seconds=1e-5, device="cpu")  # the largest are left out first
    assert max(k.flops for k in slow.seconds) <= min(k.flops for k in slow.left_out)
    assert slow.jsonable()["left_out"][0]["why"].endswith("too long for 1e-05 s in all")


def test_comparisons_count_what_both_have_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul_measure, "rate_of", lambda dtype, device: 1e18)
    monkeypatch.setattr(matmul_measure, "once_of", lambda key, dtype, device: key.n / 1e3)  # twice as fast with half the columns
    found = studied()
    one, two = found.cells
    measured = measure(found, seconds=60, device="cpu")
    compared = measured.compared(two, one)
    assert compared is not None and compared.compared > 0.99 and compared.measured > 0
    assert not measured.left_out and "tp=2 at a local batch of 32 saves" in measured.text(found)


def test_devices() -> None:
    name, entry = present_device("cpu")
    assert "CPU thread" in name and entry is not None and entry.device == "cpu"
    if not torch.cuda.is_available():
        with pytest.raises(TPError, match="no GPU on this machine"):
            measure(studied(), device="cuda")
