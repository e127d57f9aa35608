"""Lightning's averages of weights under a split model: each rank keeps the average of its own shards.

`WeightAveraging`, `EMAWeightAveraging` and `StochasticWeightAveraging` copy the LightningModule before it is split. While a Trainer runs, they
get an average of shards instead, once the module is split, and iterate over each rank's local tensors. When and how to average stays
theirs. In a state dict the average looks like the model: DTensors, or full tensors.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from typing_extensions import override

from lightning_tp._compat import incompatible_keys, local_tensor
from lightning_tp.errors import TPError
from lightning_tp.shards import shard as shards
from lightning_tp.shards import state_dict as state_dicts
from lightning_tp.trainer.patches import private
from lightning_tp.trainer.patches.replaced import replaced


def averaging_callbacks(trainer: pl.Trainer) -> list[Any]:
    """The callbacks of a Trainer that average weights."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return [c for c in callbacks if isinstance(c, (WeightAveraging, StochasticWeightAveraging))]


@contextmanager
def averages_of_shards(trainer: pl.Trainer, *, backend: str = "local") -> Iterator[None]:
    """While a Trainer runs, keep its averaging callbacks from copying the module, and let them iterate over local tensors.

    Args:
        trainer: Its callbacks have not been set up yet.
        backend: The strategy's; the average of DTensors is not supported.

    Raises:
        TPError: If there is such a callback with `backend="dtensor"`.
    """
    if (callbacks := averaging_callbacks(trainer)) and backend == "dtensor":
        raise TPError(f"`{type(callbacks[0]).__name__}` works with `backend='local'`, and the strategy has 'dtensor'.")
    ema, swa = WeightAveraging, StochasticWeightAveraging
    replacements: list[tuple[type, str, Callable[[Any], Any]]] = [
        (ema, "setup", _made_later),
        (ema, "_swap_models", _with_locals),
        (ema, "_copy_average_to_current", _with_locals),
        (swa, "setup", _made_later),
        (swa, "update_parameters", lambda own: staticmethod(_with_locals(own))),
        (swa, "transfer_weights", lambda own: staticmethod(_with_locals(own))),
        (swa, "load_state_dict", lambda own: _with_scheduler_of_swa(own, trainer)),
    ]
    with ExitStack() as stack:
        for owner, name, wrap in replacements:
            if any(isinstance(callback, owner) for callback in callbacks):
                stack.enter_context(replaced(owner, name, wrap))
        yield


def start_averages(trainer: pl.Trainer, module: pl.LightningModule, *, full: bool) -> None:
    """Give each averaging callback an average of this rank's shards.

    Args:
        trainer: Its callbacks have been set up.
        module: Split, and on its device.
        full: Checkpoints hold full tensors, from rank 0.
    """
    for callback in averaging_callbacks(trainer):
        if isinstance(callback, WeightAveraging):
            average: nn.Module = ShardAverage(module, full=full, **private.average_options(callback, module.device))
        else:
            average = Shards(module, torch.device("cpu"), full=full)
        private.set_average(callback, average)


