"""Dropout, and other random numbers in a model's forward: equal on all ranks where the activation is whole, each rank's own where it is split.

Nobody has to say which is which. In the first training step (and in the 2nd, 3rd, 5th, 9th, .., in case something has changed) a
`TorchFunctionMode` sees each call that draws random numbers, and compares what it is applied to over the tensor-parallel group: a whole activation
is the same on all ranks, shards of one differ. (What is equal by chance, zeros for example, is taken for whole until it is looked at again.)
Calls on shards then run on this rank's own stream (`rng.py`). In the steps between, only the modules that make such calls are looked into, so
that a model without dropout pays nothing: `F.dropout` and SDPA are replaced while such a module runs, and where its code has got hold of them
under another name, or calls something else, the mode is on again. Numbers that are drawn by themselves (`torch.rand` of a drop path) are
followed to the activation that they meet; one number for each sample is shared on any activation, and so are the places that an index was
drawn for. `torch.seed()` in a forward gives all ranks of a group the same seed; where they seed themselves differently in another way, the
next draw for a whole activation in an observed step raises.

`exact` gives the masks of one process: the mask of the whole activation is drawn from the shared stream, and each rank takes its part. It
looks into every step and draws tp times as much: for comparing runs. Attention is written out, as SDPA's math kernel computes it.

Not covered: random numbers outside of training mode, and inside of compiled code: there all ranks of a group draw the same.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial, wraps
from types import FrameType
from typing import Any, Literal

import torch.distributed as dist
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.overrides import TorchFunctionMode

from lightning_tp._compat import gather_rows
from lightning_tp.core.comm.axis import SEQUENCE_DIM, Axis
from lightning_tp.core.comm.transitions import outside
from lightning_tp.core.modules.call_site import MODULE_CALL, call_site
from lightning_tp.core.modules.swap_class import swap_class
from lightning_tp.core.ops.exact_dropout import Part, _attention, _out_dim, _span
from lightning_tp.core.ops.random_calls import (
    BY_INDEX,
    DRAWS,
    EXACT,
    FILLS,
    OF_ATTENTION,
    REPLACED,
    _device,
    _flag,
    _is_random,
    _operand,
    _p,
)
from lightning_tp.core.ops.rng import on_own_stream
from lightning_tp.errors import TPError

Dropout = Literal["independent", "exact"]


SAMPLE, TOLERANCE = 512, 1e-3  # elements of an activation that are compared over the ranks, and how much they may differ


Key = tuple[str, tuple[Any, ...]]


@dataclass
class RandomCall:
    """A call that draws random numbers: one place in the code of one module.

    Args:
        own: it is made on this rank's shard.
        name: under which `torch.nn.functional` has what the code called; None where it got hold of it in another way.
        part: for `exact`, which part of the whole the shard is.
    """

    own: bool = False
    name: str | None = None
    part: Part | None = None


class RandomCallPolicy:
    """What is known of the random numbers of one model, on one rank.

    Args:
        axis: the tensor-parallel axis.
        how: "independent" or "exact".
    """

    def __init__(self, axis: Axis, how: Dropout = "independent") -> None:
        self.axis = axis
        self.exact = how == "exact"
        self.steps = 0
        self.observing = False
        self.running: list[dict[Key, RandomCall]] = []  # of the modules that run now and are known to draw, the inner ones last
        self.on = False  # the mode is
        self.mode = _Mode(self)
        self.stand_ins = {name: _stand_in(self, func) for name, func in REPLACED.items()}
        self.originals = {self.stand_ins[name]: func for name, func in REPLACED.items()}
        self.busy = False  # a draw is being made: what torch calls inside of it, by whatever name, belongs to it
        self.by_name: str | None = None  # the stand-in that is passing on a call
        self.last: tuple[nn.Module, torch.Size] | None = None  # the split layer that ran last, and the shape that it gave
        self._marks: dict[int, tuple[Tensor, RandomCall, nn.Module | None, Key]] = {}
        self._seeds: random.Random | None = None  # the same on all ranks of the group, from the first `torch.seed()` on

    def __deepcopy__(self, memo: dict[int, Any]) -> RandomCallPolicy:
        import copy

        memo[id(self)] = twin = RandomCallPolicy(copy.deepcopy(self.axis, memo), "exact" if self.exact else "independent")
        return twin

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """A training step, of which the first, second, third, fifth, ninth, .. are observed."""
        n = self.steps
        self.steps += 1
        if self.on or torch.compiler.is_compiling():
            yield
            return
        with _seeded_by(self.seed):
            if n & (n - 1) and not self.exact:
                yield
                return
            self.observing = self.on = True
            try:
                with self.mode, _replaced(self.stand_ins), _nothing_compiled():
                    yield
            finally:
                self.observing = self.on = False
                self._marks.clear()
                self.running.clear()
                self.busy = False

    def seed(self) -> int:
        """`torch.seed()`, the same on all ranks of the group. A collective the first time."""
        if self._seeds is None:
            payload = [random.SystemRandom().getrandbits(63)]
            dist.broadcast_object_list(payload, group=self.axis.group, group_src=0)
            self._seeds = random.Random(payload[0])
        seed = self._seeds.getrandbits(63)
        torch.manual_seed(seed)
        return seed

    # ------------------------------------------------------------------------------------------------------ one call

    def draw(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], frame: FrameType) -> Any:
        """Make a call that draws."""
        if self.busy:
            return func(*args, **kwargs)
        self.busy = True
        try:
            return self._draw(func, args, kwargs, frame)
        finally:
            self.busy = False

    def _draw(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], frame: FrameType) -> Any:
        if kwargs.get("generator") is not None or not _is_random(func, args, kwargs):
            return func(*args, **kwargs)
        key = (str(getattr(func, "__name__", func)), call_site(frame, _ENDS))
        if not self.observing:
            site = self.running[-1].get(key) if self.running else None
            return func(*args, **kwargs) if site is None or not site.own else self._on_shard(func, args, kwargs, site)
        module, bare = _module_of(frame)
        site = module.__dict__.get("_sites", {}).get(key) if module is not None else None
        if func in FILLS:
            site = site or RandomCall()
            out = self._on_shard(func, args, kwargs, site) if site.own else func(*args, **kwargs)
            if isinstance(out, Tensor) and not site.own:
                self._marks[id(out)] = (out, site, None if bare else module, key)
            return out
        operand = _operand(args, kwargs)
        if site is None or not site.own:
            shapes = self._differs(operand)
            if shapes is None:
                return func(*args, **kwargs)
            if bare:
                raise TPError(
                    f"{type(module).__name__}: `{key[0]}` draws random numbers for a shard of an activation, in a function that is handed to "
                    "`torch.utils.checkpoint`: when it is run again for the backward, nobody sees it. Hand over a module (the block itself), or "
                    "use `activation_checkpointing='block'`."
                )
            site = RandomCall(True, self.by_name, self._part(func, operand, shapes, module) if self.exact else None)
            self._keep(module, key, site)
        return self._on_shard(func, args, kwargs, site)

    def _on_shard(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], site: RandomCall) -> Any:
        if not self.exact:
            return on_own_stream(self.axis.rank, _device(args, kwargs), lambda: func(*args, **kwargs))
        if func not in EXACT or site.part is None:
            raise TPError(
                f'`dropout="exact"`: `{getattr(func, "__name__", func)}` draws random numbers for a shard of an activation, and what one '
                'process would draw is not known for it. Use F.dropout or nn.Dropout, or `dropout="independent"`.'
            )
        if func is OF_ATTENTION:
            return _attention(*args, **kwargs, part=site.part, axis=self.axis)
        x, p = _operand(args, kwargs), _p(func, args, kwargs)
        out = x * site.part.of_whole(x.detach(), self.axis, lambda ones: F.dropout(ones, p, True))
        return x.copy_(out) if _flag(args, kwargs, "inplace", 3) else out

    def _keep(self, module: nn.Module | None, key: Key, site: RandomCall) -> None:
        """Look into this module from now on, in every step, and where its block is run again for the backward."""
        if module is None:
            return  # in the step itself, outside of the model: nothing is run again there, and the next steps stay shared
        if "_sites" not in module.__dict__:
            alone = type(module).forward is nn.Dropout.forward and not self.exact
            swap_class(module, _Layer if alone else _Drawing, _draws=self, _sites={}, _names=frozenset())
        sites: dict[Key, RandomCall] = module.__dict__["_sites"]
        sites[key] = site
        names = {s.name for s in sites.values() if s.own}
        module.__dict__["_names"] = None if None in names or self.exact else frozenset(names)

    def follow(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Another call, while numbers that were drawn by themselves have not met an activation yet."""
        out = func(*args, **kwargs)
        if not self._marks:
            return out
        tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
        found = next((self._marks[id(t)] for t in tensors if id(t) in self._marks), None)
        if found is None:
            return out
        noise, site, module, key = found
        met = [t for t in tensors if id(t) not in self._marks and t.ndim and t.numel() > 1 and t.is_floating_point()]
        if not met:
            if isinstance(out, Tensor):
                self._marks[id(out)] = (out, site, module, key)
            return out
        for i in [i for i, mark in self._marks.items() if mark[1] is site]:
            del self._marks[i]
        of_places = func in BY_INDEX and not noise.is_floating_point() and noise.dtype is not torch.bool
        if of_places or self._is_shared(noise, met[0]) or self._differs(met[0]) is None:
            return out
        if self.exact:
            raise TPError(
                f'`dropout="exact"`: {type(module).__name__} draws `{key[0]}` of shape {tuple(noise.shape)} for a shard of an activation of shape '
                f'{tuple(met[0].shape)}, and what one process would draw is not known for it. Use F.dropout, or `dropout="independent"`.'
            )
        site.own = True  # from the next step on: this one has drawn already
        self._keep(module, key, site)
        return out

    def _is_shared(self, noise: Tensor, activation: Tensor) -> bool:
        """Whether it has one number for all that the ranks have of the dim that they split: a drop path's, one for each sample."""
        dim = activation.ndim - 1
        tokens = self.axis.seq_len is not None and math.ceil(self.axis.seq_len / self.axis.size)
        if activation.ndim == 4 or (activation.ndim == 3 and activation.shape[SEQUENCE_DIM] == tokens):
            dim = 1  # heads, or tokens
        from_last = activation.ndim - dim
        return noise.ndim < from_last or noise.shape[-from_last] == 1

    @torch.no_grad()
    def _differs(self, x: Tensor) -> list[list[int]] | None:
        """The shapes of it on all ranks, if they don't have the same; None if they do. A collective."""
        x = x.detach()
        flat = x.reshape(-1)
        sample = flat[:: max(1, -(-flat.numel() // SAMPLE))].double()
        mine = torch.zeros(9 + SAMPLE, dtype=torch.float64, device=x.device)
        mine[0], mine[1 : 1 + min(x.ndim, 7)] = x.ndim, torch.tensor(x.shape[:7], dtype=torch.float64, device=x.device)
        mine[8] = _point(x.device)
        mine[9 : 9 + sample.numel()] = sample.nan_to_num(0.0)
        every = gather_rows(mine, self.axis.group)
        shapes, points, samples = every[:, :8], every[:, 8], every[:, 9:]
        off = (samples - samples[0]).norm(dim=1).max() > TOLERANCE * samples.norm(dim=1).max()
        if bool((points != points[0]).any()):
            raise TPError(
                f"Random numbers are drawn for an activation of shape {tuple(x.shape)}, and torch's generator for {x.device.type} is not in the "
                f"same state on all tp={self.axis.size} ranks: where the activation is whole, each would change it otherwise. See that the "
                "ranks of a tensor-parallel group draw the same: nothing may be drawn on one of them only, nor a generator be seeded by what "
                "differs between them (its own `seed()`, the time, the rank; `torch.seed()` is the same on all of them)."
            )
        if not bool(off | (shapes != shapes[0]).any()):
            return None
        return [[int(n) for n in row[1 : 1 + int(row[0])]] for row in shapes.tolist()]

    # --------------------------------------------------------------------------------------------------------- exact

    def _part(self, func: Any, x: Tensor, shapes: list[list[int]], module: nn.Module | None) -> Part:
        """Which part of the whole this shard is.

        Raises:
            TPError: if that can't be told.
        """
        if module is not None and func in EXACT:
            axis, last, shape = self.axis, self.last, tuple(x.shape)
            if isinstance(module, nn.MultiheadAttention) and len(shape) == 4:
                return Part(1)  # written out, see styles/attention.py
            if last is not None and (split := last[0].__dict__["_tp_split"]).dim == _out_dim(last[0]):
                n, out = len(last[1]), last[1]
                in_order = (
                    split.sum_over(axis.size) > 1
                    or all(  # each part of the features is cut in the order of the ranks
                        len(a) == len(b) and all(i[1] == j[0] for i, j in zip(a, b)) for a, b in zip(split.ranges, split.ranges[1:])
                    )
                )
                lengths = {len(s) for s in shapes}
                if in_order and len(lengths) == 1:
                    if len(shape) == n == 3 and shape[:2] == tuple(out[:2]) and func is not OF_ATTENTION:
                        return Part(2, span=_span([s[2] for s in shapes], axis.rank))
                    if len(shape) == 4 and n == 3 and shape[0] in out[:2]:  # batch first or second
                        return Part(1, span=_span([s[1] for s in shapes], axis.rank))
                    if (
                        len(shape) == 3 == n
                        and shape[0] % out[0] == 0
                        and shape[1] == out[1]
                        and all(s == list(shape) for s in shapes)
                    ):
                        return Part(0, heads=shape[0] // out[0])
            elif axis.seq_len is not None and len(shape) == 3 and shape[SEQUENCE_DIM] == math.ceil(axis.seq_len / axis.size):
                return Part(SEQUENCE_DIM, sequence=True)
        raise TPError(
            f'`dropout="exact"`: {type(module).__name__} draws random numbers (`{getattr(func, "__name__", func)}`) for a shard of shape '
            f"{tuple(x.shape)} of an activation, and it can't be told which part of the whole that is, nor what one process would draw. "
            'Use `dropout="independent"`.'
        )

    def remember_shapes(self, model: nn.Module) -> None:
        """See what the split layers give; for `exact` alone."""
        for module in model.modules():
            weight = getattr(module, "weight", None)
            split = getattr(getattr(weight, "_tp_shard", None), "split", None)
            if split is not None and split.dim is not None:
                module.__dict__["_tp_split"] = split
                module.register_forward_hook(self._remember)

    def _remember(self, module: nn.Module, args: Any, out: Any) -> None:
        if isinstance(out, Tensor):
            self.last = (module, out.shape)


class _Mode(TorchFunctionMode):
    def __init__(self, draws: RandomCallPolicy) -> None:
        super().__init__()
        self.draws = draws

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        func = self.draws.originals.get(func, func)  # Python code of torch finds the stand-in by its own name
        if func in DRAWS:
            return self.draws.draw(func, args, kwargs or {}, sys._getframe(1))
        if self.draws._marks:
            return self.draws.follow(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


def _stand_in(draws: RandomCallPolicy, func: Callable[..., Any]) -> Callable[..., Any]:
    """What stands in the place of a function that draws while a module runs that is looked into."""
    name = func.__name__

    @wraps(func)
    def call(*args: Any, **kwargs: Any) -> Any:
        if draws.busy:
            return func(*args, **kwargs)
        if not draws.on:
            return draws.draw(func, args, kwargs, sys._getframe(1))
        draws.by_name = name
        try:
            return func(*args, **kwargs)  # the mode sees it
        finally:
            draws.by_name = None

    return call


class _Drawing(nn.Module):
    """Runs a module that draws random numbers for shards, with a look at its calls."""

    _draws: RandomCallPolicy
    _sites: dict[Key, RandomCall]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if is_compiling():  # a call that draws is known by its place in the code
            return outside(self._call_impl, *args, **kwargs)
        return self._call_impl(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with _looked_into(self):
            return super().forward(*args, **kwargs)


class _Layer(nn.Module):
    """An `nn.Dropout` of shards: one call, which need not be looked for."""

    _draws: RandomCallPolicy
    p: float

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if is_compiling():
            return outside(self._call_impl, *args, **kwargs)
        return self._call_impl(*args, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        draws = self._draws
        if draws.on or not self.training or not self.p:
            with _looked_into(self):
                return super().forward(x)
        return on_own_stream(draws.axis.rank, x.device, partial(super().forward, x))


@contextlib.contextmanager
def _seeded_by(seed: Callable[[], int]) -> Iterator[None]:
    """`torch.seed` is this one, for as long as this runs."""
    before, torch.seed = torch.seed, seed
    try:
        yield
    finally:
        torch.seed = before


def _point(device: torch.device) -> int:
    """A number (below 2**52, exact in double precision) for the state that torch's generator is in."""
    if device.type == "cuda":
        generator = torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]
        state = f"{generator.initial_seed()} {generator.get_offset()}".encode()
    else:
        state = torch.get_rng_state().numpy().tobytes()
    return int.from_bytes(hashlib.sha256(state).digest()[:6], "little")


class _replaced:
    """These functions in `torch.nn.functional`, for as long as this runs."""

    def __init__(self, functions: dict[str, Callable[..., Any]]) -> None:
        self.functions = functions

    def __enter__(self) -> None:
        there = F.__dict__
        self.before = {name: there[name] for name in self.functions}
        there.update(self.functions)

    def __exit__(self, *error: Any) -> None:
        F.__dict__.update(self.before)


def _nothing_compiled() -> Any:
    """What users have compiled runs as it is: compiled code has no places, and shows none of its calls."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext()


class _looked_into:
    """While a module runs that draws random numbers for shards."""

    def __init__(self, module: nn.Module) -> None:
        of = module.__dict__
        self.draws, self.sites = of["_draws"], of["_sites"]
        self.context: Any = None
        if not self.draws.on:
            names, stand_ins = of["_names"], self.draws.stand_ins
            self.context = self.draws.mode if names is None else _replaced({name: stand_ins[name] for name in names})

    def __enter__(self) -> None:
        self.draws.running.append(self.sites)
        if self.context is not None:
            self.context.__enter__()
            self.draws.on = self.context is self.draws.mode

    def __exit__(self, *error: Any) -> None:
        if self.context is not None:
            self.draws.on = False
            self.context.__exit__(*error)
        if self.draws.running:
            self.draws.running.pop()


class _Step(nn.Module):
    """A model whose training steps are observed from its own forward, where no Trainer tells when they begin."""

    _tp_random_policy: RandomCallPolicy

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.training:
            return super().forward(*args, **kwargs)
        with self._tp_random_policy.step():
            return super().forward(*args, **kwargs)


def bind_random_calls(model: nn.Module, axis: Axis, how: Dropout) -> None:
    """Let random numbers of this model, which runs on its shards already, be drawn as `how` says."""
    draws = RandomCallPolicy(axis, how)
    if draws.exact:
        draws.remember_shapes(model)
    if hasattr(model, "training_step"):  # a LightningModule: its steps begin there, see `policy_of`
        model.__dict__["_tp_random_policy"] = draws
    else:
        swap_class(model, _Step, _tp_random_policy=draws)


def policy_of(model: nn.Module) -> RandomCallPolicy | None:
    """What is known of the random numbers of this model, or of the one inside it that `parallelize` was applied to."""
    return next((m.__dict__["_tp_random_policy"] for m in model.modules() if "_tp_random_policy" in m.__dict__), None)


def run_block(block: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What activation checkpointing runs, twice: the block's own forward, seen both times."""
    if "_sites" not in block.__dict__:
        return forward(*args, **kwargs)
    with _looked_into(block):
        return forward(*args, **kwargs)


_ENDS = frozenset({MODULE_CALL, run_block.__code__})


def _module_of(frame: FrameType | None) -> tuple[nn.Module | None, bool]:
    """The module whose forward runs, and whether activation checkpointing runs a mere function of it."""
    bare = False
    while frame is not None:
        if frame.f_code in _ENDS:
            return frame.f_locals["self" if frame.f_code is MODULE_CALL else "block"], bare
        bare |= frame.f_code.co_filename == torch.utils.checkpoint.__file__
        frame = frame.f_back
    return None, bare
