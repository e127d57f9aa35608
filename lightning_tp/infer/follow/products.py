"""Rules of products: with a weight, which makes features or sums over them, and of activations with each other.

| input (N, n, k) | weight (N, k, m) | result (N, n, m) |
|---|---|---|
| equal on all ranks | makes features along m ("out": column-wise) | one feature per column |
| features differ along k | its rows go with them ("in": row-wise) | a sum over ranks: equal on all ranks |
| one feature per product | has its own features for each ("out": heads with a matrix each) | one feature per product |
| other features | needed whole | all features of a row joined |

Here n are rows, k is the summed dim, m are columns, and N products are batched.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_tp.infer.follow.features import gradient_is_partial, no_features, shrunk
from lightning_tp.infer.follow.moves import mixed
from lightning_tp.infer.follow.trace import ParamView, TensorFacts
from lightning_tp.infer.follow.tracer import AtenCall, FeatureTracer, follows

ROWS, COLUMNS = 1, 2  # dims of a weight (N, k, m) along which its rows follow each other, and its columns


@follows("mm", "bmm", "addmm", "baddbmm")
def product(tracer: FeatureTracer, op: AtenCall) -> list[TensorFacts]:
    """(n, k) x (k, m) -> (n, m), or with N in front; a bias may be added."""
    start = 1 if op.name in ("addmm", "baddbmm") else 0
    x, y = op.args[start : start + 2]
    a, b = tracer.shadow(x), tracer.shadow(y)
    if x.ndim == 2:
        a, b = a.batched(), b.batched()
    label = _product(tracer, a, b, x.shape[-2], y.shape[-1])
    if label is not None:
        label = (label.squeeze(0) if x.ndim == 2 else label).expand(op.out.shape)
    return op.labelled(with_bias(tracer, op.args[0], label) if start else label)


@follows("_grouped_mm")
def grouped_product(tracer: FeatureTracer, op: AtenCall) -> list[TensorFacts]:
    """Rows (n, k) in groups, each times its own (k, m) of a weight (E, k, m): all groups are split alike."""
    x, weight = op.args[:2]
    param = tracer.shadow(weight).param
    if param is not None and x.ndim == 2 and weight.ndim == 3:
        first = ParamView(param.name, tuple(c[:1] for c in param.coordinates))
        label = with_weight(tracer, tracer.shadow(x).batched().label, first, rows=x.shape[0])
        return op.labelled(None if label is None else label.squeeze(0))
    return mixed(tracer, op, [label for t in (x, weight) if (label := tracer.shadow(t).label) is not None])


@follows("scaled_dot_product_attention")
def attention(tracer: FeatureTracer, op: AtenCall) -> list[TensorFacts]:
    """softmax(q k^T + mask) v: the features of one head of q (B, H, T, F), of its k and of its v are joined."""
    args, classes = op.args, tracer.trace.classes
    out = op.outs[0]
    mask = op.kwargs.get(
        "attn_mask", op.kwargs.get("attn_bias", args[3] if len(args) > 3 and isinstance(args[3], Tensor) else None)
    )
    facts = [tracer.shadow(t) for t in (*args[:3], mask) if t is not None]
    labels = [f.label for f in facts if f.label is not None]
    tracer.note_operands([f.param.name for f in facts if f.param is not None], labels)
    for t in args[:3]:
        _note_factor(tracer, tracer.label(t))
    heads: Tensor | None = None
    for label in (tracer.shadow(t).label for t in args[:3]):
        if label is not None:
            top = classes.join_along(label, (-2, -1), keepdim=True)  # (B, H, 1, 1)
            if top.shape[1] != out.shape[1]:
                top = top.repeat_interleave(out.shape[1] // top.shape[1], 1)
            heads = top if heads is None else classes.join(heads, top)
    if heads is not None and mask is not None and tracer.shadow(mask).label is not None:
        heads = classes.join(heads, classes.join_along(tracer.label(mask), (-2, -1), keepdim=True))
    return [TensorFacts(None if heads is None else heads.expand(out.shape), None, op.grad)]


def with_bias(tracer: FeatureTracer, bias: Tensor, label: Tensor | None) -> Tensor | None:
    """Return the label of a product of this label after a bias is added: the bias goes with the features that it is added to."""
    facts = tracer.shadow(bias)
    if facts.label is not None:
        return facts.label if label is None else tracer.trace.classes.join(facts.label, label)
    if facts.param is not None:
        tracer.note_operands([facts.param.name], [] if label is None else [label])
    return label


def _product(tracer: FeatureTracer, a: TensorFacts, b: TensorFacts, rows: int, columns: int) -> Tensor | None:
    """Return the labels of (N, n, k) x (N, k, m), which expand to (N, n, m)."""
    if b.param is not None:
        if a.param is not None:  # the first is taken for an activation: its gradient is made equal on all ranks at once
            for uses in (tracer.trace.whole_uses, tracer.trace.local_uses):
                uses.setdefault(a.param.name, set()).add(tracer.stack[-1])
        return with_weight(tracer, a.label, b.param, rows)
    if a.param is not None:  # (y^T W^T)^T
        a, b = (f.moved(lambda t: t.transpose(1, 2)) for f in (b, a))
        label = _product(tracer, a, b, columns, rows)
        return None if label is None else label.transpose(1, 2)
    tops = []
    for label, dim in ((a.label, 2), (b.label, 1)):  # (N, n, 1), (N, 1, m)
        if label is not None:
            _note_factor(tracer, label)
            tops.append(tracer.trace.classes.join_along(label, (dim,), keepdim=True))
    return tracer.trace.classes.join(*tops) if len(tops) == 2 else tops[0] if tops else None


def _note_factor(tracer: FeatureTracer, label: Tensor) -> None:
    """Note the features of a factor of a product of activations, unless they are one already."""
    matrix = shrunk(label[(0,) * (label.ndim - 2)])
    if matrix.numel() and bool((matrix != matrix[:1, :1]).any()):
        tracer.trace.operands.append(shrunk(label).unique())


def with_weight(tracer: FeatureTracer, x: Tensor | None, weight: ParamView, rows: int) -> Tensor | None:
    """Return the labels (N, n, m) of an input of labels (N, n, k) times a weight (N, k, m); None for what is equal on all ranks."""
    batch, _, columns = weight.coordinates[0].shape
    if not batch * rows:
        return _without_rows(tracer, weight, rows)
    if x is not None and gradient_is_partial(x):
        if not tracer.gathered or not any((weight.name, d, "out") in tracer.known for d in range(len(weight.coordinates))):
            tracer.note_operands([weight.name], [x])
            return no_features(batch, rows, columns)  # so is its product's
        x = None
    if x is None:
        return _makes_features(tracer, weight, rows)
    found = tracer.trace.classes.find(shrunk(x))
    if found.shape[1] == 1 or bool((found == found[:, :1]).all()):  # all rows have the same features
        label = _of_each_product(tracer, x, found, weight) if batch > 1 and columns else None
        if label is not None:
            return label.expand(batch, rows, columns)
        if found.shape[2] > 1 and bool((found != found[:, :, :1]).any()) and (along := _row_dim(tracer, found, weight)):
            _sums_over_features(tracer, x[:, 0, :], weight.name, *along)
            return no_features(batch, rows, columns) if tracer.deferring else None
    tracer.note_operands([weight.name], [x])
    return tracer.trace.classes.join_along(x, (2,), keepdim=True).expand(batch, rows, columns)


def _without_rows(tracer: FeatureTracer, weight: ParamView, rows: int) -> Tensor | None:
    """Return labels for an expert without tokens: how its weight is split is known from other uses of it, or it is kept whole."""
    batch, _, columns = weight.coordinates[0].shape
    for kind, dims in (("in", _dims_along(weight, ROWS)), ("out", _dims_along(weight, COLUMNS))):
        for dim, where in dims:
            if (weight.name, dim, kind) in tracer.known:
                tracer.note_product(weight.name, dim, kind)
                tracer.events.append((kind, weight.name))
                features = tracer.features(weight.name, dim)[where]
                return None if kind == "in" else features.unsqueeze(1).expand(batch, rows, columns)
    tracer.note_operands([weight.name], [])
    return None


def _makes_features(tracer: FeatureTracer, weight: ParamView, rows: int) -> Tensor | None:
    """Return the features (N, n, m) of a weight's columns, for an input that is equal on all ranks; None if they are needed whole."""
    batch, _, columns = weight.coordinates[0].shape
    along = next((a for a in _dims_along(weight, COLUMNS) if (weight.name, a[0]) not in tracer.whole), None)
    if along is None:
        tracer.trace.whole_uses.setdefault(weight.name, set()).add(tracer.stack[-1])
        return None
    dim, where = along
    features = tracer.features(weight.name, dim)[where]  # (N, m)
    tracer.note_product(weight.name, dim, "out")
    tracer.events.append(("out", weight.name))
    indices, known = where.unique(), tracer.trace.pieces.setdefault((weight.name, dim), [])
    if indices.numel() < tracer.shapes[weight.name][dim] and not any(torch.equal(indices, k) for k in known):
        known.append(indices)
    return features.unsqueeze(1).expand(batch, rows, columns)


