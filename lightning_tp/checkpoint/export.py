"""Weights out: into safetensors, a Hugging Face folder or one file of `torch.save`, one tensor in memory at a time.

Everything is written beside its place and renamed at the end. The model's code is not needed, but for `hf`, where transformers says (on the
meta device) which names and shapes its class has.
"""

from __future__ import annotations

import glob
import json
import os
import pickle
import re
import shutil
import socket
import struct
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_tp._compat import fake_like, rename_exchange, saved_without_data
from lightning_tp.checkpoint.find import choose
from lightning_tp.checkpoint.hugging_face import apart, names_in_files
from lightning_tp.checkpoint.manifest import MANIFEST
from lightning_tp.checkpoint.place import Place
from lightning_tp.checkpoint.read import (
    DTYPES,
    INDEX,
    METADATA,
    Contents,
    Stored,
    bytes_of,
    in_memory,
    is_safetensors,
    local,
    open_checkpoint,
    unique,
)
from lightning_tp.checkpoint.safe import SafeGlobals
from lightning_tp.checkpoint.world import World
from lightning_tp.errors import TPError

Format = Literal["safetensors", "hf", "torch"]
HF_CONFIG = "lightning_tp_hf_config"  # in a checkpoint: where in the model a Hugging Face model is -> its config
NAMES = {dtype: name for name, dtype in DTYPES.items()}
SHORT = {"fp32": torch.float32, "float32": torch.float32, "bf16": torch.bfloat16, "bfloat16": torch.bfloat16, "fp16": torch.float16,
         "float16": torch.float16, "fp64": torch.float64, "float64": torch.float64}  # fmt: skip
AT_ONCE = 2**24  # bytes that are written at once


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
        choose(Place(checkpoint), World(alone=True))  # refuses a damaged one
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
        choose(Place(checkpoint), World(alone=True))  # refuses a damaged one
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


# ---------------------------------------------------------------------------------------------------------------- safetensors


def write_safetensors(folder: Path, tensors: Mapping[str, Stored], limit: int) -> None:
    """`model.safetensors`, or several files of at most `limit` bytes (but one tensor each) with an index, as Hugging Face names them."""
    unknown = [f"`{n}` ({s.dtype})" for n, s in tensors.items() if s.dtype not in NAMES]
    if unknown:
        raise TPError(f"safetensors has no word for the dtype of {', '.join(unknown[:4])}. Use `format='torch'`.")
    shards: list[dict[str, Stored]] = [{}]
    held = 0
    for name, stored in tensors.items():
        if shards[-1] and held + stored.nbytes > limit:
            shards.append({})
            held = 0
        shards[-1][name] = stored
        held += stored.nbytes
    if len(shards) == 1:
        _write_file(folder / "model.safetensors", shards[0])
        return
    files = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for file, shard in zip(files, shards, strict=True):
        _write_file(folder / file, shard)
    weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
    total = {"total_size": sum(s.nbytes for s in tensors.values()), "total_parameters": sum(s.numel for s in tensors.values())}
    (folder / INDEX).write_text(json.dumps({"metadata": total, "weight_map": dict(sorted(weight_map.items()))}, indent=2) + "\n")


def _write_file(path: Path, tensors: Mapping[str, Stored]) -> None:
    in_order = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)  # so that each is aligned
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, s in in_order:
        header[name] = {"dtype": NAMES[s.dtype], "shape": list(s.shape), "data_offsets": [at, at + s.nbytes]}
        at += s.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for _, stored in in_order:
            value = stored.read()
            view = bytes_of(value)
            for i in range(0, len(view), AT_ONCE):
                f.write(view[i : i + AT_ONCE])
            del value, view


# ----------------------------------------------------------------------------------------------------------------- torch.save


def write_torch(tree: Any, path: Path) -> None:
    """`torch.save` of a nesting of dicts, lists and tuples in which tensors may be `Stored`: read and written one after the other."""
    leaves: list[Stored] = []
    bare = _without_data(tree, leaves, {})
    try:
        saved_without_data(bare, path)
    except (AttributeError, TypeError, pickle.PicklingError) as error:
        raise TPError(f"The checkpoint has something in it that does not pickle: {error}") from error
    except RuntimeError as error:  # of torch's writer
        text = str(error).partition("strerror: ")[2] or (str(error).splitlines() or [""])[0]
        raise TPError(f"`{path.parent}` can't be written to: {text}") from error
    with TorchFile(path) as file:
        for i, stored in enumerate(leaves):
            file.fill(i, stored)


