"""The styles of a plan: how one module is split.

| name | module | parameters on a rank | input -> output (states, see `core/comm/state.py`) |
|---|---|---|---|
| `colwise` | linear (or embedding, by width) | a shard of its output features | `R`, `I` or `S(1)` -> `S(-1)` or `I` |
| `fused_colwise` | linear with several parts | a shard of each part | `R`, `I` or `S(1)` -> `S(-1)` |
| `rowwise` | linear | a shard of its input features; full bias | `S(-1)` or `I` -> `I`, `S(1)` or `P` |
| `sequence` | norm, dropout | full; gradients summed | `S(1)` or `I` -> `S(1)` or `I` |
| `vocab_embedding` | embedding | a shard of its rows | ids -> `I` or `S(1)` |
| `vocab_head` | linear | a shard of its rows | `R`, `I` or `S(1)` -> split logits |
| `replicate` | anything | full | as it is |
| `prepare_input`, `prepare_output` | any module around these | - | as they say |
| `local_ops` | a module whose code hard-codes full sizes | - | - |
| `shard` | one parameter | a shard of one dim | - |
"""

from __future__ import annotations

from typing import Any

from lightning_tp.errors import TPError
from lightning_tp.styles.base import BindContext as BindContext
from lightning_tp.styles.base import Style
from lightning_tp.styles.boundary import PrepareInput, PrepareOutput
from lightning_tp.styles.calls.rewritten_calls import RewrittenCalls
from lightning_tp.styles.fused import FusedColwise
from lightning_tp.styles.linear import Colwise, Rowwise
from lightning_tp.styles.replicated import Replicate, Sequence
from lightning_tp.styles.shard_parameter import ShardParameter
from lightning_tp.styles.split import Split as Split
from lightning_tp.styles.torch_styles import from_torch, is_torch_style
from lightning_tp.styles.vocab import VocabEmbedding, VocabHead

_OF_LAYERS = (Colwise, FusedColwise, Rowwise, Sequence, VocabEmbedding, VocabHead, Replicate)
_OF_THE_REST = (
    PrepareInput,
    PrepareOutput,
    RewrittenCalls,
    ShardParameter,
)  # modules around layers, single calls, single parameters
STYLES: dict[str, type[Style]] = {style.name: style for style in (*_OF_LAYERS, *_OF_THE_REST)}


def make_style(value: Any, where: str) -> tuple[Style, ...]:
    """Return the style that a user wrote: its name, a `Style`, a dict of name and options, or a style of `torch.distributed.tensor.parallel`.

    One of torch's may be two of ours (`PrepareModuleInput` with several arguments), hence the tuple.

    Args:
        value: what was written.
        where: the pattern or name that it is for, for the error.

    Raises:
        TPError: if it is none of these, or has an option that the style does not take.

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
        except TPError as e:
            raise TPError(f"`{where}`: {e}") from None
    if is_torch_style(value):
        try:
            return from_torch(value, where)
        except TPError as e:
            raise TPError(str(e) if str(e).startswith(f"`{where}`") else f"`{where}`: {e}") from None
    raise TPError(
        f"`{where}`: unknown style {value!r}. Valid styles are {', '.join(STYLES)}, the classes of lightning_tp.styles with options, and "
        "ColwiseParallel, RowwiseParallel, SequenceParallel, PrepareModuleInput and PrepareModuleOutput of torch."
    )
