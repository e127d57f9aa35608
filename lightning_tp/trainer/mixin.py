"""The mixin for a LightningModule that splits itself in `configure_model`."""

from __future__ import annotations

from typing import Any

from lightning_tp.errors import TPError


class TensorParallel:
    """Mixin, to be put first: `class Net(TensorParallel, L.LightningModule)`. Its `configure_model` applies the strategy's plan.

    Under `TPStrategy` a LightningModule is split with or without it. The mixin does it in Lightning's own hook, early, so that a module can
    build itself there (call `super().configure_model()` last) and look at its shards afterwards; `plan` lets the class say how.
    Under any other strategy, and for a second `fit`, it does nothing.

    Attributes:
        plan: a mapping pattern -> style, or a `Plan`; the strategy's own `plan=` comes before it.

    Raises:
        TPError: when the class is defined, if it stands behind LightningModule, whose empty `configure_model` would win.

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
        """Apply the plan, if the Trainer runs `TPStrategy`; a module that is split already stays as it is."""
        strategy = getattr(getattr(self, "_trainer", None), "strategy", None)
        if strategy is not None and hasattr(strategy, "apply_plan"):
            strategy.apply_plan(self)
