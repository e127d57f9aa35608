"""What devices can do: numbers from `hardware.json`, and from files of the same form that users give."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, fields
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from lightning_tp.errors import TPError

FILE = Path(__file__).with_name("hardware.json")


@dataclass(frozen=True)
class Hardware:
    """One kind of device, in bytes, seconds, bytes/s and FLOP/s; where the numbers come from is said in `hardware.json`.

    Args:
        key: its name in the file.
        name: for reading.
        device: "cuda" or "cpu": whose kernels it has.
        matches: what its name contains, as `torch.cuda.get_device_name` gives it.
        memory_bytes: that it has.
        memory_bandwidth: of that.
        flops: peak of products by dtype ("tf32" for float32 where that is allowed).
        per_node: devices of a node.
        intra_bandwidth, inter_bandwidth: to the others of a node; to other nodes. One way, for each device.
        intra_latency, inter_latency: of one hop, with the protocol for large messages and that for small ones.
        product_efficiency, attention_efficiency, memory_efficiency, link_efficiency: what share of the peaks is reached at best.
        kernel_s: the least time of a kernel.
        host_s: of the host to start one.
        tile: rows and columns of a product that one unit computes at a time, at most; see `tiles.py`.
        units: that compute tiles at the same time.
        reserved_bytes: taken before the first tensor.
        fragmentation: share of the allocator's memory that can't be used.
        sustained: the speed of kernels in training, as a share of what each reaches alone: clocks fall under a power limit, products of the
            backward read their operands across, eager mode reads what was just written.
        fsdp_traffic: bytes of the device's memory that are read and written for each byte that FSDP2 gathers or scatters: its copies in and
            out, and what NCCL itself reads and writes. Kernels that run beside it are slower by that.
    """

    key: str
    name: str
    device: str
    memory_bytes: float
    memory_bandwidth: float
    flops: dict[str, float]
    per_node: int
    intra_bandwidth: float
    inter_bandwidth: float
    intra_latency: tuple[float, float]
    inter_latency: tuple[float, float]
    product_efficiency: float
    attention_efficiency: float
    memory_efficiency: float
    link_efficiency: float
    kernel_s: float
    host_s: float
    tile: tuple[int, int] = (128, 128)
    units: int = 1
    reserved_bytes: float = 0
    fragmentation: float = 0.0
    fsdp_traffic: float = 2.0
    sustained: float = 1.0
    matches: tuple[str, ...] = ()

    def peak(self, dtype: torch.dtype) -> float:
        """FLOP/s of products in this dtype."""
        name = str(dtype).removeprefix("torch.")
        return self.flops.get(name) or self.flops["float32"]

    @property
    def usable_bytes(self) -> float:
        """What tensors can have."""
        return (self.memory_bytes - self.reserved_bytes) / (1 + self.fragmentation)


def hardware(which: str | Path | Hardware) -> Hardware:
    """A kind by its name, as vendors write it, too; `file.json` for the only one of a file, `file.json:name` for one of several.

    Raises:
        TPError: it lists those that are known, and says which one may be meant.

    Example:
        >>> hardware("h100").memory_bandwidth / 1e9
        3350.0
        >>> hardware("NVIDIA A100-SXM4-80GB").key, hardware("H100-SXM").key
        ('a100', 'h100')
    """
    if isinstance(which, Hardware):
        return which
    text = str(which)
    path, colon, key = text.rpartition(":")
    if text.endswith(".json") or (colon and path.endswith(".json")):
        found = _read(Path(text if text.endswith(".json") else path))
        if text.endswith(".json"):
            if len(found) != 1:
                raise TPError(f"`hardware={text!r}`: the file has {', '.join(found) or 'nothing'}; say which, `{text}:name`.")
            return next(iter(found.values()))
        if key not in found:
            raise TPError(f"`hardware={text!r}`: {path} has {', '.join(found)}.")
        return found[key]
    known = known_hardware()
    short = {_short(n): h for h in known.values() for n in (h.name, h.key)}
    if _short(text) not in short:
        first = _short(text).partition("-")[0]
        near = [k for k in known if first and k.partition("-")[0] == first] or get_close_matches(_short(text), known, 3)
        meant = f"Did you mean {' or '.join(near)}? " if near else ""
        raise TPError(
            f"`hardware={text!r}` is not known. {meant}There are {', '.join(known)}; or "
            f"give the path of a JSON file with your own, in the form of {FILE.name} of this package."
        )
    return short[_short(text)]


def _short(name: str) -> str:
    """What says which device it is: "nvidia-a100-sxm4-80 gb" -> "a100-80gb"."""
    words = re.findall(r"[a-z0-9]+", re.sub(r"(\d) ?gi?b\b", r"\1gb", name.lower()))
    return "-".join(w for w in words if not re.fullmatch(r"nvidia|tesla|gpu|sxm\d?|hbm\d?e?", w))


@lru_cache(maxsize=1)
def known_hardware() -> dict[str, Hardware]:
    """Those that come with the package."""
    return _read(FILE)


def guess(device_name: str) -> Hardware | None:
    """The kind that a device's name tells; None if it is none of the known.

    Example:
        >>> guess("NVIDIA H100 80GB HBM3").key
        'h100'
    """
    return next((h for h in known_hardware().values() if any(m in device_name for m in h.matches)), None)


def _read(path: Path) -> dict[str, Hardware]:
    try:
        data: Any = json.loads(path.read_text())
    except OSError as error:
        raise TPError(f"`hardware`: `{path}` can't be read: {error.strerror}.") from None
    except ValueError as error:
        raise TPError(f"`hardware`: `{path}` is no JSON: {error}.") from None
    if not isinstance(data, dict):
        raise TPError(f"`hardware`: `{path}` has to be an object of devices by name, as {FILE.name} of this package.")
    names = {f.name for f in fields(Hardware)}
    found: dict[str, Hardware] = {}
    for key, values in data.items():
        if key == "comment":
            continue
        if not isinstance(values, dict):
            raise TPError(f"`hardware`: `{path}`: `{key}` is no object of numbers.")
        like: str | None = values.get("like")
        base = None if like is None else found.get(like) or (known_hardware().get(like) if path != FILE else None)
        if like is not None and base is None:
            raise TPError(
                f"`hardware`: `{path}`: `{key}` is like {like!r}, which is not known. There are {', '.join(known_hardware())}."
            )
        given = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k not in ("like", "comment")}
        unknown = set(given) - names
        if unknown:
            raise TPError(
                f"`hardware`: `{path}`: `{key}` has {', '.join(sorted(unknown))}, which mean nothing here; there are "
                f"{', '.join(sorted(names))}."
            )
        whole = (
            ({f.name: getattr(base, f.name) for f in fields(Hardware)} if base is not None else {})
            | {"name": key}
            | given
            | {"key": key}
        )
        try:
            made = Hardware(**whole)
        except TypeError as error:
            missing = str(error).partition(": ")[2]
            raise TPError(
                f'`hardware`: `{path}`: `{key}` lacks {missing}. Give them, or `"like": "h100"` for what is not said.'
            ) from None
        for f in fields(Hardware):
            value = getattr(made, f.name)
            numbers = value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else (value,)
            if any(
                isinstance(n, (int, float)) and (n < 0 or (n == 0 and f.name not in ("reserved_bytes", "fragmentation")))
                for n in numbers
            ):
                raise TPError(f"`hardware`: `{path}`: `{key}`: `{f.name}` is {value}; it has to be above 0.")
        found[key] = made
    return found
