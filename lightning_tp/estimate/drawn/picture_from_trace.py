"""Make the picture of a plan from a trace: what the plan says of each module, in the order of the calls of the forward pass.

The same calls in one process have the full shapes. A collective of the backward pass stands beside that of the forward pass whose counterpart it is,
or else where its module is entered.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from torch import Tensor, nn

from lightning_tp.core.modules.blocks import find_blocks
from lightning_tp.errors import TPError
from lightning_tp.estimate.drawn.call_tree import Call, CallTree, call_tree, parents, registered_tree
from lightning_tp.estimate.drawn.picture import Box, Communication, Cut, Frame, Picture, Row, State, Weight
from lightning_tp.estimate.drawn.picture_collapse import collapse, mark_partial_sums, merge_repeats, put_side_by_side
from lightning_tp.estimate.rank.inputs import loss_of
from lightning_tp.estimate.rank.rank_model import RankModel
from lightning_tp.estimate.rank.settings import PRECISIONS, Precision, Settings
from lightning_tp.estimate.rank.trace_step import trace_step
from lightning_tp.estimate.trace.forward_log import ForwardEvent, Shape
from lightning_tp.plan.checked import CheckedPlan, Entry
from lightning_tp.plan.plan import Plan

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
    plan: CheckedPlan,
    *,
    loss_fn: Callable[..., Tensor] | None = None,
) -> Picture:
    """Trace a model and return the picture of its plan, to be written by `plot_plan` or `write_plan`.

    Args:
        model: on any device; it is traced on the meta device.
        inputs: what forward is called with; sizes of activations and of collectives are those of these, in the model's dtype.
        plan: checked against this model.
        loss_fn: as for `estimate`.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
        >>> plan = Plan({"0": "colwise", "2": "rowwise"}).check(model, tp=2)
        >>> picture = picture_of(model, (torch.ones(2, 4, 8),), plan, loss_fn=lambda y: y.mean())
        >>> [f"{box.name}: {box.style}" for box in picture.boxes()], [c.words for c in picture.communications()]
        (['0: column-wise', '2: row-wise'], ['all-reduce'])
    """
    whole = Plan({"**": "replicate"}).check(model, 1)
    losses = (loss_fn, None) if loss_fn is not None else (None,)  # one that holds real tensors can't be traced; the model can
    for precision, loss in product(PRECISIONS_TO_TRY, losses):
        try:
            how = [(p, Settings(p.tp, 1, precision=precision)) for p in (plan, whole)]
            traces = [trace_step(model, loss_of(loss), inputs, p, settings) for p, settings in how]
        except TPError:
            continue
        return picture_from_trace(type(model).__name__, plan, *traces)
    return picture_from_registration(model, plan)


def picture_from_trace(model: str, plan: CheckedPlan, rank: RankModel, whole: RankModel) -> Picture:
    """Return the picture of a model of this class that was traced: on a rank, and whole in one process."""
    backward: dict[str, list[ForwardEvent]] = {}
    for segment in rank.trace.segments:
        for call, n in segment.collectives.items():
            if call.phase == "backward":
                event = ForwardEvent("collective", call.module, call.kind, bytes=call.bytes)
                backward.setdefault(call.module, []).extend([event] * n)
    tree, full = (call_tree(traced.trace.forward, traced.trace.followed) for traced in (rank, whole))
    return _Builder(plan, tree, full, rank.classes, rank.blocks, backward).picture(model, "in the order of the traced forward pass")


def picture_from_registration(model: nn.Module, plan: CheckedPlan) -> Picture:
    """Return the picture of a model that can't be traced: modules as they were registered, no shapes of activations, no collectives."""
    classes = {name: type(module).__name__ for name, module in model.named_modules()}
    blocks = [name for name, _ in find_blocks(model)]
    builder = _Builder(plan, registered_tree(model), CallTree(Call("", ""), {}, {}), classes, blocks, {})
    return builder.picture(type(model).__name__, "in the order of registration, as the model could not be traced")


