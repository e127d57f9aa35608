"""A way through a model that its plan has not seen is compared with an unsplit run, and taken unsplit where it is wrong on shards."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import Tensor, nn

import lightning_tp as ltp
from lightning_tp.apply.unsplit import kind_of
from lightning_tp.core.comm.mesh import make_mesh
from lightning_tp.testing import run_ranks


class Switched(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.calls = 0

    def forward(self, x: Tensor, *, hidden: bool = False, centred: bool = False) -> Any:
        self.calls += 1
        h = self.up(x).relu()
        if centred:
            h = h - h.mean(-1, keepdim=True)
        y = self.down(h)
        return (y, h) if hidden else y


def ways() -> None:
    torch.manual_seed(0)
    one, x = Switched(), torch.randn(2, 3, 8)
    many: Any = ltp.parallelize(copy.deepcopy(one), make_mesh("cpu", 1, 2), {"up": "colwise", "down": "rowwise"})
    torch.testing.assert_close(many(x), one(x))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # right on shards, so nothing is said
        torch.testing.assert_close(many.eval()(x), one.eval()(x))
    assert many.calls == 2, "what is compared leaves no trace"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.testing.assert_close(many(x, hidden=True), one(x, hidden=True))
        wanted, got = one(x, centred=True), many(x, centred=True)
    assert len(said) == 2 * (torch.distributed.get_rank() == 0) and all("run unsplit" in str(w.message) for w in said)
    torch.testing.assert_close(got, wanted)
    wanted.square().sum().backward()
    got.square().sum().backward()
    for name, p in one.named_parameters():
        torch.testing.assert_close(ltp.full_gradients(many)[name], p.grad)
    torch.testing.assert_close(many(x), one(x))
    assert many.up.out_features == 16 and any(c.__name__ == "_Entry" for c in type(many).__mro__)


def test_ways_that_a_plan_has_not_seen() -> None:
    run_ranks(ways, 2)


def late_hooks() -> None:
    torch.manual_seed(0)
    one, x = Switched(), torch.randn(2, 3, 8)
    many: Any = ltp.parallelize(copy.deepcopy(one), make_mesh("cpu", 1, 2), {"up": "colwise", "down": "rowwise"})
    seen: list[Tensor] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        handle = many.up.register_forward_hook(lambda m, args, out: seen.append(out))
    torch.testing.assert_close(many(x), one(x))
    torch.testing.assert_close(seen[0], one.up(x))
    handle.remove()
    torch.testing.assert_close(many(x), one(x))
    assert len(seen) == 1 and any(c.__name__ == "_Entry" for c in type(many).__mro__), "split again"


def test_hooks_registered_after_the_split() -> None:
    run_ranks(late_hooks, 2)


def test_the_kind_of_a_call_is_its_structure_not_its_sizes() -> None:
    assert kind_of({"x": torch.ones(2, 3), "flag": True}) == kind_of({"x": torch.ones(4, 5), "flag": True})
    assert kind_of({"flag": True}) != kind_of({"flag": False})
    assert kind_of((torch.ones(2),)) != kind_of((torch.ones(2), None))
    assert kind_of([3]) == kind_of([4])
