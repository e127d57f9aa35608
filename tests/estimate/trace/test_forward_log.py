from __future__ import annotations

import torch

from lightning_tp.estimate.trace.forward_log import ForwardEvent, ForwardLog


def test_events_in_order() -> None:
    log, x = ForwardLog(), torch.ones(2, 3)
    log.enter("layer", (torch.ones(4, dtype=torch.int64), x))  # the first floating-point tensor counts
    log.kernel("layer", "product", (1, 2, 3, 4))
    log.kernel("layer", "product", (1, 9, 9, 9))
    log.kernel("layer", "other", ())
    log.collective("layer", "all-gather", 64)
    log.leave("layer", {"y": x[0]})
    assert log.events == [
        ForwardEvent("enter", "layer", shape=(2, 3), tensor=1),
        ForwardEvent("kernel", "layer", "product", (1, 2, 3, 4)),  # of several in a row the first
        ForwardEvent("kernel", "layer", "other"),
        ForwardEvent("collective", "layer", "all-gather", bytes=64),
        ForwardEvent("leave", "layer", shape=(3,)),
    ]


def test_modules_that_read_the_same_tensor() -> None:
    log, x = ForwardLog(), torch.ones(2)
    for inputs in ((x,), (torch.ones(2),), (x,), (), (torch.tensor(1.0),)):
        log.enter("m", inputs)
    numbers = [event.tensor for event in log.events]
    assert numbers[0] == numbers[2] != numbers[1] and numbers[3:] == [0, 0]
    assert [event.shape for event in log.events] == [(2,), (2,), (2,), (), ()]


def test_a_module_that_raised() -> None:
    log = ForwardLog()
    log.leave("m", None)
    assert log.events == [ForwardEvent("leave", "m")]
