"""Let the blocks of a sequence-parallel stream hand on its shards as what they are: they may be left out, repeated, or called by themselves."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.compiler import is_compiling

from lightning_tp.core.comm.axis import Axis
from lightning_tp.core.comm.state import SEQUENCE, I
from lightning_tp.core.comm.transitions import invariant_to_sequence
from lightning_tp.core.modules.swap_class import swap_class
from lightning_tp.core.ops.stream_shard import StreamShard, plain_shard, stream_shard
from lightning_tp.plan.checked import CheckedPlan
from lightning_tp.styles import PrepareInput, PrepareOutput


class _Block(nn.Module):
    """A block of a stream: what it is given is this rank's shard, or full and plain."""

    _stream: tuple[Axis, int | str | None, bool, bool]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if is_compiling():
            return super().__call__(*args, **kwargs)
        axis, arg, is_first, is_last = self._stream
        if arg is None:
            arg = _first_argument(args, kwargs)
        x = args[arg] if isinstance(arg, int) and arg < len(args) else kwargs.get(arg)  # type: ignore[arg-type]
        if isinstance(x, StreamShard):
            x = x.full_tensor() if is_first else _entered(x, axis)
        elif isinstance(x, Tensor) and not is_first:
            x = invariant_to_sequence(x, axis)
        if isinstance(arg, int) and arg < len(args):
            args = (*args[:arg], x, *args[arg + 1 :])
        elif arg in kwargs:
            kwargs[arg] = x
        out = super().__call__(*args, **kwargs)
        first = out[0] if isinstance(out, (tuple, list)) and out else out
        if not is_last and type(first) is Tensor and axis.seq_len is not None:
            stream_shard(first, axis, axis.seq_len)
        return out


def _first_argument(args: Any, kwargs: dict[str, Any]) -> Any:
    """Return the position or the name of the first floating-point tensor."""
    named: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
    return next((k for k, v in named.items() if isinstance(v, Tensor) and v.is_floating_point()), None)


def _entered(x: StreamShard, axis: Axis) -> Tensor:
    axis.seq_len = x.length
    return plain_shard(x)


def mark_streams(model: nn.Module, plan: CheckedPlan, axis: Axis) -> None:
    """Find the streams of a plan by where they begin and end in a container, and mark the blocks in between."""
    modules = dict(model.named_modules())
    begins = {
        e.where: e.style
        for e in plan.entries
        if isinstance(e.style, PrepareInput) and (e.style.arrives, e.style.wanted) == (I, SEQUENCE)
    }
    ends = [
        e.where for e in plan.entries if isinstance(e.style, PrepareOutput) and (e.style.arrives, e.style.wanted) == (SEQUENCE, I)
    ]
    for first, style in begins.items():
        container = first.rpartition(".")[0]
        last = next((e for e in ends if e.rpartition(".")[0] == container), None)
        if last is None or container not in modules:
            continue
        names = [f"{container}.{n}" if container else n for n, _ in modules[container].named_children()]
        for name in names[names.index(first) : names.index(last) + 1]:
            swap_class(modules[name], _Block, _stream=(axis, style.arg, name == first, name == last))
