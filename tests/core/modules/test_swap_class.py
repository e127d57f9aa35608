"""One module gets a subclass of its own class; its fellows do not."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_tp.core.modules.swap_class import swap_class
from lightning_tp.errors import TPError
from lightning_tp.styles import BindContext, Replicate


class Plus(nn.Module):
    _plus: float

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self._plus


class Times(nn.Module):
    def forward(self, x: Tensor, *, factor: float = 2.0) -> Tensor:
        return super().forward(x) * factor


X = torch.ones(1, 3)


def test_one_module_runs_through_the_mixin() -> None:
    layer, other = nn.Linear(3, 3), nn.Linear(3, 3)
    before = layer(X)
    swap_class(layer, Plus, _plus=1.5)
    assert torch.equal(layer(X), before + 1.5) and type(other) is nn.Linear
    assert (
        isinstance(layer, (nn.Linear, Plus))
        and type(layer).__name__ == "PlusLinear"
        and type(layer).__module__ == nn.Linear.__module__
    )
    assert layer.__dict__["_plus"] == 1.5 and not hasattr(other, "_plus")
    swap_class(other, Plus, _plus=2)
    assert type(other) is type(layer)  # one class for each pair


def test_the_last_mixin_is_the_outermost() -> None:
    layer = nn.Linear(3, 3)
    before = layer(X)
    swap_class(layer, Plus, _plus=1)
    swap_class(layer, Times)
    assert torch.equal(layer(X), (before + 1) * 2) and type(layer).__name__ == "TimesPlusLinear"


def test_a_copy_is_swapped_as_well() -> None:
    layer = nn.Linear(3, 3)
    swap_class(layer, Plus, _plus=1)
    twin = copy.deepcopy(layer)
    assert type(twin) is type(layer) and torch.equal(twin(X), layer(X)) and twin.weight is not layer.weight
    assert layer.state_dict().keys() == {"weight", "bias"}


class Embedding(nn.Embedding):
    """What a user has made of the layer."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 10


class Shifted(nn.Embedding):
    """A style that is a layer itself."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + 1)


def test_a_mixin_that_is_a_layer_takes_its_place() -> None:
    plain, own = nn.Embedding(4, 2), Embedding(4, 2)
    swap_class(plain, Shifted)
    swap_class(own, Shifted)
    tokens = torch.tensor([0, 2])
    assert torch.equal(plain(tokens), plain.weight[tokens + 1])
    assert torch.equal(own(tokens), own.weight[tokens + 1] * 10)  # what the subclass adds stays, around it
    assert isinstance(own, Embedding) and type(own).__mro__[1:3] == (Embedding, Shifted)


def test_a_class_with_other_bases_before_module() -> None:
    class Mapping(dict):
        pass

    class Odd(Mapping, nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            nn.Module.__init__(self)

        def forward(self, x: Tensor) -> Tensor:
            return x * 3

        __hash__ = object.__hash__  # type: ignore[assignment]

    odd = Odd()
    swap_class(odd, Times)
    assert isinstance(odd, Odd) and type(odd).__name__ == "TimesOdd"
    assert torch.equal(nn.Module.__call__(odd, X), X * 6)
    assert torch.equal(nn.Module.__call__(odd, X, factor=3.0), X * 9)
    other: Any = Odd()
    assert torch.equal(nn.Module.__call__(other, X), X * 3)


def test_replicate_swaps_nothing() -> None:
    layer = nn.Linear(4, 4)
    Replicate().bind(layer, BindContext("x", None))  # type: ignore[arg-type]
    assert type(layer) is nn.Linear


def test_a_swapped_module_is_copied_but_not_pickled() -> None:
    class Twice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    layer = nn.Linear(2, 2)
    swap_class(layer, Twice)
    assert torch.equal(copy.deepcopy(layer)(torch.ones(2)), layer(torch.ones(2)))
    with pytest.raises(TPError, match="can't be pickled: it holds the shards of this rank"):
        pickle.dumps(nn.Sequential(layer))
