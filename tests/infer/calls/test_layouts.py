from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_tp.infer.calls.layouts import Layouts, OnRanks
from tests.infer.calls.recorded import halves, sharded
from tests.infer.follow.traced import Net, traced

OWNER = torch.tensor([-1, *[0, 0, 0, 0, 1, 1, 1, 1] * 2])  # of the features of `a`, and of `b`, which reads them


def layouts_of(between: Any, owner: Tensor = OWNER) -> tuple[Layouts, dict[str, Tensor]]:
    """The layouts of a run in which `between` is given eight features, and tensors of it by name."""
    seen: dict[str, Tensor] = {}

    def keep(x: Tensor) -> Tensor:
        out = between(x, seen)
        return x if out is None else out

    net = Net(keep)
    trace, _, tracer = traced(net, torch.zeros(2, 4))
    seen.update(net.named_parameters())
    nodes = {key: n for key, n in trace.nodes.items() if key[0].endswith("weight")}
    return Layouts(tracer, owner, 2, nodes), seen


def test_a_tensor_lies_as_its_features_are_owned() -> None:
    def between(x: Tensor, seen: Any) -> None:
        seen["x"], seen["heads"], seen["whole"] = x, x.view(2, 4, 2).transpose(0, 1), torch.zeros(8)

    layouts, seen = layouts_of(between)
    assert layouts.of(seen["x"]) == halves(1)
    assert layouts.of(seen["heads"]) == sharded(0, (0, 2), (1, 2))
    assert layouts.of(seen["whole"]) is None
    assert layouts.of(seen["a.weight"]) == halves(0)
    assert layouts.of(seen["b.weight"]) == halves(1)
    assert layouts.of(seen["b.bias"]) is None


def test_two_dims_are_no_layout() -> None:
    def between(x: Tensor, seen: Any) -> None:
        seen["crossed"] = torch.stack((x[0], x[0].flip(0)))

    layouts, seen = layouts_of(between)
    assert layouts.of(seen["crossed"]) == "split along 2 dims"


def test_what_every_rank_has_goes_with_what_lies_beside_it() -> None:
    def between(x: Tensor, seen: Any) -> None:
        seen["padded"] = torch.cat((x, torch.zeros(2, 2)), 1)

    layouts, seen = layouts_of(between)
    assert layouts.of(seen["padded"]) == sharded(1, (0, 4), (1, 4), (-1, 2))
    layouts, seen = layouts_of(between, torch.full((9,), -1))
    assert layouts.of(seen["padded"]) is None


def test_a_layout_is_that_of_the_label_which_a_tensor_has_now() -> None:
    def between(x: Tensor, seen: Any) -> None:
        seen["x"] = x

    layouts, seen = layouts_of(between)
    assert layouts.of(seen["x"]) == halves(1)
    facts = layouts.tracer.shadow(seen["x"])
    layouts.tracer.put(seen["x"], type(facts)(None, None, False))
    assert layouts.of(seen["x"]) is None


def test_sizes_and_shards_are_those_of_each_rank() -> None:
    def between(x: Tensor, seen: Any) -> None:
        seen["x"] = x

    uneven = torch.tensor([-1, 0, 0, 0, 1, 1, 1, 1, 1])
    layouts, seen = layouts_of(between, uneven)
    assert layouts.sizes(seen["x"]) == [(2, 2), (3, 5)]
    x = OnRanks(torch.arange(16).view(2, 8), layouts.of(seen["x"]))
    assert x.shard(1).tolist() == [[3, 4, 5, 6, 7], [11, 12, 13, 14, 15]]
    assert OnRanks(x.tensor, None).shard(1) is x.tensor


def test_features_of_tensors_and_parameters() -> None:
    def between(x: Tensor, seen: Any) -> None:
        seen["x"] = x

    layouts, seen = layouts_of(between)
    assert layouts.features(seen["x"])[0].tolist() == [*range(1, 9)]
    assert layouts.features(seen["b.weight"]).tolist() == layouts.nodes["b.weight", 1].tolist()
    assert not layouts.features(seen["b.bias"]).any()
    assert layouts.is_followed(seen["x"]) and layouts.is_followed(seen["a.weight"]) and not layouts.is_followed(seen["b.bias"])
    assert not layouts.is_followed(nn.Parameter(torch.zeros(1)))
