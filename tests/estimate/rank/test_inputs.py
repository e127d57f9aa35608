from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_tp import TPError
from lightning_tp.estimate import estimate
from lightning_tp.estimate.rank.inputs import BatchCount, check_size, count_batch, default_loss, loss_of, resized
from tests.estimate.models import TOKENS, meta_llama


def test_sizes_of_the_inputs_can_be_others() -> None:
    found = estimate(meta_llama(), TOKENS, (4, 2), batch=3, seq=32)
    assert (found.batch, found.tokens) == (3, 3 * 32 * 4)


def test_resized_inputs() -> None:
    tokens = torch.arange(6).view(2, 3)
    given = {"tokens": tokens, "mask": torch.ones(2, 1, 3, 3), "pixels": torch.ones(2, 3), "labels": torch.ones(2).long(), "n": 5}
    found = resized(given, 5, 4)
    shapes = {k: tuple(v.shape) for k, v in found.items() if isinstance(v, Tensor)}
    assert shapes == {"tokens": (5, 4), "mask": (5, 1, 4, 4), "pixels": (5, 3), "labels": (5,)} and found["n"] == 5
    assert found["tokens"][0].tolist() == [0, 1, 2, 0] and found["tokens"][2].tolist() == [0, 1, 2, 0]  # repeated
    assert resized(given, None, None)["tokens"] is tokens
    assert resized(given, 1, 2)["tokens"].tolist() == [[0, 1]]
    meta = resized({"tokens": tokens.to("meta")}, 7, None)["tokens"]
    assert meta.is_meta and meta.shape == (7, 3)
    with pytest.raises(TPError, match="no tokens"):
        resized((torch.ones(2, 3),), None, 8)


@pytest.mark.parametrize(
    ("inputs", "count"),
    [
        ((torch.zeros(2, 8).long(),), BatchCount(2, 16, "tokens")),
        ((torch.ones(4, 3, 8, 8), torch.zeros(4).long()), BatchCount(4, 4, "samples")),
        ((torch.ones(2, 8), torch.zeros(2, 8).bool()), BatchCount(2, 2, "samples")),  # a mask is no text
        ((), BatchCount(1, 1, "samples")),
    ],
)
def test_what_a_batch_counts(inputs: Any, count: BatchCount) -> None:
    assert count_batch(inputs) == count


def test_default_loss() -> None:
    loss, tokens, logits = torch.tensor(2.0), torch.tensor([[0, 1, 2]]), torch.randn(1, 3, 4)
    assert default_loss({"loss": loss, "logits": logits}, None) is loss
    assert default_loss(SimpleNamespace(loss=loss), None) is loss
    expected = nn.functional.cross_entropy(logits[0, :-1], tokens[0, 1:])
    assert torch.equal(default_loss({"logits": logits}, {"tokens": tokens}), expected)
    for inputs in ({"tokens": tokens + 2}, {"tokens": tokens[:, :2]}, {}):  # not of this vocabulary, another length, no tokens
        found = default_loss(logits, inputs)
        assert found.ndim == 0 and not torch.equal(found, expected)
    assert torch.equal(default_loss(logits, {}), default_loss(logits, {}))  # the same projection each time
    with pytest.raises(TPError, match=r"without a floating-point tensor.*`loss_fn`"):
        default_loss((tokens,), {})


def test_loss_functions() -> None:
    layer, x = nn.Linear(3, 3), torch.ones(2, 3)
    assert torch.equal(loss_of(lambda y: y.sum())(layer, (x,)), layer(x).sum())
    assert torch.equal(loss_of(lambda y, inputs: y.sum() + inputs[0].sum())(layer, (x,)), layer(x).sum() + 6)
    assert loss_of(lambda y, scale=2.0: y.sum() * scale)(layer, {"input": x}).ndim == 0  # one that has a default is not the inputs
    with pytest.raises(TPError, match=r"`loss_fn` returned a tensor of shape \(2, 3\).*`.mean\(\)`"):
        loss_of(lambda y: y)(layer, (x,))
    with pytest.raises(TPError, match="`loss_fn` returned a float"):
        loss_of(lambda y: 1.0)(layer, (x,))  # type: ignore[arg-type, return-value]
    with pytest.raises(TPError, match=r"`loss_fn` raised AttributeError: .*the model's output \(a Tensor\)"):
        loss_of(lambda y: y.loss)(layer, (x,))


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "2"])
def test_sizes(value: Any) -> None:
    check_size("seq", 3)
    check_size("seq", None)
    with pytest.raises(TPError, match="`seq="):
        check_size("seq", value)
