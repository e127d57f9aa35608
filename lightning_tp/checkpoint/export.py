"""Export weights to safetensors, a Hugging Face folder or one file of `torch.save`, and merge a checkpoint folder into one file.

One tensor is in memory at a time. Everything is written beside its place and renamed at the end. The model's code is not needed; for a Hugging
Face folder transformers says (on the meta device) which names and shapes its class has.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import torch

from lightning_tp.checkpoint.find import select_intact
from lightning_tp.checkpoint.storage.path import MANIFEST, METADATA, StoragePath, local_path
from lightning_tp.checkpoint.storage.unpickle import SafeGlobals
from lightning_tp.checkpoint.weights.hugging_face import HF_CONFIG, as_hugging_face, save_config
from lightning_tp.checkpoint.weights.open import open_checkpoint
from lightning_tp.checkpoint.weights.safetensors_file import is_safetensors, write_safetensors
from lightning_tp.checkpoint.weights.stored import unique
from lightning_tp.checkpoint.weights.torch_file import write_torch
from lightning_tp.core import staging
from lightning_tp.core.comm.agree import Peers
from lightning_tp.errors import TPError

Format = Literal["safetensors", "hf", "torch"]
DTYPES = {"fp32": torch.float32, "float32": torch.float32, "bf16": torch.bfloat16, "bfloat16": torch.bfloat16, "fp16": torch.float16,
          "float16": torch.float16, "fp64": torch.float64, "float64": torch.float64}  # fmt: skip
_KEPT = {"epoch", "global_step", "pytorch-lightning_version", "hyper_parameters", "datamodule_hyper_parameters", HF_CONFIG}


def export(
    checkpoint: str | Path,
    out: str | Path,
    format: Format = "safetensors",
    *,
    dtype: torch.dtype | str | None = None,
    max_shard_size: int | str = "5GB",
    config: str | Path | None = None,
    prefix: str | None = None,
    overwrite: bool = False,
    weights_only: bool = True,
) -> list[Path]:
    """Export the weights of a checkpoint, of whatever mesh, to another format.

    Args:
        checkpoint: a folder or a file: see `open_checkpoint`.
        out: a folder, which is created; for "torch" a file.
        format: "safetensors" has the model's own names, with an index if it is in several files; "hf" those of the Hugging Face model in it, with
            its config, so that `from_pretrained(out)` loads it; "torch" is a checkpoint of Lightning with weights and hyperparameters alone, for
            `load_from_checkpoint` and `torch.load`.
        dtype: of what has floating-point numbers: "bf16", "fp16", "fp32", or torch's. Default: as stored.
        max_shard_size: of one file of safetensors: bytes, or "5GB".
        config: for "hf": a `config.json`, or a folder with one. Default: the one in the checkpoint.
        prefix: for "hf": the name of the Hugging Face model in the LightningModule ("model"). Default: found.
        overwrite: replace `out` if it exists.
        weights_only: False lets the checkpoint's own classes be loaded; only for checkpoints that you trust.

    Returns:
        The files.

    Raises:
        TPError: if it is no checkpoint or a broken one, `out` exists, or the names and shapes are not those of the Hugging Face model.
    """
    if isinstance(dtype, str) and dtype not in DTYPES:
        raise TPError(f"`dtype={dtype!r}`: valid names are {', '.join(DTYPES)}.")
    to = DTYPES[dtype] if isinstance(dtype, str) else dtype
    limit = parse_size(max_shard_size)
    if format not in ("safetensors", "hf", "torch"):
        raise TPError(f"`format={format!r}`: valid formats are 'safetensors', 'hf' and 'torch'.")
    if (local_path(checkpoint) / MANIFEST).is_file():
        select_intact(StoragePath(checkpoint), Peers(alone=True))  # refuses a damaged one
    contents = open_checkpoint(checkpoint, weights_only=weights_only)
    if not contents.model:
        raise TPError(f"`{checkpoint}` contains no weights of a model.")
    target = _check_output(out, contents.path, overwrite=overwrite)
    if format == "torch":
        kept = {k: v for k, v in contents.rest.items() if k in _KEPT or k.startswith("hparams")}
        _write_torch(target, {**kept, "state_dict": {name: stored.cast(to) for name, stored in contents.model.items()}})
        return [target]
    if format == "hf":
        model, tensors = as_hugging_face(contents, config, prefix, to)
    else:
        model, tensors = None, {name: s.cast(to) for name, s in unique(contents.model).items()}
    with _replacing(target, folder=True) as folder:
        if model is not None:
            save_config(model, tensors, folder)
        write_safetensors(folder, tensors, limit)
    return sorted(target.iterdir())


def consolidate(
    checkpoint: str | Path,
    out: str | Path,
    *,
    overwrite: bool = False,
    safe_globals: SafeGlobals = (),
    weights_only: bool | None = None,
) -> Path:
    """Merge a sharded checkpoint into one file, from which a plain `Trainer` resumes: `fit(ckpt_path=out)`.

    With optimizer states (numbered as torch does), schedulers, loops and callbacks. One tensor is in memory at a time.

    Args:
        checkpoint: the folder: ours, or of Lightning's ModelParallelStrategy or FSDPStrategy.
        out: the file.
        overwrite: replace it if it exists.
        safe_globals: classes of your own that the checkpoint may contain.
        weights_only: False lets the checkpoint's own classes be loaded; only for checkpoints that you trust.

    Raises:
        TPError: if it is no checkpoint or a broken one, or `out` exists.
    """
    if local_path(checkpoint).is_dir():
        select_intact(StoragePath(checkpoint), Peers(alone=True))  # refuses a damaged one
    with torch.serialization.safe_globals(list(safe_globals)):
        contents = open_checkpoint(checkpoint, weights_only=weights_only is not False)
    if contents.kind == "safetensors":
        raise TPError(f"`{checkpoint}` contains weights only. `export --format torch` writes them as one file.")
    states = [_numbered(state) for state in contents.optimizers]
    target = _check_output(out, contents.path, overwrite=overwrite)
    _write_torch(target, {**contents.rest, "state_dict": contents.model, "optimizer_states": states})
    return target


def _numbered(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return an optimizer's state by number, as an optimizer's own state dict has it."""
    try:
        order = [name for group in state["param_groups"] for name in group["params"]]
    except (KeyError, TypeError):
        raise TPError("The checkpoint has no optimizer state where one should be: there are no `param_groups`.") from None
    number = {name: i for i, name in enumerate(order)}
    values = {number[name]: fields for name, fields in state["state"].items() if name in number}
    groups = [{**group, "params": [number[name] for name in group["params"]]} for group in state["param_groups"]]
    return {"state": dict(sorted(values.items())), "param_groups": groups}