class TorchFile:
    """A file of `torch.save` whose storages get their bytes afterwards. It is a zip file: their checksums come with the bytes."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> TorchFile:
        self._file = self.path.open("r+b")
        with zipfile.ZipFile(self._file) as archive:
            infos = {info.filename.partition("/data/")[2]: info for info in archive.infolist() if "/data/" in info.filename}
            directory = archive.start_dir
        self._records: dict[str, tuple[int, int, int]] = {}  # storage -> (begin of its local header, of its data, its size)
        for name, info in infos.items():
            self._file.seek(info.header_offset + 26)
            names, extra = struct.unpack("<HH", self._file.read(4))
            self._records[name] = (info.header_offset, info.header_offset + 30 + names + extra, info.file_size)
        self._central = self._central_headers(directory)
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()

    def _central_headers(self, at: int) -> dict[str, int]:
        """Where the central directory speaks of each storage."""
        found = {}
        self._file.seek(at)
        while (head := self._file.read(46))[:4] == b"PK\x01\x02":
            names, extra, comment = struct.unpack("<HHH", head[28:34])
            name = self._file.read(names).decode()
            found[name.partition("/data/")[2]] = at
            at += 46 + names + extra + comment
            self._file.seek(at)
        return found

    def fill(self, number: int, stored: Stored) -> None:
        """Write a tensor's bytes into the storage that was saved as the `number`-th."""
        header, begin, size = self._records[str(number)]
        assert size == stored.nbytes, f"storage {number} has {size} bytes, and the tensor {stored.nbytes}"
        value = stored.read()
        view = bytes_of(value)
        check = 0
        self._file.seek(begin)
        for i in range(0, len(view), AT_ONCE):
            check = zlib.crc32(view[i : i + AT_ONCE], check)
            self._file.write(view[i : i + AT_ONCE])
        self._check(header, self._central[str(number)], check, begin + size)

    def _check(self, header: int, central: int, check: int, end: int) -> None:
        self._file.seek(header + 6)
        flags = int.from_bytes(self._file.read(2), "little")
        places = [header + 14, central + 16]
        if flags & 8:  # again behind the data
            self._file.seek(end)
            places.append(end + 4 if self._file.read(4) == b"PK\x07\x08" else end)
        for place in places:
            self._file.seek(place)
            self._file.write(check.to_bytes(4, "little"))


def _without_data(node: Any, leaves: list[Stored], made: dict[Any, Tensor]) -> Any:
    """The same nesting with tensors without memory; what they stand for goes to `leaves`, in the order in which `torch.save` meets them."""
    if isinstance(node, Tensor):
        node = in_memory(node)
    if isinstance(node, Stored):
        key = (node.key, node.dtype) if node.key is not None else None
        if key is not None and key in made:
            return made[key]
        fake = fake_like(node.shape, node.dtype)
        leaves.append(node)
        if key is not None:
            made[key] = fake
        return fake
    if isinstance(node, dict):
        items = {k: _without_data(v, leaves, made) for k, v in node.items()}
        return items if type(node) is dict else type(node)(items)
    if type(node) in (list, tuple):
        return type(node)(_without_data(v, leaves, made) for v in node)
    return node


# --------------------------------------------------------------------------------------------------------------- Hugging Face


def config_in(module: nn.Module) -> dict[str, Any]:
    """For each Hugging Face model inside (the outermost ones), where it is -> its config as plain data, with the class's name."""
    found: dict[str, Any] = {}
    for name, m in module.named_modules():
        if any(name.startswith(f"{p}.") if p else name for p in found) or not hasattr(getattr(m, "config", None), "to_json_string"):
            continue
        try:
            config = json.loads(m.config.to_json_string())
        except (TypeError, ValueError):
            continue
        if "model_type" in config:
            own = next((c for c in type(m).__mro__ if c.__module__.startswith(("transformers.", "transformers_modules"))), type(m))
            found[name] = {**config, "architectures": [own.__name__]}
    return found


