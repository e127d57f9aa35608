"""Run a model once and write down which elements of each activation come from which features of which weight.

A label tensor goes along with each activation that a linear layer's output features have reached (see `classes.py`). Data movement moves
the labels by the very same operation; pointwise operations, reductions and products join features that meet. What the names of
modules are does not matter, only what the forward does.

A product with a weight is special: with a whole input it makes features (the weight may be split by its output, column-wise); with an
input whose features differ along the summed dim it ends them (the weight is split by its input, row-wise, and ranks add up).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

from lightning_tp.errors import TPError
from lightning_tp.infer.follow.convolutions import convolved, kernel_of
from lightning_tp.infer.follow.features import FeatureSets, compact, reshaped, shrunk
from lightning_tp.infer.follow.meta import made


@dataclass
class TensorFacts:
    """What the trace knows of a tensor.

    Args:
        label: the feature each element comes from, 0 where every rank has it; None: 0 everywhere.
        param: the parameter that it is a view of, and for each dim of that the coordinate of each element in it.
        grad: whether a gradient flows back through it.
    """

    label: Tensor | None = None
    param: tuple[str, tuple[Tensor, ...]] | None = None
    grad: bool = False


@dataclass(frozen=True)
class Use:
    """A product of an activation with a weight."""

    name: str  # of the parameter
    dim: int  # of the parameter that is split
    kind: str  # "out": it makes features, "in": it ends them, "along": it has its own for each group of those it reads
    module: str  # whose forward ran


@dataclass
class FeatureTrace:
    """What one run showed."""

    classes: FeatureSets
    nodes: dict[tuple[str, int], Tensor] = field(default_factory=dict)  # (parameter, dim) -> its features
    uses: dict[Use, None] = field(default_factory=dict)
    pieces: dict[tuple[str, int], list[Tensor]] = field(
        default_factory=dict
    )  # indices of it that one product has: experts in a stack
    local_uses: dict[str, set[str]] = field(default_factory=dict)  # parameter -> modules where it meets split activations
    whole_uses: dict[str, set[str]] = field(default_factory=dict)
    looked_up: dict[str, set[str]] = field(default_factory=dict)  # parameter -> modules that take rows of it
    convolved: set[str] = field(default_factory=set)  # weights of convolutions: their features lie along dim 1 of what comes out
    operands: list[Tensor] = field(default_factory=list)  # the features of each factor of a product of activations
    logits: list[Tensor] = field(default_factory=list)  # labels of what the loss was given
    tried: set[Any] = field(default_factory=set)  # calls that give the same on shards, in runs whose features are these
    escaped: dict[str, None] = field(
        default_factory=dict
    )  # modules where what every rank has, beside its shards, meets what is whole


# Operations that only move data: what they do to an activation they do to its labels.
MOVES = {
    *("view", "_unsafe_view", "reshape", "_reshape_alias", "permute", "transpose", "t", "unsqueeze", "squeeze", "expand", "slice"),
    *("select", "split", "split_with_sizes", "chunk", "unbind", "clone", "contiguous", "alias", "detach", "roll", "flip", "repeat"),
    *("unfold", "as_strided", "narrow", "diagonal", "movedim", "tril", "triu", "lift_fresh", "constant_pad_nd", "index_select"),
    *(
        "index",
        "gather",
        "cat",
        "stack",
        "repeat_interleave",
        "pixel_shuffle",
        "squeeze_",
        "unsqueeze_",
        "transpose_",
        "view_as_real",
    ),
    *("view_as_complex", "_conj", "swapaxes", "flatten", "unflatten"),
}


MOST_WRITTEN = 2**12  # elements of a tensor of numbers in the code that are compared between runs


MOST_KNOWN = 2**22  # elements of a tensor whose values are computed although the model is on the meta device


REDUCTIONS = {
    *("sum", "mean", "amax", "amin", "max", "min", "var", "std", "var_mean", "prod", "logsumexp", "argmax", "argmin", "any", "all"),
    *(
        "linalg_vector_norm",
        "norm",
        "_softmax",
        "_log_softmax",
        "_safe_softmax",
        "softmax",
        "log_softmax",
        "cumsum",
        "cumprod",
        "topk",
        "sort",
    ),
}


POINTWISE = {"dropout", "native_dropout", "masked_fill", "where", "copy_", "fill_"}


RANDOM = {
    "bernoulli",
    "bernoulli_",
    "uniform_",
    "normal_",
    "exponential_",
    "random_",
    "zero_",
}  # writes what depends on no features


CHANCE = {torch.ops.aten.rand.default, torch.ops.aten.uniform_.default}


GROUPED = torch.ops.aten._grouped_mm.default


KEPT = 0.99


class FeatureTracer(TorchDispatchMode):
    """Follows features through the operations of one forward.

    Args:
        model: whose parameters are the weights.
        whole: (parameter, dim) that make no features: found to be needed whole in an earlier run.
        shared: which indices of a (parameter, dim) make features that every rank has.
    """

    def __init__(self, model: nn.Module, whole: set[tuple[str, int]], shared: dict[tuple[str, int], Tensor]) -> None:
        super().__init__()
        self.trace = FeatureTrace(FeatureSets())
        self.whole = whole
        self.shadows: dict[int, tuple[Tensor, TensorFacts]] = {}
        self.stack: list[str] = [""]
        self.shared = shared
        self.on_meta = any(p.is_meta for p in model.parameters())
        self.values: dict[int, tuple[Tensor, Tensor]] = {}  # of meta tensors that no weight has a part in
        self.twins: dict[int, tuple[Tensor, Tensor]] = {}  # of tensors elsewhere that have met some on the meta device
        # ("out" | "in" | "apart", parameter) of the call that runs now; "apart": several products, not all of them split alike
        self.events: list[tuple[str, str]] = []
        self.known: set[tuple[str, int, str]] = set()  # (parameter, dim, "in" or "out") that an earlier run found
        self.owner: Tensor | None = None  # the rank of each feature, where it is known: -1 for all ranks
        self.gathered = False  # whether what every rank has with a share of its gradient may be read by a split weight
        self.deferring = False  # whether terms of sums over ranks are not added up where they are made
        # (module, operation, what it is given beside tensors, shapes of what comes out), of a run that is compared with another
        self.log: list[tuple[Any, ...]] | None = None
        self.names = {id(p): n for n, p in model.named_parameters()}
        self.shapes = {n: p.shape for n, p in model.named_parameters()}

    # ------------------------------------------------------------------------------------------------------- shadows

    def onto_meta(self, inputs: Any) -> Any:
        """The inputs on the meta device; what their values are is known, or ones if they were there already."""

        def move(t: Tensor) -> Tensor:
            meta = t.to("meta") if not t.is_meta else t
            self.values[id(meta)] = (meta, t if not t.is_meta else torch.ones(t.shape, dtype=t.dtype))
            return meta

        return tree_map_only(Tensor, move, inputs)

    def _know_buffers(self, model: nn.Module) -> None:
        for b in model.buffers():
            value = getattr(b, "_tp_value", None if b.is_floating_point() else torch.ones(b.shape, dtype=b.dtype))
            if b.is_meta and value is not None:
                self.values[id(b)] = (b, value)

    def shadow(self, t: Any) -> TensorFacts:
        """What is known of a tensor."""
        found = self.shadows.get(id(t))
        if found is not None:
            return found[1]
        name = self.names.get(id(t))
        if name is not None:
            made = TensorFacts(None, (name, _coordinates(t.shape)), t.requires_grad)
            self.shadows[id(t)] = (t, made)
            return made
        return TensorFacts(grad=isinstance(t, Tensor) and t.requires_grad)

    def put(self, t: Any, shadow: TensorFacts) -> None:
        """Remember it, as long as the trace runs."""
        if isinstance(t, Tensor):
            self.shadows[id(t)] = (t, shadow)

    def label(self, t: Tensor) -> Tensor:
        """The labels of a tensor, zeros for none; constant dims without memory."""
        label = self.shadow(t).label
        return torch.zeros((), dtype=torch.int64).expand(t.shape) if label is None else label

    # ------------------------------------------------------------------------------------------------------ dispatch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return self._looked_at(args[0])
        out = self._computed(func, args, kwargs, tensors)
        if self.log is not None:  # of a run that is compared with another
            self.log.append(self._entry(func, args, kwargs, out))
        shadows = [self.shadow(t) for t in tensors]
        if not any(s.label is not None or s.param is not None or s.grad for s in shadows):
            return out
        self.trace.classes.why = f"`{_called(func)}` in `{self.stack[-1] or 'the model'}`"
        grad = any(s.grad for s in shadows)
        with _untraced():
            self._follow(func, args, kwargs, out, tensors, shadows, grad)
        return out

    def _computed(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> Any:
        """What it gives; tensors of other devices that meet some on the meta device (class weights that a loss holds) are taken there."""
        if not self.on_meta:
            return _run(func, args, kwargs)
        moves = any(t.is_meta for t in tensors) and [t for t in tensors if t.ndim and not t.is_meta]
        if moves:
            with _untraced():
                twins = {id(t): self._twin(t) for t in moves}
            args, kwargs = tree_map_only(Tensor, lambda t: twins.get(id(t), t), (args, kwargs))
            tensors = [twins.get(id(t), t) for t in tensors]
        out = _run(func, args, kwargs)
        with _untraced():
            self._known(func, args, kwargs, out, tensors)
        if moves and func._schema.is_mutable:
            back = {id(twins[id(t)]): t for t in moves}
            for twin in back:
                self.values.pop(twin, None)  # which were those before
            out = tree_map_only(Tensor, lambda t: back.get(id(t), t), out)
        return out

    def _twin(self, t: Tensor) -> Tensor:
        """This tensor on the meta device, where its values are known."""
        if id(t) not in self.twins:
            twin = t.detach().to("meta")
            self.twins[id(t)] = (t, twin)
            self.values[id(twin)] = (twin, t.detach().cpu())
        return self.twins[id(t)][1]

    def _entry(self, func: Any, args: Any, kwargs: Any, out: Any) -> tuple[Any, ...]:
        rest = tuple(x if isinstance(x, (int, float, str, type(None))) else str(x) for x in _not_tensors((args, kwargs)))
        made: tuple[Any, ...] = tuple(tuple(t.shape) for t in tree_flatten(out)[0] if isinstance(t, Tensor))
        if func is torch.ops.aten.lift_fresh.default and not out.is_meta and out.numel() <= MOST_WRITTEN:  # numbers of the code
            with _untraced():
                made = (*made, str(out.tolist()))
        return self.stack[-1], func, rest, made

    def _known(self, func: Any, args: Any, kwargs: Any, out: Any, tensors: list[Tensor]) -> None:
        """On the meta device: positions, masks and the like have known values; compute them, for code that decides by them."""
        outs = [t for t in tree_flatten(out)[0] if isinstance(t, Tensor)]
        if not outs or not outs[0].is_meta or any(t.is_meta and id(t) not in self.values for t in tensors):
            return
        if func._schema.is_mutable or sum(t.numel() for t in outs) > MOST_KNOWN:
            return
        cpu = torch.device("cpu")
        real = tree_map_only(Tensor, lambda t: self.values[id(t)][1] if t.is_meta else t, (args, kwargs))
        real_args, real_kwargs = tree_map_only(torch.device, lambda d: cpu if d.type == "meta" else d, real)
        for t, value in zip(outs, tree_flatten(func(*real_args, **real_kwargs))[0], strict=False):
            if isinstance(value, Tensor):
                self.values[id(t)] = (t, value)

    def _looked_at(self, t: Tensor) -> Any:
        known = self.values.get(id(t))
        if known is not None:
            return known[1].item()
        raise TPError(
            f"`{self.stack[-1] or 'the model'}` decides by the value of a tensor that depends on weights, which are on the meta device. Make "
            "the plan from a model with real weights (a small one of the same kind has the same plan), or give a plan."
        )

    def _follow(
        self, func: Any, args: Any, kwargs: Any, out: Any, tensors: list[Tensor], shadows: list[TensorFacts], grad: bool
    ) -> None:
        name = func.overloadpacket.__name__
        handler = getattr(self, f"_op_{name}", None)
        if handler is not None:
            handler(func, args, kwargs, out, grad)
            return
        if name.startswith("_scaled_dot_product"):
            self._attention(args, kwargs, out, grad)
            return
        if name in MOVES:
            self._move(func, args, kwargs, out, grad)
            return
        if name in ("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like"):
            self.put(out, TensorFacts(self.shadow(args[0]).label, None, False))
            return
        if name in ("_to_copy", "to", "type_as") and isinstance(out, Tensor):
            self.put(out, TensorFacts(shadows[0].label, shadows[0].param, grad))
            return
        self._meets(func, args, kwargs, out, tensors, shadows, grad)

    def _meets(
        self, func: Any, args: Any, kwargs: Any, out: Any, tensors: list[Tensor], shadows: list[TensorFacts], grad: bool
    ) -> None:
        """An operation of which no more is known than whether it works on each element, or reduces."""
        name = func.overloadpacket.__name__
        labelled = [(t, s.label) for t, s in zip(tensors, shadows, strict=True) if s.label is not None and t.numel()]
        params = [s.param[0] for s in shadows if s.param is not None]
        if name == "embedding" and params:
            self.trace.looked_up.setdefault(params[0], set()).add(self.stack[-1])
        self._use(params, [label for _, label in labelled])
        if not labelled:
            for t in tree_flatten(out)[0]:
                self.put(t, TensorFacts(None, None, grad and isinstance(t, Tensor) and (t.is_floating_point() or t.is_complex())))
            return
        self._stays_inside(tensors, shadows)
        if name in REDUCTIONS:
            self._reduce(name, args, kwargs, out, grad)
        elif torch.Tag.pointwise in func.tags or name in RANDOM or name in POINTWISE:
            self._pointwise(tensors, out, grad)
        else:
            self._mixed(name, labelled, out, grad)

    def _use(self, params: list[str], labels: list[Tensor]) -> None:
        """Note that parameters meet activations with these labels: split ones, or whole ones."""
        if labels and self.owner is not None:
            inside = [x for x in labels if self._is_inside(x)]
        else:
            inside = labels
        for p in params:
            (self.trace.local_uses if inside else self.trace.whole_uses).setdefault(p, set()).add(self.stack[-1])

    def _is_inside(self, label: Tensor) -> bool:
        """Whether ranks have different elements of it, or it lies beside such: not the logits, which show as whole."""
        assert self.owner is not None
        small = shrunk(label)
        return not bool(small.any()) or bool((self.owner[small] >= 0).any())

    def _stays_inside(self, tensors: list[Tensor], shadows: list[TensorFacts]) -> None:
        """What every rank has beside its shards has a share of its gradient on each: it may only meet its like."""
        labels = [s.label for s in shadows if s.label is not None and s.label.numel()]
        if not labels or len(labels) == len(tensors) or any(bool(shrunk(x).any()) for x in labels):
            return
        if any(s.label is None and s.param is None and s.grad for s in shadows):
            self.trace.escaped[self.stack[-1]] = None

    def _pointwise(self, tensors: list[Tensor], out: Any, grad: bool) -> None:
        label: Tensor | None = None
        for t in tensors:
            mine = self.shadow(t).label
            if mine is not None:
                label = mine if label is None else self.trace.classes.join(label, mine)
        for t in tree_flatten(out)[0]:
            if isinstance(t, Tensor):
                self.put(t, TensorFacts(None if label is None else label.expand(t.shape), None, grad))

    def _reduce(self, name: str, args: Any, kwargs: Any, out: Any, grad: bool) -> None:
        x = args[0]
        label = self.label(x)
        dims = _reduced_dims(name, args, kwargs, x.ndim)
        kept = self.trace.classes.join_along(label, dims, keepdim=True)
        for t in tree_flatten(out)[0]:
            if not isinstance(t, Tensor):
                continue
            if t.ndim == x.ndim:
                shape_label = kept.expand(t.shape)
            else:
                shape_label = kept.squeeze(dims).expand(t.shape) if t.ndim else kept.reshape(-1)[0]
            self.put(t, TensorFacts(shape_label, None, grad and t.is_floating_point()))

    def _mixed(self, name: str, labelled: list[tuple[Tensor, Tensor]], out: Any, grad: bool) -> None:
        """An operation that nothing is known about: all features that go in have to be in one place."""
        top: Tensor | None = None
        for _, label in labelled:
            one = self.trace.classes.join_along(label.reshape(-1) if label.ndim else label.view(1), (0,))
            top = one if top is None else self.trace.classes.join(top, one)
        for t in tree_flatten(out)[0]:
            if isinstance(t, Tensor):
                self.put(t, TensorFacts(None if top is None else top.expand(t.shape), None, grad and t.is_floating_point()))

    def _move(self, func: Any, args: Any, kwargs: Any, out: Any, grad: bool) -> None:
        data, _ = tree_flatten(args[0])
        data = [t for t in data if isinstance(t, Tensor)]
        outs = [t for t in tree_flatten(out)[0] if isinstance(t, Tensor)]
        params = [p[0] for t in data if (p := self.shadow(t).param) is not None]
        labels = [x for t in data if (x := self.shadow(t).label) is not None]
        if labels or len(data) > 1:
            self._use(params, labels)
        if labels:
            moved_labels = self._moved(func, args, kwargs, outs, self.label)
            if func.overloadpacket.__name__ in ("cat", "constant_pad_nd"):
                moved_labels = [_filled(m) for m in moved_labels]
            for t, m in zip(outs, moved_labels, strict=True):
                self.put(t, TensorFacts(m, None, grad))
        elif len(data) == 1 and (param := self.shadow(data[0]).param) is not None:
            moved = [self._moved(func, args, kwargs, outs, lambda t, c=c: c) for c in param[1]]
            for t, coordinates in zip(outs, zip(*moved, strict=True), strict=True):
                self.put(t, TensorFacts(None, (param[0], tuple(coordinates)), grad))
        else:
            for t in outs:
                self.put(t, TensorFacts(None, None, grad))

    def _moved(self, func: Any, args: Any, kwargs: Any, outs: list[Tensor], of: Any) -> list[Tensor]:
        """What the operation does to the labels, or coordinates, `of(t)` of what it moves."""
        first = tree_map_only(Tensor, of, args[0])
        name = func.overloadpacket.__name__
        if name in ("view_as_complex", "view_as_real"):
            moved: Any = first.amax(-1) if name == "view_as_complex" else first.unsqueeze(-1).expand(*first.shape, 2)
        elif name in ("view", "_unsafe_view", "reshape", "_reshape_alias"):
            moved = reshaped(first, outs[0].shape)
        elif name in ("clone", "contiguous", "alias", "detach", "lift_fresh", "_conj"):
            moved = first
        elif name == "cat" and len(first) > 1:
            moved = _cat(first, kwargs.get("dim", args[1] if len(args) > 1 else 0))
        elif name == "constant_pad_nd":
            moved = func(first, args[1], 0)
        elif name == "as_strided":
            moved = func(torch.empty_strided(args[0].shape, args[0].stride(), dtype=first.dtype).copy_(first), *args[1:], **kwargs)
        else:
            if any(self._unknown(t) for t in tree_flatten(args[1:])[0]) and of == self.label:
                for dim in _indexed(name, args):  # which of them is not known: they meet
                    first = self.trace.classes.join_along(first, (dim,), keepdim=True).expand(first.shape)
            rest = tree_map_only(Tensor, self._index, args[1:])
            moved = func(first, *rest, **{k: v for k, v in kwargs.items() if k != "memory_format"})
        return [compact(m) for m in tree_flatten(moved)[0] if isinstance(m, Tensor)]

    def _unknown(self, t: Any) -> bool:
        return isinstance(t, Tensor) and t.is_meta and id(t) not in self.values

    def _index(self, t: Tensor) -> Tensor:
        """The values of an index; the first of each where they are not known (a router's choice, on the meta device)."""
        if self._unknown(t):
            return torch.zeros(t.shape, dtype=t.dtype)
        return self.values[id(t)][1] if t.is_meta else t.cpu()

    # ------------------------------------------------------------------------------------------------------ products

    def _op_mm(self, func: Any, args: Any, kwargs: Any, out: Tensor, grad: bool) -> None:
        self._product(args[0].unsqueeze(0), args[1].unsqueeze(0), out, grad, self._up(args[0]), self._up(args[1]), squeeze=True)

    def _op_addmm(self, func: Any, args: Any, kwargs: Any, out: Tensor, grad: bool) -> None:
        self._op_mm(func, args[1:3], {}, out, grad)
        self._add(args[0], out, grad)

    def _op_bmm(self, func: Any, args: Any, kwargs: Any, out: Tensor, grad: bool) -> None:
        self._product(args[0], args[1], out, grad, self.shadow(args[0]), self.shadow(args[1]))

    def _op__grouped_mm(self, func: Any, args: Any, kwargs: Any, out: Tensor, grad: bool) -> None:
        """Rows (n, k) in groups, each times its own (k, m) of a weight (E, k, m): all groups are split alike."""
        x, w = self._up(args[0]), self.shadow(args[1])
        if w.param is not None and args[0].ndim == 2 and args[1].ndim == 3:
            label = self._with_weight(
                x.label, (w.param[0], tuple(c[:1] for c in w.param[1])), args[0].unsqueeze(0).shape, out_dim=2
            )
            self.put(out, TensorFacts(None if label is None else label.squeeze(0), None, grad))
            return
        self._mixed("_grouped_mm", [(t, s) for t in args[:2] if (s := self.shadow(t).label) is not None], out, grad)

    def _op_native_layer_norm(self, func: Any, args: Any, kwargs: Any, out: Any, grad: bool) -> None:
        """A norm over the last dims: the features of one row meet; rows do not."""
        x, shape = args[0], args[1]
        outs = [t for t in tree_flatten(out)[0] if isinstance(t, Tensor)]
        label = self.shadow(x).label
        for t in args[2:4]:
            if isinstance(t, Tensor) and (param := self.shadow(t).param) is not None:
                (self.trace.whole_uses if label is None else self.trace.local_uses).setdefault(param[0], set()).add(self.stack[-1])
        if label is None:
            for t in outs:
                self.put(t, TensorFacts(None, None, grad))
            return
        kept = self.trace.classes.join_along(label, tuple(range(x.ndim - len(shape), x.ndim)), keepdim=True)
        for t in outs:
            self.put(t, TensorFacts(kept.expand(t.shape), None, grad))

    _op__fused_rms_norm = _op_native_layer_norm

    def _op_baddbmm(self, func: Any, args: Any, kwargs: Any, out: Tensor, grad: bool) -> None:
        self._op_bmm(func, args[1:3], {}, out, grad)
        self._add(args[0], out, grad)

    def _op_convolution(self, func: Any, args: Any, kwargs: Any, out: Tensor, grad: bool) -> None:
        x, weight, bias, *_, transposed, _, groups = args
        kernel = None if transposed and groups > 1 else kernel_of(self.shadow(weight).param, transposed)
        tensors = [t for t in (x, weight, bias) if t is not None]
        if kernel is None or self.shadow(weight).label is not None or (bias is not None and self.shadow(bias).label is not None):
            self._meets(func, args, kwargs, out, tensors, [self.shadow(t) for t in tensors], grad)
            return
        self.put(out, TensorFacts(convolved(self, x, kernel, groups, out), None, grad))
        if bias is not None:
            self._add(bias, out, grad)

    def _attention(self, args: Any, kwargs: Any, out: Any, grad: bool) -> None:
        """softmax(q k^T + mask) v: the features of one head of q (B, H, T, F), of its k and of its v meet."""
        out = out[0] if isinstance(out, tuple) else out
        classes = self.trace.classes
        heads: Tensor | None = None
        mask = kwargs.get("attn_mask", kwargs.get("attn_bias", args[3] if len(args) > 3 and isinstance(args[3], Tensor) else None))
        given = [t for t in (*args[:3], mask) if t is not None]
        labels = [x for t in given if (x := self.shadow(t).label) is not None]
        self._use([p[0] for t in given if (p := self.shadow(t).param) is not None], labels)
        for t in args[:3]:
            self._factor(self.label(t))
        for t in args[:3]:
            if self.shadow(t).label is not None:
                label = classes.join_along(self.label(t), (-2, -1), keepdim=True)  # (B, H, 1, 1)
                if label.shape[1] != out.shape[1]:
                    label = label.repeat_interleave(out.shape[1] // label.shape[1], 1)
                heads = label if heads is None else classes.join(heads, label)
        if heads is not None and mask is not None and self.shadow(mask).label is not None:
            heads = classes.join(heads, classes.join_along(self.label(mask), (-2, -1), keepdim=True))
        self.put(out, TensorFacts(None if heads is None else heads.expand(out.shape), None, grad))

    def _add(self, bias: Tensor, out: Tensor, grad: bool) -> None:
        """A bias behind a product: its elements go with the features that it is added to."""
        shadow, label = self.shadow(bias), self.shadow(out).label
        if shadow.label is not None:
            self._pointwise([bias, out], out, grad)
        elif shadow.param is not None:
            self._use([shadow.param[0]], [] if label is None else [label])

    def _up(self, t: Tensor) -> TensorFacts:
        s = self.shadow(t)
        label = None if s.label is None else s.label.unsqueeze(0)
        return TensorFacts(label, None if s.param is None else (s.param[0], tuple(c.unsqueeze(0) for c in s.param[1])), s.grad)

    def _product(
        self, a: Tensor, b: Tensor, out: Tensor, grad: bool, sa: TensorFacts, sb: TensorFacts, squeeze: bool = False
    ) -> None:
        """(N, n, k) x (N, k, m) -> (N, n, m)."""
        label: Tensor | None
        if sb.param is not None and (sa.param is None or sa.label is None):
            if (
                sa.param is not None
            ):  # a weight times a parameter, as if that were an activation: its gradient is made whole at once
                self.trace.whole_uses.setdefault(sa.param[0], set()).add(self.stack[-1])
                self.trace.local_uses.setdefault(sa.param[0], set()).add(self.stack[-1])
            label = self._with_weight(sa.label, sb.param, a.shape, out_dim=2)
        elif sa.param is not None and sb.param is None:
            other = None if sb.label is None else sb.label.transpose(1, 2)
            weight = (sa.param[0], tuple(c.transpose(1, 2) for c in sa.param[1]))
            label = self._with_weight(other, weight, b.transpose(1, 2).shape, out_dim=2)
            label = None if label is None else label.transpose(1, 2)
        elif sa.label is None and sb.label is None:
            self._use([s.param[0] for s in (sa, sb) if s.param is not None], [])
            label = None
        else:
            rows = torch.zeros((), dtype=torch.int64).expand(a.shape) if sa.label is None else sa.label
            cols = torch.zeros((), dtype=torch.int64).expand(b.shape) if sb.label is None else sb.label
            self._factor(rows)
            self._factor(cols)
            top_a = self.trace.classes.join_along(rows, (2,), keepdim=True)  # (N, n, 1)
            top_b = self.trace.classes.join_along(cols, (1,), keepdim=True)  # (N, 1, m)
            label = self.trace.classes.join(top_a, top_b)
        if label is not None and squeeze:
            label = label.squeeze(0)
        self.put(out, TensorFacts(None if label is None else label.expand(out.shape), None, grad))

    def _factor(self, label: Tensor) -> None:
        """Note the features of a factor of a product of activations, unless they have met already."""
        matrix = shrunk(label[(0,) * (label.ndim - 2)])
        if matrix.numel() and bool((matrix != matrix[:1, :1]).any()):
            self.trace.operands.append(shrunk(label).unique())

    def _with_weight(self, x: Tensor | None, weight: tuple[str, tuple[Tensor, ...]], shape: Any, out_dim: int) -> Tensor | None:
        """Labels (N, n, m) of an input (N, n, k) times a weight (N, k, m)."""
        name, coordinates = weight
        n, k, m = shape[1], coordinates[0].shape[1], coordinates[0].shape[2]
        if not shape[0] * n:
            return self._without_rows(name, coordinates, shape, k, m)
        gathered = x is not None and not bool(shrunk(x).any())  # every rank has it, beside its shards
        if gathered and self.gathered and any((name, d, "out") in self.known for d in range(len(coordinates))):
            x, gathered = None, False
        if gathered and x is not None:  # so it stays
            self._use([name], [x])
            return torch.zeros((), dtype=torch.int64).expand(shape[0], n, m)
        if x is None:
            candidates = _param_dims([c[:, 0, :] for c in coordinates]) if k else []
            along = next((a for a in candidates if (name, a[0]) not in self.whole), None)
            if along is None:
                self.trace.whole_uses.setdefault(name, set()).add(self.stack[-1])
                return None
            dim, where = along
            nodes = self._nodes(name, dim)
            self._used(name, dim, "out")
            self.events.append(("out", name))
            self._piece(name, dim, where)
            labels = nodes[where]  # (N, m)
            return labels.unsqueeze(1).expand(shape[0], n, m)
        found = self.trace.classes.find(shrunk(x))
        same_rows = found.shape[1] == 1 or bool((found == found[:, :1]).all())
        varies = found.shape[2] > 1 and bool((found != found[:, :, :1]).any())
        candidates = _param_dims([c[:, :, 0] for c in coordinates]) if m else []
        along = candidates[0] if len(candidates) == 1 else next((a for a in candidates if _follows(found[:, 0, :], a[1])), None)
        batches = self._own_batches(found, name, coordinates) if same_rows and shape[0] > 1 and m else None
        if batches is not None:
            dim, where = batches
            self._used(name, dim, "out")
            top = self.trace.classes.join_along(x[:, 0, :], (1,), keepdim=True)  # (N, 1)
            top = self.trace.classes.join(top, self.trace.classes.join_along(self._nodes(name, dim)[where], (1,), keepdim=True))
            return top.unsqueeze(1).expand(shape[0], n, m)
        if varies and same_rows and along is not None and (name, along[0]) not in self.whole:
            dim, where = along
            self._used(name, dim, "in")
            self.events.append(("in", name))
            self.trace.classes.join(x[:, 0, :], self._nodes(name, dim)[where])
            if self.owner is not None and bool((ranks := self.owner[shrunk(x[:, 0, :])]).ne(ranks[:1]).any()):
                self.events.append(("apart", name))
            # a sum over ranks: whole again
            return torch.zeros((), dtype=torch.int64).expand(shape[0], n, m) if self.deferring else None
        self._use([name], [x])
        return self.trace.classes.join_along(x, (2,), keepdim=True).expand(shape[0], n, m)

    def _used(self, name: str, dim: int, kind: str) -> None:
        """Note what a weight does to features, by this dim."""
        self.trace.uses[Use(name, dim, kind, self.stack[-1])] = None

    def _own_batches(self, classes: Tensor, name: str, coordinates: tuple[Tensor, ...]) -> tuple[int, Tensor] | None:
        """The dim of a weight of which each of several products has features of its own, as its input has: heads, with a matrix for each.

        Args:
            classes: of the input (N, n or 1, k).
            name: of the weight.
            coordinates: of the weight (N, k, m).

        Returns:
            The dim and the coordinates (N, features); None for products that share the features of either.
        """
        if not _apart(classes[:, 0, :]):
            return None
        for dim, where in enumerate(coordinates):
            mine = shrunk(where)
            if (name, dim) not in self.whole and mine.shape[0] > 1 and _apart(mine.flatten(1)):
                return dim, mine.flatten(1)
        return None

    def _without_rows(self, name: str, coordinates: Any, shape: Any, k: int, m: int) -> Tensor | None:
        """An expert without tokens: how its weight is split is known from other uses of it, or it is kept whole."""
        for kind, dims in (
            ("in", _param_dims([c[:, :, 0] for c in coordinates]) if m else []),
            ("out", _param_dims([c[:, 0, :] for c in coordinates]) if k else []),
        ):
            for dim, where in dims:
                if (name, dim, kind) in self.known:
                    self._used(name, dim, kind)
                    self.events.append((kind, name))
                    nodes = self._nodes(name, dim)
                    return None if kind == "in" else nodes[where].unsqueeze(1).expand(shape[0], shape[1], m)
        self._use([name], [])
        return None

    def _piece(self, name: str, dim: int, where: Tensor) -> None:
        """Note the indices of a weight that meet in one product, if these are a part of it."""
        indices = where.unique()
        known = self.trace.pieces.setdefault((name, dim), [])
        if indices.numel() < self.shapes[name][dim] and not any(torch.equal(indices, k) for k in known):
            known.append(indices)

    def _nodes(self, name: str, dim: int) -> Tensor:
        if (name, dim) not in self.trace.nodes:
            nodes = self.trace.classes.new(self._shape_of(name)[dim])
            self.trace.nodes[name, dim] = nodes.masked_fill(self.shared[name, dim], 0) if (name, dim) in self.shared else nodes
        return self.trace.nodes[name, dim]

    def _shape_of(self, name: str) -> torch.Size:
        return self.shapes[name]


def _not_tensors(x: Any) -> list[Any]:
    return [i for i in tree_flatten(x)[0] if not isinstance(i, Tensor)]


def _called(func: Any) -> str:
    name: str = func.overloadpacket.__name__.strip("_")
    return "scaled_dot_product_attention" if name.startswith("scaled_dot_product") else name


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    if func is GROUPED and args[0].is_meta and args[0].dtype is not torch.bfloat16:
        # its kernels take other dtypes, only that for the meta device does not
        out = func(*(t.bfloat16() for t in args[:2]), *args[2:], **kwargs).to(args[0].dtype)
    else:
        plain = made(func, args, kwargs)
        out = func(*args, **kwargs) if plain is None else plain
    if func in CHANCE and out.numel() == 1:
        out.fill_(KEPT)  # whether a whole block is dropped: not while its weights are looked for
    return out


class Values(FeatureTracer):
    """Follows nothing, but knows what does not depend on weights: for a model on the meta device whose code decides by positions or masks."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, set(), {})
        self._know_buffers(model)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return self._looked_at(args[0])
        return self._computed(func, args, kwargs, [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)])


def _filled(label: Tensor) -> Tensor:
    """What lies beside split features, along a dim in which these do not differ, is cut as they are: a prefix, the padding of a start."""
    shape, label = label.shape, shrunk(label)
    for dim in range(label.ndim):
        if label.shape[dim] == 1:
            continue
        top = label.amax(dim, keepdim=True)
        beside = (label == 0) & (top > 0)
        if bool(beside.any()) and bool((beside | (label == top)).all()):
            label = top
    return label.expand(shape)


def _cat(parts: list[Tensor], dim: int) -> Tensor:
    """`torch.cat`, without memory for the dims along which all parts are constant by construction."""
    parts = [p for p in parts if p.shape != (0,)]
    like = parts[0]
    dim %= like.ndim
    same = [d for d in range(like.ndim) if d != dim and all(p.stride(d) == 0 for p in parts)]
    index = tuple(slice(0, 1) if d in same else slice(None) for d in range(like.ndim))
    small = torch.cat([p[index] for p in parts], dim)
    return small.expand([like.shape[d] if d in same else n for d, n in enumerate(small.shape)])


def _indexed(name: str, args: Any) -> list[int]:
    """The dims of which an operation takes elements by an index."""
    ndim = args[0].ndim
    if name == "index":
        return [d for d, t in enumerate(args[1]) if t is not None]
    return [args[1] % ndim] if name in ("gather", "index_select", "take_along_dim") else list(range(ndim))


def _coordinates(shape: torch.Size) -> tuple[Tensor, ...]:
    """For each dim, the coordinate of each element; without memory for the other dims."""
    ones = [1] * len(shape)
    return tuple(torch.arange(n).view(*ones[:d], n, *ones[d + 1 :]).expand(shape) for d, n in enumerate(shape))


def _param_dims(coordinates: list[Tensor]) -> list[tuple[int, Tensor]]:
    """(dim of the parameter, the coordinate there) for those along which the last dim of a view of it runs, the longest first."""
    found = []
    for dim, coordinate in enumerate(coordinates):
        small = shrunk(coordinate)
        if small.numel() and small.shape[-1] > 1 and bool((small != small[..., :1]).any()):
            found.append((dim, small))
    return sorted(found, key=lambda a: -int(a[1].amax()))


def _apart(rows: Tensor) -> bool:
    """Whether no two rows have a number in common."""
    numbers = torch.cat([row.unique() for row in rows])
    return rows.shape[0] > 1 and numbers.unique().numel() == numbers.numel()


def _follows(classes: Tensor, coordinate: Tensor) -> bool:
    """Whether the features along a dim that is several dims of a weight, flattened, differ by this coordinate only."""
    if classes.shape[-1] != coordinate.shape[-1]:
        return False
    classes, coordinate = torch.broadcast_tensors(classes, coordinate)
    first = torch.zeros(int(coordinate.amax()) + 1, dtype=classes.dtype).scatter_(0, coordinate.reshape(-1), classes.reshape(-1))
    return bool((first[coordinate] == classes).all())


def _reduced_dims(name: str, args: Any, kwargs: Any, ndim: int) -> tuple[int, ...]:
    dims = kwargs.get("dim")
    if dims is None and len(args) > 1:
        position = 2 if name in ("linalg_vector_norm", "norm", "topk") else 1
        dims = args[position] if len(args) > position and not isinstance(args[position], (bool, Tensor)) else None
    if name in ("topk", "sort") and dims is None:
        dims = -1
    if dims is None or (isinstance(dims, (list, tuple)) and not dims):
        return tuple(range(ndim))
    dims = [dims] if isinstance(dims, int) else list(dims)
    return tuple(d % ndim for d in dims) if ndim else ()


@contextmanager
def _untraced() -> Iterator[None]:
    with torch.utils._python_dispatch._disable_current_modes():
        yield