@dataclass
class _Builder:
    """Turns calls into rows of a picture."""

    plan: CheckedPlan
    tree: CallTree  # the calls of a rank
    full: CallTree  # the calls in one process
    classes: Mapping[str, str]
    blocks: Sequence[str]
    backward: Mapping[str, list[ForwardEvent]]  # module -> the collectives of the backward pass of all its calls

    def __post_init__(self) -> None:
        plan, self.tp = self.plan, self.plan.tp
        self.containers = {"", *(parent for block in self.blocks for parent in parents(block))}  # of blocks; these have no frame
        self.entries: dict[str, list[Entry]] = {}  # of each module
        for entry in plan.entries:
            self.entries.setdefault(entry.where, []).append(entry)
        self.entry_of = {name: entry for entry in plan.entries for name in entry.splits}
        self.parameters = self._parameters()

    def picture(self, model: str, order: str) -> Picture:
        left_out = Counter(self.classes.get(call.module, "module") for call in self._left_out(self.tree.root))
        return Picture(model, self.tp, tuple(self._rows(self.tree.root, "")), order, left_out, self.plan.source)

    def _parameters(self) -> dict[str, list[str]]:
        """Collect for each module its own parameters, and those of modules in it that are not called; tied ones where they are used."""
        calls, shapes, found = self.tree.calls, self.plan.shapes, dict[str, list[str]]()
        tied = [(shapes.get(name), name.rpartition(".")[0]) for name in self.plan.tied]
        for name in self.plan.splits:
            module = name.rpartition(".")[0]
            if module not in calls and any(shape == shapes[name] and owner in calls for shape, owner in tied):
                continue
            owner = next((parent for parent in (module, *parents(module)) if parent in calls), "")
            found.setdefault(owner, []).append(name)
        return found

    def _is_drawn(self, call: Call) -> bool:
        """Whether it has parameters, collectives or matmuls."""
        own = any(event.what == "collective" or event.name in ("attention", "product") for event in call.own)
        return own or call.source in self.parameters or any(map(self._is_drawn, call.children))

    def _left_out(self, call: Call) -> Iterator[Call]:
        """Walk over the calls that are not drawn, the outermost ones."""
        if self._is_drawn(call):
            for child in call.children:
                yield from self._left_out(child)
        else:
            yield call

    def _rows(self, call: Call, prefix: str) -> list[Row]:
        if not self._is_drawn(call):
            return []
        if not any(map(self._is_drawn, call.children)):
            return self._leaf(call, prefix)
        inline, is_block, has_own = (call.source in of for of in (self.containers, self.blocks, self.parameters))
        inside = prefix if inline else call.source
        last_call = max(i for i, event in enumerate(call.events) if isinstance(event, Call))
        twins, entrance = self._pair(call)
        rows: list[Row] = []
        for i, event in enumerate(call.events):
            if isinstance(event, Call):
                rows += self._rows(event, inside)
            elif event.what == "collective":
                behind = bool(rows) and not isinstance(rows[-1], Communication)
                row = self._communication(call, event, next(twins), behind)
                rows.append(replace(row, reason="in the loss") if call is self.tree.root and i > last_call else row)
            elif event.name in ("attention", "product"):
                rows.append(self._operation(event, call))
        own = [self._own_parameters(call, inside)] if has_own else []
        rows = collapse([*own, *entrance, *mark_partial_sums(put_side_by_side(merge_repeats(rows)), self.tp)])
        if inline:
            return rows
        name, only = _name(call.module, prefix), rows[0]
        if len(rows) == 1 and isinstance(only, (Box, Frame)) and not is_block and not has_own:
            return [replace(only, name=f"{name}.{only.name}")]
        return [Frame(name, self.classes.get(call.source, ""), tuple(rows), block=is_block)]

    def _leaf(self, call: Call, prefix: str) -> list[Row]:
        """Draw a module in which no other is drawn: what crosses the ranks before its kernels, itself, what does so after them."""
        twins, entrance = self._pair(call)
        main = "product" if any(event.name == "product" for event in call.own) else "other"
        before, after, ran = list[Row](), list[Row](), False
        for event in call.own:
            if event.what == "collective":
                (after if ran else before).append(self._communication(call, event, next(twins), ran))
            ran = ran or event.name == main
        box = Box("", self.classes.get(call.source, ""), "no parameters", "")
        if call.source in self.parameters:
            box = self._own_parameters(call, prefix)
        arrives, leaves = self._states(call)
        if arrives.kind == "sequence" and _gathers(before):
            arrives = State(arrives.full, arrives.full, "replicated")
        if leaves.kind == "replicated" and box.cut == "columns" and _gathers(after):
            leaves = State(leaves.full, (*leaves.full[:-1], -(-leaves.full[-1] // self.tp)), "features")
        notes = (*box.notes, *(self._operation(event, call).style for event in call.own if event.name == "attention"))
        box = replace(box, name=_name(call.module, prefix), arrives=arrives, leaves=leaves, notes=notes, tensor=call.tensor)
        return [*entrance, *merge_repeats(before), box, *merge_repeats(after)]

    def _own_parameters(self, call: Call, prefix: str) -> Box:
        """Make the box of a module's own parameters; it speaks of the matrices, if there are any."""
        names = self.parameters[call.source]
        weights = tuple(self._weight(name, call.source) for name in names)
        entries = list({id(self.entry_of[name]): self.entry_of[name] for name in names}.values())
        matrices = [e for e in entries if any(len(shape) > 1 for shape in e.shapes.values())] or entries
        largest = max(matrices, key=lambda e: max(map(math.prod, e.shapes.values()), default=0))
        dims = dict.fromkeys(s.dim for e in matrices if e.style.name == "shard" for s in e.splits.values() if s.dim is not None)
        words = ["sharded along " + " and ".join(f"dim {dim}" for dim in dims)] if dims else []
        words += [STYLES.get(e.style.name, (str(e.style), ""))[0] for e in matrices if e.style.name != "shard"]
        cut = STYLES[largest.style.name][1] if largest.style.name in STYLES else _cut_of(weights)
        notes = tuple(
            f"{len(getattr(e.style, 'calls', ()))} calls with hard-coded sizes get local sizes"
            + (f": {e.reason}" if e.reason else "")
            for e in self.entries.get(call.source, ())
            if e.style.name == "local_ops"
        )
        return Box(
            ", ".join(w.name for w in weights),
            self.classes.get(call.source, ""),
            "; ".join(dict.fromkeys(words)),
            cut,
            weights,
            reason="; ".join(dict.fromkeys(e.reason for e in matrices if e.reason)),
            notes=notes,
        )

    def _weight(self, name: str, module: str) -> Weight:
        split, shape = self.plan.splits[name], self.plan.shapes[name]
        local = dict.fromkeys(split.local_shape(shape, rank) for rank in range(self.tp))
        return Weight(_name(name, module), tuple(shape), tuple(local), split.dim)

    def _pair(self, call: Call) -> tuple[Iterator[str], list[Row]]:
        """Pair the collectives of a call's forward pass with those of its backward pass.

        Returns:
            For each of the forward pass the kind of its counterpart ("" for none), and the rows of those of the backward pass alone.
        """
        of, calls = self.backward.get(call.source, ()), len(self.tree.calls.get(call.source, ())) or 1
        left = list(of[call.nth * len(of) // calls : (call.nth + 1) * len(of) // calls])
        collectives = [event for event in call.own if event.what == "collective"]
        twins = []
        for event in collectives:
            kind = COUNTERPARTS.get(event.name)
            twin = next((b for b in left if b.name == kind and (b.bytes == event.bytes or kind != "all-reduce")), None)
            if twin is not None:
                left.remove(twin)
            twins.append(twin.name if twin is not None else "")
        reason = "" if collectives else self._reason(call, "prepare_input")
        return iter(twins), merge_repeats(Communication("", b.name, b.bytes, reason=reason) for b in left)

    def _communication(self, call: Call, event: ForwardEvent, twin: str, behind: bool) -> Communication:
        reason = self._reason(call, "prepare_output" if behind else "prepare_input")
        return Communication(event.name, twin, event.bytes, reason=reason)

    def _reason(self, call: Call, style: str) -> str:
        return next((e.reason for e in self.entries.get(call.source, ()) if e.style.name == style and e.reason), "")

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
        calls = self.full.calls.get(self.full.traced(call.module), ())
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
