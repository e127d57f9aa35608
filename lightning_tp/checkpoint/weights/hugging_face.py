"""The names that a Hugging Face model has in files, where these differ from those in memory.

Newer versions of transformers hold the experts of a layer in one tensor, and write them one by one under their old names. Which part of which
tensor is what in a file is found by letting transformers take the model apart on the meta device.
"""

from __future__ import annotations

import json
import math
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_tp.checkpoint.weights.stored import Box, Stored, StoredTensors, narrow
from lightning_tp.errors import TPError
from lightning_tp.shards.state_dict import persistent

HF_CONFIG = "lightning_tp_hf_config"  # in a checkpoint: where in the model a Hugging Face model is -> its config


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
    contents: StoredTensors, out: Path, config: str | Path | None, prefix: str | None, to: torch.dtype | None
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


def _config_of(contents: StoredTensors, config: str | Path | None, prefix: str | None) -> tuple[dict[str, Any], str | None]:
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


class Part(NamedTuple):
    """What a name in a file is: a box of a tensor in memory, in another shape."""

    of: str
    box: Box
    shape: tuple[int, ...]


class _Views(TorchFunctionMode):
    """Copies are none: what was made of a tensor by cutting it stays a view of it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.contiguous, Tensor.clone, torch.clone):
            return args[0]
        return func(*args, **(kwargs or {}))


def names_in_files(model: nn.Module) -> dict[str, Part]:
    """For each name that `save_pretrained` writes for this model what it is; {} if they are the model's own, or nobody knows.

    Args:
        model: a model of transformers, or what holds one; on the meta device or not.
    """
    inside = next(((n, m) for n, m in model.named_modules() if hasattr(m, "save_pretrained") and hasattr(m, "config")), None)
    if inside is None:
        return {}
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # before version 5
        return {}
    start, within = (f"{inside[0]}." if inside[0] else ""), inside[1]
    whole = {n: torch.empty(_shape(t), device="meta") for n, t in _tensors(within).items()}
    own = {t.untyped_storage()._cdata: n for n, t in whole.items()}
    try:
        with _Views():
            apart: Mapping[str, Any] = revert_weight_conversion(within, dict(whole))
    except Exception:  # of a version that does it in another way: then the names are taken as they are
        return {}
    parts: dict[str, Part] = {}
    for name, t in apart.items():
        of = own.get(t.untyped_storage()._cdata) if isinstance(t, Tensor) else None
        box = _box(t, whole[of]) if of is not None else None
        if of is None or box is None:
            return {}
        parts[start + name] = Part(start + of, box, tuple(t.shape))
    covered: dict[str, int] = {}
    for part in parts.values():
        covered[part.of] = covered.get(part.of, 0) + math.prod(part.shape)
    if any(covered.get(start + n) != t.numel() for n, t in whole.items()):
        return {}
    return {} if all(part.of == name for name, part in parts.items()) else parts


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    named = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
    return {n: named[n] for n in persistent(model) if n in named}


def _shape(t: Tensor) -> tuple[int, ...]:
    shard = getattr(t, "_tp_shard", None)
    return tuple(shard.shape if shard is not None else t.shape)


def _box(view: Tensor, whole: Tensor) -> Box | None:
    """Which box of a contiguous tensor a view of it is; None if it is none (a transposed one, say)."""
    offset, left = [], view.storage_offset()
    for stride in whole.stride():
        offset.append(left // stride if stride else 0)
        left -= offset[-1] * stride
    size = [1] * whole.ndim
    dim = -1
    for n, stride in zip(view.shape, view.stride(), strict=True):
        if n == 1:
            continue
        dim = next((d for d in range(dim + 1, whole.ndim) if whole.stride(d) == stride and whole.shape[d] > 1), whole.ndim)
        if dim == whole.ndim or offset[dim] + n > whole.shape[dim]:
            return None
        size[dim] = n
    return tuple(offset), tuple(size)


def apart(tensors: Mapping[str, Stored], parts: Mapping[str, Part]) -> dict[str, Stored]:
    """Under the names of files what is there under those of memory; one tensor of memory after the other."""
    by_source: dict[str, list[str]] = {}
    for name, part in parts.items():
        by_source.setdefault(part.of, []).append(name)
    last: dict[str, Tensor] = {}  # the one that was read last: its parts follow each other
    found: dict[str, Stored] = {}
    for of, source in tensors.items():
        for name in by_source.get(of, [of]):
            whole = name not in parts or parts[name].shape == source.shape
            found[name] = source if whole else _part(of, source, parts[name], last)
    return found


def _part(of: str, source: Stored, part: Part, last: dict[str, Tensor]) -> Stored:
    def load(box: Box | None, dtype: torch.dtype) -> Tensor:
        if of not in last:
            last.clear()
            last[of] = source.read()
        t = narrow(last[of], part.box).reshape(part.shape)
        return narrow(t, box).to(dtype).contiguous()

    return Stored(part.shape, source.dtype, load)


def together(stored: Mapping[str, Stored], parts: Mapping[str, Part]) -> dict[str, Stored]:
    """Under the names of memory what is there under those of files; what is not complete stays as it is."""
    by_source: dict[str, list[tuple[str, Part]]] = {}
    for name, part in parts.items():
        by_source.setdefault(part.of, []).append((name, part))
    found = dict(stored)
    for of, pieces in by_source.items():
        if all(name in stored and stored[name].shape == part.shape for name, part in pieces):
            sources = [(part.box, found.pop(name)) for name, part in pieces]
            found[of] = sources[0][1] if len(sources) == 1 else _whole(sources)
    return found


def _whole(sources: list[tuple[Box, Stored]]) -> Stored:
    shape = tuple(max(at + n for at, n in dims) for dims in zip(*(zip(*box) for box, _ in sources)))

    def load(box: Box | None, dtype: torch.dtype) -> Tensor:
        offset, size = box or ((0,) * len(shape), shape)
        out = torch.empty(size, dtype=dtype)
        for (at, length), source in sources:
            low = [max(a, b) for a, b in zip(at, offset, strict=True)]
            high = [min(a + n, b + m) for a, n, b, m in zip(at, length, offset, size, strict=True)]
            if any(a >= b for a, b in zip(low, high, strict=True)):
                continue
            extent = tuple(b - a for a, b in zip(low, high, strict=True))
            inside = tuple(a - b for a, b in zip(low, at, strict=True))
            kept = [d for d in range(len(shape)) if length[d] > 1] if len(source.shape) < len(shape) else list(range(len(shape)))
            read = source.read((tuple(inside[d] for d in kept), tuple(extent[d] for d in kept)))
            narrow(out, (tuple(a - b for a, b in zip(low, offset, strict=True)), extent)).copy_(read.view(extent))
        return out

    return Stored(shape, sources[0][1].dtype, load)
