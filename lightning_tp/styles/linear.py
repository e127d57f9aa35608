"""Linear layers split by their output features (column-wise) or by their input features (row-wise).

After Megatron-LM (Shoeybi et al. 2019, arXiv 1909.08053): a column-wise layer followed by a row-wise one needs one collective at each
end of the pair. torch's counterparts are `ColwiseParallel` and `RowwiseParallel`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor, nn

from lightning_tp._compat import own_parameters
from lightning_tp.core.comm.axis import Axis
from lightning_tp.core.comm.state import SEQUENCE, WIDTH, I, P, R, State
from lightning_tp.core.comm.transitions import Transition, invariant_to_sequence, transition, width_to_invariant
from lightning_tp.core.modules.swap_class import swap_class
from lightning_tp.errors import TPError
from lightning_tp.styles.base import BindContext, PlanContext, Style, layout, linear_dims, set_sizes
from lightning_tp.styles.split import Ranges, Split, check_heads, even_split, head_split, split_of_ranges


def runs_torchs_code(module: nn.Module) -> bool:
    """Whether this is a linear layer or a convolution, and no class below has a forward of its own."""
    own = next((c for c in (nn.Linear, *CONVOLUTIONS) if isinstance(module, c)), None)
    methods = ("forward", "_conv_forward") if own in CONVOLUTIONS else ("forward",)
    return own is not None and all(getattr(getattr(type(module), m), "__code__", None) is getattr(own, m).__code__ for m in methods)


CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Colwise(Style):
    """Split a linear layer by its output features: weight (out, in) -> (out / tp, in), bias (out,) -> (out / tp,).

    Also an `nn.Embedding`, by its width: (n, d) -> (n, d / tp), with the output all-gathered; and an `nn.Conv1d`, `nn.Conv2d` or
    `nn.Conv3d` without groups, by its output channels, with the output all-gathered (`output=I`).

    Args:
        heads: the output is this many heads, and a rank gets whole ones; fewer (key/value) heads than tp are shared by neighbouring ranks.
        query_heads: with `heads`, the number of query heads, which tp has to divide. Default: `heads`.
        input: the state in which its input arrives: `R` (taken to it by an enclosing module), `I` or `S(1)`.
        output: the state in which its output leaves: `S(-1)` (sharded), or `I` (all-gathered); of an embedding also `S(1)`.
        ranges: for each rank the (start, stop) ranges of the output features that it holds, where they are not cut evenly.

    Example:
        >>> from torch import nn
        >>> Colwise().splits(nn.Linear(64, 341), "up", tp=2)["weight"].local_shape((341, 64), rank=1)
        (170, 64)
    """

    name: ClassVar[str] = "colwise"
    states: ClassVar[dict[str, tuple[State, ...]]] = {"input": (R, I, SEQUENCE), "output": (WIDTH, I, SEQUENCE)}
    heads: int | None = None
    query_heads: int | None = None
    input: State | None = None
    output: State = WIDTH
    ranges: tuple[Ranges, ...] | None = None

    def splits(self, module: nn.Module, where: str, tp: int) -> dict[str, Split]:
        if isinstance(module, nn.Embedding):
            refuse_embedding_options(module, where)
            return {"weight": even_split(module.embedding_dim, 1, tp)}
        if isinstance(module, CONVOLUTIONS) and self.output == I:
            if module.groups > 1:
                raise TPError(f"`{where}`: `{self.name}` splits no convolution of {module.groups} groups. Use `replicate` for it.")
            self._refuse_sequence("input", where, "a convolution")
            given = ("weight",) if module.bias is None else ("weight", "bias")
            return {name: even_split(module.out_channels, 0, tp) for name in given}
        out_dim, _, shape = linear_dims(module, where, self.name)
        self._refuse_sequence("output", where, "a linear layer")
        length = shape[out_dim]
        heads = self.heads if self.output == WIDTH else None  # who gathers the output sees whole heads anyway
        if heads is not None:
            check_heads(where, heads, self.query_heads or heads, length, tp)
        names = {"weight": _split(length, out_dim, tp, self.ranges, heads)}
        if getattr(module, "bias", None) is not None:
            names["bias"] = _split(length, 0, tp, self.ranges, heads)
        return names

    def bind(self, module: nn.Module, site: BindContext) -> None:
        if isinstance(module, nn.Embedding):
            swap_class(module, _WidthEmbedding, _axis=site.axis, _width=module.embedding_dim, _leaves=self.output)
            module.embedding_dim = module.weight.shape[1]
            return
        if isinstance(module, CONVOLUTIONS):
            enter = transition(self.input or R, R)
            swap_class(module, _ColwiseConvolution, _axis=site.axis, _enter=enter, _gather=module.out_channels)
            return
        out_dim, _, shape = linear_dims(module, site.where, self.name)
        width = set_sizes(module, out_features=shape[out_dim], nf=shape[out_dim])
        enter = transition(self.input or R, R)
        if enter is None and self.output == WIDTH:
            return  # a plain linear layer on its own columns
        gathered = width if self.output == I else None
        if gathered is not None and isinstance(module, nn.Linear):
            module.out_features = width  # code around it reads the size of the output
        swap_class(module, _Colwise, _axis=site.axis, _enter=enter, _gather=gathered)

    def fill_in(self, where: str, module: nn.Module | None, plan: PlanContext) -> Style:
        if isinstance(module, nn.Embedding):
            return replace(self, output=plan.stream) if self.output == WIDTH else self
        style = self if self.input is not None else replace(self, input=R if plan.is_inside_boundary(where) else plan.stream)
        # where the output is gathered again, a cut may go through heads
        if isinstance(module, nn.Linear) and self.output == WIDTH and self.heads is None and self.ranges is None:
            heads, query_heads = plan.heads(where)
            style = replace(style, heads=heads, query_heads=query_heads)
        return style

    def to_torch(self, module: nn.Module) -> Any:
        from torch.distributed.tensor.parallel import ColwiseParallel

        if isinstance(module, CONVOLUTIONS):
            raise TPError("torch's styles split no convolution.")
        return ColwiseParallel(input_layouts=layout(self.input or I), output_layouts=layout(self.output))

    def _refuse_sequence(self, option: str, where: str, what: str) -> None:
        if getattr(self, option) == SEQUENCE:
            allowed = " or ".join(str(s) for s in self.states[option] if s != SEQUENCE)
            raise TPError(f"`{where}`: `{self.name}({option}=S(1))` is not for {what}: {option} can be {allowed}.")


@dataclass(frozen=True)
class Rowwise(Style):
    """Split a linear layer by its input features: weight (out, in) -> (out, in / tp); the bias is full and added once.

    Args:
        input: the state in which its input arrives: `S(-1)` (the shard that a column-wise layer leaves), or `I` (it is sharded here).
        output: the state in which its output leaves: `I` (all-reduce), `S(1)` (reduce-scatter), or `P` (partial sums, which an enclosing
            module reduces). Default: that of the activations between split modules.
        ranges: for each rank the (start, stop) ranges of the input features that it holds, where they are not cut evenly.

    Example:
        >>> from torch import nn
        >>> Rowwise().splits(nn.Linear(341, 64), "down", tp=2)["weight"].local_shape((64, 341), rank=0)
        (64, 171)
    """

    name: ClassVar[str] = "rowwise"
    states: ClassVar[dict[str, tuple[State, ...]]] = {"input": (WIDTH, I), "output": (I, SEQUENCE, P)}
    input: State = WIDTH
    output: State | None = None
    ranges: tuple[Ranges, ...] | None = None

    def splits(self, module: nn.Module, where: str, tp: int) -> dict[str, Split]:
        _, in_dim, shape = linear_dims(module, where, self.name)
        names = {"weight": _split(shape[in_dim], in_dim, tp, self.ranges)}
        if getattr(module, "bias", None) is not None:
            # where it is added to this rank's tokens only, or to one term of a sum, its gradient is partial
            names["bias"] = Split(R if self.output in (SEQUENCE, P) else I)
        return names

    def bind(self, module: nn.Module, site: BindContext) -> None:
        _, in_dim, shape = linear_dims(module, site.where, self.name)
        set_sizes(module, in_features=shape[in_dim], nx=shape[in_dim])
        leave = transition(P, self.output or I)
        has_bias = own_parameters(module).get("bias") is not None
        if has_bias and hasattr(module, "nf"):
            swap_class(module, _Conv1DProduct)
        swap_class(module, _Rowwise, _axis=site.axis, _enter=transition(self.input, WIDTH), _leave=leave, _has_bias=has_bias)

    def to_torch(self, module: nn.Module) -> Any:
        from torch.distributed.tensor.parallel import RowwiseParallel

        if self.output == P:
            raise TPError("its partial sums are reduced by the module around it, which torch's styles don't do.")
        return RowwiseParallel(input_layouts=layout(self.input), output_layouts=layout(self.output or I))


class _Colwise(nn.Module):
    """Runs a linear layer on this rank's columns, with a collective before or after."""

    _axis: Axis
    _enter: Transition | None
    _gather: int | None

    def forward(self, x: Tensor) -> Tensor:
        axis, enter, gather = self._axis, self._enter, self._gather
        if enter is not None:
            x = axis.share(x, enter)
        y = super().forward(x)  # (.., out / tp)
        return y if gather is None else width_to_invariant(y, axis, gather)


