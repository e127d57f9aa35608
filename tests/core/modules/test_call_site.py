"""Places in the code of a module: the same in every run, different for different calls."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_tp.core.modules import call_site as call_site_module
from lightning_tp.core.modules.call_site import (
    MODEL_CODE,
    MODULE_CALL,
    CallSite,
    _is_machinery,
    call_site,
    raised_at,
    resumed,
    users_line,
)
from lightning_tp.core.ops import attention
from lightning_tp.core.ops.attention import readable_attention
from lightning_tp.plan.plan import Plan


class Sites(TorchFunctionMode):
    """The call sites of some functions."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.names, self.found = names, []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in self.names:
            self.found.append(call_site(sys._getframe(1)))
        return func(*args, **(kwargs or {}))

    @classmethod
    def of(cls, names: str, model: nn.Module, *inputs: Any) -> list[CallSite]:
        with cls(*names.split()) as mode:
            model(*inputs)
        return mode.found


def double(x: Tensor) -> Tensor:
    return x.mul(2)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)

    def helper(self, x: Tensor) -> Tensor:
        return double(x)

    def forward(self, x: Tensor, depth: int = 0) -> Tensor:
        x = double(x)
        x = self.helper(x) + self.helper(x)
        self.inner(x)
        return self.again(x, depth)

    def again(self, x: Tensor, depth: int) -> Tensor:
        return self.again(x, depth - 1) if depth else double(x)


def test_the_chain_ends_at_the_forward() -> None:
    first, second, third, fourth = Sites.of("mul", Model(), torch.ones(1, 2))
    assert [name for name, _ in first] == ["double", "forward"]
    assert [name for name, _ in second] == [name for name, _ in third] == ["double", "helper", "forward"]
    assert [name for name, _ in fourth] == ["double", "again", "forward"]
    assert len({first, second, third, fourth}) == 4
    assert second[:2] == third[:2] and second[2] != third[2]  # two calls of the helper in one line
    assert first[0] == ("double", "1:11-1:19")  # line in the function, column to column
    assert call_site(None) == ()


def test_it_is_the_same_in_every_run() -> None:
    model, x = Model(), torch.ones(1, 2)
    runs = [Sites.of("mul", model, x) for _ in range(64)]  # Python replaces instructions as it runs them
    assert all(run == runs[0] for run in runs)
    assert Sites.of("mul", nn.Sequential(nn.Sequential(model)), x) == runs[0]  # what is around it does not count


def test_a_function_that_calls_itself_counts_once() -> None:
    model, x = Model(), torch.ones(1, 2)
    once, often = (Sites.of("mul", model, x, depth)[-1] for depth in (1, 5))
    assert once == often and [name for name, _ in once] == ["double", "again", "again", "forward"]


def test_layers_of_torch_are_code_and_what_is_beneath_them_is_not() -> None:
    (site,) = Sites.of("linear", Model(), torch.ones(1, 2))
    assert [name for name, _ in site] == ["forward"]
    (site,) = Sites.of("dropout", nn.Dropout(), torch.ones(2))
    assert [name for name, _ in site] == ["forward"]  # F.dropout is called there


def test_attention_that_is_written_out_is_code_of_the_model() -> None:
    assert {attention.__file__} == MODEL_CODE
    model = nn.MultiheadAttention(4, 2)
    x = torch.ones(3, 1, 4)
    with readable_attention(model):
        sites = Sites.of("view", model, x, x, x)
    assert len(set(sites)) == 3 and all([name for name, _ in site] == ["_multi_head_attention", "forward"] for site in sites)


def test_other_ends() -> None:
    def end() -> CallSite:
        return inner()

    def inner() -> CallSite:
        return call_site(sys._getframe(), frozenset({end.__code__}))

    assert [name for name, _ in end()] == ["inner"]
    assert MODULE_CALL is nn.Module._call_impl.__code__


def test_the_line_of_the_user() -> None:
    line = users_line(sys._getframe())
    assert line == f"{__file__}:{sys._getframe().f_lineno - 1}"
    lines: list[str] = []
    layer = torch.nn.Linear(1, 1)
    layer.register_forward_hook(lambda *_: lines.append(users_line(sys._getframe(1))))
    layer(torch.ones(1))  # from torch's code
    assert lines == [f"{__file__}:{sys._getframe().f_lineno - 1}"]


@pytest.mark.parametrize(
    ("file", "machinery"), [("torch/functional.py", True), ("torch/nn/modules/linear.py", False), ("torchscale/layer.py", False)]
)
def test_a_folder_beside_torchs_is_code_of_a_model(file: str, machinery: bool) -> None:
    packages = Path(torch.__file__).parents[1]
    assert _is_machinery(str(packages / file)) is machinery
    package = Path(call_site_module.__file__).parents[2]
    assert _is_machinery(f"{package}/styles/x.py")
    assert not _is_machinery(f"{package}_of_a_user/x.py")


def test_a_resumed_function_has_the_site_of_its_first_call() -> None:
    site = (("forward", "1:2-3:4"),)
    with Sites("mul") as mode:
        resumed(double, site, nullcontext)(torch.ones(2))
    assert [(found[0][0], found[1:]) for found in mode.found] == [("double", site)]


def test_where_an_exception_was_raised() -> None:
    """The innermost line of the user's, though torch or this package has raised it."""
    line = 0
    try:
        line = sys._getframe().f_lineno + 1
        Plan({"a": "no such style"})
    except Exception as error:
        assert raised_at(error.__traceback__) == f" (at {__file__}:{line})"
    assert line and raised_at(None) == ""