def _of_each_product(tracer: FeatureTracer, x: Tensor, found: Tensor, weight: ParamView) -> Tensor | None:
    """Return the feature (N, 1, 1) of each of several products, whose inputs and matrices share none: heads, with a matrix for each."""
    if not _disjoint(found[:, 0, :]):
        return None
    for dim, coordinates in enumerate(weight.coordinates):
        where = shrunk(coordinates)
        if (weight.name, dim) not in tracer.whole and where.shape[0] > 1 and _disjoint(where.flatten(1)):
            classes = tracer.trace.classes
            tracer.note_product(weight.name, dim, "out")
            top = classes.join_along(x[:, 0, :], (1,), keepdim=True)  # (N, 1)
            mine = classes.join_along(tracer.features(weight.name, dim)[where.flatten(1)], (1,), keepdim=True)
            return classes.join(top, mine).unsqueeze(1)
    return None


def _row_dim(tracer: FeatureTracer, found: Tensor, weight: ParamView) -> tuple[int, Tensor] | None:
    """Return the dim along which a weight's rows go with the features (N, n or 1, k) of its input, and the coordinates there."""
    candidates = _dims_along(weight, ROWS)
    if len(candidates) != 1:
        candidates = [a for a in candidates if _differ_by(found[:, 0, :], a[1])][:1]
    return next((a for a in candidates if (weight.name, a[0]) not in tracer.whole), None)


