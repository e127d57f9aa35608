"""The plugin in a project of somebody else: the example of docs/testing.md runs, and what is left behind is found."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_tp.testing import assert_parity

DOCS = Path(__file__).parents[2] / "docs" / "testing.md"


@pytest.fixture
def project(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    monkeypatch.setenv("PYTHONPATH", str(DOCS.parents[1]))
    conftest, _ = re.findall(r"```python\n(.*?)```", DOCS.read_text(), flags=re.DOTALL)
    pytester.makeconftest(conftest)
    return pytester


def test_the_example_of_the_docs(project: pytest.Pytester) -> None:
    _, example = re.findall(r"```python\n(.*?)```", DOCS.read_text(), flags=re.DOTALL)
    project.makepyfile(example)
    result = project.runpytest_subprocess("-p", "no:cacheprovider")
    skipped = 0 if torch.cuda.device_count() > 1 else 1
    result.assert_outcomes(passed=3 - skipped, skipped=skipped)


def test_what_is_left_is_found(project: pytest.Pytester) -> None:
    project.makepyfile(
        """
        import os, subprocess, threading, time
        import torch.distributed as dist

        def test_process(): subprocess.Popen(["sleep", "100"])
        def test_file(): open("left.txt", "w").close()
        def test_group(): dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        def test_variable(): os.environ["LEFT"] = "1"
        def test_clean(tmp_path): (tmp_path / "x").touch(); assert "LEFT" not in os.environ and not dist.is_initialized()
        """
    )
    result = project.runpytest_subprocess("-p", "no:cacheprovider")
    result.assert_outcomes(passed=5, errors=4)
    for words in ("processes running: sleep", "left left.txt", "process group of 1 ranks", "variables: LEFT"):
        result.stdout.fnmatch_lines([f"*{words}*"])


def test_standalone_tests_run_alone(project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    project.makepyfile(
        """
        from lightning_tp.testing.fixtures import run_if

        @run_if(standalone=True)
        def test_alone(): pass
        def test_beside(): pass
        """
    )
    project.runpytest_subprocess("-p", "no:cacheprovider").assert_outcomes(passed=1, skipped=1)
    monkeypatch.setenv("LTP_RUN_STANDALONE_TESTS", "1")
    project.runpytest_subprocess("-p", "no:cacheprovider").assert_outcomes(passed=1, deselected=1)


def test_parity_fails_with_the_report() -> None:
    class Wrong(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(self.up(x).relu()) * self.up.weight.shape[0]  # of a shard: half

    plan = {"up": "colwise", "down": "rowwise"}
    with pytest.raises(AssertionError, match="down"):
        assert_parity(Wrong, (torch.rand(2, 4, 8),), lambda y: y.square().mean(), tp=2, plan=plan, steps=1)
