"""Every test is guarded by the package's own fixtures: nothing may be left behind."""

from collections.abc import Iterator

import pytest
import pytorch_lightning  # noqa: F401  here, before `lightning`: whichever is imported last takes the messages of both

from lightning_tp.shards.view import depth, set_depth

pytest_plugins = ["lightning_tp.testing.fixtures", "pytester"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--faults", type=int, default=2, help="how many runs `scenarios/test_faults.py` kills at a random instant (50: minutes)"
    )


@pytest.fixture(autouse=True)
def _outside_of_local_view() -> Iterator[None]:
    """What a test leaves entered, the ranks of the next ones begin with."""
    yield
    left, _ = depth(), set_depth(0)
    assert left == 0
