"""Run a model on the meta device: cheap results, and the values of tensors that do not depend on weights.

Many of torch's kernels for that device are written in Python (`torch._refs`) and take up to 2 ms a call, most of it for cases that the forward
of a transformer does not have: strides of all kinds, promotion of dtypes, symbolic sizes. For contiguous tensors of one dtype the result is
known from the shapes (`made`). Code that decides by positions or masks reads values, which a tensor on the meta device does not have:
`Values` computes those in which no weight takes part.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

from lightning_tp._compat import grouped_mm, is_in_place, read_scalar, softmax_operators, without_dispatch_modes
from lightning_tp.core.trees import tensors_in
from lightning_tp.errors import TPError
from lightning_tp.infer.follow.features import FeatureSets
from lightning_tp.infer.follow.trace import FeatureTrace, ParamView, TensorFacts

MOST_KNOWN = 2**22  # elements of an operation's results up to which their values are computed
KEEP_BLOCK = 0.99  # in place of a single random number: stochastic depth then skips no block

aten = torch.ops.aten
Made = tuple[Tensor, ...] | Tensor | None
PLAIN = (Tensor, nn.Parameter)
_DRAWS = {aten.rand.default, aten.uniform_.default}


class Values(TorchDispatchMode):
    """Run operations, and keep of each tensor which parameter it is and, on the meta device, its value if no weight takes part in it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.trace = FeatureTrace(FeatureSets())
        self.stack: list[str] = [""]  # names of the modules that run, the innermost last
        self.names = {id(p): n for n, p in model.named_parameters()}
        self.shadows: dict[int, tuple[Tensor, TensorFacts]] = {}
        self.on_meta = any(p.is_meta for p in model.parameters())
        self.values: dict[int, tuple[Tensor, Tensor]] = {}  # id of a tensor on the meta device -> it, its value
        self._twins: dict[int, tuple[Tensor, Tensor]] = {}  # id of a tensor of another device -> it, its copy on the meta device
        for b in model.buffers():
            value = getattr(b, "_tp_value", None if b.is_floating_point() else torch.ones(b.shape, dtype=b.dtype))
            if b.is_meta and value is not None:
                self.values[id(b)] = (b, value)

    def shadow(self, t: Any) -> TensorFacts:
        """Return what is known of a tensor."""
        found = self.shadows.get(id(t))
        if found is not None:
            return found[1]
        name = self.names.get(id(t))
        if name is None:
            return TensorFacts(grad=isinstance(t, Tensor) and t.requires_grad)
        facts = TensorFacts(None, ParamView(name, _coordinates(t.shape)), t.requires_grad)
        self.shadows[id(t)] = (t, facts)
        return facts

    def put(self, t: Any, facts: TensorFacts) -> None:
        """Remember what is known of a tensor, and the tensor, as long as the run takes."""
        if isinstance(t, Tensor):
            self.shadows[id(t)] = (t, facts)

    def value(self, t: Tensor) -> Tensor | None:
        """Return a tensor's value; None for one on the meta device of which it is not known."""
        if not t.is_meta:
            return t
        known = self.values.get(id(t))
        return None if known is None else known[1]

    def onto_meta(self, inputs: Any) -> Any:
        """Return the inputs on the meta device; their values are known, or taken for ones if they were there already."""

        def move(t: Tensor) -> Tensor:
            meta = t.to("meta") if not t.is_meta else t
            self.values[id(meta)] = (meta, t if not t.is_meta else torch.ones(t.shape, dtype=t.dtype))
            return meta

        return tree_map_only(Tensor, move, inputs)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.compute(func, args, kwargs or {})

    def compute(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run one operation. Where a tensor of another device meets one on the meta device (class weights of a loss), it is copied there.

        Raises:
            TPError: if code reads a number that depends on weights, which are on the meta device.
        """
        if func is read_scalar and args[0].is_meta:
            if (known := self.value(args[0])) is not None:
                return known.item()
            raise TPError(
                f"`{self.stack[-1] or 'the model'}` reads the value of a tensor that depends on weights, which are on the meta device. Infer "
                "the plan from a model with real weights (a small one of the same architecture has the same plan), or pass `plan=`."
            )
        if not self.on_meta:
            return _run(func, args, kwargs)
        tensors = list(tensors_in((args, kwargs), depth=0))
        elsewhere = [t for t in tensors if t.ndim and not t.is_meta] if any(t.is_meta for t in tensors) else []
        if elsewhere:
            with without_dispatch_modes():
                twins = {id(t): self._twin(t) for t in elsewhere}
            args, kwargs = tree_map_only(Tensor, lambda t: twins.get(id(t), t), (args, kwargs))
            tensors = [twins.get(id(t), t) for t in tensors]
        out = _run(func, args, kwargs)
        with without_dispatch_modes():
            self.keep_values(func, args, kwargs, out, tensors)
        if elsewhere and is_in_place(func):
            originals = {id(twins[id(t)]): t for t in elsewhere}
            for twin in originals:
                self.values.pop(twin, None)  # those from before the write
            out = tree_map_only(Tensor, lambda t: originals.get(id(t), t), out)
        return out

    def _twin(self, t: Tensor) -> Tensor:
        """Return a copy of this tensor on the meta device, with its value."""
        if id(t) not in self._twins:
            twin = t.detach().to("meta")
            self._twins[id(t)] = (t, twin)
            self.values[id(twin)] = (twin, t.detach().cpu())
        return self._twins[id(t)][1]

    def keep_values(self, func: Any, args: Any, kwargs: Any, out: Any, tensors: list[Tensor]) -> None:
        """Compute the values of results on the meta device, if those of all operands are known."""
        outs = list(tensors_in(out, depth=0))
        if not outs or not outs[0].is_meta or any(t.is_meta and id(t) not in self.values for t in tensors):
            return
        if is_in_place(func) or sum(t.numel() for t in outs) > MOST_KNOWN:
            return
        cpu = torch.device("cpu")
        real = tree_map_only(Tensor, self.value, (args, kwargs))
        real_args, real_kwargs = tree_map_only(torch.device, lambda d: cpu if d.type == "meta" else d, real)
        for t, value in zip(outs, tree_flatten(func(*real_args, **real_kwargs))[0], strict=False):
            if isinstance(value, Tensor):
                self.values[id(t)] = (t, value)


def _coordinates(shape: torch.Size) -> tuple[Tensor, ...]:
    """Return for each dim the coordinate of each element; without memory for the other dims."""
    ones = [1] * len(shape)
    return tuple(torch.arange(n).view(*ones[:d], n, *ones[d + 1 :]).expand(shape) for d, n in enumerate(shape))


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    if func is grouped_mm and args[0].is_meta and args[0].dtype is not torch.bfloat16:
        # its kernels take other dtypes, except the one for the meta device
        out = func(*(t.bfloat16() for t in args[:2]), *args[2:], **kwargs).to(args[0].dtype)
    else:
        quick = made(func, args, kwargs)
        out = func(*args, **kwargs) if quick is None else quick
    if func in _DRAWS and out.numel() == 1:
        out.fill_(KEEP_BLOCK)
    return out


def made(func: Any, args: Any, kwargs: Any) -> Made:
    """Return what `func(*args, **kwargs)` gives for tensors on the meta device; None for a general case, to be computed by torch."""
    make = _MAKERS.get(func)
    return None if make is None or not _SHAPELESS.issuperset(kwargs) else make(*args)


def _plain(*tensors: Any) -> bool:
    """Return whether these are contiguous floating-point tensors on the meta device, of one dtype."""
    dtype = tensors[0].dtype if isinstance(tensors[0], Tensor) else None
    return all(
        type(t) in PLAIN and t.is_meta and t.dtype is dtype and dtype.is_floating_point and t.is_contiguous() for t in tensors
    )


def _same(x: Any, *rest: Any) -> Made:
    """Return a tensor like the first operand; the rest are no tensors."""
    return torch.empty_like(x) if _plain(x) and not any(isinstance(r, (Tensor, complex)) for r in rest) else None


def _softmax(x: Any, dim: int, *rest: Any) -> Made:
    return _same(x) if not rest or rest[0] in (None, False) else None


def _triangle(x: Any, *rest: Any) -> Made:
    return torch.empty_like(x) if type(x) in PLAIN and x.is_meta and x.ndim > 1 and x.is_contiguous() else None


def _pair(x: Any, y: Any) -> Made:
    """Return a tensor like the operand that the other one broadcasts to."""
    if isinstance(y, (int, float)):
        return _same(x)
    if not _plain(x, y):
        return None
    for wide, other in ((x, y), (y, x)):
        start = wide.ndim - other.ndim
        if start >= 0 and all(n in (1, wide.shape[start + d]) for d, n in enumerate(other.shape)):
            return torch.empty_like(wide)
    return None


def _addmm(bias: Any, x: Any, weight: Any) -> Made:
    if not _plain(bias, x) or type(weight) not in PLAIN or not weight.is_meta or weight.dtype is not x.dtype:
        return None  # the weight may lie in memory in any way, it is transposed most often
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[0] or bias.shape != weight.shape[1:]:
        return None
    return x.new_empty(x.shape[0], weight.shape[1])


def _layer_norm(x: Any, shape: list[int], weight: Any, bias: Any, eps: float) -> Made:
    given = [t for t in (weight, bias) if t is not None]
    if not _plain(x, *given) or not shape or any(list(t.shape) != list(shape) for t in (*given, x[(0,) * (x.ndim - len(shape))])):
        return None
    statistics = (*x.shape[: x.ndim - len(shape)], *([1] * len(shape)))
    dtype = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
    return torch.empty_like(x), x.new_empty(statistics, dtype=dtype), x.new_empty(statistics, dtype=dtype)


_SHAPELESS = frozenset({"alpha", "beta", "approximate"})
_MAKERS: dict[Any, Callable[..., Made]] = {
    aten.addmm.default: _addmm,
    aten.native_layer_norm.default: _layer_norm,
    aten.tril.default: _triangle,
    **dict.fromkeys(softmax_operators, _softmax),
    **dict.fromkeys((aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor), _pair),
    **dict.fromkeys((aten.mul.Scalar, aten.pow.Tensor_Scalar), _same),
    **dict.fromkeys(
        (aten.gelu.default, aten.silu.default, aten.relu.default, aten.tanh.default, aten.rsqrt.default, aten.neg.default), _same
    ),
}