class _ColwiseConvolution(nn.Module):
    """Runs a convolution for this rank's output channels, and all-gathers them."""

    _axis: Axis
    _enter: Transition | None
    _gather: int
    weight: Tensor

    def forward(self, x: Tensor) -> Tensor:
        axis, enter = self._axis, self._enter
        if enter is not None:
            x = axis.share(x, enter)
        channels = 1 - self.weight.ndim  # of (B, C, ..), or (C, ..)
        y = super().forward(x).movedim(channels, -1).contiguous()
        return width_to_invariant(y, axis, self._gather).movedim(-1, channels)


class _Rowwise(nn.Module):
    """Runs a linear layer on this rank's rows, reduces over the ranks, then adds the bias once."""

    _axis: Axis
    _enter: Transition | None
    _leave: Transition | None
    _has_bias: bool
    bias: Tensor

    def forward(self, x: Tensor) -> Tensor:
        axis = self._axis
        axis.forget()
        if self._enter is not None:
            x = self._enter(x, axis)
        axis.summing = True
        if not self._has_bias:
            y = super().forward(x)
            axis.summing = False
            return y if self._leave is None else self._leave(y, axis)  # P -> I: all-reduce; P -> S(1): reduce-scatter
        self.__dict__["bias"] = None  # hidden from the layer's own forward, which would add it on every rank, and not from FSDP2
        try:
            y = super().forward(x)
        finally:
            del self.__dict__["bias"]
            axis.summing = False
        if self._leave is None:  # added to one of the terms; on all ranks it has a gradient
            return y + (self.bias * 0 if axis.rank else self.bias)
        return self._leave(y, axis) + self.bias


