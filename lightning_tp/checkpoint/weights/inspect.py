"""What a checkpoint is: which step, which mesh, how large, and whether it is complete. No tensor is read, but to verify checksums."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_tp.checkpoint.manifest import FORMAT, LATER, MANIFEST
from lightning_tp.checkpoint.weights.dcp_folder import Folder
from lightning_tp.checkpoint.weights.hugging_face import HF_CONFIG
from lightning_tp.checkpoint.weights.open import open_checkpoint
from lightning_tp.checkpoint.weights.safetensors_file import is_safetensors
from lightning_tp.checkpoint.weights.stored import METADATA, Stored, StoredTensors, local, readable, unique
from lightning_tp.errors import TPError

AT_ONCE = 2**22


@dataclass
class Summary:
    """What `inspect_checkpoint` found.

    Args:
        path: the checkpoint.
        what: its kind in words.
        step: `global_step`.
        epoch: of the run that wrote it.
        mesh: the sizes of its axes, where that is known.
        versions: of the packages that wrote it.
        parameters: elements of the model's tensors (buffers too), tied ones once where that is known.
        bytes_by_dtype: of the model's tensors.
        optimizers: the bytes of each one's state.
        weights_only: whether there is no optimizer in it.
        plan: where the plan came from, where there is one.
        hugging_face: the class in it, by where it is in the model.
        files: name -> bytes.
        problems: what is missing or broken; nothing: it is complete, as far as that can be seen.
        checked: in words, how far that was.
    """

    path: str
    what: str
    step: int | None = None
    epoch: int | None = None
    mesh: dict[str, int] | None = None
    versions: dict[str, str] = field(default_factory=dict)
    parameters: int = 0
    bytes_by_dtype: dict[str, int] = field(default_factory=dict)
    optimizers: list[int] = field(default_factory=list)
    weights_only: bool | None = None
    plan: str | None = None
    hugging_face: dict[str, str] = field(default_factory=dict)
    files: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    checked: str = ""

    @property
    def complete(self) -> bool:
        """Whether nothing is missing or broken."""
        return not self.problems

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**self.__dict__, "complete": self.complete}

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.what}"]
        at = [f"step {self.step:,}" if self.step is not None else "", f"epoch {self.epoch}" if self.epoch is not None else ""]
        lines += _line("at", ", ".join(a for a in at if a))
        lines += _line("mesh", " x ".join(f"{k} {n}" for k, n in (self.mesh or {}).items()))
        lines += _line("plan", self.plan)
        lines += _line("versions", ", ".join(f"{k} {v}" for k, v in self.versions.items()))
        lines += _line("Hugging Face", ", ".join(f"{c} at `{n}`" if n else c for n, c in self.hugging_face.items()))
        kinds = ", ".join(f"{dtype} {_size(n)}" for dtype, n in self.bytes_by_dtype.items())
        lines += _line("model", f"{self.parameters:,} parameters and buffers: {kinds}" if self.parameters else "")
        lines += _line("optimizers", ", ".join(map(_size, self.optimizers)) or ("none (weights only)" if self.weights_only else ""))
        lines += _line("files", f"{len(self.files)}, {_size(sum(self.files.values()))}")
        lines += _line("complete", f"yes ({self.checked})" if self.complete else f"NO: {'; '.join(self.problems)}")
        return "\n".join(lines)


def _line(name: str, text: str | None) -> list[str]:
    return [f"  {name:<13} {text}"] if text else []


def _size(n: int) -> str:
    for unit, of in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if n >= of:
            return f"{n / of:.1f} {unit}"
    return f"{n} B"


def inspect_checkpoint(path: str | Path, *, verify: bool = False, weights_only: bool = True) -> Summary:
    """Look at a checkpoint of any kind: a folder, a file, safetensors.

    Args:
        path: where it is.
        verify: read every file, and compare checksums where the checkpoint has them.
        weights_only: False lets the checkpoint's own classes be loaded; only for checkpoints that you trust.

    Raises:
        TPError: if it is nothing that could be a checkpoint. A broken one is no error, but has `problems`.
    """
    path = local(path)
    with readable(path):
        return _inspect(path, verify, weights_only)


def _inspect(path: Path, verify: bool, weights_only: bool) -> Summary:
    files = (
        {f.relative_to(path).as_posix(): f.stat().st_size for f in sorted(path.rglob("*")) if f.is_file()} if path.is_dir() else {}
    )
    if path.is_file():
        files = {path.name: path.stat().st_size}
    found = Summary(str(path), "a broken checkpoint", files=files)
    manifest = _manifest(path, found)
    try:
        contents = open_checkpoint(path, weights_only=weights_only)
    except TPError as error:
        if not _should_be_one(path):
            raise
        found.problems.append(str(error))
        contents = None
    if contents is not None:
        _describe(contents, found)
    if manifest is not None:
        found.mesh = manifest.get("mesh") or found.mesh
        found.versions = {k: str(v) for k, v in (manifest.get("versions") or {}).items()} or found.versions
        found.step = manifest.get("step", found.step)
        found.epoch = manifest.get("epoch", found.epoch)
        found.weights_only = manifest.get("weights_only", found.weights_only)
        found.problems += _against(path, manifest, verify)
        found.checked = "sizes and checksums as in its manifest" if verify else "sizes as in its manifest"
    elif contents is not None and contents.kind == "folder":
        found.problems += _lacking(path)
        found.checked = "as far as can be seen, without a manifest: all that `.metadata` names is there"
    else:
        found.checked = "all tensors lie inside"
    if verify and manifest is None and contents is not None:
        found.problems += _unreadable(contents)
        found.checked += "; every tensor was read, and there are no checksums"
    return found


def _should_be_one(path: Path) -> bool:
    """Whether somebody meant it to be a checkpoint."""
    if path.is_dir():
        return (
            (path / METADATA).is_file() or (path / MANIFEST).is_file() or bool(list(path.glob("*.distcp"))) or is_safetensors(path)
        )
    return path.is_file() and path.suffix in (".ckpt", ".pt", ".pth", ".bin", ".safetensors")


def _describe(contents: StoredTensors, found: Summary) -> None:
    rest = contents.rest
    kind = {"folder": "a folder that many ranks have written", "file": "one file", "safetensors": "weights alone"}[contents.kind]
    found.what = f"{kind}, by {contents.by}" if contents.by else kind
    found.step, found.epoch = rest.get("global_step"), rest.get("epoch")
    if (version := rest.get("pytorch-lightning_version")) is not None:
        found.versions["lightning"] = str(version)
    if (rng := rest.get("lightning_tp_rng_state")) is not None:
        found.mesh = dict(zip(("data_parallel", "tensor_parallel"), rng["mesh"], strict=True))
    first = unique(contents.model)
    found.parameters = sum(s.numel for s in first.values())
    bytes_: Counter[str] = Counter()
    for s in first.values():
        bytes_[str(s.dtype).removeprefix("torch.")] += s.nbytes
    found.bytes_by_dtype = dict(bytes_)
    found.optimizers = [sum(s.nbytes for s in _stored(state)) for state in contents.optimizers]
    found.weights_only = not contents.optimizers
    found.hugging_face = {where: (c.get("architectures") or ["?"])[0] for where, c in (rest.get(HF_CONFIG) or {}).items()}
    where = contents.path
    for name, take in (("plan.json", lambda d: d.get("source")), ("config.json", lambda d: d.get("architectures"))):
        try:
            said = take(json.loads((where / name).read_text()))
        except (OSError, ValueError, AttributeError):
            continue
        if name == "plan.json":
            found.plan = said
        elif said and not found.hugging_face:
            found.hugging_face = {"": said[0]}


def _stored(tree: Any) -> Iterator[Stored]:
    if isinstance(tree, Stored):
        yield tree
    elif isinstance(tree, (dict, list, tuple)):
        for value in tree.values() if isinstance(tree, dict) else tree:
            yield from _stored(value)


def _manifest(path: Path, found: Summary) -> dict[str, Any] | None:
    file = path / MANIFEST
    if not file.is_file():
        return None
    try:
        manifest: dict[str, Any] = json.loads(file.read_text())
        if not isinstance(manifest["files"], dict):
            raise TypeError("`files` is no mapping")
        if manifest.get("format") != FORMAT:
            found.problems.append(
                f"{MANIFEST} has the format {manifest.get('format')}, and {LATER}. Install the version that wrote it"
            )
        return manifest
    except (ValueError, KeyError, TypeError) as error:
        found.problems.append(f"{MANIFEST} can't be read ({error})")
        return None


def _against(path: Path, manifest: dict[str, Any], verify: bool) -> list[str]:
    """What differs from the manifest."""
    problems = []
    for name, entry in manifest["files"].items():
        file = path / name
        if not file.is_file():
            problems.append(f"{name} is missing")
        elif file.stat().st_size != entry["bytes"]:
            problems.append(f"{name} has {file.stat().st_size} bytes, and should have {entry['bytes']}")
        elif verify and not _as_written(file, entry):
            problems.append(f"{name} is not as it was written (its checksum differs)")
    return problems


def _as_written(file: Path, entry: dict[str, Any]) -> bool:
    sha, crc = hashlib.sha256(), 0
    by_sha = "sha256" in entry
    with file.open("rb") as f:
        while data := f.read(AT_ONCE):
            if by_sha:
                sha.update(data)
            else:
                crc = zlib.crc32(data, crc)
    if by_sha:
        return bool(sha.hexdigest() == entry["sha256"])
    return "crc32" not in entry or int(entry["crc32"], 16) == crc


def _lacking(path: Path) -> list[str]:
    """Files that the metadata of a folder names, and that are missing or too short."""
    ends: dict[str, int] = {}
    data: Any = Folder(path).metadata.storage_data or {}
    for info in data.values():
        ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
    problems = []
    for name, end in sorted(ends.items()):
        if not (path / name).is_file():
            problems.append(f"{name} is missing")
        elif (path / name).stat().st_size < end:
            problems.append(f"{name} has {(path / name).stat().st_size} bytes, and should have {end}")
    return problems


def _unreadable(contents: StoredTensors) -> list[str]:
    for stored in (*contents.model.values(), *_stored(contents.optimizers), *_stored(contents.rest)):
        try:
            stored.read()
        except TPError as error:
            return [str(error)]
    return []
