from __future__ import annotations

import torch

from lightning_tp.infer.follow.trace import ParamView, TensorFacts


def test_facts_are_moved_with_the_data() -> None:
    label, coordinates = torch.arange(6).view(2, 3), (torch.arange(2).view(2, 1).expand(2, 3), torch.arange(3).expand(2, 3))
    facts = TensorFacts(label, ParamView("w", coordinates), grad=True).moved(torch.t)
    assert facts.label is not None and facts.label.tolist() == [[0, 3], [1, 4], [2, 5]]
    assert facts.param is not None and facts.param.name == "w"
    assert [c.tolist() for c in facts.param.coordinates] == [[[0, 1]] * 3, [[0, 0], [1, 1], [2, 2]]]
    assert facts.grad and TensorFacts().moved(torch.t) == TensorFacts()
