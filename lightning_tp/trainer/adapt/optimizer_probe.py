"""Find out whether an optimizer takes the same steps on shards as on full weights: try it on a small matrix, whole and in halves.

What is stepped are throw-away copies of the user's optimizer, with its class, its settings and its state, on parameters made for the purpose. An
optimizer passes whose update of an element depends on nothing but the history of this element and of its gradient.
"""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_tp._compat import local_tensor, without_global_optimizer_hooks
from lightning_tp.core.ops.generators import generators_in
from lightning_tp.core.ops.rng import local_state_restored, seed_torch
from lightning_tp.shards.view import local_view

SIDE = 256  # of the matrix: some optimizers treat smaller ones element by element
STEPS = 5
RTOL = 1e-5  # of the largest step
PATCHED = ("step", "zero_grad")  # attributes of an instance by which schedulers count steps of the user's own optimizer


def difference_on_halves(optimizer: Optimizer, weight: Tensor, dim: int) -> str | None:
    """Step a random matrix by copies of an optimizer, whole and as two halves; alone and together with a vector.

    Args:
        optimizer: any; neither it nor what it holds is changed, nor are the default random generators.
        weight: a parameter of it, in place of which the matrix stands (a vector, if it has one dim).
        dim: where the matrix is cut.

    Returns:
        What differs, in words; None if nothing does.

    Raises:
        Exception: what the optimizer raised on the full matrix.

    Example:
        >>> weight = nn.Parameter(torch.zeros(4, 4))
        >>> difference_on_halves(torch.optim.AdamW([weight]), weight, 0) is None
        True
        >>> difference_on_halves(torch.optim.Muon([weight]), weight, 0)
        'alone, step 1 of a matrix of 256 x 256 and of its halves differ by ...
    """
    others = [p for group in optimizer.param_groups for p in group["params"] if p is not weight]
    with local_state_restored(), local_view(), without_global_optimizer_hooks():
        for second in (None, others[0]) if others else (None,):
            try:
                found = _compare(optimizer, weight, dim, second)
            except Exception:
                if second is None and others:  # some need all their groups
                    continue
                raise
            if found is not None:
                return f"{'alone' if second is None else 'together with another parameter'}, {found}"
    return None