class _Conv1DProduct(nn.Module):
    """The matmul of transformers' `Conv1D` without its bias, which its own forward can't do without."""

    weight: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class _WidthEmbedding(nn.Module):
    """An embedding whose rows are split by their width, and all-gathered."""

    _axis: Axis
    _width: int
    _leaves: State

    def forward(self, ids: Tensor) -> Tensor:
        whole = width_to_invariant(super().forward(ids), self._axis, self._width)
        return invariant_to_sequence(whole, self._axis) if self._leaves == SEQUENCE else whole


def _split(length: int, dim: int, tp: int, ranges: tuple[Ranges, ...] | None, heads: int | None = None) -> Split:
    if ranges:
        return split_of_ranges(ranges, dim)
    return even_split(length, dim, tp) if heads is None else head_split(length, dim, tp, heads)


def refuse_embedding_options(module: nn.Embedding, where: str) -> None:
    """Raise `TPError` for an option of `nn.Embedding` that needs the full table, or that depends on which rows a batch used."""
    for option in ("max_norm", "scale_grad_by_freq", "sparse"):
        if getattr(module, option):
            raise TPError(
                f"`{where}`: an embedding with `{option}={getattr(module, option)}` can't be split. Give it the style "
                "`replicate`, or build it without that option."
            )
