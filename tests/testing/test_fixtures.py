"""The plugin in a project of somebody else: the example of docs/testing.md runs, and what is left behind is found."""

from __future__ import annotations

import re
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from lightning_tp.testing.fixtures import run_if

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
    result = project.runpytest_inprocess("-p", "no:cacheprovider")
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
    project.runpytest_inprocess("-p", "no:cacheprovider").assert_outcomes(passed=1, skipped=1)
    monkeypatch.setenv("LTP_RUN_STANDALONE_TESTS", "1")
    project.runpytest_inprocess("-p", "no:cacheprovider").assert_outcomes(passed=1, deselected=1)


def test_gloo_fixture(gloo: dist.ProcessGroup) -> None:
    total = torch.ones(2)
    dist.all_reduce(total)
    torch.testing.assert_close(total, torch.ones(2))
    assert gloo.size() == 1


def test_run_if_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    mark = run_if(min_gpus=1000, min_torch="2.0").mark
    assert mark.args == (True,) and mark.kwargs["reason"] == "needs 1000 GPUs"
    assert run_if(min_torch="2.0", linux_only=sys.platform == "linux").mark.args == (False,)
    mark = run_if(min_torch="99.1").mark
    assert mark.args == (True,) and mark.kwargs["reason"].startswith(f"needs torch>=99.1 (installed: {torch.__version__}")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "platform", "win32")
    mark = run_if(bf16_cuda=True, linux_only=True).mark
    assert mark.args == (True,) and mark.kwargs["reason"] == "needs bfloat16 on CUDA, Linux"


LEAKY = {
    "process group": "dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)",
    "environment variables: LEAKED": "os.environ['LEAKED'] = '1'",
    "threads running: leaked": "threading.Thread(target=lambda: time.sleep(4), name='leaked').start()",
}


@pytest.mark.parametrize("complaint", LEAKY)
def test_fixtures_fail_a_test_that_leaks(pytester: pytest.Pytester, complaint: str) -> None:
    pytester.makeconftest('pytest_plugins = ["lightning_tp.testing.fixtures"]')
    pytester.makepyfile(
        f"""
        import os, threading, time, torch, torch.distributed as dist

        def test_leaks():
            torch.set_default_dtype(torch.float64)
            torch.manual_seed(1)
            {LEAKY[complaint]}

        def test_next():
            assert torch.get_default_dtype() == torch.float32 and torch.initial_seed() != 1
            assert "LEAKED" not in os.environ and not dist.is_initialized()
        """
    )
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider", "-q")
    for thread in threading.enumerate():
        if thread.name == "leaked":
            thread.join()
    result.assert_outcomes(passed=2, errors=1)
    result.stdout.fnmatch_lines([f"*{complaint}*"])