def _sums_over_features(tracer: FeatureTracer, x: Tensor, name: str, dim: int, where: Tensor) -> None:
    """Join a weight's rows with the features (N, k) of the input: their sum is a sum over ranks."""
    tracer.note_product(name, dim, "in")
    tracer.events.append(("in", name))
    tracer.trace.classes.join(x, tracer.features(name, dim)[where])
    if tracer.owner is not None and bool((ranks := tracer.owner[shrunk(x)]).ne(ranks[:1]).any()):
        tracer.events.append(("apart", name))


def _dims_along(weight: ParamView, direction: int) -> list[tuple[int, Tensor]]:
    """Return the dims of the parameter along which rows or columns of a view (N, k, m) run, with the coordinates (N, k or m) there."""
    across = ROWS + COLUMNS - direction
    found = []
    for dim, coordinates in enumerate(weight.coordinates if weight.coordinates[0].shape[across] else ()):
        small = shrunk(coordinates.select(across, 0))
        if small.numel() and small.shape[-1] > 1 and bool((small != small[..., :1]).any()):
            found.append((dim, small))
    return sorted(found, key=lambda a: -int(a[1].amax()))  # the longest first


def _disjoint(rows: Tensor) -> bool:
    """Return whether no two rows have a number in common."""
    numbers = torch.cat([row.unique() for row in rows])
    return rows.shape[0] > 1 and numbers.unique().numel() == numbers.numel()


def _differ_by(classes: Tensor, coordinate: Tensor) -> bool:
    """Return whether the features along several dims of a weight, flattened to one, differ by this coordinate only."""
    if classes.shape[-1] != coordinate.shape[-1]:
        return False
    classes, coordinate = torch.broadcast_tensors(classes, coordinate)
    first = torch.zeros(int(coordinate.amax()) + 1, dtype=classes.dtype).scatter_(0, coordinate.reshape(-1), classes.reshape(-1))
    return bool((first[coordinate] == classes).all())
