from __future__ import annotations

import pytest
import torch

from lightning_tp.infer.follow import features
from lightning_tp.infer.follow.features import FeatureSets, shrunk


def test_new_features_are_apart_and_zero_is_none() -> None:
    classes = FeatureSets()
    new = classes.new(5)
    assert new.tolist() == [1, 2, 3, 4, 5]
    assert classes.find(new).tolist() == new.tolist()
    assert classes.find(torch.tensor(0)) == 0


def test_join_is_transitive_over_many_rounds() -> None:
    classes = FeatureSets()
    a = classes.new(64)
    classes.join(a[:-1], a[1:])  # a chain
    assert classes.find(a).unique().tolist() == [1]


def test_joining_with_zero_joins_nothing_and_keeps_the_other_label() -> None:
    classes = FeatureSets()
    a = classes.new(3)
    out = classes.join(torch.zeros(3, dtype=torch.int64), a)
    assert out.tolist() == a.tolist() == classes.join(a, torch.zeros(3, dtype=torch.int64)).tolist()
    assert classes.find(a).tolist() == a.tolist()
    assert classes.find(a).unique().numel() == 3


def test_join_broadcasts() -> None:
    classes = FeatureSets()
    rows, columns = classes.new(2).view(2, 1), classes.new(3).view(1, 3)
    assert classes.join(rows, columns).shape == (2, 3)
    assert classes.find(torch.arange(1, 6)).unique().numel() == 1


def test_join_along_joins_one_dim_and_counts_dims_from_the_end() -> None:
    classes = FeatureSets()
    labels = classes.new(6).view(2, 3)
    kept = classes.join_along(labels, (-1,), keepdim=True)
    assert kept.shape == (2, 1)
    assert classes.find(labels).unique(dim=1).shape == (2, 1)
    assert classes.find(labels)[0, 0] != classes.find(labels)[1, 0]


def test_more_features_than_there_is_room_for() -> None:
    classes = FeatureSets()
    a, b = classes.new(3000), classes.new(3000)
    classes.join(a, b)
    assert torch.equal(classes.find(a), classes.find(b))
    assert classes.find(a).unique().numel() == 3000


def test_shrunk_keeps_one_of_what_is_the_same_by_construction() -> None:
    labels = torch.arange(4).view(1, 4, 1).expand(7, 4, 5)
    assert shrunk(labels).shape == (1, 4, 1)
    assert shrunk(torch.arange(4)).shape == (4,)


@pytest.mark.parametrize(
    ("shape", "strides"),
    [
        ((7, 3, 5), (0, 1, 0)),
        ((7, 1, 3, 5), (0, 3, 1, 0)),
        ((21, 5), (1, 0)),
        ((7, 15), (0, 1)),
        ((105,), (1,)),
        ((7, 3, 5, 1), (0, 1, 0, 0)),
    ],
)
def test_reshaped_labels_need_no_memory_for_dims_that_stay_constant(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], strides: tuple[int, ...]
) -> None:
    monkeypatch.setattr(features, "LARGE", 1)
    labels = torch.arange(3).view(1, 3, 1).expand(7, 3, 5)
    out = features.reshaped(labels, shape)
    assert torch.equal(out, labels.reshape(shape))
    assert out.stride() == strides


def test_compact_labels_need_no_memory_for_what_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "LARGE", 1)
    labels = torch.tensor([[1, 2], [1, 2], [1, 2]])
    assert torch.equal(features.compact(labels), labels)
    assert features.compact(labels).stride() == (0, 1)


def test_what_has_labels_without_a_feature_has_a_partial_gradient() -> None:
    partial = features.gradient_is_partial
    assert (partial(features.no_features(2, 3)), partial(torch.tensor([0, 2])), partial(None)) == (True, False, False)
