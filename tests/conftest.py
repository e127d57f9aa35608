"""Every test is guarded by the package's own fixtures: nothing may be left behind."""

import pytest
import pytorch_lightning  # noqa: F401  here, before `lightning`: whichever is imported last takes the messages of both

pytest_plugins = ["lightning_tp.testing.fixtures", "pytester"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--faults", type=int, default=2, help="how many runs `scenarios/test_faults.py` kills at a random instant (50: minutes)"
    )
