"""The mixin for a LightningModule that splits itself in `configure_model`."""

from __future__ import annotations

from typing import Any

from lightning_tp.errors import TPError
from lightning_tp.trainer.patches import private


class TensorParallel:
    """Apply the strategy's plan in `configure_model`. To be put first: `class Net(TensorParallel, L.LightningModule)`.

    Under `TPStrategy` a LightningModule is split with or without this mixin. With it the module is split in Lightning's own hook, early, so that it
    can build itself there (call `super().configure_model()` last) and look at its shards afterwards; the attribute `plan` sets its plan.
    Under any other strategy, and in a second `fit`, it does nothing.

    Attributes:
        plan: A mapping pattern -> style, or a `Plan`; the strategy's `plan=` takes precedence.

    Raises:
        TPError: When the class is defined, if it comes after LightningModule, whose empty `configure_model` would win.

    Example:
        >>> import lightning as L
        >>> class Net(TensorParallel, L.LightningModule):
        ...     plan = {"blocks.*.up": "colwise", "blocks.*.down": "rowwise", "**": "replicate"}
        >>> class Wrong(L.LightningModule, TensorParallel):
        ...     pass
        Traceback (most recent call last):
        ...
        lightning_tp.errors.TPError: `class Wrong(LightningModule, TensorParallel)`: put it first: `class Wrong(TensorParallel, LightningModule)`.
    """

    plan: Any = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        mro = [c.__name__ for c in cls.__mro__]
        if "LightningModule" in mro and mro.index("LightningModule") < mro.index(TensorParallel.__name__):
            bases = [b.__name__ for b in cls.__bases__]
            first = ", ".join([TensorParallel.__name__, *(b for b in bases if b != TensorParallel.__name__)])
            raise TPError(f"`class {cls.__name__}({', '.join(bases)})`: put it first: `class {cls.__name__}({first})`.")

    def configure_model(self) -> None:
        """Apply the plan, if the Trainer uses `TPStrategy` and the module is not split yet."""
        strategy = getattr(private.trainer_of(self), "strategy", None)
        if strategy is not None and hasattr(strategy, "apply_plan"):
            strategy.apply_plan(self)
