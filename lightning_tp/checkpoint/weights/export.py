"""Weights out: into safetensors, a Hugging Face folder or one file of `torch.save`, one tensor in memory at a time.

Everything is written beside its place and renamed at the end. The model's code is not needed, but for `hf`, where transformers says (on the
meta device) which names and shapes its class has.
"""

from __future__ import annotations

import glob
import os
import re
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import torch

from lightning_tp._compat import rename_exchange
from lightning_tp.checkpoint.find import select_intact
from lightning_tp.checkpoint.manifest import MANIFEST
from lightning_tp.checkpoint.safe import SafeGlobals
from lightning_tp.checkpoint.storage import StoragePath
from lightning_tp.checkpoint.weights.hugging_face import HF_CONFIG, _as_hugging_face
from lightning_tp.checkpoint.weights.open import open_checkpoint
from lightning_tp.checkpoint.weights.safetensors_file import is_safetensors, write_safetensors
from lightning_tp.checkpoint.weights.stored import METADATA, local, unique
from lightning_tp.checkpoint.weights.torch_file import write_torch
from lightning_tp.core.comm.agree import Peers
from lightning_tp.errors import TPError

Format = Literal["safetensors", "hf", "torch"]


SHORT = {"fp32": torch.float32, "float32": torch.float32, "bf16": torch.bfloat16, "bfloat16": torch.bfloat16, "fp16": torch.float16,
         "float16": torch.float16, "fp64": torch.float64, "float64": torch.float64}  # fmt: skip


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
    """Write the weights of a checkpoint, of whatever mesh, for somebody else.

    Args:
        checkpoint: a folder or a file: see `read.open_checkpoint`.
        out: a folder that is made; for "torch" a file.
        format: "safetensors" has the model's own names, with an index if it is in several files; "hf" those of the Hugging Face model in it, with
            its config, so that `from_pretrained(out)` loads it; "torch" is a checkpoint of Lightning with weights and hyperparameters alone, for
            `load_from_checkpoint` and `torch.load`.
        dtype: of what has floating-point numbers: "bf16", "fp16", "fp32", or torch's. Default: as stored.
        max_shard_size: of one file of safetensors: bytes, or "5GB".
        config: for "hf": a `config.json`, or a folder with one. Default: the one in the checkpoint.
        prefix: for "hf": the name of the Hugging Face model in the LightningModule ("model"). Default: found.
        overwrite: replace `out` if it is there.
        weights_only: False lets the checkpoint's own classes be loaded; only for checkpoints that you trust.

    Returns:
        The files.

    Raises:
        TPError: if it is no checkpoint or a broken one, `out` is there, or the names and shapes are not those of the Hugging Face model.
    """
    to = _dtype(dtype)
    limit = parse_size(max_shard_size)
    if format not in ("safetensors", "hf", "torch"):
        raise TPError(f"`format={format!r}`: there are 'safetensors', 'hf' and 'torch'.")
    if (local(checkpoint) / MANIFEST).is_file():
        select_intact(StoragePath(checkpoint), Peers(alone=True))  # refuses a damaged one
    contents = open_checkpoint(checkpoint, weights_only=weights_only)
    if not contents.model:
        raise TPError(f"`{checkpoint}` has no weights of a model in it.")
    with beside(out, overwrite=overwrite, source=contents.path) as temporary:
        if format == "torch":
            keep = {k: v for k, v in contents.rest.items() if k in _OF_WEIGHTS or k.startswith("hparams")}
            model = {name: stored.cast(to) for name, stored in contents.model.items()}
            write_torch({**keep, "state_dict": model}, temporary)
        else:
            temporary.mkdir()
            tensors = {name: s.cast(to) for name, s in unique(contents.model).items()}
            if format == "hf":
                tensors = _as_hugging_face(contents, temporary, config, prefix, to)
            write_safetensors(temporary, tensors, limit)
    out = Path(out)
    return [out] if out.is_file() else sorted(out.iterdir())


_OF_WEIGHTS = ("epoch", "global_step", "pytorch-lightning_version", "hyper_parameters", "datamodule_hyper_parameters", HF_CONFIG)


def consolidate(
    checkpoint: str | Path,
    out: str | Path,
    *,
    overwrite: bool = False,
    safe_globals: SafeGlobals = (),
    weights_only: bool | None = None,
) -> Path:
    """Write a folder that many ranks have written as one file, from which a plain `Trainer` goes on: `fit(ckpt_path=out)`.

    With optimizer states (numbered as torch does), schedulers, loops and callbacks. One tensor is in memory at a time.

    Args:
        checkpoint: the folder: ours, or of Lightning's ModelParallelStrategy or FSDPStrategy.
        out: the file.
        overwrite: replace it if it is there.
        safe_globals: classes of your own that the checkpoint may have in it.
        weights_only: False lets the checkpoint's own classes be loaded; only for checkpoints that you trust.

    Raises:
        TPError: if it is no checkpoint or a broken one, or `out` is there.
    """
    if local(checkpoint).is_dir():
        select_intact(StoragePath(checkpoint), Peers(alone=True))  # refuses a damaged one
    with torch.serialization.safe_globals(list(safe_globals)):
        contents = open_checkpoint(checkpoint, weights_only=weights_only is not False)
    if contents.kind == "safetensors":
        raise TPError(f"`{checkpoint}` has weights alone. `export --format torch` writes them as one file.")
    states = [_numbered(state) for state in contents.optimizers]
    with beside(out, overwrite=overwrite, source=contents.path) as temporary:
        write_torch({**contents.rest, "state_dict": contents.model, "optimizer_states": states}, temporary)
    return Path(out)


