"""Describe devices: what is in `hardware.json`, and in files of the same form that users pass."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from lightning_tp.errors import TPError

FILE = Path(__file__).with_name("hardware.json")
MAY_BE_ZERO = ("reserved_bytes", "fragmentation")


@dataclass(frozen=True)
class Hardware:
    """One kind of device, in bytes, seconds, bytes/s and FLOP/s; `hardware.json` says where the numbers come from.

    Args:
        key: its name in the file.
        name: for reading.
        device: "cuda" or "cpu": whose kernels it has.
        memory_bytes: of the device.
        memory_bandwidth: of its memory.
        flops: peak of matmuls by dtype ("tf32" for float32 where that is allowed).
        per_node: devices of a node.
        intra_bandwidth, inter_bandwidth: to other devices of the node, and to other nodes; one way, for each device.
        intra_latency, inter_latency: of one hop, with the protocol for large messages and with that for small ones.
        product_efficiency, attention_efficiency, memory_efficiency, link_efficiency: the share of the peaks that is achieved at best.
        kernel_s: the least time of a kernel.
        host_s: CPU time to launch one.
        tile: rows and columns of the largest tile of a matmul; see `gemm_tiling`.
        units: streaming multiprocessors, which compute tiles at the same time.
        reserved_bytes: taken before the first tensor: CUDA context, NCCL.
        fragmentation: allocator overhead, as a share of what tensors take.
        fsdp_traffic: bytes of the device's memory that are read and written for each byte that FSDP2 gathers or reduces: its copies in and out, and
            NCCL's own. Kernels that run beside it are slower by that.
        sustained: the speed of kernels in training, as a share of what each achieves alone: clocks fall under a power limit, matmuls of the
            backward read their operands transposed, eager mode reads what was just written.
        matches: what its name contains, as `torch.cuda.get_device_name` gives it.
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
        """Return the FLOP/s of matmuls in this dtype."""
        name = str(dtype).removeprefix("torch.")
        return self.flops.get(name) or self.flops["float32"]

    @property
    def usable_bytes(self) -> float:
        """What is left for tensors."""
        return (self.memory_bytes - self.reserved_bytes) / (1 + self.fragmentation)


def hardware(which: str | Path | Hardware) -> Hardware:
    """Return a device by its name, also as vendors write it; `file.json` for the only one of a file, `file.json:name` for one of several.

    Raises:
        TPError: for an unknown name (it suggests similar ones), or a file that is not in the form of `hardware.json`.

    Example:
        >>> hardware("h100").memory_bandwidth / 1e9
        3350.0
        >>> hardware("NVIDIA A100-SXM4-80GB").key, hardware("H100-SXM").key
        ('a100', 'h100')
    """
    if isinstance(which, Hardware):
        return which
    text = str(which)
    path, _, key = text.rpartition(":")
    if text.endswith(".json"):
        return _of_file(text, Path(text), None)
    if path.endswith(".json"):
        return _of_file(text, Path(path), key)
    known = known_hardware()
    by_name = {_short(n): h for h in known.values() for n in (h.name, h.key)}
    name = _short(text)
    if name not in by_name:
        first = name.partition("-")[0]
        near = [k for k in known if first and k.partition("-")[0] == first] or get_close_matches(name, known, 3)
        meant = f"Did you mean {' or '.join(near)}? " if near else ""
        raise TPError(
            f"Unknown `hardware={text!r}`. {meant}There are {', '.join(known)}; or pass the path of a JSON file with your own devices, in the form "
            f"of {FILE.name} of this package."
        )
    return by_name[name]


def _of_file(text: str, path: Path, key: str | None) -> Hardware:
    found = _read(path)
    if key is None:
        if len(found) != 1:
            raise TPError(f"`hardware={text!r}`: the file has {', '.join(found) or 'no devices'}. Say which: `{text}:name`.")
        return next(iter(found.values()))
    if key not in found:
        raise TPError(f"`hardware={text!r}`: {path} has no `{key}`, only {', '.join(found)}.")
    return found[key]


def _short(name: str) -> str:
    """Reduce a name to what tells which device it is: "nvidia-a100-sxm4-80 gb" -> "a100-80gb"."""
    words = re.findall(r"[a-z0-9]+", re.sub(r"(\d) ?gi?b\b", r"\1gb", name.lower()))
    return "-".join(w for w in words if not re.fullmatch(r"nvidia|tesla|gpu|sxm\d?|hbm\d?e?", w))


@lru_cache(maxsize=1)
def known_hardware() -> dict[str, Hardware]:
    """Return the devices that come with the package."""
    return _read(FILE)


def guess(device_name: str) -> Hardware | None:
    """Return the known device that a name of `torch.cuda.get_device_name` means; None if it is none of them.

    Example:
        >>> guess("NVIDIA H100 80GB HBM3").key
        'h100'
    """
    return next((h for h in known_hardware().values() if any(m in device_name for m in h.matches)), None)


# ---------------------------------------------------------------------------------------------------------------- the files


def _read(path: Path) -> dict[str, Hardware]:
    try:
        data: Any = json.loads(path.read_text())
    except OSError as error:
        raise TPError(f"`hardware`: could not read `{path}`: {error.strerror}.") from None
    except ValueError as error:
        raise TPError(f"`hardware`: `{path}` is not valid JSON: {error}.") from None
    if not isinstance(data, dict):
        raise TPError(f"`hardware`: `{path}` has to be a JSON object of devices by name, as {FILE.name} of this package.")
    found: dict[str, Hardware] = {}
    for key, values in data.items():
        if key != "comment":
            found[key] = _device(f"`hardware`: `{path}`: `{key}`", key, values, found if path == FILE else known_hardware() | found)
    return found


def _device(where: str, key: str, values: Any, known: Mapping[str, Hardware]) -> Hardware:
    """Build a device of its JSON object; `"like": name` takes what is not given from another one."""
    if not isinstance(values, dict):
        raise TPError(f"{where} has to be a JSON object of numbers.")
    like = values.get("like")
    if like is not None and like not in known:
        raise TPError(f"{where} is like {like!r}, which is unknown. Valid are {', '.join(known)}.")
    names = [f.name for f in fields(Hardware)]
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k not in ("like", "comment")}
    if unknown := sorted(given.keys() - set(names)):
        raise TPError(f"{where} has unknown fields: {', '.join(unknown)}. Valid are {', '.join(sorted(names))}.")
    inherited = {name: getattr(known[like], name) for name in names} if like is not None else {}
    try:
        made = Hardware(**(inherited | {"name": key} | given | {"key": key}))
    except TypeError as error:
        missing = str(error).partition(": ")[2]
        raise TPError(
            f'{where} lacks {missing}. Add them, or `"like": "h100"` to take what is not given from that device.'
        ) from None
    for name in names:
        _check_positive(where, name, getattr(made, name))
    return made


def _check_positive(where: str, name: str, value: Any) -> None:
    numbers = value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else (value,)
    for n in numbers:
        if isinstance(n, (int, float)) and (n < 0 or (n == 0 and name not in MAY_BE_ZERO)):
            raise TPError(f"{where}: `{name}` is {value}; it has to be above 0.")
