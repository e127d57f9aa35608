"""A model is left as it was, whatever a run or a try has put into it; and runs without its weights."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_tp.core.modules.snapshot import MetaWeights, gc_disabled, has_more_than, preserve_modules
from lightning_tp.core.modules.swap_class import swap_class


class Mixin(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def state_of(model: nn.Module) -> list[Any]:
    return [
        (
            type(m),
            {k: (dict(v) if isinstance(v, dict) else list(v) if isinstance(v, (list, set)) else v) for k, v in vars(m).items()},
        )
        for m in model.modules()
    ]


def test_everything_but_the_inside_of_tensors_comes_back() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model.caches, model.names, model.seen = {"a": 1}, ["x"], {1, 2}
    caches = model.caches
    weight, before = model[0].weight, state_of(model)
    handle = model[1].register_forward_hook(lambda *args: None)
    with_hook = state_of(model)
    with pytest.raises(ZeroDivisionError), preserve_modules(model):
        swap_class(model[0], Mixin, extra=1)
        model[0].weight = nn.Parameter(torch.zeros(3, 3))
        model.register_buffer("new", torch.zeros(1))
        model.add_module("more", nn.Linear(1, 1))
        del model[1].running_mean
        model.caches["b"] = 2
        model.names.append("y")
        model.seen.clear()
        model.other = "attribute"
        handle.remove()
        model[0].register_forward_hook(lambda *args: None)
        torch.backends.mha.set_fastpath_enabled(False)
        model[0].bias.data.fill_(7)
        1 / 0  # noqa: B018
    assert state_of(model) == with_hook and model[0].weight is weight and model.caches is caches
    assert torch.backends.mha.get_fastpath_enabled()
    assert (model[0].bias == 7).all()
    handle.remove()
    assert state_of(model) == before  # the hook's handle still finds it


def test_garbage_collection_is_off_for_a_while() -> None:
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError), gc_disabled():
        assert not gc.isenabled()
        with gc_disabled():
            pass
        assert not gc.isenabled()  # it was off there
        1 / 0  # noqa: B018
    assert gc.isenabled()


def test_models_that_are_too_large_to_copy() -> None:
    model = nn.Linear(3, 2)
    assert has_more_than(model, 7) and not has_more_than(model, 8)
    with torch.device("meta"):
        assert not has_more_than(nn.Linear(3, 2), 7)


def test_without_weights() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.BatchNorm1d(2))
    model[1].weight = model[0].weight
    model[1].bias.requires_grad = False
    real = [*model.parameters(), *model.buffers()]
    mean = model[2].running_mean
    with pytest.raises(ZeroDivisionError), MetaWeights(model) as meta:
        assert all(t.is_meta for t in (*model.parameters(), *model.buffers()))
        assert model[1].weight is model[0].weight and isinstance(model[0].weight, nn.Parameter)
        assert model[0].weight.requires_grad and not model[1].bias.requires_grad
        assert model[2].running_mean._tp_value is mean
        with pytest.raises(KeyError), meta.weights():
            assert [id(t) for t in (*model.parameters(), *model.buffers())] == [id(t) for t in real]
            raise KeyError
        assert model[0].weight.is_meta
        1 / 0  # noqa: B018
    assert [id(t) for t in (*model.parameters(), *model.buffers())] == [id(t) for t in real]
    with torch.device("meta"):
        own = nn.Linear(2, 2)
    weight = own.weight
    with MetaWeights(own):
        assert own.weight is weight  # there already
