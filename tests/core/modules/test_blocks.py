"""Repeated blocks: which modules they are, the numbers they keep, their names for display."""

from __future__ import annotations

from collections import OrderedDict

import pytest
from torch import nn

from lightning_tp.core.modules.blocks import enclosing, find_blocks, fold, own_numbers, starred


class Block(nn.Module):
    def __init__(self, width: int = 4, number: int = 0) -> None:
        super().__init__()
        self.linear, self.act = nn.Linear(width, width), nn.ReLU()
        self.act.number = number
        self.flag = bool(number)  # True is 1, and no number
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(3))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 8), nn.ReLU(), nn.ReLU())  # of other shapes, or of none
        self.inner = nn.ModuleDict({"layers": nn.ModuleList([Block(), Block(), Block(8)])})
        self.again = self.inner["layers"]


def names(model: nn.Module) -> list[str]:
    return [name for name, _ in find_blocks(model)]


def test_blocks_are_of_one_class_and_shape_and_the_outermost() -> None:
    model = Model()
    found = find_blocks(model)
    assert names(model) == ["inner.layers.0", "inner.layers.1", *(f"inner.layers.2.experts.{i}" for i in range(3))]
    assert all(model.get_submodule(name) is block for name, block in found)
    assert names(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))) == ["0", "2"]
    assert names(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, bias=False))) == []
    one = nn.Linear(2, 2)
    assert len(find_blocks(nn.Sequential(one, nn.Linear(2, 2), one))) == 2  # each once, by its first name


def test_numbers_that_every_block_keeps() -> None:
    layers = OrderedDict((str(key), Block(number=key)) for key in (0, 1, 2))
    assert own_numbers(layers) == {"": {("act", "number")}}
    layers["2"].act.number = 0
    assert own_numbers(layers) == {"": set()}
    by_place = {f"late.{key}": Block(number=i) for i, key in enumerate((5, 6))}
    assert own_numbers(by_place) == {"late": {("act", "number")}}
    by_key = {f"late.{key}": Block(number=key) for key in (5, 6)}
    assert own_numbers(by_key) == {"late": {("act", "number")}}


@pytest.mark.parametrize(
    ("given", "folded"),
    [
        (["norm"], "norm"),
        (["layers.0.wq", "layers.1.wq"], "layers.{0-1}.wq"),
        ([f"h.{i}.w" for i in (10, 9, 2, 3, 4, 7)], "h.{2-4,7,9-10}.w"),
        (["a.0.b.1", "a.0.b.2"], "a.0.b.{1-2}"),
    ],
)
def test_names_are_folded(given: list[str], folded: str) -> None:
    assert fold(given) == folded


def test_numbers_that_are_whole_parts_of_names() -> None:
    assert starred("layers.3.wq") == "layers.*.wq" and starred("3.w1.12") == "*.w1.*" and starred("w2.x3") == "w2.x3"


def test_the_innermost_module_around_a_name() -> None:
    modules = {"layers.3", "layers.3.mlp", "layers.30"}
    assert enclosing("layers.3.mlp.w", modules) == "layers.3.mlp" and enclosing("layers.3.norm", modules) == "layers.3"
    assert enclosing("layers.30", modules) == "layers.30" and enclosing("layers.4.norm", modules) == ""
