"""Describe a checkpoint: which step, which mesh, how large, and whether it is complete. No tensor is read, but to verify checksums."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_tp.checkpoint.manifest import Manifest, damage_of_file, read
from lightning_tp.checkpoint.storage.nested import leaves
from lightning_tp.checkpoint.storage.path import MANIFEST, METADATA, PLAN, StoragePath, local_path, permission_errors
from lightning_tp.checkpoint.weights.dcp_folder import DcpFolder
from lightning_tp.checkpoint.weights.hugging_face import HF_CONFIG
from lightning_tp.checkpoint.weights.open import open_checkpoint
from lightning_tp.checkpoint.weights.safetensors_file import is_safetensors
from lightning_tp.checkpoint.weights.stored import StoredCheckpoint, StoredTensor, unique
from lightning_tp.core.units import size
from lightning_tp.errors import TPError

_KINDS = {"folder": "sharded checkpoint", "file": "checkpoint in one file", "safetensors": "weights"}


@dataclass
class Summary:
    """What `inspect_checkpoint` found."""

    path: str  # the checkpoint
    what: str  # its kind, and who wrote it, in words
    step: int | None = None  # `global_step`
    epoch: int | None = None  # of the run that wrote it
    mesh: dict[str, int] | None = None  # the size of each axis, where that is known
    versions: dict[str, str] = field(default_factory=dict)  # of the packages that wrote it
    parameters: int = 0  # elements of the model's tensors (buffers too), tied ones once where that is known
    bytes_by_dtype: dict[str, int] = field(default_factory=dict)  # of the model's tensors
    optimizers: list[int] = field(default_factory=list)  # the bytes of each one's state
    weights_only: bool | None = None  # whether there is no optimizer in it
    plan: str | None = None  # where the plan came from, where there is one
    hugging_face: dict[str, str] = field(default_factory=dict)  # the class in it, by where it is in the model
    files: dict[str, int] = field(default_factory=dict)  # name -> bytes
    # what is missing or broken; nothing: it is complete, as far as that can be seen
    problems: list[str] = field(default_factory=list)
    checked: str = ""  # in words, how far that was

    @property
    def complete(self) -> bool:
        """Whether nothing is missing or broken."""
        return not self.problems

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {**self.__dict__, "complete": self.complete}

    def __str__(self) -> str:
        dtypes = ", ".join(f"{dtype} {size(n)}" for dtype, n in self.bytes_by_dtype.items())
        rows = {
            "step": f"{self.step:,}" if self.step is not None else None,
            "epoch": str(self.epoch) if self.epoch is not None else None,
            "mesh": " x ".join(f"{axis} {n}" for axis, n in (self.mesh or {}).items()),
            "plan": self.plan,
            "versions": ", ".join(f"{package} {version}" for package, version in self.versions.items()),
            "Hugging Face": ", ".join(f"{name} at `{where}`" if where else name for where, name in self.hugging_face.items()),
            "model": f"{self.parameters:,} parameters and buffers: {dtypes}" if self.parameters else None,
            "optimizers": ", ".join(map(size, self.optimizers)) or ("none (weights only)" if self.weights_only else None),
            "files": f"{len(self.files)}, {size(sum(self.files.values()))}",
            "complete": f"yes ({self.checked})" if self.complete else f"NO: {'; '.join(self.problems)}",
        }
        return "\n".join([f"{self.path}: {self.what}", *(f"  {name:<13} {text}" for name, text in rows.items() if text)])


def inspect_checkpoint(path: str | Path, *, verify: bool = False, weights_only: bool = True) -> Summary:
    """Describe a checkpoint of any kind: a folder, a file, safetensors.

    Args:
        path: where it is.
        verify: read every file, and compare checksums where the checkpoint has them.
        weights_only: False lets the checkpoint's own classes be loaded; only for checkpoints that you trust.

    Raises:
        TPError: if it is nothing that could be a checkpoint. A broken one is no error, but has `problems`.
    """
    path = local_path(path)
    with permission_errors(path):
        found = Summary(str(path), "broken checkpoint", files=_files(path))
        manifest: Manifest | None = None
        contents: StoredCheckpoint | None = None
        try:
            manifest = read(StoragePath(path))
        except TPError as error:
            found.problems.append(str(error).removesuffix("."))
        try:
            contents = open_checkpoint(path, weights_only=weights_only)
        except TPError as error:
            if not _is_meant_as_one(path):
                raise
            found.problems.append(str(error).removesuffix("."))
        if contents is not None:
            _describe(contents, found)
        if manifest is not None:  # of the run that wrote it
            found.mesh, found.step, found.epoch = manifest.mesh or found.mesh, manifest.step, manifest.epoch
            found.versions, found.weights_only = manifest.versions or found.versions, manifest.weights_only
        _check(path, manifest, contents, found, verify)
        return found


def _files(path: Path) -> dict[str, int]:
    """Return name -> bytes of a file, or of all files in a folder."""
    if path.is_file():
        return {path.name: path.stat().st_size}
    return {f.relative_to(path).as_posix(): f.stat().st_size for f in sorted(path.rglob("*")) if f.is_file()}


def _is_meant_as_one(path: Path) -> bool:
    """Return whether somebody meant it to be a checkpoint."""
    if path.is_file():
        return path.suffix in (".ckpt", ".pt", ".pth", ".bin", ".safetensors")
    return (path / METADATA).is_file() or (path / MANIFEST).is_file() or any(path.glob("*.distcp")) or is_safetensors(path)


def _describe(contents: StoredCheckpoint, found: Summary) -> None:
    """Note what the checkpoint contains."""
    rest = contents.rest
    found.what = f"{_KINDS[contents.kind]}, written by {contents.by}" if contents.by else _KINDS[contents.kind]
    found.step, found.epoch = rest.get("global_step"), rest.get("epoch")
    if (version := rest.get("pytorch-lightning_version")) is not None:
        found.versions["lightning"] = str(version)
    if (rng := rest.get("lightning_tp_rng_state")) is not None:
        found.mesh = dict(zip(("data_parallel", "tensor_parallel"), rng["mesh"], strict=True))
    tensors = unique(contents.model).values()
    found.parameters = sum(t.numel for t in tensors)
    num_bytes: Counter[str] = Counter()
    for t in tensors:
        num_bytes[str(t.dtype).removeprefix("torch.")] += t.nbytes
    found.bytes_by_dtype = dict(num_bytes)
    found.optimizers = [sum(t.nbytes for t in _tensors(state)) for state in contents.optimizers]
    found.weights_only = not contents.optimizers
    found.plan = _from_json(contents.path / PLAN, lambda plan: plan.get("source"))
    found.hugging_face = {where: (c.get("architectures") or ["?"])[0] for where, c in (rest.get(HF_CONFIG) or {}).items()}
    if not found.hugging_face and (name := _from_json(contents.path / "config.json", lambda config: config["architectures"][0])):
        found.hugging_face = {"": name}


def _from_json(file: Path, take: Callable[[Any], Any]) -> Any:
    """Return something of a JSON file; None if it is not there."""
    try:
        return take(json.loads(file.read_text()))
    except (OSError, ValueError, AttributeError, LookupError, TypeError):
        return None


def _check(path: Path, manifest: Manifest | None, contents: StoredCheckpoint | None, found: Summary, verify: bool) -> None:
    """Note what is missing or broken, and how far that was checked."""
    if manifest is not None:
        of_files = (damage_of_file(StoragePath(path), name, entry, checksums=verify) for name, entry in manifest.files.items())
        found.problems += [problem for problem in of_files if problem is not None]
        found.checked = "sizes and checksums match the manifest" if verify else "sizes match the manifest"
        return
    if contents is not None and contents.kind == "folder":
        found.problems += DcpFolder(path).missing()
        found.checked = "there is no manifest; all files that `.metadata` names are there"
    else:
        found.checked = "all tensors are inside"
    if verify and contents is not None:
        found.problems += _unreadable(contents)
        found.checked += "; every tensor was read, and there are no checksums"


def _tensors(tree: Any) -> Iterator[StoredTensor]:
    return (leaf for _, leaf in leaves(tree) if isinstance(leaf, StoredTensor))


def _unreadable(contents: StoredCheckpoint) -> list[str]:
    """Read every tensor, and say why the first one can't be that can't."""
    for stored in (*contents.model.values(), *_tensors(contents.optimizers), *_tensors(contents.rest)):
        try:
            stored.read()
        except TPError as error:
            return [str(error).removesuffix(".")]
    return []
