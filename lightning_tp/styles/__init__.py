"""The styles of a plan: how one module is split.

| name | module | parameters on a rank | what crosses |
|---|---|---|---|
| `colwise` | linear (or embedding, by width) | its output features | nothing, or as `input`, `output` say |
| `fused_colwise` | linear with several parts | its share of each part | the same |
| `rowwise` | linear | its input features; bias whole | sum over ranks |
| `sequence` | norm, dropout | whole; gradients summed | nothing |
| `vocab_embedding` | embedding | its rows | sum over ranks |
| `vocab_head` | linear | its rows; logits stay split | as `input` says |
| `replicate` | anything | whole | nothing |
| `prepare_input`, `prepare_output` | any module around these | - | as they say |
"""

from __future__ import annotations

from typing import Any

from lightning_tp.errors import TPError
from lightning_tp.styles.base import BindContext, Style
from lightning_tp.styles.boundary import PrepareInput, PrepareOutput
from lightning_tp.styles.calls.rewritten_calls import RewrittenCalls
from lightning_tp.styles.fused import FusedColwise
from lightning_tp.styles.linear import Colwise, Rowwise
from lightning_tp.styles.replicated import Replicate, Sequence
from lightning_tp.styles.shard_parameter import ShardParameter
from lightning_tp.styles.split import Split
from lightning_tp.styles.vocab import VocabEmbedding, VocabHead

STYLES: dict[str, type[Style]] = {
    style.name: style
    for style in (
        Colwise,
        FusedColwise,
        Rowwise,
        Sequence,
        VocabEmbedding,
        VocabHead,
        Replicate,
        PrepareInput,
        PrepareOutput,
        RewrittenCalls,
        ShardParameter,
    )
}


def make_style(value: Any, where: str) -> tuple[Style, ...]:
    """A style from what a user writes: its name, a `Style`, or a style of `torch.distributed.tensor.parallel`.

    One of torch's may be two of ours (`PrepareModuleInput` with several arguments), hence the tuple.

    Raises:
        TPError: if it is none of these.

    Example:
        >>> [str(style) for style in make_style({"style": "colwise", "heads": 4}, "layers.*.wq")]
        ['colwise(heads=4)']
    """
    if isinstance(value, Style):
        return (value,)
    if isinstance(value, str) and value in STYLES:
        return (STYLES[value](),)
    if isinstance(value, dict) and value.get("style") in STYLES:
        options = {k: v for k, v in value.items() if k != "style"}
        try:
            return (STYLES[value["style"]](**options),)
        except TypeError as e:
            raise TPError(f"`{where}`: {value}: {e}") from None
    from lightning_tp.styles.torch_styles import from_torch, is_torch_style

    if is_torch_style(value):
        return from_torch(value, where)
    raise TPError(
        f"`{where}`: {value!r} is no style. There are {', '.join(STYLES)}, the classes of lightning_tp.styles with options, and "
        "ColwiseParallel, RowwiseParallel, SequenceParallel, PrepareModuleInput and PrepareModuleOutput of torch."
    )


__all__ = [
    "STYLES",
    "Colwise",
    "FusedColwise",
    "RewrittenCalls",
    "PrepareInput",
    "PrepareOutput",
    "Replicate",
    "Rowwise",
    "Sequence",
    "ShardParameter",
    "BindContext",
    "Split",
    "Style",
    "VocabEmbedding",
    "VocabHead",
    "make_style",
]
