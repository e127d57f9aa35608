"""A module that is given a subclass of its own class stays what it was."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from lightning_tp.core.modules.swap_class import swap_class
from lightning_tp.styles import (
    BindContext,
    Replicate,
)


def test_become_keeps_what_the_module_is() -> None:
    layer = nn.Linear(4, 4)
    before = layer.state_dict()

    class _Twice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self._factor

    swap_class(layer, _Twice, _factor=2)
    other = nn.Linear(4, 4)
    swap_class(other, _Twice, _factor=3)
    assert type(layer) is type(other) and type(layer).__name__ == "TwiceLinear" and isinstance(layer, nn.Linear)
    x = torch.ones(1, 4)
    torch.testing.assert_close(layer(x), (x @ layer.weight.T + layer.bias) * 2)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), layer(x)) and twin.weight is not layer.weight
    assert layer.state_dict().keys() == before.keys() and "_factor" not in layer.state_dict()
    assert Replicate().bind(layer, BindContext("x", None)) is None  # type: ignore[arg-type]
