"""Lightning's averages of weights, of a split model: each rank keeps the average of its shards.

`WeightAveraging`, `EMAWeightAveraging` and `StochasticWeightAveraging` copy the LightningModule before it is split. For as long as a
Trainer runs, they get a `ShardAverage` instead, once it is split, and see each rank's local tensors of the model. All that
decides when and how to average stays theirs. In a state dict the average is as the model is: DTensors, or whole tensors.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from typing_extensions import override

from lightning_tp._compat import local_tensor, patched
from lightning_tp.errors import TPError
from lightning_tp.shards import shard as shard_module
from lightning_tp.shards import state_dict as border

CURRENT_MODEL = "current_model_state"  # WeightAveraging: the model's own weights, while `state_dict` has the average


class Averaging:
    """What a strategy changes about the averaging callbacks for as long as its Trainer runs.

    Args:
        trainer: whose callbacks have not been set up.
        whole: checkpoints hold whole tensors, of rank 0.
    """

    def __init__(self, trainer: pl.Trainer, *, whole: bool) -> None:
        self.trainer, self.whole = trainer, whole
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        self.callbacks = [c for c in callbacks if isinstance(c, (WeightAveraging, StochasticWeightAveraging))]
        self._undo: list[Callable[[], None]] = []
        if not self.callbacks:
            return
        ema, swa = WeightAveraging, StochasticWeightAveraging
        replaced: dict[tuple[type, str], Any] = {
            (ema, "setup"): _later,
            (ema, "_swap_models"): _with_locals(ema._swap_models),
            (ema, "_copy_average_to_current"): _with_locals(ema._copy_average_to_current),
            (swa, "setup"): _later,
            (swa, "update_parameters"): staticmethod(_with_locals(swa.update_parameters)),
            (swa, "transfer_weights"): staticmethod(_with_locals(swa.transfer_weights)),
            (swa, "load_state_dict"): _without_other_schedulers(swa.load_state_dict, trainer),
        }
        self._undo = [patched(owner, name, value) for (owner, name), value in replaced.items()]

    def begin(self, module: pl.LightningModule) -> None:
        """The averages of the module, which is split now and on its device."""
        for callback in self.callbacks:
            device = callback._device or module.device
            if isinstance(callback, WeightAveraging):
                average = ShardAverage(module, device, whole=self.whole, use_buffers=callback._use_buffers, **callback._kwargs)
                callback._average_model = average
            else:
                callback._average_model = Shards(module, torch.device("cpu"), whole=self.whole)  # type: ignore[assignment]

    def close(self) -> None:
        """Back to as it was."""
        while self._undo:
            self._undo.pop()()


class Shards(nn.Module):
    """A rank's tensors of a split model, copied: plain parameters and buffers in the model's own order, and its state dict's names.

    It can't be called: the callbacks put its values into the model for that.
    """

    def __init__(self, module: nn.Module, device: torch.device | None, *, whole: bool) -> None:
        super().__init__()
        self._of = (module,)  # in a tuple: not a submodule
        self.whole = whole
        locals_ = Locals(module)
        for i, p in enumerate(locals_.parameters()):
            self.register_parameter(f"p{i}", nn.Parameter(p.detach().clone().to(device), p.requires_grad))
        for i, b in enumerate(locals_.buffers()):
            self.register_buffer(f"b{i}", b.detach().clone().to(device))

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise TPError(
            "The average of a split model is weights only, and can't be called: they are in the model itself while it is validated, and "
            "after training."
        )

    def _named(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """(name in the model's state dict, the model's own tensor, the copy)."""
        (module,) = self._of
        border.reshard(module)
        pairs = itertools.chain(
            zip(module.parameters(), self.parameters(), strict=True), zip(module.buffers(), self.buffers(), strict=True)
        )
        of = {id(own): (own, copy) for own, copy in pairs}
        tensors = itertools.chain(module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False))
        for name, tensor in tensors:
            yield (name, *of[id(tensor)])

    @override
    def state_dict(  # type: ignore[override]
        self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False
    ) -> dict[str, Any]:
        """As the model's own, with the values of the copy. A collective, where it holds whole tensors."""
        (module,) = self._of
        state = dict(module.state_dict())
        gathered: dict[int, Tensor] = {}
        for name, own, copy in self._named():
            if name not in state:
                continue
            shard = getattr(own, "_tp_shard", None)
            if shard is None:
                state[name] = copy.detach()
            elif not self.whole:
                state[name] = shard.to_dtensor(copy)
            else:
                if id(copy) not in gathered:
                    on_device = copy.detach().to(local_tensor(own).device)
                    gathered[id(copy)] = shard.gather(shard_module.like(own, on_device)).cpu()
                state[name] = gathered[id(copy)]
        if self.whole and torch.distributed.get_rank() != 0:
            state = {}
        out = {} if destination is None else destination
        out.update({prefix + name: value for name, value in state.items()})
        return out

    @override
    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """From DTensors of this mesh, or whole tensors."""
        for name, own, copy in self._named():
            value = state_dict.get(name)
            if value is None:
                continue
            shard = getattr(own, "_tp_shard", None)
            copy.copy_(local_tensor(value) if shard is None else shard.to_local(value, name))
        return nn.modules.module._IncompatibleKeys([], [])

    @override
    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        self.load_state_dict({k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)})


class ShardAverage(AveragedModel):
    """torch's average of a model, of this rank's shards."""

    def __init__(
        self, module: nn.Module, device: Any, *, whole: bool, use_buffers: bool, avg_fn: Any = None, multi_avg_fn: Any = None
    ) -> None:
        if avg_fn is not None and multi_avg_fn is not None:
            raise TPError("`WeightAveraging`: there are both `avg_fn` and `multi_avg_fn`; give one of them.")
        nn.Module.__init__(self)
        self.module = Shards(module, device, whole=whole)
        self.register_buffer("n_averaged", torch.tensor(0, dtype=torch.long, device=device))
        self.avg_fn, self.multi_avg_fn, self.use_buffers = avg_fn, multi_avg_fn, use_buffers

    @override
    def update_parameters(self, model: nn.Module) -> None:
        super().update_parameters(Locals(model))  # type: ignore[arg-type]


class Locals:
    """A module as the callbacks iterate over it, with this rank's local tensors, which are those of the module."""

    def __init__(self, module: nn.Module) -> None:
        border.reshard(module)
        self.module = module

    def parameters(self) -> Iterator[Tensor]:
        """In the module's order."""
        for p in self.module.parameters():
            yield local_tensor(p).detach().requires_grad_(p.requires_grad)

    def buffers(self) -> Iterator[Tensor]:
        """In the module's order."""
        return (local_tensor(b) for b in self.module.buffers())


def _later(self: Any, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
    """In the place of `setup`, which would copy the module before it is split. See `Averaging.begin`."""


def _with_locals(method: Callable[..., None]) -> Callable[..., None]:
    def with_locals(*args: Any) -> None:
        method(*(Locals(a) if isinstance(a, pl.LightningModule) else a for a in args))

    return with_locals


def _without_other_schedulers(load: Callable[..., None], trainer: pl.Trainer) -> Callable[..., None]:
    """SWA's scheduler takes the place of the user's, whose state is not in the checkpoint then. Lightning clears it when fit starts, too early
    for a strategy that restores after its setup."""

    def load_state_dict(self: StochasticWeightAveraging, state: dict[str, Any]) -> None:
        load(self, state)
        if self._scheduler_state is not None and trainer.state.fn == "fit":
            self._clear_schedulers(trainer)

    return load_state_dict
