from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_tp.infer.follow.run import run
from lightning_tp.infer.follow.tracer import ANY_OTHER, RULES
from tests.infer.follow.traced import Net, classes_of, traced


def test_rules_are_registered_for_all_kinds_of_operators() -> None:
    modules = {name: rule.__module__.rpartition(".")[2] for name, rule in RULES.items()}
    for name, module in {
        "mm": "products",
        "scaled_dot_product_attention": "products",
        "view": "moves",
        "embedding": "moves",
        "convolution": "convolutions",
        ANY_OTHER: "moves",
    }.items():
        assert modules[name] == module


def test_what_an_earlier_run_found_to_be_needed_whole_makes_no_features() -> None:
    trace, _, _ = traced(Net(F.gelu), torch.zeros(2, 4), whole={("a.weight", 0)})
    assert ("a.weight", 0) not in trace.nodes
    assert trace.whole_uses["a.weight"] == {"a"}


def test_a_parameter_that_is_combined_with_shards_and_with_equal_activations_is_in_both() -> None:
    class Scaled(Net):
        def __init__(self) -> None:
            super().__init__(F.gelu)
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x) * self.scale) * self.scale

    trace, _, _ = traced(Scaled(), torch.zeros(2, 4))
    assert trace.local_uses["scale"] == trace.whole_uses["scale"] == {""}
    assert "a.bias" in trace.local_uses and "b.bias" in trace.whole_uses


def test_shared_features_have_a_partial_gradient_and_count_as_sharded() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            split, kept = self.a(x).chunk(2, -1)
            return self.b(split) + kept * self.b.bias * x

    mask = torch.arange(8) >= 4
    trace, _, _ = traced(Shared(), torch.zeros(2, 4, requires_grad=True), shared={("a.weight", 0): mask})
    assert not trace.nodes["a.weight", 0][4:].any()
    assert trace.local_uses["b.bias"]
    assert list(trace.leaked_partial) == [""]  # it is multiplied with x


def test_a_partial_gradient_may_be_combined_with_its_like_and_with_parameters() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.scale = nn.Linear(4, 8), nn.Parameter(torch.ones(8))

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return y * y * self.scale

    x = torch.zeros(2, 4, requires_grad=True)
    trace, _, _ = traced(Shared(), x, shared={("a.weight", 0): torch.ones(8, dtype=torch.bool)})
    assert not trace.leaked_partial


def test_logits_do_not_count_as_sharded_where_owners_are_known() -> None:
    """They show their full shape: an owner of -1."""

    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.shift = nn.Linear(4, 8, bias=False), nn.Parameter(torch.zeros(8))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x) + self.shift

    owner = torch.full((9,), -1)
    assert "shift" in traced(Shifted(), torch.zeros(2, 4), owner=owner)[0].whole_uses
    owner[5:] = 1
    assert "shift" in traced(Shifted(), torch.zeros(2, 4), owner=owner)[0].local_uses


def test_a_log_has_one_entry_per_operation_and_the_numbers_of_literals() -> None:
    def log_of(number: float) -> list[Any]:
        net = Net(lambda x: x * torch.tensor([number] * 8))
        return traced(net, torch.zeros(2, 4), log=[])[2].log or []

    one, other, two = log_of(1.0), log_of(1.0), log_of(2.0)
    assert one == other != two
    assert [entry[0] for entry in one][:1] == ["a"]
    (differs,) = [(a, b) for a, b in zip(one, two, strict=True) if a != b]
    assert "1.0" in differs[0][3][-1] and "2.0" in differs[1][3][-1]


def test_joins_name_the_operation_and_the_module() -> None:
    trace, _, _ = traced(Net(nn.Softmax(-1)), torch.zeros(2, 4))
    assert trace.classes.joins[-1][1] == "`softmax` in `between`"


def test_only_operations_on_what_is_known_are_followed(monkeypatch: Any) -> None:
    followed = []
    rule = RULES[ANY_OTHER]
    monkeypatch.setitem(RULES, ANY_OTHER, lambda tracer, op: (followed.append(op.name), rule(tracer, op))[1])
    run(nn.Identity(), lambda m, x: x * 2 + torch.arange(3), torch.zeros(3), set(), {})
    assert followed == []
    trace, _, _ = traced(Net(F.gelu), torch.zeros(2, 4))
    assert "gelu" in followed and classes_of(trace, ("a.weight", 0)) == [*range(1, 9)]
