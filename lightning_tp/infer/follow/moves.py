"""Rules of operators without weights: data movement moves labels by the very same operation, all others join the features that they combine.

A parameter that is moved (transposed, sliced, flattened) stays known as a view of it, by the coordinates of each element.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from lightning_tp._compat import base_of
from lightning_tp.core.trees import tensors_in
from lightning_tp.infer.follow.features import compact, reshaped, shrunk
from lightning_tp.infer.follow.ops import ATEN_CASTS, ATEN_FILLS, ATEN_LIKE, ATEN_MOVES, ATEN_POINTWISE, ATEN_REDUCTIONS
from lightning_tp.infer.follow.trace import ParamView, TensorFacts
from lightning_tp.infer.follow.tracer import ANY_OTHER, WRITE_INTO_VIEW, AtenCall, FeatureTracer, follows


@follows(*ATEN_MOVES)
def move(tracer: FeatureTracer, op: AtenCall) -> list[TensorFacts]:
    """Move the labels as the data is moved, or the coordinates of a parameter."""
    data = list(tensors_in(op.args[0], depth=0))
    facts = [tracer.shadow(t) for t in data]
    labels = [f.label for f in facts if f.label is not None]
    if labels or len(data) > 1:
        tracer.note_operands([f.param.name for f in facts if f.param is not None], labels)
    if labels:
        return [TensorFacts(label, None, op.grad) for label in _moved_labels(tracer, op)]
    if len(data) == 1 and (param := facts[0].param) is not None:
        moved = [_moved(tracer, op, coordinate) for coordinate in param.coordinates]
        return [TensorFacts(None, ParamView(param.name, c), op.grad) for c in zip(*moved, strict=True)]
    return op.labelled(None)


def _moved_labels(tracer: FeatureTracer, op: AtenCall) -> list[Tensor]:
    labels = tree_map_only(Tensor, tracer.label, op.args[0])
    if any(tracer.value(t) is None for t in tensors_in(op.args[1:], depth=0)):
        for dim in _indexed_dims(op):  # which elements are taken is not known: they are joined
            labels = tracer.trace.classes.join_along(labels, (dim,), keepdim=True).expand(labels.shape)
    moved = _moved(tracer, op, labels)
    return [_filled(m) for m in moved] if op.name in ("cat", "constant_pad_nd") else moved


def _moved(tracer: FeatureTracer, op: AtenCall, first: Any) -> list[Tensor]:
    """Apply the operation to labels or coordinates, in place of its first argument."""
    match op.name:
        case "clone" | "contiguous" | "alias" | "detach" | "lift_fresh" | "_conj":
            moved = first
        case "view" | "_unsafe_view" | "reshape" | "_reshape_alias":
            moved = reshaped(first, op.outs[0].shape)
        case "view_as_complex":
            moved = first.amax(-1)
        case "view_as_real":
            moved = first.unsqueeze(-1).expand(*first.shape, 2)
        case "constant_pad_nd":
            moved = op.func(first, op.args[1], 0)
        case "as_strided":
            like = op.args[0]
            first = torch.empty_strided(like.shape, like.stride(), dtype=first.dtype).copy_(first)
            moved = op.func(first, *op.args[1:], **op.kwargs)
        case "cat":
            moved = _cat(first, op)
        case _:
            kwargs = {k: v for k, v in op.kwargs.items() if k != "memory_format"}
            moved = op.func(first, *tree_map_only(Tensor, tracer.index, op.args[1:]), **kwargs)
    return [compact(m) for m in tensors_in(moved, depth=0)]


def _cat(parts: list[Tensor], op: AtenCall) -> Tensor:
    """Concatenate, without memory for the dims along which all parts are constant by construction."""
    dim = op.kwargs.get("dim", op.args[1] if len(op.args) > 1 else 0)
    parts = [p for p in parts if p.shape != (0,)] or parts
    like = parts[0]
    dim %= like.ndim
    same = [d for d in range(like.ndim) if d != dim and all(p.stride(d) == 0 for p in parts)]
    index = tuple(slice(0, 1) if d in same else slice(None) for d in range(like.ndim))
    small = torch.cat([p[index] for p in parts], dim)
    return small.expand([like.shape[d] if d in same else n for d, n in enumerate(small.shape)])


def _indexed_dims(op: AtenCall) -> list[int]:
    """Return the dims of which an operation takes elements by an index."""
    ndim = op.args[0].ndim
    if op.name == "index":
        return [d for d, t in enumerate(op.args[1]) if t is not None]
    return [op.args[1] % ndim] if op.name in ("gather", "index_select", "take_along_dim") else list(range(ndim))


def _filled(label: Tensor) -> Tensor:
    """Give elements without a feature (a prefix, padding) the one of the elements beside them, along dims in which these do not differ."""
    shape, label = label.shape, shrunk(label)
    for dim in range(label.ndim):
        if label.shape[dim] == 1:
            continue
        top = label.amax(dim, keepdim=True)
        beside = (label == 0) & (top > 0)
        if bool(beside.any()) and bool((beside | (label == top)).all()):
            label = top
    return label.expand(shape)


@follows(*ATEN_LIKE)
def like(tracer: FeatureTracer, op: AtenCall) -> list[TensorFacts]:
    """Give a new tensor the label of the one that it is made like: code combines the two."""
    return [TensorFacts(tracer.shadow(op.args[0]).label, None, False)]


@follows(*ATEN_CASTS)
def cast(tracer: FeatureTracer, op: AtenCall) -> list[TensorFacts]:
    """Keep label and parameter."""
    return [TensorFacts(op.facts[0].label, op.facts[0].param, op.grad)]


@follows(ANY_OTHER)
def combine(tracer: FeatureTracer, op: AtenCall) -> list[TensorFacts]:
    """Join the features that an operator combines: those of each element, or along the dims that it reduces, or, of an unknown one, all."""
    params = [f.param.name for f in op.facts if f.param is not None]
    labels = [f.label for t, f in zip(op.tensors, op.facts, strict=True) if f.label is not None and t.numel()]
    tracer.note_operands(params, labels)
    if not labels:
        return [TensorFacts(None, None, op.grad and (t.is_floating_point() or t.is_complex())) for t in op.outs]
    tracer.note_leaked_partial(op)
    if op.name in ATEN_REDUCTIONS:
        return _reduced(tracer, op)
    if torch.Tag.pointwise in op.func.tags or op.name in ATEN_FILLS or op.name in ATEN_POINTWISE:
        label: Tensor | None = None
        for f in op.facts:
            if f.label is not None:
                label = f.label if label is None else tracer.trace.classes.join(label, f.label)
        return op.labelled(label)
    return mixed(tracer, op, labels)


@follows(WRITE_INTO_VIEW)
def write_into_view(tracer: FeatureTracer, op: AtenCall) -> list[TensorFacts]:
    """`x[:, 1:] = y`: what is written, a copy of y, lies in x from now on."""
    view = op.outs[0]
    base, written = base_of(view), tracer.shadow(view)
    assert base is not None
    before, label = tracer.shadow(base), written.label
    if label is not None and base.is_contiguous():
        labels = tracer.label(base).clone(memory_format=torch.contiguous_format)
        labels.as_strided(view.shape, view.stride(), view.storage_offset() - base.storage_offset()).copy_(label)
        label = _filled(compact(labels))
    elif label is not None:
        return mixed(tracer, AtenCall(op.func, (), {}, base, [base, view], [before, written]), [label, tracer.label(base)])
    return [TensorFacts(before.label if label is None else label, before.param, before.grad or written.grad)]


@follows("embedding")
def embedding(tracer: FeatureTracer, op: AtenCall) -> list[TensorFacts]:
    """Note whose rows are looked up."""
    table = next((f.param for f in op.facts if f.param is not None), None)
    if table is not None:
        tracer.trace.looked_up.setdefault(table.name, set()).add(tracer.stack[-1])
    return combine(tracer, op)


def _reduced(tracer: FeatureTracer, op: AtenCall) -> list[TensorFacts]:
    x = op.args[0]
    dims = _reduced_dims(op, x.ndim)
    kept = tracer.trace.classes.join_along(tracer.label(x), dims, keepdim=True)
    facts = []
    for t in op.outs:
        small = kept if t.ndim == x.ndim else kept.squeeze(dims) if t.ndim else kept.reshape(-1)[0]
        facts.append(TensorFacts(small.expand(t.shape), None, op.grad and t.is_floating_point()))
    return facts


def _reduced_dims(op: AtenCall, ndim: int) -> tuple[int, ...]:
    """Return the dims that an operator reduces, or normalizes over."""
    dims = op.kwargs.get("dim")
    if dims is None:
        position = 2 if op.name in ("linalg_vector_norm", "norm", "topk") else 1
        dims = op.args[position] if len(op.args) > position and not isinstance(op.args[position], (bool, Tensor)) else None
    if op.name in ("topk", "sort") and dims is None:
        dims = -1
    if dims is None or (isinstance(dims, (list, tuple)) and not dims):
        return tuple(range(ndim))
    dims = [dims] if isinstance(dims, int) else list(dims)
    return tuple(d % ndim for d in dims) if ndim else ()


def mixed(tracer: FeatureTracer, op: AtenCall, labels: list[Tensor]) -> list[TensorFacts]:
    """Join all features that go into an operator of which nothing is known."""
    top: Tensor | None = None
    for label in labels:
        one = tracer.trace.classes.join_along(label.reshape(-1) if label.ndim else label.view(1), (0,))
        top = one if top is None else tracer.trace.classes.join(top, one)
    return [TensorFacts(None if top is None else top.expand(t.shape), None, op.grad and t.is_floating_point()) for t in op.outs]


@follows("native_layer_norm", "_fused_rms_norm")
def norm(tracer: FeatureTracer, op: AtenCall) -> list[TensorFacts]:
    """Join the features of one row, over the last dims; rows stay apart."""
    x, shape = op.args[0], op.args[1]
    label = tracer.shadow(x).label
    uses = tracer.trace.whole_uses if label is None else tracer.trace.local_uses
    for t in op.args[2:4]:
        if isinstance(t, Tensor) and (param := tracer.shadow(t).param) is not None:
            uses.setdefault(param.name, set()).add(tracer.stack[-1])
    if label is None:
        return op.labelled(None)
    dims = tuple(range(x.ndim - len(shape), x.ndim))
    return op.labelled(tracer.trace.classes.join_along(label, dims, keepdim=True))
