"""Weights in: each rank reads its slices of a Hugging Face folder, or of any other checkpoint, and nothing else.

`load_pretrained` is called before a model is split or after. Before, for a model on the meta device, it only looks at names and shapes;
`parallelize` then gives each rank memory for its shards and reads these.
"""

from __future__ import annotations

import io
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_tp._compat import local_tensor, patched
from lightning_tp.checkpoint.weights.dcp_folder import open_folder
from lightning_tp.checkpoint.weights.hugging_face import names_in_files, together
from lightning_tp.checkpoint.weights.open import open_checkpoint
from lightning_tp.checkpoint.weights.safetensors_file import is_safetensors as _is_safetensors
from lightning_tp.checkpoint.weights.safetensors_file import open_safetensors
from lightning_tp.checkpoint.weights.stored import METADATA, Stored, narrow
from lightning_tp.errors import TPError
from lightning_tp.shards.state_dict import persistent, reshard

WAITING = "_tp_pretrained"  # of a module on the meta device: name in it -> what is to be read once it is split


class BytesRead:
    """How many bytes of safetensors `load_pretrained` has read in this process.

    Example:
        >>> BytesRead().total
        0
    """

    def __init__(self) -> None:
        self.total = 0

    def __call__(self, n: int) -> None:
        self.total += n


bytes_read = BytesRead()


def load_pretrained(model: nn.Module, path: str | Path, *, strict: bool = True) -> nn.Module:
    """Give a model the weights of a Hugging Face folder (safetensors, in one file or several), or of any checkpoint that `export` reads.

    A split model reads its shards at once. One on the meta device reads them when it is split, by `parallelize` or a Trainer: build it under
    `init_on_meta`, call this, and no rank ever holds a whole weight matrix that is split. Names may stand deeper or less deep in the model
    than in the file (`self.model = AutoModel..` in a LightningModule); what lies outside of that place, a head of your own, keeps its
    initial values. Numbers are converted to the dtype that the model has.

    Args:
        model: the model, or the LightningModule around it.
        path: the folder or file.
        strict: False leaves weights that the file has not as they are, with a warning, and passes over what the model has not.

    Returns:
        The same model.

    Raises:
        TPError: one, that lists what is missing, what is too much, and what has another shape; nothing is changed then.
    """
    path = Path(path)
    reshard(model)
    stored = open_safetensors(path, bytes_read) if _is_safetensors(path) else open_checkpoint(path).model
    found = matched(model, stored, path, strict=strict)
    tensors = _named(model)
    meta = {name for name in found if tensors[name].is_meta}
    if any(hasattr(p, "_tp_shard") for p in model.parameters()) and meta:
        raise TPError("`load_pretrained`: this model is split, and on the meta device all the same. Call it before the split.")
    if meta:
        model.__dict__[WAITING] = {n: s for n, s in found.items() if n in meta}
    read_shards(model, {n: s for n, s in found.items() if n not in meta})
    return model


def waiting(model: nn.Module) -> dict[str, Stored]:
    """What `load_pretrained` has found for modules inside, by the names that it has in `model`; asked for once."""
    found: dict[str, Stored] = {}
    for prefix, module in model.named_modules():
        for name, stored in module.__dict__.pop(WAITING, {}).items():
            found[f"{prefix}.{name}" if prefix else name] = stored
    return found


@torch.no_grad()
def read_shards(model: nn.Module, stored: Mapping[str, Stored]) -> None:
    """Read this rank's boxes of each parameter, and buffers whole; no collective."""
    if not stored:
        return
    reshard(model)
    tensors = _named(model)
    done: set[int] = set()
    for name, source in stored.items():
        t = tensors[name]
        if id(t) in done:  # tied
            continue
        done.add(id(t))
        local = local_tensor(t.data if isinstance(t, nn.Parameter) else t)
        shard = getattr(t, "_tp_shard", None)
        if shard is None:
            local.copy_(source.read())
            continue
        for box, here in shard.boxes():
            narrow(local, here).copy_(source.read(box if box[1] != source.shape else None))


def _named(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}


def matched(model: nn.Module, stored: Mapping[str, Stored], path: Path, *, strict: bool) -> dict[str, Stored]:
    """For the names of the model what the file has for them.

    Raises:
        TPError: if they are not the same, or shapes differ.
    """
    tensors = _named(model)
    names = [n for n in persistent(model) if n in tensors]
    parts = names_in_files(model)
    strip, add = _place([*names, *(parts.keys() - set(names))], stored)
    renamed = together({add + name[len(strip) :]: s for name, s in stored.items() if name.startswith(strip)}, parts)
    extra = [name for name in stored if not name.startswith(strip)]
    ties: dict[int, list[str]] = {}
    for n in names:
        ties.setdefault(id(tensors[n]), []).append(n)
    found: dict[str, Stored] = {}
    missing: list[str] = []
    outside: list[str] = []
    bad: list[str] = []
    for n in names:
        source = renamed.get(n)
        if source is None:
            if not any(other in renamed for other in ties[id(tensors[n])]):
                (missing if n.startswith(add) else outside).append(n)
            continue
        shard = getattr(tensors[n], "_tp_shard", None)
        shape = tuple(shard.shape if shard is not None else tensors[n].shape)
        if source.shape != shape:
            bad.append(f"`{n}` has the shape {source.shape} there, and {shape} in the model")
        else:
            found[n] = source
    known = set(names)
    extra += [n for n in renamed if n not in known and n not in tensors]
    ignored = [p for m in model.modules() for p in getattr(m, "_keys_to_ignore_on_load_unexpected", None) or ()] + [
        r"rotary_emb\.inv_freq"
    ]
    extra = [n for n in extra if not any(re.search(p, n) for p in ignored)]
    lines = [*bad]
    if strict:
        lines += [f"`{n}` is not there" for n in missing] + [f"`{n}` is there, and the model has no place for it" for n in extra]
    if not found:
        lines = [f"no name is the same: `{next(iter(stored), None)}` there, `{names[0] if names else None}` in the model"]
    if lines:
        more = f"; and {len(lines) - 6} more" if len(lines) > 6 else ""
        raise TPError(
            f"`{path}` is not what {type(model).__name__} needs: {'; '.join(lines[:6])}{more}. "
            + ("" if bad or not found else "`strict=False` takes what is there. ")
            + "Nothing was changed."
        )
    if of := missing + outside:
        warnings.warn(
            f"`{path}` has not {len(of)} tensors of the model, which keep their initial values: {', '.join(of[:4])}"
            + (", .." if len(of) > 4 else ""),
            stacklevel=3,
        )
    return found


