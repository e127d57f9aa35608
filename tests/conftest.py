"""Every test is guarded by the package's own fixtures: nothing may be left behind. `--device cuda` runs them on GPUs."""

from collections.abc import Iterator

import pytest

from tests.device import DEVICE, WHY_NO_GPUS, pretend_cuda  # before torch is imported

# isort: split
import pytorch_lightning  # noqa: F401  here, before `lightning`: whichever is imported last takes the messages of both
import torch

from lightning_tp.shards.view import depth, set_depth

pytest_plugins = ["lightning_tp.testing.fixtures", "pytester"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--faults", type=int, default=2, help="how many runs `scenarios/test_faults.py` kills at a random instant (50: minutes)"
    )
    parser.addoption(
        "--device",
        choices=("cpu", "cuda"),
        default=DEVICE,
        help="cuda: run on GPUs, pretended where there are none, tests/cuda/ as well",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("device") != DEVICE:
        raise pytest.UsageError(
            "Give --device on the command line or in PYTEST_ADDOPTS: torch is imported before a configuration is read."
        )


def pytest_report_header() -> str:
    if DEVICE == "cpu":
        return "device: cpu"
    if WHY_NO_GPUS:
        return f"device: cpu, for {WHY_NO_GPUS}"
    return f"device: cuda, {torch.cuda.device_count()} {'pretended ' if pretend_cuda.ext else ''}GPUs"  # asking for a name would use one


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, on GPUs, what can only be seen on the CPU."""
    for item in items if DEVICE == "cuda" and WHY_NO_GPUS is None else []:
        for mark in item.iter_markers("only_on_cpu"):
            item.add_marker(pytest.mark.skip(reason=mark.args[0]))


@pytest.fixture(autouse=True)
def _outside_of_local_view() -> Iterator[None]:
    """What a test leaves entered, the ranks of the next ones begin with."""
    yield
    left, _ = depth(), set_depth(0)
    assert left == 0
