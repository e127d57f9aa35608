"""Make the picture of a plan from a trace: what the plan says of each module, in the order of the calls of the forward pass.

The same calls in one process have the full shapes. A collective of the backward pass stands beside that of the forward pass whose counterpart it is,
or else where its module is entered.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import Any

from torch import Tensor, nn

from lightning_tp.core.modules.blocks import find_blocks
from lightning_tp.errors import TPError
from lightning_tp.estimate.drawn.call_tree import Call, call_tree, registered_tree
from lightning_tp.estimate.drawn.picture import Box, Communication, Cut, Frame, Picture, Row, State, Weight
from lightning_tp.estimate.drawn.picture_collapse import collapse, mark_partial_sums, merge_repeats, put_side_by_side
from lightning_tp.estimate.rank.inputs import loss_of
from lightning_tp.estimate.rank.rank_model import RankModel
from lightning_tp.estimate.rank.settings import PRECISIONS, Precision, Settings
from lightning_tp.estimate.rank.trace_step import trace_step
from lightning_tp.estimate.trace.forward_log import ForwardEvent, Shape
from lightning_tp.plan.plan import Plan
from lightning_tp.plan.rule import Entry

MANY = 2  # replicated modules from which on their container is drawn as one box
COUNTERPARTS = {"all-gather": "reduce-scatter", "reduce-scatter": "all-gather", "all-reduce": "all-reduce"}  # in the backward pass
STYLES: dict[str, tuple[str, Cut]] = {  # name of the style -> (in words, how the weight is sharded)
    "colwise": ("column-wise", "columns"),
    "fused_colwise": ("column-wise, each fused part by itself", "columns"),
    "rowwise": ("row-wise", "rows"),
    "vocab_embedding": ("vocabulary-parallel", "rows"),
    "vocab_head": ("vocabulary-parallel", "columns"),
    "sequence": ("replicated weight, sequence-sharded input", "sequence"),
    "replicate": ("replicated", "replicated"),
}
# what a plan is traced in: the model's own dtypes, or bfloat16, where a kernel is known for that alone on the meta device
PRECISIONS_TO_TRY = (Precision("as it is"), PRECISIONS["bf16-true"])


def picture_of(
    model: nn.Module,
    inputs: Mapping[str, Any] | tuple[Any, ...],
    plan: Plan,
    *,
    loss_fn: Callable[..., Tensor] | None = None,
) -> Picture:
    """Trace a model and return the picture of its plan, to be written by `plot_plan` or `write_plan`.

    Args:
        model: on any device; it is traced on the meta device.
        inputs: what forward is called with; sizes of activations and of collectives are those of these, in the model's dtype.
        plan: checked against this model.
        loss_fn: as for `estimate`.

    Raises:
        TPError: for a plan that is not checked.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
        >>> plan = Plan({"0": "colwise", "2": "rowwise"}).check(model, tp=2)
        >>> picture = picture_of(model, (torch.ones(2, 4, 8),), plan, loss_fn=lambda y: y.mean())
        >>> [f"{box.name}: {box.style}" for box in picture.boxes()], [c.words for c in picture.communications()]
        (['0: column-wise', '2: row-wise'], ['all-reduce'])
    """
    if not plan.entries or plan.tp is None:
        raise TPError("A picture needs the sizes of a model: call `plan.check(model, tp)` first, it returns the plan to use.")
    whole = Plan({"**": "replicate"}).check(model, 1)
    losses = (loss_fn, None) if loss_fn is not None else (None,)  # one that holds real tensors can't be traced; the model can
    for precision, loss in product(PRECISIONS_TO_TRY, losses):
        try:
            traces = [
                trace_step(model, loss_of(loss), inputs, p, Settings(tp, 1, precision=precision))
                for p, tp in ((plan, plan.tp), (whole, 1))
            ]
        except TPError:
            continue
        return picture_from_trace(type(model).__name__, plan, *traces)
    return picture_from_registration(model, plan)


def picture_from_trace(model: str, plan: Plan, rank: RankModel, whole: RankModel) -> Picture:
    """Return the picture of a model that was traced.

    Args:
        model: its class.
        plan: checked.
        rank: the trace of a rank.
        whole: the trace of the model in one process.
    """
    backward: dict[str, list[ForwardEvent]] = {}
    for segment in rank.trace.pieces:
        for sent, n in segment.sent.items():
            if sent.phase == "backward":
                backward.setdefault(sent.module, []).extend([ForwardEvent("sent", sent.module, sent.kind, bytes=sent.bytes)] * n)
    full: dict[str, list[Call]] = {}
    for call in call_tree(whole.trace.steps, whole.trace.followed).walk():
        full.setdefault(call.module, []).append(call)
    root = call_tree(rank.trace.steps, rank.trace.followed)
    return _Builder(plan, root, rank.classes, frozenset(rank.blocks), backward, full).picture(
        model, "in the order of the traced forward pass"
    )


def picture_from_registration(model: nn.Module, plan: Plan) -> Picture:
    """Return the picture of a model that can't be traced: modules as they were registered, no shapes of activations, no collectives."""
    classes = {name: type(module).__name__ for name, module in model.named_modules()}
    blocks = frozenset(name for name, _ in find_blocks(model))
    order = "in the order of registration, as the model could not be traced"
    return _Builder(plan, registered_tree(model), classes, blocks, {}, {}).picture(type(model).__name__, order)