def _as_hugging_face(
    contents: Contents, out: Path, config: str | Path | None, prefix: str | None, to: torch.dtype | None
) -> dict[str, Stored]:
    try:
        import transformers
    except ImportError:
        raise TPError("`format='hf'` needs transformers: pip install 'lightning-tp[hf]'.") from None
    data, where = _config_of(contents, config, prefix)
    name = (data.get("architectures") or [""])[0]
    made: Any = getattr(transformers, name, None)
    if made is None:
        raise TPError(
            f"The config names the class {name!r}, which transformers {transformers.__version__} has not"
            + (" (code of one's own is not run)" if data.get("auto_map") else "")
            + ". Give a `config.json` whose `architectures` is one of its classes, or use `format='safetensors'`."
        )
    try:
        built = transformers.AutoConfig.for_model(**{k: v for k, v in data.items() if k != "transformers_version"})
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = made(built)
            model.tie_weights()
    except Exception as error:  # whatever transformers has to say about the config
        raise TPError(f"transformers can't build {name} from the config: {type(error).__name__}: {error}") from error
    wanted = model.state_dict()
    names = contents.model
    if where is None:
        where = _find_prefix(wanted, names)
    start = f"{where}." if where else ""
    first: dict[int, str] = {}  # of tied weights the name that is kept
    tensors: dict[str, Stored] = {}
    bad = []
    missing = []
    by_id = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
    for n in wanted:
        stored = names.get(start + n)
        if id(by_id.get(n)) in first:
            continue
        if stored is None:
            ties = [m for m in wanted if m != n and by_id.get(m) is by_id.get(n) and start + m in names]
            if not ties:
                missing.append(n)
            continue
        first[id(by_id.get(n))] = n
        if stored.shape != tuple(wanted[n].shape):
            bad.append(f"`{n}` has the shape {stored.shape} and should have {tuple(wanted[n].shape)}")
        tensors[n] = stored.cast(to)
    unexpected = [n for n in names if n.startswith(start) and n[len(start) :] not in wanted]
    lines = [
        *bad,
        *(f"`{start}{n}` is not there" for n in missing),
        *([f"`{n}` has no place in it" for n in unexpected] if where or not missing else []),
    ]  # fmt: skip
    if lines:
        more = f", and {len(lines) - 6} more" if len(lines) > 6 else ""
        raise TPError(
            f"`{contents.path}` does not hold the weights of a {name} as its config says (looked for below `{where or 'the top'}`): "
            f"{'; '.join(lines[:6])}{more}. Give the right `config` and `prefix`; `format='safetensors'` writes any model with its own names."
        )
    if left := [n for n in names if not n.startswith(start)]:
        warnings.warn(
            f"{len(left)} tensors are not of the {name} in `{where}` and are left out: {', '.join(left[:4])}", stacklevel=4
        )
    common = Counter(s.dtype for s in tensors.values() if s.dtype.is_floating_point).most_common(1)
    if common:
        built.dtype = common[0][0]
    built.architectures = [name]
    built.save_pretrained(out)
    if getattr(model, "generation_config", None) is not None and model.can_generate():
        model.generation_config.save_pretrained(out)
    return apart(tensors, names_in_files(model))


def _config_of(contents: Contents, config: str | Path | None, prefix: str | None) -> tuple[dict[str, Any], str | None]:
    """(the config, where the model is, if that is known)."""
    if config is not None:
        path = Path(config)
        path = path / "config.json" if path.is_dir() else path
        try:
            data = json.loads(path.read_text())
            data["model_type"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise TPError(f"`config={str(config)!r}` is no config of Hugging Face ({type(error).__name__}: {error}).") from None
        return data, prefix
    stored: Mapping[str, Any] = contents.rest.get(HF_CONFIG) or {}
    if prefix is not None and prefix in stored:
        return stored[prefix], prefix
    if len(stored) > 1:
        raise TPError(
            f"`{contents.path}` has {len(stored)} Hugging Face models in it: {', '.join(repr(p) for p in stored)}. Say which by `prefix`."
        )
    if stored and prefix is None:
        return next(((c, where) for where, c in stored.items()))
    if contents.kind == "safetensors" and contents.path.is_dir() and (contents.path / "config.json").is_file():
        return json.loads((contents.path / "config.json").read_text()), prefix
    of_hyper: Mapping[str, Any] = contents.rest.get("hyper_parameters") or {}
    for value in of_hyper.values():
        data = json.loads(value.to_json_string()) if hasattr(value, "to_json_string") else value
        if isinstance(data, dict) and "model_type" in data and data.get("architectures"):
            return data, prefix
    raise TPError(
        f"`{contents.path}` has no config of a Hugging Face model in it{f' below {prefix!r}' if prefix else ''} (checkpoints of `TPStrategy` have "
        "it where the LightningModule holds one). Give it by `config`, on the command line `--config path/to/config.json`."
    )


def _find_prefix(wanted: Mapping[str, Any], names: Mapping[str, Any]) -> str:
    """Below what name of the checkpoint the model's own names are."""
    hits: Counter[str] = Counter()
    for name in list(wanted)[:: max(1, len(wanted) // 16)]:
        for other in names:
            if other.endswith(name) and (len(other) == len(name) or other[-len(name) - 1] == "."):
                hits[other[: -len(name) - 1]] += 1
    return hits.most_common(1)[0][0] if hits else ""
