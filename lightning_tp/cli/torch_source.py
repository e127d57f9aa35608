"""Write a plan as Python source for `torch.distributed.tensor.parallel.parallelize_module`."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from lightning_tp.core.modules.blocks import starred
from lightning_tp.errors import TPError
from lightning_tp.plan.checked import CheckedPlan

NOT_IN_TORCH = ("fused_colwise", "local_ops", "shard")  # styles


def python_source(plan: CheckedPlan, model: nn.Module, target: str) -> str:
    """Write a Python file with a function `parallelize(model, tp_mesh)` that shards the model by PyTorch's own styles.

    `TPError` with the modules of all rules that torch has no counterpart of.
    """
    refused = _not_in_torch(plan, model)
    if refused:
        what = "; ".join(f"{', '.join(f'`{n}`' for n in dict.fromkeys(names))} ({why})" for why, names in refused.items())
        raise TPError(
            f"`--emit-python`: torch.distributed.tensor.parallel has no counterpart of {what}. Use `parallelize` of lightning_tp."
        )
    styles = {name: _style_source(style) for name, style in plan.to_torch(model).items()}
    folded = _folded(styles, [name for name, _ in model.named_modules(remove_duplicate=False)])
    used = {word for source in folded.values() for word in re.findall(r"\b[A-Z]\w+(?=\()", source)}
    placements = sorted(used & {"Partial", "Replicate", "Shard"})
    shards_sequence = any("Shard(1)" in source for source in folded.values())
    lines = [
        f'"""How {type(model).__name__} is sharded over a tensor-parallel mesh dimension, in plain PyTorch.',
        "",
        f"Written by `lightning-tp plan {target} --tp {plan.tp} --emit-python`, from a plan that was {plan.source}. The model's",
        f"code has to count its heads by -1: a rank holds 1/{plan.tp} of them.",
        *([f"The sequence length has to be a multiple of {plan.tp}."] if shards_sequence else []),
        '"""',
        "",
        "from torch import nn",
        "from torch.distributed.device_mesh import DeviceMesh",
        *([f"from torch.distributed.tensor import {', '.join(placements)}"] if placements else []),
        f"from torch.distributed.tensor.parallel import {', '.join([*sorted(used - set(placements)), 'parallelize_module'])}",
        "",
        "",
        "def parallelize(model: nn.Module, tp_mesh: DeviceMesh) -> nn.Module:",
        f'    """Shard the model over the {plan.tp} ranks of `tp_mesh`, in place."""',
        "    plan = {",
        *(f"        {json.dumps(name)}: {source}," for name, source in folded.items()),
        "    }",
        "    return parallelize_module(model, tp_mesh, plan)",
    ]
    return "\n".join(lines) + "\n"


def _not_in_torch(plan: CheckedPlan, model: nn.Module) -> dict[str, list[str]]:
    """Return reason -> modules of the rules that torch has no counterpart of; the numbers of blocks are starred."""
    refused: dict[str, list[str]] = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    for entry in plan.entries:
        if entry.where not in modules:
            continue
        reason = f"`{entry.style.name}`" if entry.style.name in NOT_IN_TORCH else ""
        if not reason:
            try:
                entry.to_torch(modules[entry.where])
            except TPError as error:  # its advice is for TPStrategy, and none for a file
                reason = str(error).removeprefix(f"`{entry.where}`: ").partition(" Use ")[0].strip(" .")
        if reason:
            refused.setdefault(reason, []).append(starred(entry.where))
    tied = [name for name in sorted(plan.tied) if name in plan.splits and plan.splits[name].dim is not None]
    if tied:
        refused["tied weights, which torch's styles untie silently"] = tied
    return refused


def _folded(styles: Mapping[str, str], everything: Iterable[str]) -> dict[str, str]:
    """Fold the modules of all blocks into one pattern, where it matches these and no others."""
    groups: dict[str, list[str]] = {}
    for name in styles:
        groups.setdefault(starred(name), []).append(name)
    every = Counter(starred(name) for name in everything)
    folded: dict[str, str] = {}
    for star, names in groups.items():
        if len({styles[n] for n in names}) == 1 and every[star] == len(names):
            folded[star] = styles[names[0]]
        else:
            folded |= {n: styles[n] for n in names}
    return folded


def _style_source(style: Any) -> str:
    """Return the expression that makes one of torch's styles."""
    from torch.distributed.tensor import parallel as torch_tp

    if isinstance(style, (torch_tp.ColwiseParallel, torch_tp.RowwiseParallel)):
        inputs, outputs = _placements([style.input_layouts[0], style.output_layouts[0]])
        as_dtensor = "" if style.use_local_output else ", use_local_output=False"
        return f"{type(style).__name__}(input_layouts={inputs}, output_layouts={outputs}{as_dtensor})"
    if isinstance(style, torch_tp.SequenceParallel):
        return "SequenceParallel()"
    if isinstance(style, torch_tp.PrepareModuleInput):
        names = ("input_layouts", "desired_input_layouts") if style.input_layouts else ()
        options = [f"{n}={_tuple(getattr(style, n))}" for n in names]
        for n in ("input_kwarg_layouts", "desired_input_kwarg_layouts") if style.input_kwarg_layouts else ():
            by_name = (f"{json.dumps(k)}: {_placements([v])[0]}" for k, v in getattr(style, n).items())
            options.append(f"{n}={{{', '.join(by_name)}}}")
        if style.use_local_output:
            options.append("use_local_output=True")
        return f"PrepareModuleInput({', '.join(options)})"
    if isinstance(style, torch_tp.PrepareModuleOutput):
        given, wanted = _tuple(style.output_layouts), _tuple(style.desired_output_layouts)
        return f"PrepareModuleOutput(output_layouts={given}, desired_output_layouts={wanted})"
    raise AssertionError(f"`to_torch` never makes a {type(style).__name__}")


def _tuple(placements: Any) -> str:
    found = _placements(placements)
    return f"({', '.join(found)},)" if len(found) == 1 else f"({', '.join(found)})"


def _placements(placements: Any) -> list[str]:
    return [
        "None" if p is None else f"Shard({p.dim})" if p.is_shard() else "Partial()" if p.is_partial() else "Replicate()"
        for p in placements
    ]
