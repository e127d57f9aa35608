"""Draw random numbers in a model's forward equal on all ranks for replicated activations, and each rank's own for shards.

Nobody has to say which is which: `RandomCallPolicy` decides. In the first training step (and in the 2nd, 3rd, 5th, 9th, .., in case something
has changed) it observes all calls of functions that draw (`intercept.py`), and compares over the tensor-parallel group what they are applied
to (`replication.py`): replicated activations are equal on all ranks, shards differ. Calls on shards draw from this rank's own stream from
then on (`rng.py`). In the steps between, only modules that make such calls are intercepted: a model without dropout pays nothing.

| what draws | decided by | drawn from |
|---|---|---|
| dropout, SDPA, .. of an activation | comparing the activation over ranks | shared stream if replicated, else the rank's |
| noise (`torch.rand`, ..) that meets an activation | the same, where they meet | the same, from the next step on |
| noise with one number for each sample (drop path) | its shape | shared stream |
| random integers that index | the function that they are given to | shared stream |
| a call with `generator=` | | that generator |

`torch.seed()` in a forward gives all ranks of a group the same seed. Where they seed themselves differently in another way, the next draw for
a replicated activation in an observed step raises.

`dropout="exact"` gives the masks that one process would draw (`exact_dropout.py`), to compare runs; all steps are observed then.

Not covered: random numbers outside of training mode and in compiled code: there all ranks of a group draw the same.
"""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Iterator
from types import FrameType
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.compiler import is_compiling

from lightning_tp._compat import patched
from lightning_tp.core.comm.axis import Axis
from lightning_tp.core.modules.swap_class import swap_class
from lightning_tp.core.ops.exact_dropout import LastSplitLayer, dropout_region, run_exact
from lightning_tp.core.ops.intercept import CallInterceptor, PerRankCall, intercept_call, key_of, module_calling, per_rank_calls_of
from lightning_tp.core.ops.random_calls import GENERATING, INDEXING, FunctionCall
from lightning_tp.core.ops.replication import CallKey, NoiseSource, is_broadcast_over_shards, shapes_if_sharded
from lightning_tp.core.ops.rng import on_rank_stream
from lightning_tp.errors import TPError

Dropout = Literal["independent", "exact"]