@dataclass(frozen=True)
class _Builder:
    """Turns calls into rows of a picture.

    Args:
        plan: checked.
        root: the calls of a rank.
        classes: of each module, by name.
        blocks: names of the repeated blocks.
        backward: module -> the collectives of the backward pass of all its calls.
        full: module -> its calls in one process.
    """

    plan: Plan
    root: Call
    classes: Mapping[str, str]
    blocks: frozenset[str]
    backward: Mapping[str, Sequence[ForwardEvent]]
    full: Mapping[str, Sequence[Call]]

    def picture(self, model: str, order: str) -> Picture:
        left_out = Counter(self.classes.get(call.module, "module") for call in self._left_out(self.root))
        return Picture(model, self.plan.tp or 1, tuple(self._rows(self.root, "")), order, left_out, self.plan.source)

    # ------------------------------------------------------------------------------------------------- what the plan says

    @cached_property
    def _calls(self) -> Counter[str]:
        """How often each module is called."""
        return Counter(call.module for call in self.root.walk())

    @cached_property
    def _containers(self) -> set[str]:
        """Modules that hold blocks; these have no frame of their own."""
        return {""} | {parent for block in self.blocks for parent in _parents(block)}

    @cached_property
    def _entries(self) -> dict[str, list[Entry]]:
        """Module -> what the plan says of it."""
        entries: dict[str, list[Entry]] = {}
        for entry in self.plan.entries:
            entries.setdefault(entry.where, []).append(entry)
        return entries

    @cached_property
    def _entry_of(self) -> dict[str, Entry]:
        """Parameter -> the entry that shards it."""
        return {name: entry for entry in self.plan.entries for name in entry.splits}

    @cached_property
    def _parameters(self) -> dict[str, list[str]]:
        """Module -> its own parameters, and those of modules in it that are not called; tied ones where they are used."""
        shapes, found = self.plan.shapes, dict[str, list[str]]()
        tied = [(shapes.get(name), name.rpartition(".")[0]) for name in self.plan.tied]
        for name in self.plan.splits:
            module = name.rpartition(".")[0]
            if module not in self._calls and any(shape == shapes[name] and owner in self._calls for shape, owner in tied):
                continue
            while module and module not in self._calls:
                module = module.rpartition(".")[0]
            found.setdefault(module, []).append(name)
        return found

    def _reason(self, module: str, style: str) -> str:
        return next((e.reason for e in self._entries.get(module, ()) if e.style.name == style and e.reason), "")

    # ------------------------------------------------------------------------------------------------------------- a call

    def _is_drawn(self, call: Call) -> bool:
        """Whether it has parameters, collectives or matmuls."""
        own = any(event.what == "sent" or event.name in ("attention", "product") for event in call.own)
        return own or call.module in self._parameters or any(map(self._is_drawn, call.children))

    def _left_out(self, call: Call) -> Iterator[Call]:
        """Walk over the calls that are not drawn, the outermost ones."""
        if not self._is_drawn(call):
            yield call
        elif not self._is_replicated(call):
            for child in call.children:
                yield from self._left_out(child)

    def _rows(self, call: Call, prefix: str) -> list[Row]:
        if not self._is_drawn(call):
            return []
        if not any(map(self._is_drawn, call.children)):
            return self._leaf(call, prefix)
        if self._is_replicated(call):
            return [self._replicated(call, prefix)]
        inline = call.module in self._containers
        inside = prefix if inline else call.module
        rows: list[Row] = [self._own_parameters(call, inside)] if call.module in self._parameters else []
        twins, entrance = self._pair(call)
        inner: list[Row] = []
        in_loss = max(i for i, event in enumerate(call.events) if isinstance(event, Call)) if call is self.root else math.inf
        for i, event in enumerate(call.events):
            if isinstance(event, Call):
                inner += self._rows(event, inside)
            elif event.what == "sent":
                behind = bool(inner) and not isinstance(inner[-1], Communication)
                reason = self._reason(call.module, "prepare_output" if behind else "prepare_input")
                inner.append(Communication(event.name, next(twins), event.bytes, reason="in the loss" if i > in_loss else reason))
            elif event.name in ("attention", "product"):
                inner.append(self._operation(event, call))
        rows = collapse([*rows, *entrance, *mark_partial_sums(put_side_by_side(merge_repeats(inner)), self.plan.tp or 1)])
        if inline:
            return rows
        name = _name(call.module, prefix)
        if len(rows) == 1 and isinstance(rows[0], (Box, Frame)) and call.module not in self.blocks | self._parameters.keys():
            return [replace(rows[0], name=f"{name}.{rows[0].name}")]
        return [Frame(name, self.classes.get(call.module, ""), tuple(rows), block=call.module in self.blocks)]

    def _leaf(self, call: Call, prefix: str) -> list[Row]:
        """Draw a module in which no other is drawn: what crosses the ranks before its kernels, itself, what does so after them."""
        twins, entrance = self._pair(call)
        kernels = [event.name for event in call.own if event.what == "op"]
        main = "product" if "product" in kernels else "other"
        before, after, ran = list[Row](), list[Row](), False
        for event in call.own:
            if event.what == "sent":
                reason = self._reason(call.module, "prepare_output" if ran else "prepare_input")
                (after if ran else before).append(Communication(event.name, next(twins), event.bytes, reason=reason))
            ran = ran or event.name == main
        if call.module in self._parameters:
            box = replace(self._own_parameters(call, prefix), name=_name(call.module, prefix))
        else:
            box = Box(_name(call.module, prefix), self.classes.get(call.module, ""), "no parameters", "")
        arrives, leaves = self._states(call)
        if arrives.kind == "sequence" and _gathers(before):
            arrives = State(arrives.full, arrives.full, "replicated")
        if leaves.kind == "replicated" and box.cut == "columns" and _gathers(after):
            leaves = State(leaves.full, (*leaves.full[:-1], -(-leaves.full[-1] // (self.plan.tp or 1))), "features")
        notes = (*box.notes, *(self._operation(event, call).style for event in call.own if event.name == "attention"))
        box = replace(box, arrives=arrives, leaves=leaves, notes=notes, tensor=call.tensor)
        return [*entrance, *merge_repeats(before), box, *merge_repeats(after)]

    def _own_parameters(self, call: Call, prefix: str) -> Box:
        """Make the box of a module's own parameters; it speaks of the matrices, if there are any."""
        names = self._parameters[call.module]
        weights = tuple(self._weight(name, call.module) for name in names)
        entries = list({id(self._entry_of[name]): self._entry_of[name] for name in names}.values())
        matrices = [e for e in entries if any(len(shape) > 1 for shape in e.shapes.values())] or entries
        largest = max(matrices, key=lambda e: max(map(math.prod, e.shapes.values()), default=0))
        dims = dict.fromkeys(s.dim for e in matrices if e.style.name == "shard" for s in e.splits.values() if s.dim is not None)
        words = ["sharded along " + " and ".join(f"dim {dim}" for dim in dims)] if dims else []
        words += [STYLES.get(e.style.name, (str(e.style), ""))[0] for e in matrices if e.style.name != "shard"]
        cut = STYLES[largest.style.name][1] if largest.style.name in STYLES else _cut_of(weights)
        notes = tuple(
            f"{len(getattr(e.style, 'calls', ()))} calls with hard-coded sizes get local sizes"
            + (f": {e.reason}" if e.reason else "")
            for e in self._entries.get(call.module, ())
            if e.style.name == "local_ops"
        )
        return Box(
            ", ".join(w.name for w in weights),
            self.classes.get(call.module, ""),
            "; ".join(dict.fromkeys(words)),
            cut,
            weights,
            reason="; ".join(dict.fromkeys(e.reason for e in matrices if e.reason)),
            notes=notes,
        )

    def _weight(self, name: str, module: str) -> Weight:
        split, shape = self.plan.splits[name], self.plan.shapes[name]
        local = dict.fromkeys(split.local_shape(shape, rank) for rank in range(self.plan.tp or 1))
        return Weight(_name(name, module), tuple(shape), tuple(local), split.dim)

    def _is_replicated(self, call: Call) -> bool:
        """Whether it is a container of several modules of which nothing is sharded and nothing crosses the ranks."""
        inside = list(call.walk())
        if call.module in self._containers or (call.module not in self.blocks and any(c.module in self.blocks for c in inside)):
            return False
        if any(self.backward.get(c.source) or any(event.what == "sent" for event in c.own) for c in inside):
            return False
        entries = [e for c in inside for e in self._entries.get(c.module, ())]
        entries += [self._entry_of[name] for c in inside for name in self._parameters.get(c.module, ())]
        return all(e.style.name == "replicate" for e in entries) and sum(c.module in self._parameters for c in inside) >= MANY

    def _replicated(self, call: Call, prefix: str) -> Box:
        """Make the one box of such a container; its reason is that of the largest module."""
        inside = [c for c in call.walk() if c.module in self._parameters]
        names = list(dict.fromkeys(name for c in inside for name in self._parameters[c.module]))
        entries = sorted((self._entry_of[name] for name in names), key=lambda e: -sum(map(math.prod, e.shapes.values())))
        style = f"replicated: {len(inside)} modules, {sum(math.prod(self.plan.shapes[n]) for n in names):,} parameters"
        arrives, leaves = self._states(call)
        reason = next((e.reason for e in entries if e.reason), "")
        name, class_name = _name(call.module, prefix), self.classes.get(call.module, "")
        return Box(name, class_name, style, "replicated", (), arrives, leaves, reason, tensor=call.tensor)

    # ------------------------------------------------------------------------------------------------- what is in between

    def _pair(self, call: Call) -> tuple[Iterator[str], list[Row]]:
        """Pair the collectives of a call's forward pass with those of its backward pass.

        Returns:
            For each of the forward pass the kind of its counterpart ("" for none), and the rows of those of the backward pass alone.
        """
        of, calls = self.backward.get(call.source, ()), max(1, self._calls[call.source])
        nth = min(call.nth, calls - 1)
        left = list(of[nth * len(of) // calls : (nth + 1) * len(of) // calls])
        sent = [event for event in call.own if event.what == "sent"]
        twins = []
        for event in sent:
            alike = [b for b in left if b.name == COUNTERPARTS.get(event.name)]
            equal = [b for b in alike if b.bytes == event.bytes]
            twin = next(iter(equal if event.name == "all-reduce" else [*equal, *alike]), None)
            if twin is not None:
                left.remove(twin)
            twins.append(twin.name if twin is not None else "")
        reason = "" if sent else self._reason(call.module, "prepare_input")
        return iter(twins), merge_repeats(Communication("", b.name, b.bytes, reason=reason) for b in left)

    def _operation(self, event: ForwardEvent, call: Call) -> Box:
        """Make the box of an attention or of a matmul of two activations."""
        b, m, n, k = event.shape or (0, 0, 0, 0)
        full = self._full(call)
        batches = [e.shape[0] for e in (full.own if full else ()) if e.name == event.name and e.shape]
        of = f"{b} of {batches[0]}" if batches and batches[0] != b else f"{b}"
        if event.name == "attention":
            return Box("attention", "", f"{of} (batch x heads), {m:,} queries, {n:,} keys", "")
        return Box("matmul of activations", "", f"{of} x ({m:,} x {k:,}) ({k:,} x {n:,})", "")

    def _full(self, call: Call) -> Call | None:
        """Return the same call in one process."""
        calls = self.full.get(call.module, ())
        return calls[min(call.nth, len(calls) - 1)] if calls else None

    def _states(self, call: Call) -> tuple[State, State]:
        full = self._full(call)
        return _state(call.arrives, full.arrives if full else ()), _state(call.leaves, full.leaves if full else ())


def _state(local: Shape, full: Shape) -> State:
    """Tell the state of an activation by what its shape on a rank differs in from the full one."""
    if not local or len(local) != len(full):
        return State((), local)
    differ = [dim for dim in range(len(local)) if local[dim] != full[dim]]
    if not differ:
        return State(full, local, "replicated")
    if differ == [len(local) - 1]:
        return State(full, local, "features")
    return State(full, local, "sequence" if len(differ) == 1 and len(local) > 1 else "sharded")


def _cut_of(weights: Sequence[Weight]) -> Cut:
    """Tell how a style is drawn that is not of this package, or shards any dim."""
    sharded = next((w for w in weights if w.dim is not None), None)
    if sharded is None:
        return "replicated"
    return "columns" if sharded.dim == len(sharded.full) - 1 else "rows"


def _gathers(rows: Sequence[Row]) -> bool:
    return any(isinstance(row, Communication) and row.forward == "all-gather" for row in rows)


def _name(module: str, prefix: str) -> str:
    """Return a name below a prefix."""
    return (module[len(prefix) + 1 :] if prefix else module) or "(the model)"


def _parents(name: str) -> Iterator[str]:
    while "." in name:
        name = name.rpartition(".")[0]
        yield name
