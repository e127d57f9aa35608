from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_tp.infer.follow.convolutions import channels_of, kernel_of
from lightning_tp.infer.follow.trace import ParamView
from tests.infer.follow.traced import classes_of, labels_of, traced


class Convolved(nn.Module):
    def __init__(self, *layers: nn.Module, between: Any = F.gelu) -> None:
        super().__init__()
        self.first, *rest = layers
        self.rest, self.between = nn.ModuleList(rest), between

    def forward(self, x: Tensor) -> Tensor:
        x = self.between(self.first(x))
        for layer in self.rest:
            x = layer(x)
        return x


def uses(trace: Any) -> set[tuple[str, int, str]]:
    return {(u.name, u.dim, u.kind) for u in trace.uses}


IMAGES = torch.zeros(2, 4, 5, 5)


def test_a_pair_of_convolutions_makes_channels_and_sums_over_them() -> None:
    trace, out, tracer = traced(Convolved(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 4, 3)), IMAGES)
    assert uses(trace) == {("first.weight", 0, "out"), ("rest.0.weight", 1, "in")}
    assert trace.convolved == {"first.weight", "rest.0.weight"}
    assert trace.local_uses == {"first.bias": {"first"}} and trace.whole_uses == {"rest.0.bias": {"rest.0"}}
    assert tracer.shadow(out).label is None


def test_a_transposed_convolution_has_its_output_channels_in_dim_1() -> None:
    trace, _, _ = traced(Convolved(nn.ConvTranspose2d(4, 8, 3), nn.Conv2d(8, 4, 3)), IMAGES)
    assert uses(trace) == {("first.weight", 1, "out"), ("rest.0.weight", 1, "in")}


def test_a_filter_for_each_channel_goes_with_it() -> None:
    trace, out, tracer = traced(Convolved(nn.Conv2d(4, 8, 1), nn.Conv2d(8, 16, 3, groups=8)), IMAGES)
    assert uses(trace) == {("first.weight", 0, "out"), ("rest.0.weight", 0, "along")}
    labels = labels_of(trace, tracer, out)
    assert [channel[0][0] for channel in labels[0]] == [n for n in range(1, 9) for _ in range(2)]
    assert classes_of(trace, ("rest.0.weight", 0)) == [n for n in range(1, 9) for _ in range(2)]


def test_groups_join_their_channels() -> None:
    trace, _, _ = traced(Convolved(nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 3, groups=2)), IMAGES)
    assert classes_of(trace, ("first.weight", 0)) == [1, 1, 1, 1, 2, 2, 2, 2]
    trace, _, _ = traced(nn.Conv2d(4, 8, 1, groups=2), IMAGES)  # of an equal input
    assert uses(trace) == {("weight", 0, "out")} and classes_of(trace, ("weight", 0)) == [1, 1, 1, 1, 2, 2, 2, 2]


def test_a_filter_for_each_channel_that_every_rank_has_is_not_split() -> None:
    trace, _, _ = traced(nn.Conv2d(4, 4, 3, groups=4, bias=False), IMAGES)
    assert not trace.uses and trace.whole_uses == {"weight": {""}}


def test_grouped_weights_that_are_needed_whole_join_all_channels() -> None:
    model = Convolved(nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 3, groups=2, bias=False))
    trace, _, _ = traced(model, IMAGES, whole={("rest.0.weight", 0)})
    assert set(classes_of(trace, ("first.weight", 0))) == {1}
    assert trace.local_uses["rest.0.weight"] == {"rest.0"}


def test_a_picture_whose_features_are_not_its_channels_is_joined() -> None:
    def turned(x: Tensor) -> Tensor:
        return x.transpose(1, 3)

    trace, _, _ = traced(Convolved(nn.Conv2d(4, 8, 1), nn.Conv2d(5, 4, 3, bias=False), between=turned), IMAGES)
    assert set(classes_of(trace, ("first.weight", 0))) == {1}
    assert trace.local_uses["rest.0.weight"] == {"rest.0"}


def test_channels_that_differ_from_position_to_position_are_not_known() -> None:
    assert channels_of(torch.tensor([1, 2]).view(1, 2, 1, 1).expand(3, 2, 4, 4)).tolist() == [1, 2]  # type: ignore[union-attr]
    assert channels_of(torch.arange(8).view(1, 2, 2, 2)) is None
    rows, columns = torch.arange(6).view(6, 1, 1).expand(6, 2, 3), torch.arange(2).view(1, 2, 1).expand(6, 2, 3)
    kernel = kernel_of(ParamView("w", (rows, columns)), transposed=False)
    assert kernel is not None and [c[:, 1].tolist() for c in kernel.coordinates] == [[0, 1, 2, 3, 4, 5], [1] * 6]
    assert kernel_of(ParamView("w", (torch.arange(36).view(6, 2, 3),)), transposed=False) is None