def _place(names: list[str], stored: Mapping[str, Any]) -> tuple[str, str]:
    """(what is taken from the front of a name in the file, what is put there) to get the model's names: what fits most of them."""
    votes: Counter[tuple[str, str]] = Counter()
    for name in list(stored)[:: max(1, len(stored) // 16)]:
        parts = name.split(".")
        for i in range(len(parts)):
            end = ".".join(parts[i:])
            if i and len(parts) - i < 2:
                break
            strip = name[: len(name) - len(end)]
            for other in names:
                if other == end or other.endswith(f".{end}"):
                    votes[strip, other[: len(other) - len(end)]] += 1
    known = set(names)
    fits = {place: sum(place[1] + n[len(place[0]) :] in known for n in stored if n.startswith(place[0])) for place in votes}
    return max(fits, key=lambda place: (fits[place], -len(place[0]) - len(place[1])), default=("", ""))


# -------------------------------------------------------------------------------------------------- a folder in one process


def load_from_checkpoint(cls: Any, path: str | Path, **kwargs: Any) -> Any:
    """`cls.load_from_checkpoint(path)` for a checkpoint that is a folder: an unsplit module, its weights read one after the other.

    With `lightning_tp` imported, `cls.load_from_checkpoint(path)` comes here by itself.

    Args:
        cls: the LightningModule's class.
        path: the folder, or a file, which is Lightning's own affair.
        **kwargs: as of `LightningModule.load_from_checkpoint`: `map_location`, `hparams_file`, `strict`, `weights_only`, and arguments of
            the class's own.

    Raises:
        TPError: if weights are missing or too many (unless `strict=False`), or of another shape.
    """
    path = Path(path)
    if not (path / METADATA).is_file():
        if path.is_dir():
            open_checkpoint(path)  # says what it is instead
        return cls.load_from_checkpoint(path, **kwargs)
    contents = open_folder(path, weights_only=kwargs.get("weights_only") is not False)
    own = cls.__mro__[: [c.__module__.startswith(("lightning.pytorch", "pytorch_lightning")) for c in cls.__mro__].index(True)]
    if any(name in vars(c) for c in own for name in ("on_load_checkpoint", "load_state_dict")):  # code that looks at all of them
        weights: dict[str, Any] = {name: s.read() for name, s in contents.model.items()}
        return cls.load_from_checkpoint(_as_file({**contents.rest, "state_dict": weights}), **kwargs)
    undo = patched(cls, "load_state_dict", lambda *_, **__: SimpleNamespace(missing_keys=[], unexpected_keys=[]))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The state dict in")
            module = cls.load_from_checkpoint(_as_file({**contents.rest, "state_dict": {}}), **kwargs)
    finally:
        undo()
    if isinstance(where := kwargs.get("map_location"), (str, torch.device)):
        module = module.to(where)
    tensors, names = _named(module), persistent(module)
    missing = [f"`{n}` is not there" for n in names if n not in contents.model]
    extra = [f"`{n}` is there, and the module has no place for it" for n in contents.model if n not in set(names)]
    lines = [f"`{n}` has the shape {contents.model[n].shape} there, and {tuple(tensors[n].shape)} in the module"
             for n in names if n in contents.model and contents.model[n].shape != tuple(tensors[n].shape)]  # fmt: skip
    if module.strict_loading:
        lines += missing + extra
    if lines:
        more = f"; and {len(lines) - 6} more" if len(lines) > 6 else ""
        raise TPError(f"`{path}` is not of {cls.__name__}: {'; '.join(lines[:6])}{more}. `strict=False` takes what fits.")
    read_shards(module, {n: contents.model[n] for n in names if n in contents.model})
    return module


def _as_file(tree: Any) -> io.BytesIO:
    """As `torch.save` would write it, in memory."""

    def real(node: Any) -> Any:
        if isinstance(node, Stored):
            return node.read()
        if isinstance(node, dict):
            return {k: real(v) for k, v in node.items()}
        return type(node)(real(v) for v in node) if type(node) in (list, tuple) else node

    file = io.BytesIO()
    torch.save(real(tree), file)
    file.seek(0)
    return file
