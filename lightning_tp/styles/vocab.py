"""The two ends of a language model, split over the vocabulary: the embedding and the head. They may be tied.

After Megatron-LM (arXiv 1909.08053). torch's counterparts are `RowwiseParallel` on an `nn.Embedding` and `ColwiseParallel` with
`use_local_output=False`. Any vocabulary splits over any tp: 1003 rows over 2 ranks are 502 and 501.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_tp.core.comm.axis import Axis
from lightning_tp.core.comm.state import SEQUENCE, I, R, State
from lightning_tp.core.comm.transitions import Transition, partial_to_invariant, partial_to_sequence, transition, width_to_invariant
from lightning_tp.core.modules.swap_class import swap_class
from lightning_tp.errors import TPError
from lightning_tp.styles.base import BindContext, Style, layout, linear_dims, set_sizes
from lightning_tp.styles.linear import refuse_embedding_options
from lightning_tp.styles.split import Split, even_split


@dataclass(frozen=True)
class VocabEmbedding(Style):
    """Split an embedding by its rows: weight (V, d) -> (V / tp, d). Each rank looks up its own rows, and the results are summed.

    Args:
        output: the state in which its output leaves: `I` (all-reduce) or `S(1)` (reduce-scatter). Default: that of the activations between
            split modules.

    Example:
        >>> from torch import nn
        >>> VocabEmbedding().splits(nn.Embedding(1003, 64), "tok", tp=2)["weight"].local_shape((1003, 64), rank=1)
        (501, 64)
    """

    name: ClassVar[str] = "vocab_embedding"
    states: ClassVar[dict[str, tuple[State, ...]]] = {"output": (I, SEQUENCE)}
    output: State | None = None

    def splits(self, module: nn.Module, where: str, tp: int) -> dict[str, Split]:
        if not isinstance(module, nn.Embedding):
            raise TPError(f"`{where}`: the style `{self.name}` splits an nn.Embedding, and this is a {type(module).__name__}.")
        refuse_embedding_options(module, where)
        return {"weight": even_split(module.num_embeddings, 0, tp)}

    def bind(self, module: nn.Module, site: BindContext) -> None:
        assert isinstance(module, nn.Embedding)
        start = site.axis.rank * math.ceil(module.num_embeddings / site.axis.size)
        rows = module.weight.shape[0]
        padding = module.padding_idx
        module.padding_idx = padding - start if padding is not None and start <= padding < start + rows else None
        leave = partial_to_sequence if self.output == SEQUENCE else partial_to_invariant
        vocab = module.num_embeddings
        swap_class(module, _VocabEmbedding, _axis=site.axis, _leave=leave, _start=start, _rows=rows, _vocab=vocab)
        module.num_embeddings = rows

    def to_torch(self, module: nn.Module) -> Any:
        from torch.distributed.tensor.parallel import RowwiseParallel

        return RowwiseParallel(input_layouts=layout(I), output_layouts=layout(self.output or I))


@dataclass(frozen=True)
class VocabHead(Style):
    """Split the output layer by the vocabulary: weight (V, d) -> (V / tp, d). The logits stay split for the loss.

    The module returns `lightning_tp.core.ops.split_logits.SplitLogits` of the whole shape (.., V): the cross entropy of torch runs on its shards,
    anything else gathers them. Without loss parallelism it returns the gathered logits.

    Args:
        input: the state in which its input arrives: `R`, `I` or `S(1)`. Default: that of the activations between split modules.
    """

    name: ClassVar[str] = "vocab_head"
    states: ClassVar[dict[str, tuple[State, ...]]] = {"input": (R, I, SEQUENCE)}
    input: State | None = None

    def splits(self, module: nn.Module, where: str, tp: int) -> dict[str, Split]:
        out_dim, _, shape = linear_dims(module, where, self.name)
        length = shape[out_dim]
        names = {"weight": even_split(length, out_dim, tp)}
        if getattr(module, "bias", None) is not None:
            names["bias"] = even_split(length, 0, tp)
        return names

    def bind(self, module: nn.Module, site: BindContext) -> None:
        out_dim, _, shape = linear_dims(module, site.where, self.name)
        vocab = set_sizes(module, out_features=shape[out_dim], nf=shape[out_dim])
        enter = transition(self.input or I, R)
        swap_class(module, _VocabHead, _axis=site.axis, _enter=enter, _vocab=vocab, _split=site.loss_parallel)

    def to_torch(self, module: nn.Module) -> Any:
        from torch.distributed.tensor.parallel import ColwiseParallel

        return ColwiseParallel(input_layouts=layout(self.input or I), output_layouts=layout(I))


class _VocabEmbedding(nn.Embedding):
    _axis: Axis
    _leave: Transition
    _start: int
    _rows: int
    _vocab: int

    def forward(self, ids: Tensor) -> Tensor:
        if type(ids) is Tensor and ids.device.type == "cpu":  # a GPU would have to wait for the answer
            _check_range(ids, self._vocab)
        if self._rows == 0:  # more ranks than rows: this one holds none, and adds zeros
            y = self.weight.sum() + self.weight.new_zeros((*ids.shape, self.embedding_dim))
            return self._leave(y, self._axis)
        local = ids - self._start
        mine = local.clamp(0, self._rows - 1)
        y = super().forward(mine)  # the class's own: Gemma's and BART's scale the rows
        y = y.masked_fill((mine != local).unsqueeze(-1), 0.0)  # (B, S, d): zero except on the rank that holds the row
        return self._leave(y, self._axis)


def _check_range(ids: Tensor, vocab: int) -> None:
    """Raise as one process does: an id that no rank holds would give zeros on all of them."""
    low, high = torch.aminmax(ids) if ids.numel() else (0, 0)
    if low < 0 or high >= vocab:
        raise TPError(f"Embedding: id {int(low if low < 0 else high)} is out of range for a vocabulary of {vocab}.")


class _VocabHead(nn.Module):
    _axis: Axis
    _enter: Transition | None
    _vocab: int
    _split: bool

    def forward(self, x: Tensor) -> Tensor:
        from lightning_tp.core.ops.logits_rules import split_logits

        axis = self._axis
        if self._enter is not None:
            x = axis.share(x, self._enter)
        logits = super().forward(x)  # (B, S, V / tp)
        axis.forget()
        return split_logits(logits, axis, self._vocab) if self._split else width_to_invariant(logits, axis, self._vocab)
