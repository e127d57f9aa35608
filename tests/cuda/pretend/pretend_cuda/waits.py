"""What makes the host wait for the device, by the lines that asked, and the collectives with the streams that they run on."""

from __future__ import annotations

import collections
import os
import threading
import traceback

from pretend_cuda import device

HERE = os.path.dirname(os.path.abspath(__file__)) + os.sep
Key = tuple[str, str, str]  # kind, what, where


class HostWaits:
    """What would make the host wait for the device while this context is open.

        with HostWaits() as waits:
            step()
        print(waits.table())

    Kinds: `item`, `sync op` (nonzero, masked_select ..), `copy host->device`, `copy device->host` (pinned and non-blocking ones do not
    count), `stream.synchronize`, `event.synchronize`, `device.synchronize`. With `collectives=True` two more that are no waits: `collective`,
    with the stream on which it ran, its own or the current one; and `needless stream`, a collective on a stream of its own that was waited
    for before anything else was launched: that stream only cost two events.
    """

    def __init__(self, collectives: bool = False) -> None:
        self.collectives = collectives
        self.found: collections.Counter[Key] = collections.Counter()
        self.stacks: dict[Key, list[traceback.FrameSummary]] = {}  # the whole stack of the first

    def __call__(self, kind: str, what: str) -> None:
        if kind in ("collective", "needless stream") and not self.collectives:
            return
        frames = [f for f in traceback.extract_stack()[:-1] if not f.filename.startswith(HERE)]
        key = (kind, what.split(" of ")[0] if kind.startswith("copy") else what, where(frames))
        self.found[key] += 1
        self.stacks.setdefault(key, frames)

    def __enter__(self) -> HostWaits:
        device.ext.set_report(self)
        return self

    def __exit__(self, *error: object) -> None:
        device.ext.set_report(None)

    def table(self, steps: int = 1) -> str:
        """Return one line each, the most frequent first; with the number of `steps`, how often in a step."""
        rows = sorted(self.found.items(), key=lambda row: (-row[1], row[0]))
        return "\n".join(f"{n / steps:8.2f}  {kind:18s} {what:40s} {place}" for (kind, what, place), n in rows)


def where(frames: list[traceback.FrameSummary]) -> str:
    """Return, of a stack, the innermost lines of the package, of Lightning, and of anything else that is not torch's."""
    found, seen = [], set()
    for f in reversed(frames):
        path = f.filename
        if f.name in ("__torch_function__", "__torch_dispatch__") and "func(" in (f.line or ""):
            continue  # a mode that only passes the call on
        inner = path.split("site-packages" + os.sep)[-1]
        if "site-packages" in path:
            group = inner.split(os.sep)[0]
        else:
            group = "lightning_tp" if os.sep + "lightning_tp" + os.sep in path else "script"
            inner = os.sep.join(path.split(os.sep)[-2:])
        if group == "torch" or group in seen:
            continue
        seen.add(group)
        found.append(f"{inner}:{f.lineno} {f.name}")
    if found:
        return " < ".join(found[:3])
    return "a thread of autograd" if threading.current_thread() is not threading.main_thread() else "?"