def _numbered(state: Mapping[str, Any]) -> dict[str, Any]:
    """An optimizer's state by number, as a plain optimizer has it."""
    try:
        order = [name for group in state["param_groups"] for name in group["params"]]
    except (KeyError, TypeError):
        raise TPError("The checkpoint has no optimizer's state where one should be: there are no `param_groups`.") from None
    number = {name: i for i, name in enumerate(order)}
    values = {number[name]: of for name, of in state["state"].items() if name in number}
    groups = [{**group, "params": [number[name] for name in group["params"]]} for group in state["param_groups"]]
    return {"state": dict(sorted(values.items())), "param_groups": groups}


@contextmanager
def beside(out: str | Path, *, overwrite: bool, source: Path | None = None) -> Iterator[Path]:
    """A name beside `out` to write to, which takes its place once all is written; nothing is left of it after an error.

    Raises:
        TPError: if `out` is there, and is not to be overwritten, or is (in) what is read.
    """
    out = local(out)
    try:
        out.resolve()
    except RuntimeError as error:
        raise TPError(f"`{out}` can't be written: {error}.") from None
    if source is not None and (out.resolve() == source.resolve() or out.resolve() in source.resolve().parents):
        raise TPError(f"`{out}` is, or has in it, the checkpoint that is read. Give another name.")
    if source is not None and source.is_dir() and source.resolve() in out.resolve().parents:
        raise TPError(f"`{out}` lies in the checkpoint that is read. Give another place.")
    with suppress(OSError):
        _tidy(out)
    if out.exists() and not overwrite:
        raise TPError(f"`{out}` is there already. Give another name, or `overwrite=True`, on the command line `--overwrite`.")
    if out.is_dir() and any(out.iterdir()) and not (is_safetensors(out) or (out / METADATA).is_file()):
        raise TPError(
            f"`{out}` is a folder with other things in it than a checkpoint, and is not replaced. Remove it yourself, or give another name."
        )
    temporary, old = (out.parent / f".{out.name}.{kind}-{socket.gethostname()}-{os.getpid()}" for kind in ("writing", "replaced"))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove(temporary)  # of an earlier process with this number
        yield temporary
        _sync(temporary)
        if not (out.is_dir() or (out.exists() and temporary.is_dir())):
            temporary.replace(out)
        elif not rename_exchange(str(temporary), str(out)):  # a file system that can't: for a moment nothing has the name
            out.rename(old)
            temporary.rename(out)
        _sync(out.parent)
    except FileExistsError:
        raise TPError(f"`{out}` can't be written: `{out.parent}` is no folder. Nothing of it is left.") from None
    except OSError as error:
        raise TPError(f"`{out}` can't be written: {error.strerror or error}. Nothing of it is left.") from error
    finally:
        if old.exists() and not out.exists():
            old.rename(out)
        _remove(temporary)
        _remove(old)


def _tidy(out: Path) -> None:
    """What processes of this machine that were killed have left beside `out`; what had its name gets it back."""
    for path in sorted(out.parent.glob(f".{glob.escape(out.name)}.*-{glob.escape(socket.gethostname())}-*")):
        kind, _, rest = path.name.removeprefix(f".{out.name}.").partition("-")
        pid = rest.rpartition("-")[2]
        if kind not in ("writing", "replaced") or not pid.isdigit() or _is_there(int(pid)):
            continue
        if kind == "replaced" and not out.exists():
            path.rename(out)
        _remove(path)


def _is_there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(FileNotFoundError, NotADirectoryError):
            path.unlink()


def _sync(path: Path) -> None:
    for each in (*path.iterdir(), path) if path.is_dir() else (path,):
        if each.is_file() or each == path:
            fd = os.open(each, os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if isinstance(dtype, str):
        if dtype not in SHORT:
            raise TPError(f"`dtype={dtype!r}`: there are {', '.join(SHORT)}.")
        return SHORT[dtype]
    return dtype


def parse_size(size: int | str) -> int:
    """Bytes of a size in words.

    Example:
        >>> parse_size("5GB"), parse_size("100 MiB"), parse_size(7)
        (5000000000, 104857600, 7)
    """
    if isinstance(size, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", size, re.IGNORECASE)
        if match is None:
            raise TPError(f"`max_shard_size={size!r}`: a number of bytes, or the like of '5GB' and '500MB'.")
        size = int(float(match[1]) * (1024 if match[3] else 1000) ** " kmgt".index(match[2].lower() or " "))
    if size < 1:
        raise TPError(f"`max_shard_size={size}`: a file has to hold something.")
    return size
