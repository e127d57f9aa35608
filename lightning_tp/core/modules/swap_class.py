"""Give one module a subclass of its own class."""

from __future__ import annotations

import sys
from functools import cache
from types import CellType, FunctionType
from typing import Any

from torch import nn

from lightning_tp.errors import TPError


def swap_class(module: nn.Module, mixin: type, **attributes: Any) -> None:
    """Let this one module run through `mixin.forward`: a subclass of its own class, as FSDP2 does it.

    Replacing the class costs nothing at run time (a hook does), and survives `copy.deepcopy` (a replaced `forward` does not). A mixin that
    is a layer itself (an `nn.Embedding`) takes that layer's place under the module's class: what a subclass adds stays.
    """
    try:
        module.__class__ = _subclass(mixin, type(module))  # type: ignore[arg-type]  # a class is hashable, whatever its instances are
    except TypeError:  # "object layout differs": its class has other bases before nn.Module
        module.__class__ = _grafted(mixin, type(module))  # type: ignore[arg-type]
    for name, value in attributes.items():
        module.__dict__[name] = value


@cache
def _subclass(mixin: type, cls: type) -> type:
    layer = mixin.__mro__[1]
    beneath = layer is nn.Embedding and layer is not cls and issubclass(cls, layer)
    bases = (cls, mixin) if beneath else (mixin,) if issubclass(mixin, cls) else (mixin, cls)
    own = {"__module__": cls.__module__, "__reduce_ex__": _reduce}
    return type(_name(mixin, cls), bases, own)


def _name(mixin: type, cls: type) -> str:
    """Name a layer's class by its style; that of a module which holds layers stays, since it is written into files (transformers' configs)."""
    return cls.__name__ if mixin.__name__ in _KEEP_NAME else f"{mixin.__name__.removeprefix('_')}{cls.__name__}"


_KEEP_NAME = {
    "_Entry",
    "_Sized",
    "_RewrittenCalls",
    "_UnderCallMode",
    "_Block",
    "_ObservedModel",
    "ReplacedForward",
    "_Checkpointed",
    "_Compiled",
}


def _reduce(self: Any, protocol: Any) -> Any:
    """Let `copy` copy a module; a pickle could not find its class, and would hold one rank's shards."""
    if sys._getframe(1).f_globals.get("__name__") != "copy":
        raise TPError(
            f"{type(self).__name__}, a module of a model that is split, can't be pickled: it holds the shards of this rank. Call "
            "`full_state_dict(module)` on every rank, save that, and load it into a new module."
        )
    return object.__reduce_ex__(self, protocol)


@cache
def _grafted(mixin: type, cls: type) -> type:
    """A subclass of `cls` alone, with the functions of `mixin`, whose `super()` is `cls`."""
    own = {"__module__": cls.__module__, "__reduce_ex__": _reduce}
    made = type(_name(mixin, cls), (cls,), own)
    for name, f in vars(mixin).items():
        if isinstance(f, FunctionType):
            cells = zip(f.__code__.co_freevars, f.__closure__ or (), strict=True)
            closure = tuple(CellType(made) if n == "__class__" else c for n, c in cells)
            twin = FunctionType(f.__code__, f.__globals__, f.__name__, f.__defaults__, closure)
            twin.__kwdefaults__ = f.__kwdefaults__
            setattr(made, name, twin)
    return made
