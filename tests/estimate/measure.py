"""A training step on real ranks, with all that is alive and sent counted: what estimates are held against."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

from lightning_tp.apply.parallelize import parallelize
from lightning_tp.core.comm.mesh import make_mesh
from lightning_tp.plan.plan import Plan
from lightning_tp.shards.grad_norm import clip_grad_norm_
from lightning_tp.shards.gradients import no_sync
from lightning_tp.shards.view import local_view
from lightning_tp.trainer.adapt.precision import MeshGradScaler, fsdp_policy

NAMES = {
    "allreduce_": "all-reduce",
    "_allgather_base_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "allgather_into_tensor_coalesced_": "all-gather",
}


class Watch(TorchDispatchMode):
    """Bytes of all storages that operations have made, as long as they are alive, whatever they were resized to; and collectives."""

    def __init__(self, tp: int) -> None:
        super().__init__()
        self.tp = tp
        self.storages: dict[int, Any] = {}
        self.most = 0
        self.sent: Counter[tuple[str, int, int]] = Counter()
        self.counting = False
        self.ignore: set[int] = set()

    @property
    def now(self) -> int:
        total = 0
        for key, ref in list(self.storages.items()):
            storage = ref()
            if storage is None:
                del self.storages[key]
            else:
                total += storage.nbytes()
        return total

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented
        out = func(*args, **(kwargs or {}))
        if func.namespace == "c10d":
            self._send(func, args)
        elif func is torch.ops.lightning_tp.sum_over_ranks.default:  # one operator, which calls a collective where no mode looks
            x, _, scatter = args
            length = -(-x.shape[1] // self.tp) * self.tp if scatter else x.shape[1]  # the sequence is padded
            size = x.numel() * x.itemsize // x.shape[1] * length
            self.sent["reduce-scatter" if scatter else "all-reduce", self.tp, size] += 1
        for t in tree_flatten(out)[0]:
            if isinstance(t, Tensor) and type(t) is not DTensor and not hasattr(t, "local"):
                s = t.untyped_storage()
                known = self.storages.get(s._cdata)
                if s._cdata not in self.ignore and (known is None or known() is None):  # an address is used again
                    self.storages[s._cdata] = weakref.ref(s)
        if self.counting:
            self.most = max(self.most, self.now)
        return out

    def _send(self, func: Any, args: Any) -> None:
        name = func.overloadpacket.__name__
        if name not in NAMES:
            return
        tensors = [t for t in tree_flatten(args)[0] if isinstance(t, Tensor)]
        group = next(
            dist.ProcessGroup.unbox(a) for a in args if isinstance(a, torch.ScriptObject) and "ProcessGroup" in str(a._type())
        )
        self.sent[NAMES[name], group.size(), max(t.numel() * t.itemsize for t in tensors)] += 1


def held(tensors: Any) -> int:
    """Bytes of the storages of these, each counted once."""
    found = {}
    for t in tensors:
        local = t._local_tensor if isinstance(t, DTensor) else t
        if isinstance(local, Tensor) and local.numel():
            found[local.untyped_storage()._cdata] = local.untyped_storage().nbytes()
    return sum(found.values())


@local_view()  # the bytes of shards, not those of full tensors
def measured(
    build: Callable[[], nn.Module],
    inputs: Any,
    loss_of: Callable[[nn.Module, Any], Tensor],
    dp: int,
    tp: int,
    plan: Plan | None,
    *,
    precision: str = "32-true",
    accumulate: int = 1,
    **options: Any,
) -> dict[str, Any]:
    """On a rank: the fourth step of AdamW, as a Trainer takes it."""
    torch.manual_seed(0)
    model = build()
    model.train()
    if precision == "bf16-true":
        model.to(torch.bfloat16)
        inputs = tree_map_only(Tensor, lambda t: t.to(torch.bfloat16) if t.is_floating_point() else t, inputs)
    mesh = make_mesh("cpu", dp, tp)
    parallelize(model, mesh, plan, precision=fsdp_policy(precision), **options)
    half = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
    scaler = MeshGradScaler("cpu", init_scale=2.0**8, enabled=precision == "16-mixed")  # no step is skipped
    scaler.groups = tuple(group for group in mesh.get_all_groups() if group.size() > 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    saved: dict[int, int] = {}
    parameters = set()
    watch = Watch(tp)

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage()._cdata not in parameters:
            saved[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
        return t

    def step() -> dict[str, int]:
        optimizer.zero_grad()
        saved.clear()
        parameters.clear()
        watch.most = watch.now
        watch.sent.clear()
        handles = [
            m.register_forward_pre_hook(
                lambda m, _: parameters.update(
                    p.untyped_storage()._cdata for p in m.parameters(recurse=False) if not isinstance(p, DTensor)
                )
            )
            for m in model.modules()
        ]
        for i in range(accumulate):
            saved.clear()
            with no_sync(model) if i < accumulate - 1 else nullcontext():
                gc.collect()  # what is garbage by now would be taken for let go of
                before = watch.now
                with ExitStack() as stack:
                    if half is not None:
                        stack.enter_context(torch.autocast("cpu", half))
                    if options.get("activation_checkpointing") is None:
                        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t))
                    loss = loss_of(model, inputs)
                kept = watch.now - before
                scaler.scale(loss).backward()
                del loss
        for h in handles:
            h.remove()
        scaler.unscale_(optimizer)
        clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        kept_saved = sum(n for key, n in saved.items() if key not in parameters)
        return {"kept": kept, "saved": kept_saved}

    watch.ignore = {(p._local_tensor if isinstance(p, DTensor) else p).untyped_storage()._cdata for p in model.parameters()} | {
        b.untyped_storage()._cdata for b in model.buffers()
    }
    with watch:
        for _ in range(3):  # dropout looks at its calls in the first, second, third and fifth step
            step()
        watch.counting = True
        found = step()
    parameters_held = held(model.parameters())
    return {
        "parameters": parameters_held,
        "gradients": held(p.grad for p in model.parameters() if p.grad is not None),
        "optimizer": held(t for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor) and t.ndim),
        "peak": watch.most + parameters_held + held(model.buffers()),
        "sent": dict(watch.sent),
        **found,
    }