def _compare(optimizer: Optimizer, weight: Tensor, dim: int, second: Tensor | None) -> str | None:
    generator = torch.Generator().manual_seed(0)
    shape = (SIDE, SIDE) if weight.ndim > 1 else (4 * SIDE,)
    scale = torch.linspace(1, 5, shape[0], dtype=torch.float64)  # so that statistics of the halves differ
    scale = scale[:, None] * torch.linspace(5, 1, SIDE, dtype=torch.float64) if len(shape) > 1 else scale

    def draw() -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64) * scale

    start, direction = draw(), draw()
    halves: list[Any] = [
        slice(None),
        *((slice(None),) * dim + (part,) for part in (slice(0, shape[dim] // 2), slice(shape[dim] // 2, None))),
    ]
    runs = [_Run(optimizer, weight, second, start[part]) for part in halves]
    for step in range(1, STEPS + 1):
        grad = 0.01 * (direction + 0.2 * draw())
        for run, part in zip(runs, halves, strict=True):
            run.step(grad[part])
        full, *parts = runs
        if not bool(full.matrix.isfinite().all()):
            return None
        moved = float((full.matrix - start.to(full.matrix)).abs().max()) or 1.0
        off = max(float((full.matrix[part] - run.matrix).abs().max()) for run, part in zip(parts, halves[1:], strict=True))
        if not off <= RTOL * moved:
            size = f"matrix of {SIDE} x {SIDE}" if len(shape) > 1 else f"vector of {4 * SIDE}"
            return f"step {step} of a {size} and of its halves differ by {100 * off / moved:.2g}% of what it moves"
        moved = float((full.vector - 1).abs().max()) or 1.0
        off = max(float((full.vector - run.vector).abs().max()) for run in parts)
        if not off <= RTOL * moved:
            return f"step {step} of the other one differs by {100 * off / moved:.2g}% of what it moves"
    return None


class _Run:
    """A copy of an optimizer on a matrix in place of `weight`, and a vector in place of `second`."""

    def __init__(self, optimizer: Optimizer, weight: Tensor, second: Tensor | None, start: Tensor) -> None:
        self.start = start
        self.stand_ins: dict[int, Any] = {id(weight): nn.Parameter(start.clone().to(weight.device))}
        self.vector_parameter = nn.Parameter(torch.ones(64, dtype=start.dtype, device=weight.device))
        if second is not None:
            self.stand_ins[id(second)] = self.vector_parameter
        self.kept = set(self.stand_ins)
        self.memo: dict[int, Any] = dict(self.stand_ins)
        for group in optimizer.param_groups:
            for p in group["params"]:
                if id(p) not in self.memo:
                    self.memo[id(p)] = nn.Parameter(torch.zeros(1, device=p.device))
        pairs = [(p, self.stand_ins[id(p)]) for p in (weight, second) if p is not None]
        for t in _tensors_in(vars(optimizer)):
            if id(t) not in self.memo:
                self.memo[id(t)] = _in_place_of(t, pairs)
        for generator in generators_in({"optimizer": optimizer}).values():
            if isinstance(generator, torch.Generator):  # can't be copied
                self.memo[id(generator)] = generator.clone_state()
        self.copy = self._copied(optimizer)
        self.takes_closure = len(inspect.signature(type(self.copy).step).parameters) > 1
        if callable(getattr(self.copy, "train", None)):
            self.copy.train()  # schedule-free optimizers have two modes

    def _copied(self, optimizer: Any) -> Any:
        """Copy an optimizer and those that it wraps; `deepcopy` would drop the attributes that torch does not know."""
        twin = self.memo[id(optimizer)] = object.__new__(type(optimizer))
        for inner in _optimizers_in(vars(optimizer)):
            if id(inner) not in self.memo:
                self._copied(inner)
        if id(optimizer.param_groups) not in self.memo:
            self.memo[id(optimizer.param_groups)] = [g for group in optimizer.param_groups if (g := self._group(group))["params"]]
        if id(optimizer.state) not in self.memo:
            entries = {
                self.memo.get(id(k), k): copy.deepcopy(v, self.memo) for k, v in optimizer.state.items() if not self._is_left_out(k)
            }
            self.memo[id(optimizer.state)] = defaultdict(dict, entries)
        for name, value in vars(optimizer).items():
            if name.startswith("_optimizer_"):  # hooks
                setattr(twin, name, OrderedDict())
            elif name not in PATCHED:
                setattr(twin, name, copy.deepcopy(value, self.memo))
        return twin

    def _is_left_out(self, key: Any) -> bool:
        return isinstance(key, Tensor) and id(key) not in self.kept

    def _group(self, group: dict[str, Any]) -> dict[str, Any]:
        if id(group) in self.memo:
            return self.memo[id(group)]
        new = {k: copy.deepcopy(v, self.memo) for k, v in group.items() if k != "params"}
        new["params"] = [self.memo[id(p)] for p in group["params"] if id(p) in self.kept]
        if isinstance(lr := new.get("lr"), (int, float, Tensor)) and float(lr) == 0:  # a warm-up begins
            new["lr"] = new.get("initial_lr") or (lr + 0.01)
        self.memo[id(group)] = new
        return new

    @property
    def matrix(self) -> Tensor:
        return next(iter(self.stand_ins.values())).detach()

    @property
    def vector(self) -> Tensor:
        return self.vector_parameter.detach()

    def step(self, grad: Tensor) -> None:
        def closure() -> Tensor:  # a gradient of each element by itself, that changes on the way
            for p in self.stand_ins.values():
                of_vector = p is self.vector_parameter
                slope = p.detach() - (1 if of_vector else self.start.to(p.device))
                p.grad = 0.1 * slope + (0.5 if of_vector else grad.to(p.device))
            return torch.ones((), device=self.vector_parameter.device)

        seed_torch(0)
        closure()
        type(self.copy).step(self.copy, *([closure] if self.takes_closure else []))


def _in_place_of(t: Tensor, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Return a tensor for the copy: of the size of a stand-in where it was of the size of its parameter."""
    t = local_tensor(t).detach()
    for p, stand_in in ((local_tensor(p).detach(), stand_in) for p, stand_in in pairs):
        if t.shape == p.shape and t.numel() > 1:
            if torch.equal(t.to(p.dtype), p):
                return stand_in.detach().clone()
            first = t.flatten()[0]
            dtype = stand_in.dtype if t.is_floating_point() else t.dtype
            return torch.full_like(stand_in, float(first) if bool((t == first).all()) else 0.0, dtype=dtype, requires_grad=False)
    return t.clone()


def _tensors_in(value: Any, depth: int = 5) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif depth and isinstance(value, Optimizer):
        yield from _tensors_in(vars(value), depth - 1)
    elif depth and isinstance(value, (list, tuple, Mapping)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors_in(item, depth - 1)


def _optimizers_in(value: Any, depth: int = 2) -> Iterator[Optimizer]:
    if isinstance(value, Optimizer):
        yield value
    elif depth and isinstance(value, (list, tuple, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _optimizers_in(item, depth - 1)
