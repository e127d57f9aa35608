from __future__ import annotations

from dataclasses import replace

import pytest

from lightning_tp.estimate.rank.fsdp_units import Unit, units_of
from lightning_tp.estimate.rank.settings import PRECISIONS
from tests.estimate.by_hand import DP, ROWS, model_of, step


@pytest.mark.parametrize(("precision", "gathered", "reduced"), [("32-true", 4, 4), ("bf16-mixed", 2, 4), ("bf16-fsdp", 2, 4)])
def test_bytes_of_units(precision: str, gathered: int, reduced: int) -> None:
    found = units_of(model_of(step()), PRECISIONS[precision], DP)
    assert list(found) == ["layers.0", "layers.1", "layers.2", ""]
    for unit, rows in ROWS.items():
        assert found[unit] == Unit(rows * DP * gathered, rows * DP * reduced, rows * 4)


def test_frozen_parameters_are_gathered_but_not_reduced() -> None:
    model = model_of(step())
    frozen = replace(model, params=tuple(replace(p, requires_grad=p.unit != "layers.1") for p in model.params))
    found = units_of(frozen, PRECISIONS["32-true"], DP)
    assert found["layers.1"] == Unit(ROWS["layers.1"] * DP * 4, 0, 0) and found["layers.2"].reduced > 0
