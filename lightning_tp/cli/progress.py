"""Progress of long commands on stderr."""

from __future__ import annotations

import sys
import time


class Progress:
    """Print what is being computed, once it has taken a few seconds: on a terminal one line that is erased at the end, else a line each."""

    QUIET_S = 3.0

    def __init__(self) -> None:
        self.start = time.monotonic()
        self.is_shown = False

    def __call__(self, text: str) -> None:
        """Say what comes next."""
        elapsed = time.monotonic() - self.start
        if elapsed < self.QUIET_S:
            return
        self.is_shown = True
        line = f"{elapsed:3.0f} s: {text}"
        if sys.stderr.isatty():
            print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        if self.is_shown and sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr, flush=True)
