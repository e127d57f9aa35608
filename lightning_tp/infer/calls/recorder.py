"""Run a model once more, with an owner for each feature, and see what has to change in its calls on one rank.

Every dim of every activation has a layout by now: whole, or split over the ranks by a pattern. A call of a torch function is right on a
rank's shards as it stands, or one of a few things has to change: a size that the code knows as a whole, the bounds of a slice, an operand
that is whole. Sizes that code reads from shards are followed as pairs of whole and local numbers, so that only real differences count.
"""

from __future__ import annotations

import itertools
import math
import sys
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_tp._compat import no_dispatch_modes as _untraced
from lightning_tp.core.modules.call_site import call_site
from lightning_tp.core.modules.snapshot import preserve_modules
from lightning_tp.infer.calls.local_sizes import LocalShape, PerRankInt, local_ints, local_of, mapped, on_rank, plain, whole_of
from lightning_tp.infer.calls.try_on_shards import MOST_CUT, MOST_TRIED, _number, _same, _shard, _swapped
from lightning_tp.infer.follow.features import shrunk
from lightning_tp.infer.follow.run import run
from lightning_tp.infer.follow.trace import FeatureTrace
from lightning_tp.infer.follow.tracer import FeatureTracer
from lightning_tp.styles.calls.call import (
    CONVOLUTIONS,
    COUNTS,
    FACTORIES,
    FIRST_SIZE,
    READS,
    SIZE_CALLS,
    SPLIT_CALLS,
    Call,
    Operand,
)
from lightning_tp.styles.calls.run_call import dim_of_item, run_call
from lightning_tp.styles.split import Ownership

NO_SLICE = {
    "linear",
    "embedding",
    "layer_norm",
    "rms_norm",
    *CONVOLUTIONS,
    "expand",
    "view",
    "reshape",
    "__getitem__",
    "index_select",
}


PRODUCTS = {
    "matmul",
    "__matmul__",
    "__rmatmul__",
    "bmm",
    "baddbmm",
    "mm",
    "addmm",
    "mv",
    "dot",
    "chain_matmul",
    "addbmm",
    "_grouped_mm",
}


ALONG_OTHERS = {
    "cat",
    "stack",
    "concat",
    "concatenate",
    "scaled_dot_product_attention",
    "gather",
    "scatter",
    "scatter_add",
    "take_along_dim",
}


RANDOM = {
    *("dropout", "alpha_dropout", "feature_alpha_dropout", "dropout1d", "dropout2d", "dropout3d", "rand_like", "randn_like"),
    *("randint_like", "bernoulli", "bernoulli_", "uniform_", "normal_", "exponential_", "random_", "multinomial", "rrelu"),
    *("gumbel_softmax", "empty_like", "new_empty", "empty"),
}  # what comes out is another one each time


TRIANGLES = {"tril", "triu", "tril_", "triu_"}


BY_PLACE = TRIANGLES | {"roll", "rot90", "outer", "ger", "__setitem__"}  # not taken for right where they are too large to be tried


WRITES = {"__setitem__", "__iadd__", "__isub__", "__imul__", "__idiv__", "__itruediv__", "__iand__", "__ior__", "__ixor__"}


MOVES = SIZE_CALLS | SPLIT_CALLS | {"__getitem__", "narrow", "select", "index_select", "unbind", "narrow_copy", "movedim"}


@dataclass
class CallChanges:
    """What a recording found.

    Args:
        calls: module name -> the calls that change in its forward.
        broken: labels whose features a call can't have split, and why.
        enters: parameters of split layers whose standard modules see to their own input and output.
    """

    calls: dict[str, list[Call]] = field(default_factory=dict)
    broken: list[tuple[Tensor, str]] = field(default_factory=list)
    local_uses: dict[str, set[str]] = field(default_factory=dict)  # as in Trace, where ranks do have different elements
    mixed: set[str] = field(default_factory=set)  # parameters whose gradient is made whole at once
    trace: FeatureTrace | None = None  # of the run