class RandomCallPolicy(CallInterceptor):
    """Decides for each call that draws random numbers whether it draws for all ranks or for this one, and makes it.

    Args:
        axis: the tensor-parallel axis.
        how: "independent" or "exact".

    Attributes:
        steps: training steps so far.
    """

    def __init__(self, axis: Axis, how: Dropout = "independent") -> None:
        super().__init__(axis)
        self.exact = how == "exact"
        self.steps = 0
        self.last_split_layer = LastSplitLayer()  # for `exact`
        self._observing = False
        self._seeds: random.Random | None = None  # the same on all ranks of the group, from the first `torch.seed()` on

    def __deepcopy__(self, memo: dict[int, Any]) -> RandomCallPolicy:
        memo[id(self)] = twin = RandomCallPolicy(copy.deepcopy(self.axis, memo), "exact" if self.exact else "independent")
        twin.last_split_layer = copy.deepcopy(self.last_split_layer, memo)  # whose hooks the copied layers have
        return twin

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Run a training step in this context; the first, second, third, fifth, ninth, .. are observed."""
        number, self.steps = self.steps, self.steps + 1
        if self.mode_active or is_compiling():
            yield
            return
        unpatch = patched(torch, "seed", self.seed)
        self._observing = self.exact or not number & (number - 1)
        try:
            with self.all_calls() if self._observing else contextlib.nullcontext():
                yield
        finally:
            self._observing = False
            self.noise.clear()
            unpatch()

    def seed(self) -> int:
        """Do what `torch.seed()` does, with the same seed on all ranks of the group. A collective the first time."""
        if self._seeds is None:
            payload = [random.SystemRandom().getrandbits(63)]
            dist.broadcast_object_list(payload, group=self.axis.group, group_src=0)
            self._seeds = random.Random(payload[0])
        seed = self._seeds.getrandbits(63)
        torch.manual_seed(seed)
        return seed

    def run_random_call(self, call: FunctionCall, frame: FrameType) -> Any:
        if call.kwargs.get("generator") is not None or not call.is_random:
            return call.run()
        key = key_of(call, frame)
        if not self._observing:
            return self._run(call, self.running[-1].get(key) if self.running else None)
        module, function_only = module_calling(frame)
        known = None if module is None else per_rank_calls_of(module).get(key)
        if known is None and call.func not in GENERATING:
            known = self._decide(call, key, module, function_only)
        out = self._run(call, known)
        if known is None and call.func in GENERATING and isinstance(out, Tensor):
            self.noise.add(out, NoiseSource(None if function_only else module, key))
        return out

    def run_other_call(self, call: FunctionCall) -> Any:
        out = call.run()
        if (meeting := self.noise.meeting(call, out)) is not None:
            self._decide_noise(call, *meeting)
        return out

    def _decide(self, call: FunctionCall, key: CallKey, module: nn.Module | None, function_only: bool) -> PerRankCall | None:
        """Decide whether a call is on a shard (then it gives what it is from now on) or on a replicated activation (None). A collective."""
        shapes = shapes_if_sharded(call.input, self.axis)
        if shapes is None:
            return None
        if function_only:
            raise TPError(
                f"{type(module).__name__}: `{call.name}` draws random numbers for a shard of an activation in a function that is passed to "
                "`torch.utils.checkpoint`, and its recomputation in the backward pass can't be intercepted. Pass a module instead (the block "
                "itself), or use `activation_checkpointing='block'`."
            )
        region = dropout_region(call, shapes, self.axis, module, self.last_split_layer.output) if self.exact else None
        decided = PerRankCall(self.functional_name, region)
        if module is not None:  # else in the step itself: nothing is recomputed, steps that are not observed draw for all
            intercept_call(module, key, decided, self)
        return decided

    def _decide_noise(self, call: FunctionCall, noise: Tensor, activation: Tensor, source: NoiseSource) -> None:
        """Decide whether the call that generated this noise draws for a shard, from the next step on: this one has drawn already."""
        positions = call.func in INDEXING and not noise.is_floating_point() and noise.dtype is not torch.bool
        if positions or is_broadcast_over_shards(noise.shape, activation.shape, self.axis):
            return
        if shapes_if_sharded(activation, self.axis) is None:
            return
        if self.exact:
            raise TPError(
                f'`dropout="exact"`: {type(source.module).__name__} draws `{source.key[0]}` of shape {tuple(noise.shape)} for a shard of shape '
                f"{tuple(activation.shape)}, and what one process would draw for the full activation is not known. Use F.dropout, or "
                '`dropout="independent"`.'
            )
        if source.module is not None:
            intercept_call(source.module, source.key, PerRankCall(), self)

    def _run(self, call: FunctionCall, decided: PerRankCall | None) -> Any:
        if decided is None:
            return call.run()
        if decided.region is None:
            return on_rank_stream(self.axis.rank, call.device, call.run)
        return run_exact(call, decided.region, self.axis)


class _ObservedModel(nn.Module):
    """A model whose training steps begin with its own forward, as no Trainer tells when they do."""

    _tp_random_policy: RandomCallPolicy

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.training:
            return super().forward(*args, **kwargs)
        with self._tp_random_policy.step():
            return super().forward(*args, **kwargs)


def bind_random_calls(model: nn.Module, axis: Axis, how: Dropout) -> None:
    """Let a model that runs on its shards already draw random numbers as `how` says."""
    policy = RandomCallPolicy(axis, how)
    if policy.exact:
        policy.last_split_layer.watch(model)
    if hasattr(model, "training_step"):  # a LightningModule: the strategy calls `policy_of(module).step()`
        model.__dict__["_tp_random_policy"] = policy
    else:
        swap_class(model, _ObservedModel, _tp_random_policy=policy)


def policy_of(model: nn.Module) -> RandomCallPolicy | None:
    """Return the policy of a model, or of the one inside it that `parallelize` was applied to."""
    return next((m.__dict__["_tp_random_policy"] for m in model.modules() if "_tp_random_policy" in m.__dict__), None)
