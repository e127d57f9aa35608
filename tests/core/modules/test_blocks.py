"""Which modules are repeated blocks, which of them have the same code and settings, and how their names are folded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_tp.core.modules.blocks import block_settings, copies_of_first, find_blocks, fold, own_numbers, starred


class Block(nn.Module):
    def __init__(self, index: int, activation: Callable[[Tensor], Tensor] = F.gelu, scale: float = 1.0, **attributes: Any) -> None:
        super().__init__()
        self.up, self.index, self.activation, self.scale = nn.Linear(4, 8), index, activation, scale
        self.experts = nn.ModuleList(nn.Linear(8, 4) for _ in range(3))
        for name, value in attributes.items():
            setattr(self, name, value)


class Model(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.inp, self.layers = nn.Linear(4, 4), nn.ModuleList(blocks)


def test_blocks_are_the_outermost_children_of_one_container_with_equal_shapes() -> None:
    model = Model(Block(0), Block(1), nn.Linear(4, 4))
    assert [name for name, _ in find_blocks(model)] == ["layers.0", "layers.1"]
    assert find_blocks(Model(Block(0), nn.Linear(4, 4)))[0][0] == "layers.0.experts.0"


def test_a_block_with_two_names_is_listed_under_the_first() -> None:
    model = Model(Block(0), Block(1))
    model.alias = model.layers
    assert [name for name, _ in find_blocks(model)] == ["layers.0", "layers.1"]


def test_modules_without_parameters_are_no_blocks() -> None:
    assert find_blocks(nn.Sequential(nn.ReLU(), nn.ReLU())) == []


def test_the_own_number_is_the_attribute_that_counts_the_blocks() -> None:
    blocks = dict(find_blocks(Model(*(Block(i, width=1, half=i % 2) for i in range(3)))))
    assert own_numbers(blocks) == {"layers": {("", "index")}}


def settings_equal(*blocks: nn.Module) -> bool:
    settings = block_settings(dict(find_blocks(Model(*blocks))))
    return len(set(settings.values())) == 1


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        ({}, {}, True),
        ({"scale": 0.5}, {"scale": 0.25}, True),  # it scales, and moves nothing to another place
        ({"scale": 0.5}, {"scale": 0.0}, False),
        ({"activation": F.relu}, {"activation": F.gelu}, False),
        ({"sizes": [1, (2, 3)]}, {"sizes": [1, (2, 3)]}, True),
        ({"sizes": [1, (2, 3)]}, {"sizes": [1, (2, 4)]}, False),
        ({"sizes": (1,)}, {"sizes": [1]}, False),
        ({"names": {"a": 1}}, {"names": {"a": 2}}, False),
        ({"table": torch.zeros(2)}, {"table": torch.ones(2)}, True),
        ({"table": torch.zeros(2)}, {"table": torch.zeros(3)}, False),
        ({"thing": object()}, {"thing": object()}, False),  # equal to itself only
    ],
)
def test_settings_are_what_code_can_see_but_for_the_own_number(one: dict[str, Any], other: dict[str, Any], equal: bool) -> None:
    assert settings_equal(Block(0, **one), Block(1, **other)) is equal


def test_blocks_in_training_and_in_evaluation_differ() -> None:
    blocks = Block(0), Block(1).eval()
    assert not settings_equal(*blocks)


def test_blocks_of_two_containers_are_never_equal() -> None:
    model = Model(nn.Linear(2, 2), nn.Linear(2, 2))
    model.more = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    settings = block_settings(dict(find_blocks(model)))
    assert copies_of_first(settings) == {"layers.1": "layers.0", "more.1": "more.0"}


def test_names_are_folded_by_their_numbers() -> None:
    assert fold(["layers.0.up", "layers.2.up", "layers.1.up", "layers.5.up"]) == "layers.{0-2,5}.up"
    assert fold(["head"]) == "head"
    assert starred("layers.10.experts.3.w1") == "layers.*.experts.*.w1"
