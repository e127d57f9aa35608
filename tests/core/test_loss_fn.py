"""Loss functions of one and of two arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_tp.core.loss_fn import loss_from
from lightning_tp.errors import TPError

OUTPUT, INPUTS = torch.tensor([1.0, 3.0]), torch.tensor([0.0, 1.0])


def with_default(output: Tensor, scale: float = 2.0) -> Tensor:
    return output.sum() * scale


@pytest.mark.parametrize(
    ("loss_fn", "value"),
    [
        (lambda output: output.sum(), 4.0),
        (lambda output, inputs: (output * inputs).sum(), 3.0),
        (with_default, 8.0),
        (torch.sum, 4.0),  # without a signature
        (F.mse_loss, 2.5),
        (lambda output: output.sum().view(1, 1), 4.0),
    ],
)
def test_is_called_with_what_it_takes(loss_fn: Callable[..., Tensor], value: float) -> None:
    loss = loss_from(loss_fn, OUTPUT, INPUTS)
    assert loss.shape == () and float(loss) == value


@pytest.mark.parametrize(("loss_fn", "what"), [(lambda output: output, r"shape \(2,\)"), (lambda output: None, "a NoneType")])
def test_what_is_no_scalar_is_refused(loss_fn: Any, what: str) -> None:
    with pytest.raises(TPError, match=rf"`loss_fn` returned .*{what}.*scalar"):
        loss_from(loss_fn, OUTPUT, INPUTS)
