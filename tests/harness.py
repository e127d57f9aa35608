"""One module, split by one style and nothing else, against the same module in one process.

`states` says what a rank holds of a whole tensor in each state of `comm.py`; `Collectives` sees what is sent, and `Sent` the names alone;
`alone` compares values, gradients, shapes and collectives. No tests here.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._python_dispatch import TorchDispatchMode

import lightning_tp as ltp
from lightning_tp.core.comm.axis import SEQUENCE_DIM, even_shard
from lightning_tp.core.comm.mesh import make_mesh
from lightning_tp.core.comm.state import SEQUENCE, WIDTH, I, P, State
from lightning_tp.core.comm.transitions import sequence_to_invariant
from lightning_tp.styles import Colwise, Style
from lightning_tp.testing import assert_trees_close, randomize_

SHORT = {"allreduce_": "all-reduce", "_allgather_base_": "all-gather", "_reduce_scatter_base_": "reduce-scatter"}


@functools.cache
def mesh() -> DeviceMesh:
    """All ranks as one tensor-parallel group; made once in each rank's process."""
    return make_mesh("cpu", 1, dist.get_world_size())


class Collectives(TorchDispatchMode):
    """What is sent while it is on: [(kind, bytes of the whole tensor: what a gather gives, or a reduction is given)]."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[tuple[str, int]] = []

    @property
    def kinds(self) -> list[str]:
        return [kind for kind, _ in self.sent]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            tensors = [t for a in args for t in (a if isinstance(a, (list, tuple)) else [a]) if isinstance(t, Tensor)]
            name = func.overloadpacket.__name__
            self.sent.append((SHORT.get(name, name), max(t.numel() * t.itemsize for t in tensors)))
        return func(*args, **(kwargs or {}))


class Sent(TorchDispatchMode):
    """The names of the collectives while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.all: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.all.append(func.overloadpacket.__name__.strip("_"))
        return func(*args, **(kwargs or {}))


