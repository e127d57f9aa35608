"""Names and shapes of a checkpoint against those of a model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_tp.checkpoint.weights.matching import (
    find_prefixes,
    listing,
    match_tensors,
    model_tensors,
    persistent_tensors,
    rename_prefix,
)
from lightning_tp.checkpoint.weights.stored import StoredTensor, in_memory


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("kept", torch.ones(2))
        self.register_buffer("not_kept", torch.ones(2), persistent=False)


def stored(**shapes: tuple[int, ...]) -> dict[str, StoredTensor]:
    return {name.replace("__", "."): in_memory(torch.zeros(shape)) for name, shape in shapes.items()}


def test_tensors_of_a_model() -> None:
    assert list(model_tensors(Tied())) == ["embed.weight", "head.weight", "kept", "not_kept"]
    assert list(persistent_tensors(Tied())) == ["kept", "embed.weight", "head.weight"] == list(Tied().state_dict())


def test_what_fits_is_found_and_the_rest_is_said() -> None:
    """One name of a tied tensor is enough; shapes are those of the full tensors."""
    match = match_tensors(persistent_tensors(Tied()), stored(head__weight=(5, 3), kept=(3,), more=(1,)))
    assert set(match.found) == {"head.weight"} and match.missing == []
    assert match.unexpected == ["more"] and match.misshapen == {"kept": ((3,), (2,))}
    says = "`kept` has shape (3,) in the checkpoint, but (2,) in the model"
    assert match.problems(strict=False) == [says]
    assert match.problems(prefix="net.") == [says, "`net.more` is not in the model"]
    match = match_tensors(persistent_tensors(Tied()), stored(kept=(2,)))
    assert match.missing == ["embed.weight", "head.weight"]
    assert match.problems()[0] == "`embed.weight` is missing from the checkpoint"


@pytest.mark.parametrize(
    ("checkpoint", "model", "prefixes"),
    [
        (["a.b.weight", "a.b.bias"], ["a.b.weight", "a.b.bias"], ("", "")),
        (["net.a.weight", "net.a.bias", "scale"], ["a.weight", "a.bias"], ("net.", "")),
        (["a.weight", "a.bias"], ["inner.net.a.weight", "inner.net.a.bias", "head.weight"], ("", "inner.net.")),
        (["x.a.weight", "x.c.bias"], ["y.a.weight", "y.c.bias"], ("x.", "y.")),
        (["weight"], ["other"], ("", "")),
        ([], ["a"], ("", "")),
    ],
)
def test_prefixes(checkpoint: list[str], model: list[str], prefixes: tuple[str, str]) -> None:
    assert find_prefixes(checkpoint, model) == prefixes


def test_the_prefix_that_fits_most_is_taken() -> None:
    checkpoint = ["ema.a.weight", *(f"net.{n}.weight" for n in "abc")]
    strip, add = find_prefixes(checkpoint, [f"{n}.weight" for n in "abc"])
    assert (strip, add) == ("net.", "")
    renamed, others = rename_prefix(dict.fromkeys(checkpoint, 0), strip, "x.")
    assert list(renamed) == ["x.a.weight", "x.b.weight", "x.c.weight"] and others == ["ema.a.weight"]


def test_long_lists_are_cut() -> None:
    assert listing(["a", "b"], 2) == "a; b" and listing(["a", "b", "c", "d"], 2, ", ") == "a, b, and 2 more"
