"""Open a checkpoint without reading it into memory: every tensor is a `StoredTensor`, which is read when it is asked for.

Known are folders of torch's distributed checkpoint (ours, and those that Lightning's ModelParallelStrategy and FSDPStrategy write), single
files of `torch.save`, and files and folders of safetensors. Nothing in a checkpoint is executed: the pickle of a folder's `.metadata` may name
torch's own metadata classes only, and everything else is loaded with `weights_only`.
"""

from __future__ import annotations

from pathlib import Path

from lightning_tp.checkpoint.storage.path import METADATA, local_path, permission_errors
from lightning_tp.checkpoint.weights.dcp_folder import open_folder
from lightning_tp.checkpoint.weights.safetensors_file import is_safetensors, open_safetensors
from lightning_tp.checkpoint.weights.stored import StoredCheckpoint
from lightning_tp.checkpoint.weights.torch_file import open_file
from lightning_tp.errors import TPError


def open_checkpoint(path: str | Path, *, weights_only: bool = True) -> StoredCheckpoint:
    """Open a checkpoint of any of these kinds; no tensor is read.

    Args:
        path: a folder or a file.
        weights_only: False runs what `meta.pt` or a single file has pickled (classes of your own in hyperparameters): if you trust it.

    Raises:
        TPError: if it is none, or is broken.
    """
    path = local_path(path)
    with permission_errors(path):
        if (path / METADATA).is_file():
            return open_folder(path, weights_only=weights_only)
        if is_safetensors(path):
            return StoredCheckpoint("safetensors", path, open_safetensors(path), by="safetensors")
        if path.is_file():
            return open_file(path, weights_only=weights_only)
        raise TPError(f"`{path}` is no checkpoint: {_what_it_is(path)}")


def _what_it_is(path: Path) -> str:
    if path.exists() and not path.is_dir():
        return "it is neither a file nor a folder."
    if not path.exists():
        near = sorted(p.name for p in path.parent.iterdir()) if path.parent.is_dir() else []
        return "there is no such file or folder." + (f" Beside it: {', '.join(near[:6])}." if near else "")
    has = sorted(p.name for p in path.iterdir())
    if any(name.endswith(".distcp") for name in has):
        return f"it has shards but no `{METADATA}`, which is written last: its save was never completed."
    inside = [name for name in has if (path / name / METADATA).is_file() or name.endswith((".ckpt", ".safetensors"))]
    if inside:
        return f"the folder contains {', '.join(inside[:4])}. Name one of these."
    found = f"it has {', '.join(has[:6])}" if has else "it is empty"
    return f"a folder without `{METADATA}` (a distributed checkpoint) and without `model.safetensors`; {found}."