class CallRecorder(TorchFunctionMode):
    """Sees every call of a torch function, with the layouts of what goes in and out.

    Args:
        tracer: of the run.
        owner: for each feature its rank, -1 for 0 (all ranks); of an earlier run, which numbered features alike.
        tp: how many ranks.
        standard: names of modules whose style runs them: their calls are not looked at.
        heads: parameters, used outside a standard module, whose result stays split for the loss, and the vocabulary.
        split: (parameter, dim) of all that are split.
        whole_reads: places where a size is read that has to be the whole one.
    """

    remakes = False  # whether what is whole may be made with sizes read from shards; else code is told the whole ones

    def __init__(
        self, tracer: FeatureTracer, owner: Tensor, tp: int, standard: set[str], heads: dict[str, int], split: Any, whole_reads: Any
    ) -> None:
        super().__init__()
        self.tracer, self.owner, self.tp = tracer, owner, tp
        tracer.log = []
        self.split = {n for n, _ in split}
        self.nodes, self.param_owner = split, owner
        self.mixed: set[str] = set()  # parameters that also meet whole activations: their gradient is made whole at once
        self.outside: set[str] = set()  # those of which only what is computed from them meets shards: a query that is scaled first
        self.tables: set[str] = set()  # modules that look up in a table whose style does it on shards
        self.whole_reads = whole_reads
        PerRankInt.diverging = set()
        self.layouts: dict[int, tuple[Tensor, Tensor | None, Any]] = {}  # of tensors with these labels
        self.tried: set[Any] = set()  # calls that give the same on shards
        self.uneven = False  # whether code is told sizes that are not the same on all ranks
        self.local_reads: set[Any] = set()  # where code is told the sizes of a shard
        self.before: dict[int, tuple[Tensor, Tensor, Any]] = {}  # of a call that writes into what it is given: that, and its layout
        self.given: list[PerRankInt] = []  # what the call that runs is given of these
        self.sinks: list[Tensor] = []
        self.standard, self.heads = standard, heads
        self.found = CallChanges()

    # ------------------------------------------------------------------------------------------------------- layouts

    def ranks(self, t: Tensor) -> Tensor | None:
        """The rank of each element, constant dims with length 1; None where every rank has all."""
        shadow = self.tracer.shadow(t)
        label = shadow.label
        if shadow.param is not None:
            return self._param_ranks(*shadow.param)
        if label is None:
            return None
        index = tuple(slice(0, 1) if s == 0 else slice(None) for s in label.stride())
        small = label[index] if label.ndim else label
        ranks = self.owner[small]
        return ranks if bool((ranks >= 0).any()) else None

    def _param_ranks(self, name: str, coordinates: Any) -> Tensor | None:
        for (n, dim), nodes in self.nodes.items() if name in self.split else ():
            if n == name:
                where = coordinates[dim]
                index = tuple(slice(0, 1) if s == 0 else slice(None) for s in where.stride())
                ranks = self.param_owner[nodes[where[index] if where.ndim else where]]
                return ranks if bool((ranks >= 0).any()) else None
        return None

    def features(self, t: Tensor) -> Tensor:
        """The labels of a tensor, or the features of the split parameter that it is a view of."""
        param = self.tracer.shadow(t).param
        found = [nodes for (n, _), nodes in self.nodes.items() if param is not None and n == param[0]]
        return torch.cat(found) if found else self.tracer.label(t)

    def layout(self, t: Tensor) -> tuple[int, Ownership] | str | None:
        """(dim, pattern); None where it is whole; a reason where it is neither."""
        label = self.tracer.shadow(t).label
        known = self.layouts.get(id(t))
        if known is None or known[0] is not t or known[1] is not label:
            known = self.layouts[id(t)] = (t, label, self._layout(t))
        return known[2]

    def _layout(self, t: Tensor) -> tuple[int, Ownership] | str | None:
        ranks = self.ranks(t)
        if ranks is None:
            return None
        known = ranks.masked_fill(ranks < 0, self.tp)  # what lies beside features with no rank of its own goes where they go
        split = [
            d
            for d in range(ranks.ndim)
            if ranks.shape[d] > 1
            and bool((ranks.amax(d, True) != known.amin(d, True).where(known.amin(d, True) < self.tp, -1)).any())
        ]
        if len(split) != 1:
            return f"split along {len(split)} dims"
        dim = split[0]
        rows, known = (x.movedim(dim, 0).reshape(ranks.shape[dim], -1) for x in (ranks, known))
        return dim, Ownership.of(rows.amax(1))

    def local_sizes(self, t: Tensor) -> list[tuple[int, ...]]:
        """For each dim, the size on each rank."""
        layout = self.layout(t)
        sizes = [(n,) * self.tp for n in t.shape]
        if isinstance(layout, tuple):
            dim, pattern = layout
            sizes[dim] = tuple(pattern.local(t.shape[dim], r) for r in range(self.tp))
        return sizes

    def shape(self, t: Tensor, read: Any) -> LocalShape:
        """The shape, with the local sizes behind the whole ones."""
        reads = frozenset([read])
        return LocalShape(PerRankInt.of(n, local, reads) for n, local in zip(t.shape, self.local_sizes(t), strict=True))

    def _read(self, func: Any, name: str, args: Any, kwargs: Any, frame: Any) -> Any:
        """`x.shape`, `x.size()`: pairs of whole and local sizes; whole ones where code decides or computes by them."""
        module = self.tracer.stack[-1]
        read = (module, name, call_site(frame))
        x = args[0]
        if read in self.whole_reads:
            local = self.local_sizes(x)
            sizes = tuple(
                tuple((d, *_fraction(n, of[r])) for d, (n, of) in enumerate(zip(x.shape, local, strict=True)) if of[r] != n)
                for r in range(self.tp)
            )
            self.found.calls.setdefault(module, []).append(Call(name, read[2], sizes=sizes if any(sizes) else ()))
            return func(*args, **kwargs)
        if name in COUNTS:
            of_dims = self.local_sizes(x)
            counts = of_dims[0] if name == "__len__" else tuple(math.prod(n) for n in zip(*of_dims, strict=True))
            shape = LocalShape((PerRankInt.of(func(*args, **kwargs), counts, frozenset([read])),))
        else:
            shape = self.shape(x, read)
        different = [n.local for n in shape if isinstance(n, PerRankInt)]
        if different:
            self.local_reads |= {read}
            self.uneven |= any(len(set(n)) > 1 for n in different)
        if name in COUNTS:
            return shape[0]
        dim = args[1] if len(args) > 1 else kwargs.get("dim")
        return shape if dim is None or name != "size" else shape[dim]

    # --------------------------------------------------------------------------------------------------------- calls

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "__get__":
            if func.__self__ is Tensor.shape and self._is_read(name, args[0], sys._getframe(1)):
                with torch._C.DisableTorchFunction(), _untraced():
                    return self._read(func, name, args, kwargs, sys._getframe(1))
            return func(*args, **kwargs)
        if name in READS and self._is_read(name, args[0], sys._getframe(1)):
            with torch._C.DisableTorchFunction(), _untraced():
                return self._read(func, name, args, kwargs, sys._getframe(1))
        given_args, given_kwargs = args, kwargs
        args, kwargs = plain(args), plain(kwargs)
        if func is torch.nn.functional.cross_entropy:
            return self._cross_entropy(func, args, kwargs)
        self.tracer.events = []
        self.equation = args[0] if name == "einsum" and isinstance(args[0], str) else ""
        module = self.tracer.stack[-1]
        self.before = {}
        if _writes(name, kwargs):
            with torch._C.DisableTorchFunction(), _untraced():
                self.before = {id(t): (t, t.clone(), self.layout(t)) for _, t in _with_paths(args, kwargs)}
        out = func(*args, **kwargs)
        self.given = list(local_ints((given_args, given_kwargs)))
        if module == self.tracer.stack[-1] and module not in self.standard:
            with torch._C.DisableTorchFunction(), _untraced():
                self._look(name, func, given_args, given_kwargs, out, module, sys._getframe(1))
        for n in self.given:  # no size that is known to be changed: a number, whatever it is for
            n.computed_with()
        return out

    def _are_sizes(self, numbers: Any) -> None:
        """These of what a call is given are local where it is local."""
        known = {id(n) for n in numbers if isinstance(n, PerRankInt)}
        self.given = [n for n in self.given if id(n) not in known]

    def _is_read(self, name: str, t: Tensor, frame: Any) -> bool:
        """Whether its size may be another one on a rank; or it is whole, and read in a loop where others are told the whole size."""
        return self._has_layout(t) or (
            bool(self.whole_reads) and (self.tracer.stack[-1], name, call_site(frame)) in self.whole_reads
        )

    def _has_layout(self, t: Tensor) -> bool:
        shadow = self.tracer.shadow(t)
        return shadow.label is not None or (shadow.param is not None and shadow.param[0] in self.split)

    def _cross_entropy(self, func: Any, args: Any, kwargs: Any) -> Any:
        logits = args[0] if args else kwargs["input"]
        if self.tracer.shadow(logits).label is None:
            return func(*args, **kwargs)
        with torch._C.DisableTorchFunction(), _untraced():
            plain = logits.detach()
            self.sinks.append(self.tracer.label(logits))
        return func(plain, *args[1:], **kwargs) if args else func(**{**kwargs, "input": plain})

    def _look(self, name: str, func: Any, args: Any, kwargs: Any, out: Any, module: str, frame: Any) -> None:
        if PerRankInt.shown is not None:
            return
        outs = [t for t in _tensors(out)]
        operands = [(path, t) for path, t in _with_paths(args, kwargs)]
        events = dict((kind, p) for kind, p in self.tracer.events)
        if len(set(self.tracer.events)) > 1:  # several products inside one call, which can't be looked into; or split "apart"
            for n in {n for _, n in self.tracer.events}:
                self.found.broken += [(nodes, f"{name} in `{module}`") for (of, _), nodes in self.nodes.items() if of == n]
            return
        if name == "embedding" and module not in self.tables:
            tables = [t for _, t in operands if (p := self.tracer.shadow(t).param) is not None and p[0] in self.split]
            self.found.broken += [(self.features(t), f"rows are looked up in `{module}`") for t in tables]
        on_params = name in MOVES
        is_param = lambda t: self.tracer.shadow(t).param is not None  # noqa: E731
        layouts = [self.layout(t) if on_params or not is_param(t) else None for _, t in operands]
        out_layouts = [self.layout(t) if on_params or not is_param(t) else None for t in outs]
        to_logits = self.heads.get(events.get("out", ""))
        shares = any(self._is_share(t) for t in outs) and any(self._enters(t) for _, t in operands)
        if all(x is None for x in (*layouts, *out_layouts)) and "in" not in events and to_logits is None and not shares:
            if self.remakes and name in SIZE_CALLS | FACTORIES and outs:
                self._whole_sizes(name, args, outs[0], module, frame)
            else:
                self._hold(name, module, frame)
            return
        for t, layout in [*zip((t for _, t in operands), layouts, strict=True), *zip(outs, out_layouts, strict=True)]:
            if isinstance(layout, str):
                self.found.broken.append((self.features(t), f"{name} in `{module}`: {layout}"))
                return
        change: dict[str, Any] = {}
        try:
            if name in SIZE_CALLS:
                change["sizes"] = self._sizes(name, args, kwargs, operands[0][1], outs[0])
            elif name in SPLIT_CALLS:
                change["pieces"] = self._pieces(name, args, kwargs, operands[0][1], outs)
            elif name == "__getitem__":
                change["items"] = self._item(args, operands[0][1], outs[0], layouts)
            elif name in ("narrow", "select", "index_select", "unbind", "narrow_copy", "movedim") and isinstance(layouts[0], tuple):
                self._keeps_dim(name, args, kwargs, operands[0][1], layouts[0])
            else:
                change["operands"] = self._operands(name, operands, layouts, outs, out_layouts, events)
                if name in CONVOLUTIONS and isinstance(out_layouts[0], tuple):
                    change.update(self._channels(args, kwargs, operands, change["operands"], outs[0], out_layouts[0]))
            if "in" not in events and to_logits is None and name not in RANDOM:
                tried = Call(name, call_site(frame), **{k: v for k, v in change.items() if v})
                change["operands"] = self._tried(tried, func, args, kwargs, out, operands, outs, [*layouts, *out_layouts])
        except _Unknown as e:
            labels = [self.features(t) for _, t in operands if self._has_layout(t)]
            self.found.broken.append((labels[0] if labels else self.tracer.label(outs[0]), f"{name} in `{module}`: {e}"))
            return
        if "in" in events:
            change["leave"] = True
        if to_logits is not None:
            change["logits"] = to_logits
            change["operands"] = tuple(
                Operand(path, None, True) for path, t in operands if (s := self.tracer.shadow(t)).param is None and s.grad
            )
        change = {k: v for k, v in change.items() if v}
        if change:
            self.found.calls.setdefault(module, []).append(Call(name, call_site(frame), **change))
        else:
            self._hold(name, module, frame)

    def _tried(
        self, call: Call, func: Any, args: Any, kwargs: Any, out: Any, operands: Any, outs: Any, layouts: Any
    ) -> tuple[Operand, ...]:
        """The operands of the call as it is right on shards: equal sizes do not say that two dims lie beside each other, so it is tried.

        Raises:
            _Unknown: if it is not right.
        """
        cut = [i for i, o in enumerate(call.operands) if o.part is not None]
        wrong: _Unknown | None = None
        for kept in itertools.chain.from_iterable(itertools.combinations(cut, n) for n in range(min(len(cut), MOST_CUT) + 1)):
            changed = [replace(o, part=None, beside=None) if i in kept else o for i, o in enumerate(call.operands)]
            changed = [o for o in changed if o.part is not None or o.enter]
            try:
                if not self._holds_on_shards(replace(call, operands=tuple(changed)), func, args, kwargs, out):
                    t, layout = next((t, x) for t, x in zip([*(t for _, t in operands), *outs], layouts, strict=True) if x)
                    if call.name in BY_PLACE and not (call.name in TRIANGLES and layout[0] < t.ndim - 2):
                        raise _Unknown("it is another one on shards")
                    if call.name not in NO_SLICE | PRODUCTS | ALONG_OTHERS | MOVES:
                        self._lines_up(operands, outs, (t, layout))
                return tuple(changed)
            except _Unknown as no:
                wrong = wrong or no
        assert wrong is not None
        raise wrong

    def _holds_on_shards(self, call: Call, func: Any, args: Any, kwargs: Any, out: Any) -> bool:
        """Make the call once more on the shards of the first and the last rank: its results have to be the shards of what came out.

        Returns:
            Whether that could be tried: not without values, nor with too many.

        Raises:
            _Unknown: if they are not.
        """
        given = [t for _, t in _with_paths(args, kwargs)]
        results = [*_tensors(out), *(t for t in given[:1] if id(t) in self.before)]
        layouts = {id(t): self.before[id(t)][2] if id(t) in self.before else self.layout(t) for t in given}
        out_layouts = [self.layout(t) for t in results]
        if any(isinstance(x, str) for x in (*layouts.values(), *out_layouts)):
            return False
        if sum(t.numel() for t in (*given, *results)) > MOST_TRIED or not all(t.numel() for t in (*given, *results)):
            return False  # of what is empty it is not known how it would lie on ranks
        call = replace(call, operands=tuple(replace(o, enter=False) for o in call.operands))
        kinds = tuple((t.shape, layouts[id(t)]) for t in given), repr(mapped((args, kwargs), _number))
        if all(t.is_floating_point() for t in given) and (call, kinds) in self.tried:
            return True  # in a block, or a run, before
        wholes = {id(t): self.before[id(t)][1] if id(t) in self.before else t for t in given}
        expected = results
        if any(t.is_meta for t in (*given, *results)):
            values = {id(t): self._some_values(t) for t in given}
            copies = {i: t.clone() for i, t in values.items() if t is not None}
            try:
                with torch._C._EnableTorchFunction():  # for the mode that drops nothing, around this one
                    made = func(*plain(_swapped(args, copies)), **plain(_swapped(kwargs, copies)))
            except Exception:  # it may mix them with what has no values
                return False
            wholes = {i: t for i, t in values.items() if t is not None}
            expected = [*_tensors(made), *(copies[id(t)] for t in given[:1] if id(t) in self.before)]
            if len(wholes) < len(values) or any(t.is_meta for t in expected):
                return False
        for rank in (0, self.tp - 1):
            shards = {id(t): _shard(wholes[id(t)], layouts[id(t)], rank).clone() for t in given}
            alone: Any = SimpleNamespace(rank=rank, size=self.tp)
            my_args, my_kwargs = (on_rank(_swapped(x, shards), rank) for x in (args, kwargs))
            try:
                with torch._C._EnableTorchFunction():
                    mine = run_call(call, func, my_args, my_kwargs, alone)
            except Exception as error:
                raise _Unknown(f"it does not run on shards ({type(error).__name__})") from error
            got = [*_tensors(mine), *(shards[id(t)] for t in given[:1] if id(t) in self.before)]
            wanted = [_shard(t, layout, rank) for t, layout in zip(expected, out_layouts, strict=True)]
            if len(got) != len(wanted) or not all(_same(a, b) for a, b in zip(got, wanted, strict=True)):
                raise _Unknown("its result on shards is another one")
        self.tried.add((call, kinds))
        return True

    def _some_values(self, t: Tensor) -> Tensor | None:
        """In place of one without values: what is known of it, or some."""
        if not t.is_meta:
            return t
        if id(t) in self.tracer.values:
            return self.tracer.values[id(t)][1]
        return torch.rand(t.shape, dtype=torch.float32).to(t.dtype) if t.is_floating_point() or t.is_complex() else None

    def _hold(self, name: str, module: str, frame: Any) -> None:
        """Nothing changes in this call, but another from the same place in the code may: it holds its turn."""
        if name and name != "__get__":
            self.found.calls.setdefault(module, []).append(Call(name, call_site(frame)))

    def _operands(self, name: str, operands: Any, layouts: Any, outs: Any, out_layouts: Any, events: Any) -> tuple[Operand, ...]:
        split_outs = [(t, x) for t, x in zip(outs, out_layouts, strict=True) if isinstance(x, tuple)]
        split_ins = [(t, x) for (_, t), x in zip(operands, layouts, strict=True) if isinstance(x, tuple)]
        reference = split_outs[0] if split_outs else split_ins[0] if split_ins else None
        if "in" in events:
            reference = None  # a product with a split weight: what lies beside the summed dim is not in it
        if name == "einsum":
            return self._einsum(operands, layouts, outs[0], out_layouts[0])
        changed = []
        for (path, t), layout in zip(operands, layouts, strict=True):
            if layout is not None:
                continue
            shadow = self.tracer.shadow(t)
            if shadow.param is not None and shadow.param[0] in self.split:
                continue  # this rank's shard already
            part = None
            if reference is not None and (name not in NO_SLICE or (name == "linear" and path in ((2,), ("bias",)))):
                part = _aligned(name, path, t, reference)
            beside = next((p for (p, _), x in zip(operands, layouts, strict=True) if isinstance(x, tuple)), None)
            if part is not None and beside is not None:
                other, (dim, _) = next((o, x) for (p, o), x in zip(operands, layouts, strict=True) if p == beside)
                beside = beside if other.ndim - dim == part[0] else None
            enter = (bool(split_outs) or any(self._is_share(t) for t in outs)) and self._enters(t)
            if split_outs and shadow.param is not None and shadow.param[0] in self.outside:
                enter = shadow.grad  # inside this very call
            if part is not None or enter:
                changed.append(Operand(path, part, enter, beside if part else None))
        return tuple(changed)

    def _channels(
        self, args: Any, kwargs: Any, operands: Any, changed: tuple[Operand, ...], out: Tensor, layout: tuple[int, Ownership]
    ) -> dict[str, Any]:
        """Of a convolution whose output channels are split: its part of a whole bias; with groups, that of a whole input, and how many."""
        dim, pattern = layout
        weight = next(t for p, t in operands if p in ((1,), ("weight",)))
        from_last = weight.ndim - 1
        if dim != out.ndim - from_last:  # along the batch
            return {}
        groups = int(whole_of(args[6] if len(args) > 6 else kwargs.get("groups", 1)))
        length = out.shape[dim]
        enters = {o.path: o.enter for o in changed}
        parts: dict[Any, tuple[int, Ownership]] = {}
        for path, t in operands:
            if path in ((2,), ("bias",)) and not self._has_layout(t):
                parts[path] = 1, pattern
            elif path in ((0,), ("input",)) and groups > 1 and self.layout(t) is None:
                runs = pattern.runs * (length // pattern.period)
                owner = torch.tensor([r for r, n in runs for _ in range(n)])
                inputs = t.shape[t.ndim - from_last]
                parts[path] = from_last, Ownership.of(owner[:: length // groups].repeat_interleave(inputs // groups))
        found = [o for o in changed if o.path not in parts]
        found += [Operand(path, part, enters.get(path, False)) for path, part in parts.items()]
        of_ranks = tuple(pattern.local(length, r) * groups // length for r in range(self.tp))
        return {"operands": tuple(found), "groups": of_ranks if groups > 1 else ()}

    def _is_share(self, t: Tensor) -> bool:
        """Whether every rank has all of it, beside its shards: its gradient is a share on each, as theirs is."""
        label = self.tracer.shadow(t).label
        return label is not None and bool(t.numel()) and not bool(shrunk(label).any())

    def _enters(self, t: Tensor) -> bool:
        """Whether its gradient is summed over ranks where it meets shards; inside, each rank has its share of it anyway."""
        shadow = self.tracer.shadow(t)
        outside = shadow.param is None or shadow.param[0] in self.mixed
        return shadow.label is None and outside and shadow.grad and (t.is_floating_point() or t.is_complex())

    def _lines_up(self, operands: Any, outs: Any, reference: Any) -> None:
        """Operands are cut where they lie beside the split dim, counted from the last: so they have to broadcast."""
        t, (dim, _) = reference
        others = [o for _, o in operands if o is not t and o.ndim and self.tracer.shadow(o).label is None]
        try:
            shape = torch.broadcast_shapes(t.shape, *(o.shape for o in others))
        except RuntimeError:
            shape = None
        if others and (shape is None or (outs and outs[0].shape != shape)) and any(o.numel() > 1 for o in others):
            suspects = [o for o in others if any(n == t.shape[dim] for n in o.shape)]
            if suspects:
                raise _Unknown("operands that do not lie beside each other")

    def _einsum(self, operands: Any, layouts: Any, out: Tensor, out_layout: Any) -> tuple[Operand, ...]:
        """Each operand's dims have letters: those with the letter of a split dim are cut there."""
        equation = self.equation.replace(" ", "")
        terms, _, result = equation.partition("->")
        letters = terms.split(",")
        if "..." in equation or not result or len(letters) != len(operands):
            if all(self._has_layout(t) for _, t in operands):
                return ()
            raise _Unknown(f"`{equation}`")
        patterns: dict[str, Ownership] = {}
        for word, layout in [*zip(letters, layouts, strict=True), (result, out_layout)]:
            if isinstance(layout, tuple):
                patterns[word[layout[0]]] = layout[1]
        changed = []
        for (path, t), word in zip(operands, letters, strict=True):
            shadow = self.tracer.shadow(t)
            if shadow.param is not None and shadow.param[0] in self.split:
                continue
            at = [i for i, c in enumerate(word) if c in patterns]
            part = None
            if at and not isinstance(self.layout(t), tuple):
                part = (t.ndim - at[0], patterns[word[at[0]]])
            enter = bool(patterns) and self._enters(t)
            if part is not None or enter:
                changed.append(Operand(path, part, enter))
        return tuple(changed)

    def _sizes(self, name: str, args: Any, kwargs: Any, x: Tensor, out: Tensor) -> Any:
        first = FIRST_SIZE.get(name, 1)
        packed = len(args) == first + 1 and isinstance(args[first], (tuple, list))
        given = list(args[first]) if packed else list(args[first:])
        if not given:
            given = list(kwargs.get("shape", kwargs.get("size", ())))
            if self.layout(out) is None and self.layout(x) is None:
                return ()
            if given:
                raise _Unknown("sizes by keyword")
        if given and not isinstance(given[0], int):
            return ()  # view(dtype)
        self._are_sizes(given)
        needed = self.local_sizes(out)
        if name == "unflatten":
            start = args[1] % x.ndim
            needed = needed[start : start + len(given)]
        elif name == "repeat":
            before = [(1,) * self.tp] * (len(given) - x.ndim) + self.local_sizes(x)
            needed = [tuple(n // b for n, b in zip(ns, bs, strict=True)) for ns, bs in zip(needed, before, strict=True)]
        changes: list[list[tuple[int, int, int]]] = [[] for _ in range(self.tp)]
        for i, (g, want) in enumerate(zip(given, needed, strict=True)):
            if whole_of(g) == -1:
                continue
            have = local_of(g, self.tp)
            if isinstance(g, PerRankInt) and have != tuple(want):
                g.computed_with()  # how it follows from the size of a shard may be another matter with another batch
            for rank in range(self.tp):
                if have[rank] != want[rank]:
                    changes[rank].append((i, *_fraction(want[rank], have[rank])))  # x / 0: the size itself
        return tuple(tuple(c) for c in changes) if any(changes) else ()

    def _whole_sizes(self, name: str, args: Any, out: Tensor, module: str, frame: Any) -> None:
        """A whole tensor that is made with sizes read from shards: with the whole sizes, then, as the plan knows it."""
        first = FIRST_SIZE.get(name, 1)
        packed = len(args) == first + 1 and isinstance(args[first], (tuple, list))
        given = list(args[first] if packed else args[first:])
        if name in ("full", "new_full"):
            return  # a fill value stands beside the sizes
        self._are_sizes(given)
        changes: list[list[tuple[int, int, int]]] = [[] for _ in range(self.tp)]
        for i, g in enumerate(given):
            if isinstance(g, PerRankInt):
                for rank in range(self.tp):
                    if g.local[rank] != g.whole:
                        changes[rank].append((i, *_fraction(g.whole, g.local[rank])))
        if any(changes):
            call = Call(name, call_site(frame), sizes=tuple(tuple(c) for c in changes))
            self.found.calls.setdefault(module, []).append(call)
        else:
            self._hold(name, module, frame)

    def _pieces(self, name: str, args: Any, kwargs: Any, x: Tensor, outs: list[Tensor]) -> Any:
        layout = self.layout(x)
        dim = kwargs.get("dim", args[2] if len(args) > 2 else 0) % x.ndim
        if layout is None:
            return ()
        if layout[0] != dim:
            return ()
        needed = [[self.local_sizes(t)[dim][r] for t in outs] for r in range(self.tp)]
        how = args[1] if len(args) > 1 else next(iter(v for k, v in kwargs.items() if k != "dim"))
        self._are_sizes(how if isinstance(how, (tuple, list)) else [how])
        same = True
        for rank in range(self.tp):
            length = self.local_sizes(x)[dim][rank]
            if name in ("chunk", "unsafe_chunk", "tensor_split"):
                have = [len(c) for c in torch.arange(length).chunk(local_of(how, self.tp)[rank])] if name != "tensor_split" else []
            elif isinstance(how, int):
                size = local_of(how, self.tp)[rank]
                have = [min(size, length - i) for i in range(0, length, size)] if size else []
            else:
                have = [local_of(h, self.tp)[rank] for h in how]
            same &= have == needed[rank]
        return () if same else tuple(tuple(n) for n in needed)

    def _item(self, args: Any, x: Tensor, out: Tensor, layouts: Any) -> Any:
        layout = layouts[0]
        if layout is None:
            return ()
        dim, pattern = layout
        items = list(args[1]) if isinstance(args[1], tuple) else [args[1]]
        position = next((n for n in range(len(items)) if dim_of_item(items, n, x.ndim) == dim), None)
        if position is None:
            return ()
        item = items[position]
        if not isinstance(item, slice):
            raise _Unknown("an index into the split dim")
        self._are_sizes((item.start, item.stop, item.step))
        length = x.shape[dim]
        changes = []
        same = True
        for rank in range(self.tp):
            mine = pattern.index(rank, length)
            bounds = [None if b is None else int(whole_of(b)) for b in (item.start, item.stop, item.step)]
            wanted = torch.zeros(length, dtype=torch.bool)
            wanted[slice(*bounds)] = True
            places = wanted[mine].nonzero().squeeze(1)
            have_bounds = [None if b is None else local_of(b, self.tp)[rank] for b in (item.start, item.stop, item.step)]
            have = torch.arange(mine.numel())[slice(*have_bounds)]
            if places.numel() == 0:
                changes.append((position, 0, 0, 1, mine.numel()))
                same &= have.numel() == 0
                continue
            step = int(places[1] - places[0]) if places.numel() > 1 else 1
            if not bool((places.diff() == step).all()):
                raise _Unknown("a slice that is no slice on a rank")
            same &= torch.equal(have, places)
            changes.append((position, int(places[0]), int(places[-1]) + 1, step, mine.numel()))
        return () if same else tuple(changes)

    def _keeps_dim(self, name: str, args: Any, kwargs: Any, x: Tensor, layout: Any) -> None:
        dim = kwargs.get("dim", args[1] if len(args) > 1 and isinstance(args[1], int) else 0)
        if name != "movedim" and dim % x.ndim == layout[0]:
            raise _Unknown("along the split dim")


def untracked_size_reads(
    model: Any, call: Any, inputs: Any, whole: Any, shared: Any, make: Any, once: Any, recorder: CallRecorder, tracer: FeatureTracer
) -> set[Any]:
    """Reads of sizes of shards by which code computes where that can't be seen: `range(n)`, an index into a list.

    The model runs once more with the numbers that a rank's code would have, where whatever is known for a size is made whole again. What
    then still comes out otherwise is not known for a size.

    Args:
        recorder: of the run before, in which nothing was seen to be computed with.
        tracer: of that run.

    Returns:
        Those around the first operation that is another one; nothing if all are the same.
    """
    if not recorder.local_reads:
        return set()
    before = PerRankInt.diverging
    for rank in (0, recorder.tp - 1) if recorder.uneven else (0,):
        PerRankInt.shown = rank
        try:
            with preserve_modules(model):
                _, _, again = run(model, call, inputs, whole, shared, make, during=once)
            log = again.log or []
        except Exception:  # code came to what is none
            log = []
        finally:
            PerRankInt.shown, PerRankInt.diverging = None, before
        pairs = itertools.zip_longest(tracer.log or [], log)
        other = next((a or b for a, b in pairs if a != b), None)
        if other is not None:
            near = {r for r in recorder.local_reads if log and _around(r[0], other[0])}
            return near or recorder.local_reads
    return set()


def _around(a: str, b: str) -> bool:
    """Whether one of two modules holds the other."""
    return not a or not b or f"{a}.".startswith(f"{b}.") or f"{b}.".startswith(f"{a}.")


class _Unknown(Exception):
    """A call that can't be changed into one on shards."""


def _writes(name: str, kwargs: Any) -> bool:
    """Whether a torch function of this name writes into what it is given."""
    return name in WRITES or (name.endswith("_") and not name.endswith("__")) or "out" in kwargs


def _aligned(name: str, path: Any, t: Tensor, reference: Any) -> tuple[int, Ownership] | None:
    """The dim, from the last, in which a whole operand lies beside the split dim of the others."""
    other, (dim, pattern) = reference
    from_last = other.ndim - dim
    if name in PRODUCTS and from_last <= 2 and not (name in ("baddbmm", "addmm", "addmv", "addbmm") and path == (0,)):
        return None  # its rows or columns are its own
    if name == "scaled_dot_product_attention" and from_last != 3:
        return None
    if name in ("cat", "stack", "concat", "concatenate") and t.ndim == other.ndim and t.shape[dim] != other.shape[dim]:
        return None
    if t.ndim < from_last:
        return None
    size = t.shape[t.ndim - from_last]
    if size == 1 or size != other.shape[dim]:
        if name == "scaled_dot_product_attention" and size > 1:
            raise _Unknown(f"{size} heads beside {other.shape[dim]}")
        return None
    return from_last, pattern


def _fraction(num: int, den: int) -> tuple[int, int]:
    if den == 0:
        return num, 0
    g = math.gcd(num, den)
    return num // g, den // g


def _tensors(out: Any) -> list[Tensor]:
    if isinstance(out, Tensor):
        return [out]
    if isinstance(out, (tuple, list)):
        return [t for o in out for t in _tensors(o)]
    return []


def _with_paths(args: Any, kwargs: Any) -> list[tuple[tuple[int | str, ...], Tensor]]:
    found: list[tuple[tuple[int | str, ...], Tensor]] = []
    for items in (enumerate(args), kwargs.items()):
        for key, value in items:
            if isinstance(value, Tensor):
                found.append(((key,), value))
            elif isinstance(value, (tuple, list)):
                found += [((key, i), v) for i, v in enumerate(value) if isinstance(v, Tensor)]
    return found
