"""Read the plan that a model declares: Hugging Face's `base_model_tp_plan`.

It names column- and row-wise linear layers, in patterns like ours. What it leaves out is added here: the embedding and the head are
split over the vocabulary where they are plain layers, the rest is replicated. It does not say where the residual stream may be sharded
along the sequence, so there is no sequence parallelism in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from lightning_tp.core.comm.state import WIDTH, I, R
from lightning_tp.errors import TPError
from lightning_tp.plan.plan import Plan
from lightning_tp.plan.rule import Rule
from lightning_tp.styles import Colwise, PrepareInput, Replicate, Rowwise, Style, VocabEmbedding, VocabHead

DECLARED = "declared by"  # how the source of such a plan begins

_WORDS: dict[str, Style] = {
    "colwise": Colwise(),
    "rowwise": Rowwise(),
    "colwise_gather_output": Colwise(output=I),
    "colwise_rep": Colwise(output=I),  # its older name
    "rowwise_split_input": Rowwise(input=I),
    "rowwise_rep": Rowwise(input=I),
    "embedding_rowwise": VocabEmbedding(),
    "replicated_with_grad_allreduce": Replicate(state=R),
    "replicate": Replicate(),
}


def declared_plan(model: nn.Module, tp: int) -> Plan | None:
    """Return the plan that `model`, or the one module inside it that declares one, declares; None if there is none.

    Raises:
        TPError: for a declared style without counterpart here, naming it.

    Example:
        >>> from torch import nn
        >>> declared_plan(nn.Linear(2, 2), tp=2) is None
        True
    """
    found = [(name, m) for name, m in model.named_modules() if _declares(m)]
    outer = [(n, m) for n, m in found if not any(o != n and (not o or n.startswith(f"{o}.")) for o, _ in found)]
    if len(outer) != 1:
        return None
    name, module = outer[0]
    prefix = f"{name}." if name else ""
    words: Mapping[str, str] = module.tp_plan
    rules = []
    for pattern, word in words.items():
        if word not in _WORDS:
            raise TPError(
                f"`{prefix}{pattern}`: {type(module).__name__} declares the style {word!r}, which has no counterpart here. Pass a plan "
                f"(`plan=`); known are {', '.join(_WORDS)}."
            )
        rules.append(Rule(prefix + pattern, _WORDS[word], "declared"))
    rules = [r for r in rules if any(r.matches(n) for n, _ in model.named_modules())]
    rules = _with_ends(rules, module, prefix)
    rules += _shared_heads(rules, model, tp)
    rules.append(Rule("**", "replicate", "not in the declared plan"))
    return Plan(rules, source=f"{DECLARED} {type(module).__name__}")


def _declares(module: nn.Module) -> bool:
    plan = getattr(module, "tp_plan", None)
    return hasattr(module, "config") and isinstance(plan, Mapping) and len(plan) > 0


def _with_ends(rules: list[Rule], module: Any, prefix: str) -> list[Rule]:
    """Split the embedding and the head over the vocabulary, so that tied ones stay one weight and the loss runs in parallel."""
    names = {id(m): n for n, m in module.named_modules()}
    embedding = module.get_input_embeddings() if hasattr(module, "get_input_embeddings") else None
    head = module.get_output_embeddings() if hasattr(module, "get_output_embeddings") else None
    ends: list[Rule] = []
    plain_head = type(head) is nn.Linear
    tied = isinstance(embedding, nn.Embedding) and isinstance(head, nn.Linear) and embedding.weight is head.weight
    if isinstance(embedding, nn.Embedding) and not (head is not None and not plain_head):
        ends.append(Rule(prefix + names[id(embedding)], VocabEmbedding(), "rows of the vocabulary"))
    if plain_head and (tied or isinstance(embedding, nn.Embedding)):
        ends.append(Rule(prefix + names[id(head)], VocabHead(), "its logits stay split for the loss"))
    taken = {r.pattern for r in ends}
    return [r for r in rules if not any(r.matches(t) for t in taken)] + ends


def _shared_heads(rules: list[Rule], model: nn.Module, tp: int) -> list[Rule]:
    """Where ranks share key/value heads, the attention repeats each one less often: transformers stores how often."""
    extra = []
    for name, module in model.named_modules():
        groups, config = getattr(module, "num_key_value_groups", None), getattr(module, "config", None)
        heads, kv_heads = (getattr(config, a, None) for a in ("num_attention_heads", "num_key_value_heads"))
        if not isinstance(groups, int) or not heads or not kv_heads or kv_heads >= tp or heads % tp:
            continue
        if any(r.matches(f"{name}.k_proj") and isinstance(r.style, Colwise) and r.style.output == WIDTH for r in rules):
            attributes = (("num_key_value_groups", groups * kv_heads // tp),)
            extra.append(
                Rule(
                    name,
                    PrepareInput(arrives=I, wanted=I, attributes=attributes),
                    f"{kv_heads} key/value heads for tp={tp}",
                )
            )
    return extra
