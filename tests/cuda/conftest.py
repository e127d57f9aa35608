"""Tests that need GPUs, real or pretended: `pytest --device cuda`. Without two of them they are skipped."""

from pathlib import Path

import pytest
import torch

from tests.device import WHY_NO_GPUS

collect_ignore = ["pretend"]  # the pretended device: it holds no tests


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.device_count() >= 2:
        return
    reason = "needs two GPUs" if torch.cuda.is_available() else f"needs two GPUs: {WHY_NO_GPUS}"
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))
