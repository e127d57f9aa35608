"""`python -m lightning_tp` is the command line."""

from __future__ import annotations

import subprocess
import sys


def test_the_command() -> None:
    """In a process of its own, as a shell starts it."""
    command = [sys.executable, "-m", "lightning_tp", "plan", "nowhere.py:build"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "there is no file nowhere.py" in done.stderr
    assert "Traceback" not in done.stderr and done.stderr.count("\n") == 1 and not done.stdout