def shard_of(whole: Tensor, dim: int, rank: int, tp: int, padding: float | None = None) -> Tensor:
    """The rank's shard as `torch.chunk` cuts; with `padding`, filled up to the length of the others."""
    mine = even_shard(whole.shape[dim], rank, tp)
    shard = whole.narrow(dim, mine.start, len(mine)) if len(mine) else whole.narrow(dim, 0, 0)
    if padding is None:
        return shard.clone()
    missing = -(-whole.shape[dim] // tp) - len(mine)
    fill = whole.new_full((*whole.shape[:dim], missing, *whole.shape[dim + 1 :]), padding)
    return torch.cat((shard, fill), dim)


def held(whole: Tensor, state: State | str, rank: int, tp: int, padding: float = 0.0) -> Tensor:
    """What a rank holds of a whole activation in a state; `P` gets terms that differ and sum up exactly."""
    state = State.of(state)
    if state == SEQUENCE:
        return shard_of(whole, SEQUENCE_DIM, rank, tp, padding)
    if state == WIDTH:
        return shard_of(whole, whole.ndim - 1, rank, tp)
    if state == P:
        return whole * 0 - rank if rank else whole + sum(range(tp))
    return whole.clone()


def gradient_held(whole: Tensor, state: State | str, rank: int, tp: int, padding: float = 0.0) -> Tensor:
    """What a rank is handed, or hands on, of the gradient of an activation in a state: see the table of `state.py`."""
    return held(whole, State.of(state).gradient, rank, tp, padding)


class Alone(nn.Module):
    """The module that is tested, as `m`, and one that is never called: a plan has to split something."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.m = module
        self.other = nn.Linear(2, 4, bias=False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.m(*args, **kwargs)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad for n, p in model.named_parameters(remove_duplicate=False) if p.grad is not None}


def alone(
    make: Callable[[], nn.Module],
    style: Style | str,
    x: Tensor,
    *,
    arrives: State | str = I,
    leaves: State | str = I,
    shapes: dict[str, tuple[Any, ...]],
    forward: list[str],
    backward: list[str],
    rules: dict[str, Any] | None = None,
    what: str = "",
    **options: Any,
) -> nn.Module:
    """On every rank: the module under the style gives what the whole module gives, sends what is said, and nothing else.

    Args:
        make: builds the module.
        x: its whole input; handed over in the state `arrives`, what comes back is in the state `leaves`.
        shapes: parameter name -> its shape on each rank, or one shape if they are equal.
        forward, backward: the kinds of collectives, in their order (after the first pass, which is checked by one more).
        rules: other rules of the plan, of names below `m`; then `style` may be left out with "".
        options: of `parallelize`.

    Returns:
        The split module.
    """
    rank, tp = dist.get_rank(), dist.get_world_size()
    what = f"{what or style}, tp={tp}, rank {rank}"
    whole = Alone(randomize_(make()))
    model = copy.deepcopy(whole)
    x_whole = x.clone().requires_grad_(x.is_floating_point())
    y_whole = whole(x_whole)
    upstream = torch.randn(y_whole.shape, generator=torch.Generator().manual_seed(1))
    y_whole.backward(upstream)

    plan = {"other": Colwise(input="R"), **{f"m.{n}": s for n, s in (rules or {}).items()}}
    if style:
        plan["m"] = style
    ltp.parallelize(model, mesh(), plan, **options)
    for name, p in model.m.named_parameters():
        want = shapes[name]
        want = want if isinstance(want[0], int) else want[rank]
        local = p._tp_shard.local_shape
        assert local == want, f"{what}: {name} is {local}, not {want}"

    axis = model._tp_registry.gradients.axis
    arrives, leaves = State.of(arrives), State.of(leaves)
    if arrives == SEQUENCE:
        axis.seq_len = x.shape[SEQUENCE_DIM]  # as if something before had cut it
    for turn in range(2):
        x_mine = held(x, arrives, rank, tp).requires_grad_(x.is_floating_point())
        model.zero_grad()
        with Collectives() as there:
            y = model(x_mine)
        seen = whole_of(y, leaves, y_whole.shape)
        handed = gradient_held(upstream, leaves, rank, tp)
        if (
            leaves == SEQUENCE
        ):  # a model's output is whole in the end: the sums of gradients count on a transition after the last term
            y, handed = sequence_to_invariant(y, axis), upstream
        with Collectives() as back:
            y.backward(handed)
        if turn:
            assert there.kinds == forward, f"{what}: forward sends {there.sent}, not {forward}"
            assert back.kinds == backward, f"{what}: backward sends {back.sent}, not {backward}"
        got = {"output": seen}
        ref = {"output": y_whole}
        if x_mine.grad is not None:
            got["input gradient"] = whole_gradient_of(x_mine.grad, arrives, x.shape)
            ref["input gradient"] = x_whole.grad
        assert_trees_close(got, ref, name=f"{what}, turn {turn}")
        assert_trees_close(ltp.full_gradients(model), gradients(whole), name=f"{what}, turn {turn}: gradients")
    state = ltp.full_state_dict(model)
    for name, value in whole.state_dict().items():
        assert torch.equal(state[name], value), f"{what}: {name} of the state dict"
    return model


def whole_of(y: Tensor, state: State | str, shape: Any) -> Tensor:
    """The whole tensor from all ranks' pieces; one in `R` or `I` has to be equal on all of them."""
    state = State.of(state)
    tp = dist.get_world_size()
    pieces: list[Any] = [None] * tp
    dist.all_gather_object(pieces, y.detach().clone())
    if state == SEQUENCE:
        return torch.cat(pieces, SEQUENCE_DIM).narrow(SEQUENCE_DIM, 0, shape[SEQUENCE_DIM])
    if state == WIDTH:
        return torch.cat(pieces, -1)
    if state == P:
        return torch.stack(pieces).sum(0)
    assert all(torch.equal(p, pieces[0]) for p in pieces), f"a {state} tensor differs between the ranks"
    return pieces[0]


def whole_gradient_of(grad: Tensor, state: State | str, shape: Any) -> Tensor:
    return whole_of(grad, State.of(state).gradient, shape)