def _check_output(out: str | Path, source: Path, *, overwrite: bool) -> Path:
    """Check that `out` may be written, before anything is: that it is not (in) what is read, nor anything that has to be kept."""
    target = local_path(out)
    try:
        resolved, read = target.resolve(), source.resolve()
    except (RuntimeError, OSError) as error:
        raise TPError(f"`{target}` can't be written: {error}.") from None
    if resolved == read or resolved in read.parents:
        raise TPError(f"`{target}` is, or contains, the checkpoint that is read. Give another name.")
    if source.is_dir() and read in resolved.parents:
        raise TPError(f"`{target}` is inside the checkpoint that is read. Give another place.")
    with suppress(OSError):
        staging.recover(target, shared=True)
    if target.exists() and not overwrite:
        raise TPError(f"`{target}` already exists. Give another name, or `overwrite=True`, on the command line `--overwrite`.")
    if target.is_dir() and any(target.iterdir()) and not (is_safetensors(target) or (target / METADATA).is_file()):
        raise TPError(
            f"`{target}` is a folder with other things in it than a checkpoint, and is not replaced. Remove it yourself, or give another name."
        )
    return target


@contextmanager
def _replacing(target: Path, *, folder: bool) -> Iterator[Path]:
    """Yield a path to write to, which takes the target's place at the end. Several processes may do it at once: the last one stays."""
    try:
        with staging.staged(target, folder=folder, shared=True) as path:
            yield path
    except (FileExistsError, NotADirectoryError):
        raise TPError(f"`{target}` can't be written: `{target.parent}` is not a folder. Nothing of it is left.") from None
    except OSError as error:
        raise TPError(f"`{target}` can't be written: {error.strerror or error}. Nothing of it is left.") from error


def _write_torch(target: Path, tree: Any) -> None:
    with _replacing(target, folder=False) as path, path.open("wb") as file:
        write_torch(tree, file)


def parse_size(size: int | str) -> int:
    """Return the number of bytes that a size in words means.

    Example:
        >>> parse_size("5GB"), parse_size("100 MiB"), parse_size(7)
        (5000000000, 104857600, 7)
    """
    if isinstance(size, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", size, re.IGNORECASE)
        if match is None:
            raise TPError(f"`max_shard_size={size!r}`: give a number of bytes, or a size such as '5GB' or '500MB'.")
        size = int(float(match[1]) * (1024 if match[3] else 1000) ** " kmgt".index(match[2].lower() or " "))
    if size < 1:
        raise TPError(f"`max_shard_size={size}`: it has to be at least 1 byte.")
    return size
