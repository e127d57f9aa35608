"""A small first batch, and a step that logs nothing."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset
from torchmetrics import MeanMetric

from lightning_tp import TPError
from lightning_tp.data.sample_batch import first_of, quiet, silence_logging


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter(range(6))


@pytest.mark.parametrize(
    "loader, expected",
    [
        (DataLoader(range(9), batch_size=4, shuffle=True), [0, 1]),  # type: ignore[arg-type]
        (DataLoader(range(9), batch_size=1), [0]),  # type: ignore[arg-type]
        (DataLoader(range(1), batch_size=4), [0]),  # type: ignore[arg-type]
        (DataLoader(Stream(), batch_size=3), [0, 1, 2]),
        (DataLoader(range(5, 9), batch_size=None), 5),  # type: ignore[arg-type]
        ([[1, 2], [3]], [1, 2]),
    ],
)
def test_of_one_loader(loader: Any, expected: Any) -> None:
    found = first_of(loader)
    assert (found.tolist() if isinstance(found, torch.Tensor) else found) == expected


def test_of_several() -> None:
    one, two = DataLoader(range(9), batch_size=4), DataLoader(range(3, 9), batch_size=4)  # type: ignore[arg-type]
    found = first_of({"a": one, "b": [one, two]})
    assert found["a"].tolist() == [0, 1] and [b.tolist() for b in found["b"]] == [[0, 1], [3, 4]]


def test_data_that_can_be_read_once() -> None:
    with pytest.raises(TPError, match=r"can be read only once\. Set `example_input_array`"):
        first_of(iter([1, 2]))


class Logs(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.metric = MeanMetric()

    def training_step(self, batch: Any) -> None:
        self.metric(torch.tensor(batch))
        self.log("metric", self.metric)  # outside of a loop Lightning refuses
        self.log_dict({"a": 1.0})
        self.print("said")


def test_a_step_outside_of_a_loop(capsys: pytest.CaptureFixture[str]) -> None:
    module = Logs()
    with pytest.raises(RuntimeError, match="on purpose"), quiet(module):
        module.training_step(3.0)
        assert module.metric.update_called
        raise RuntimeError("on purpose")
    assert not module.metric.update_called and not {"log", "log_dict", "print"} & set(vars(module))
    silence_logging(module)
    module.training_step(2.0)
    assert float(module.metric.compute()) == 2.0 and capsys.readouterr().out == ""
