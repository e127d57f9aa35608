"""Torch functions that draw random numbers, and what the arguments of one call mean."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from lightning_tp._compat import num_writes
from lightning_tp.core.modules.objects import preserve_objects
from lightning_tp.errors import TPError

MOST_COPIED = 50_000_000  # parameters, of which a copy is kept while a model is run for a try
SDPA = F.scaled_dot_product_attention

# functions that take an activation and return it changed at random
CHANGING = frozenset(
    {
        F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout, F.rrelu, F.gumbel_softmax, SDPA,
        torch.dropout, torch.dropout_, torch.native_dropout, torch.alpha_dropout, torch.feature_dropout, torch.rrelu, torch.multinomial,
        torch.poisson,
    }
)  # fmt: skip

# functions that generate random numbers by themselves: noise, which meets an activation later or never
GENERATING = frozenset(
    {
        torch.rand, torch.randn, torch.randint, torch.randperm, torch.normal, Tensor.bernoulli_, Tensor.uniform_, Tensor.normal_,
        Tensor.exponential_, Tensor.random_, Tensor.geometric_, Tensor.cauchy_, Tensor.log_normal_, torch.bernoulli, Tensor.bernoulli,
        torch.rand_like, torch.randn_like, torch.randint_like,
    }
)  # fmt: skip

RANDOM_FUNCTIONS = CHANGING | GENERATING

# functions to which random integers are positions: every rank has to take the same
INDEXING = frozenset({Tensor.__getitem__, torch.index_select, Tensor.index_select, F.embedding, torch.embedding})

# attributes of `torch.nn.functional` that nearly all code calls by this name
FUNCTIONAL: dict[str, Callable[..., Any]] = {"dropout": F.dropout, "scaled_dot_product_attention": SDPA}


class FunctionCall(NamedTuple):
    """A call of a torch function, as a `TorchFunctionMode` sees it.

    Example:
        >>> call = FunctionCall(F.dropout, (torch.ones(3), 0.1), {"training": False})
        >>> call.name, call.p, call.is_random
        ('dropout', 0.1, False)
    """

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self) -> Any:
        return self.func(*self.args, **self.kwargs)

    def argument(self, name: str, position: int, default: Any = False) -> Any:
        """Return an argument that may be given by position or by name."""
        return self.args[position] if len(self.args) > position else self.kwargs.get(name, default)

    @property
    def name(self) -> str:
        return str(getattr(self.func, "__name__", self.func))

    @property
    def p(self) -> float:
        """The probability of a dropout, or of the dropout in an attention."""
        return float(self.argument("dropout_p", 4, 0.0) if self.func is SDPA else self.argument("p", 1, 0.5))

    @property
    def is_random(self) -> bool:
        """Whether a call of one of `RANDOM_FUNCTIONS` draws at all: dropout does not with p = 0 or outside of training."""
        if self.func in GENERATING:
            return True
        if self.func is SDPA:
            return bool(self.p)
        if "dropout" in self.name:
            return bool(self.p) and bool(self.argument("training", 2, self.kwargs.get("train", True)))
        return self.func is not F.rrelu or bool(self.argument("training", 3))

    @property
    def input(self) -> Tensor:
        """The activation that one of `CHANGING` is applied to."""
        named = (self.kwargs[k] for k in ("input", "query", "logits") if k in self.kwargs)
        found = self.args[0] if self.args else next(named, None)
        assert isinstance(found, Tensor)
        return found

    @property
    def tensors(self) -> list[Tensor]:
        return [t for t in (*self.args, *self.kwargs.values()) if isinstance(t, Tensor)]

    @property
    def device(self) -> torch.device:
        """Where the random numbers are drawn."""
        given = next(iter(self.tensors), None)
        return given.device if given is not None else torch.empty(0, device=self.kwargs.get("device")).device


class without_dropout(TorchFunctionMode):
    """Turn dropout off for as long as this is entered, so that two runs of a model can be compared.

    Example:
        >>> with without_dropout():
        ...     F.dropout(torch.ones(3), 0.5)
        tensor([1., 1., 1.])
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in CHANGING:
            return func(*args, **(kwargs or {}))
        call = FunctionCall(func, args, kwargs or {})
        if func is SDPA and call.p:
            return func(*args[:4], **{**dict(zip(("dropout_p", "is_causal"), args[4:])), **call.kwargs, "dropout_p": 0.0})
        if "dropout" in call.name and func is not torch.native_dropout and call.is_random:
            return call.input
        return call.run()


@contextmanager
def comparable_runs(model: nn.Module) -> Iterator[None]:
    """Run a model in this context several times and compare: dropout is off; weights, buffers, generators and objects are restored on exit.

    Raises:
        TPError: if the model writes into a parameter, and has too many to keep a copy of them all.
    """
    parameters = [p for p in model.parameters() if not (p.is_meta or is_lazy(p))]
    copied = parameters if sum(p.numel() for p in parameters) <= MOST_COPIED else []
    tensors = [*(b for b in model.buffers() if not b.is_meta), *copied]
    copies = [(t, t.detach().clone()) for t in tensors]
    states = [_state(p) for p in parameters]
    try:
        with preserve_objects([model]), without_dropout():
            yield
    finally:
        with torch.no_grad():
            for t, value in copies:
                if t.shape == value.shape and (
                    t.layout is not torch.strided or not torch.equal(t, value)
                ):  # a graph may have saved it
                    t.copy_(value)
    changed = [] if copied else [p for p, before in zip(parameters, states, strict=True) if _state(p) != before]
    if changed:
        name = next(n for n, p in model.named_parameters() if p is changed[0])
        raise TPError(
            f"Finding a plan has run the model, whose forward writes into the parameter `{name}`. Infer the plan on its own, from another "
            "instance of the model (`ltp.infer_plan`), and pass it as `plan=`."
        )


def _state(t: Tensor) -> tuple[int, int]:
    """Return what differs after a write into a tensor, or another value of its `data`."""
    return num_writes(t), t.data_ptr() if t.layout == torch.strided else 0