class Shards(nn.Module):
    """A copy of a rank's tensors of a split model: plain parameters and buffers in the model's order, and its state dict's names.

    It can't be called: the callbacks copy its values into the model for that.

    Args:
        module: The model.
        device: Where the copy is kept.
        full: Its state dict has full tensors, on rank 0, and not DTensors.
    """

    def __init__(self, module: nn.Module, device: torch.device | None, *, full: bool) -> None:
        super().__init__()
        self.source = (module,)  # in a tuple: not a submodule
        self.full = full
        locals_ = Locals(module)
        for i, p in enumerate(locals_.parameters()):
            self.register_parameter(f"p{i}", nn.Parameter(p.detach().clone().to(device), p.requires_grad))
        for i, b in enumerate(locals_.buffers()):
            self.register_buffer(f"b{i}", b.detach().clone().to(device))

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise TPError(
            "The average of a split model holds weights only, and can't be called: they are in the model itself while it is validated, and "
            "after training."
        )

    def _named(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """(name in the model's state dict, the model's own tensor, the copy)."""
        (module,) = self.source
        state_dicts.reshard(module)
        pairs = itertools.chain(
            zip(module.parameters(), self.parameters(), strict=True), zip(module.buffers(), self.buffers(), strict=True)
        )
        copies = {id(own): (own, copy) for own, copy in pairs}
        tensors = itertools.chain(module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False))
        for name, tensor in tensors:
            yield (name, *copies[id(tensor)])

    @override
    def state_dict(  # type: ignore[override]
        self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False
    ) -> dict[str, Any]:
        """The model's state dict with the values of the copy. A collective, where it holds full tensors."""
        (module,) = self.source
        state = dict(module.state_dict())
        gathered: dict[int, Tensor] = {}
        for name, own, copy in self._named():
            if name not in state:
                continue
            shard = getattr(own, "_tp_shard", None)
            if shard is None:
                state[name] = copy.detach()
            elif not self.full:
                state[name] = shard.to_dtensor(copy)
            else:
                if id(copy) not in gathered:
                    on_device = copy.detach().to(local_tensor(own).device)
                    gathered[id(copy)] = shard.gather(shards.like(own, on_device)).cpu()
                state[name] = gathered[id(copy)]
        if self.full and torch.distributed.get_rank() != 0:
            state = {}
        out = {} if destination is None else destination
        out.update({prefix + name: value for name, value in state.items()})
        return out

    @override
    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load DTensors of this mesh, or full tensors."""
        for name, own, copy in self._named():
            value = state_dict.get(name)
            if value is None:
                continue
            shard = getattr(own, "_tp_shard", None)
            copy.copy_(local_tensor(value) if shard is None else shard.to_local(value, name))
        return incompatible_keys([], [])

    @override
    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        self.load_state_dict({k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)})


class ShardAverage(AveragedModel):
    """torch's average of a model, over this rank's shards.

    Args:
        full: As in `Shards`; the rest as in torch's AveragedModel.
    """

    def __init__(
        self, module: nn.Module, *, full: bool, device: Any, use_buffers: bool, avg_fn: Any = None, multi_avg_fn: Any = None
    ) -> None:
        if avg_fn is not None and multi_avg_fn is not None:
            raise TPError("`WeightAveraging` has both `avg_fn` and `multi_avg_fn`. Pass one of them.")
        nn.Module.__init__(self)
        self.module = Shards(module, device, full=full)
        self.register_buffer("n_averaged", torch.tensor(0, dtype=torch.long, device=device))
        self.avg_fn, self.multi_avg_fn, self.use_buffers = avg_fn, multi_avg_fn, use_buffers

    @override
    def update_parameters(self, model: nn.Module) -> None:
        super().update_parameters(Locals(model))  # type: ignore[arg-type]


class Locals:
    """This rank's local tensors of a module, which share the module's memory, as a callback iterates over them."""

    def __init__(self, module: nn.Module) -> None:
        state_dicts.reshard(module)
        self.module = module

    def parameters(self) -> Iterator[Tensor]:
        """Yield them in the module's order."""
        for p in self.module.parameters():
            yield local_tensor(p).detach().requires_grad_(p.requires_grad)

    def buffers(self) -> Iterator[Tensor]:
        """Yield them in the module's order."""
        return (local_tensor(b) for b in self.module.buffers())


def _made_later(own: Callable[..., None]) -> Callable[..., None]:
    """Instead of `setup`, which would copy the module before it is split: see `start_averages`."""
    return lambda self, trainer, pl_module, stage: None


def _with_locals(own: Callable[..., None]) -> Callable[..., None]:
    def with_locals(*args: Any) -> None:
        own(*(Locals(a) if isinstance(a, pl.LightningModule) else a for a in args))

    return with_locals


def _with_scheduler_of_swa(own: Callable[..., None], trainer: pl.Trainer) -> Callable[..., None]:
    """SWA's scheduler replaces the user's, whose state is then not in the checkpoint. Lightning drops the user's when fit starts, too early
    for a strategy that restores after its setup."""

    def load_state_dict(self: StochasticWeightAveraging, state_dict: dict[str, Any]) -> None:
        own(self, state_dict)
        if trainer.state.fn == "fit":
            private.use_scheduler_of_swa(self, trainer)

    return load_state_dict
