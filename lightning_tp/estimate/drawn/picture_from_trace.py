"""How the picture of a plan is found in a trace: the calls of the forward as a tree, and what the plan says of each.

A tree of calls is read from the steps of the trace; the same tree of the model in one process has the whole shapes. Collectives of the backward
stand beside those of the forward whose counterparts they are, or where a module is entered.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from torch import nn

from lightning_tp.core.modules.blocks import find_blocks
from lightning_tp.estimate.drawn.picture import Border, Box, Frame, Picture, Row, State, Weight
from lightning_tp.estimate.drawn.picture_fold import alike, beside, merged, partial
from lightning_tp.estimate.rank.rank_model import RankModel
from lightning_tp.estimate.trace.forward_log import ForwardEvent, Shape
from lightning_tp.plan.checked import CheckedPlan, Entry

MANY = 2  # modules that stay whole and are drawn as one
BACK = {
    "all-gather": "reduce-scatter",
    "reduce-scatter": "all-gather",
    "all-reduce": "all-reduce",
}  # what most have in the backward
STYLES = {  # name of the style -> (in words, how the weight is cut)
    "colwise": ("column-wise", "columns"),
    "fused_colwise": ("column-wise, each part by itself", "columns"),
    "rowwise": ("row-wise", "rows"),
    "vocab_embedding": ("by vocabulary", "rows"),
    "vocab_head": ("by vocabulary", "columns"),
    "sequence": ("whole, on this rank's tokens", "tokens"),
    "replicate": ("whole on every rank", "whole"),
}


@dataclass
class Node:
    """A call of a module: what happened in it, in order."""

    module: str
    source: str  # the module that was followed for it
    arrives: Shape = ()
    leaves: Shape = ()
    tensor: int = 0
    events: list[Node | ForwardEvent] = field(default_factory=list)

    @property
    def children(self) -> list[Node]:
        """Modules called in it."""
        return [e for e in self.events if isinstance(e, Node)]


def tree_of(steps: Iterable[ForwardEvent], followed: Mapping[str, str]) -> Node:
    """The calls of a forward, those of blocks that were not followed like those of the block that stands for them."""
    top = Node("", "")
    stack = [top]
    for step in steps:
        if step.what == "enter":
            node = Node(step.module, step.module, step.shape, tensor=step.tensor)
            stack[-1].events.append(node)
            stack.append(node)
        elif step.what == "leave":
            stack.pop().leaves = step.shape
        else:
            stack[-1].events.append(step)
    done: dict[str, Node] = {}

    def expand(node: Node) -> None:
        like = followed.get(node.module, node.module)
        if like != node.module and like in done and not node.children:
            node.source = like
            node.events = [_moved(e, like, node.module) for e in done[like].events]
        for child in node.children:
            expand(child)
        done.setdefault(node.module, node)

    expand(top)
    roots = top.children
    if len(roots) != 1 or roots[0].module:
        return top  # a loss that calls parts of the model
    at, root = top.events.index(roots[0]), roots[0]
    root.events = [*top.events[:at], *root.events, *top.events[at + 1 :]]  # what the loss does afterwards, outside of the model
    return root


def _moved(event: Node | ForwardEvent, old: str, new: str) -> Node | ForwardEvent:
    if isinstance(event, ForwardEvent):
        return event._replace(module=new + event.module[len(old) :] if event.module.startswith(old) else event.module)
    name = new + event.module[len(old) :] if event.module.startswith(old) else event.module
    return Node(name, event.source, event.arrives, event.leaves, event.tensor, [_moved(e, old, new) for e in event.events])


def _registered(model: nn.Module, name: str = "") -> Node:
    node = Node(name, name)
    node.events = [_registered(m, f"{name}.{n}" if name else n) for n, m in model.named_children()]
    return node


# -------------------------------------------------------------------------------------------------------------- pictures


def of_world(model: str, plan: CheckedPlan, world: RankModel, whole: RankModel) -> Picture:
    """The picture of a model that was traced.

    Args:
        model: its class.
        plan: checked.
        world: the trace of a rank.
        whole: the trace of the model in one process.
    """
    backward: dict[str, list[ForwardEvent]] = {}
    for piece in world.trace.segments:
        for sent, n in piece.collectives.items():
            if sent.phase == "backward":
                backward.setdefault(sent.module, []).extend(
                    [ForwardEvent("collective", sent.module, sent.kind, bytes=sent.bytes)] * n
                )
    root = tree_of(world.trace.forward, world.trace.followed)
    shapes: dict[str, list[Node]] = {}
    for node in _nodes(tree_of(whole.trace.forward, whole.trace.followed)):
        shapes.setdefault(node.module, []).append(node)
    made = _Maker(plan, world.classes, set(world.blocks), backward, shapes)
    return made.picture(model, root, "as the modules ran in the trace")


def of_plan(model: nn.Module, plan: CheckedPlan) -> Picture:
    """The picture of a model that can't be traced: modules as they were registered, no shapes of activations, no collectives."""
    classes = {n: type(m).__name__ for n, m in model.named_modules()}
    made = _Maker(plan, classes, {n for n, _ in find_blocks(model)}, {}, {})
    return made.picture(
        type(model).__name__, _registered(model), "as the modules were registered, since the model could not be traced"
    )


def _nodes(node: Node) -> Iterator[Node]:
    yield node
    for child in node.children:
        yield from _nodes(child)


class _Maker:
    def __init__(
        self,
        plan: CheckedPlan,
        classes: Mapping[str, str],
        blocks: set[str],
        backward: Mapping[str, list[ForwardEvent]],
        whole: Mapping[str, list[Node]],
    ) -> None:
        self.plan, self.classes, self.blocks, self.whole = plan, classes, blocks, whole
        self.tp = plan.tp or 1
        self.backward = {m: list(of) for m, of in backward.items()}
        self.calls: Counter[str] = Counter()
        self.in_all: Counter[str] = Counter()  # calls of each module that ran
        self.left_out: Counter[str] = Counter()
        self.entries: dict[str, list[Entry]] = {}
        self.own: dict[
            str, list[str]
        ] = {}  # module -> names of its own parameters, and of those of modules in it that are not called
        self.of: dict[str, Entry] = {}  # parameter -> what splits it
        for entry in plan.entries:
            self.entries.setdefault(entry.where, []).append(entry)
            self.of |= dict.fromkeys(entry.splits, entry)
        self.holds = {""} | {p for b in blocks for p in _parents(b)}  # containers of blocks

    def picture(self, model: str, root: Node, order: str) -> Picture:
        for node in _nodes(root):
            self.in_all[node.module] += 1
        for name in self.plan.splits:
            module = name.rpartition(".")[0]
            shared = [
                t
                for t in self.plan.tied
                if t.rpartition(".")[0] in self.in_all and self.plan.shapes.get(t) == self.plan.shapes[name]
            ]
            if module not in self.in_all and shared:
                continue  # drawn where it is used
            while module and module not in self.in_all:
                module = module.rpartition(".")[0]
            self.own.setdefault(module, []).append(name)
        rows = self.rows(root, "")
        return Picture(model, self.tp, tuple(rows), order, dict(self.left_out), self.plan.source)

    # ------------------------------------------------------------------------------------------------------- a node

    def rows(self, node: Node, prefix: str) -> list[Row]:
        """What is drawn of a module."""
        self.calls[node.module] += 1
        whole = self._whole(node)
        if not self._drawn(node):
            self.left_out[self.classes.get(node.module, "module")] += 1
            return []
        arrives, leaves = (
            self._state(node.arrives, whole.arrives if whole else ()),
            self._state(node.leaves, whole.leaves if whole else ()),
        )
        inner = [e for e in node.events if not isinstance(e, Node) or self._drawn(e)]
        if not any(isinstance(e, Node) for e in inner):
            for e in node.children:
                self.rows(e, prefix)  # counted as left out
            return self._leaf(node, prefix, arrives, leaves)
        together = self._as_one(node, prefix, arrives, leaves)
        if together is not None:
            return [together]
        inline = node.module in self.holds
        inside = prefix if inline else node.module
        rows: list[Row] = []
        if node.module in self.own:
            rows.append(self._own(node, inside))
        back = self._pending(node)
        rows_of: list[Row] = []
        for event in node.events:
            if isinstance(event, Node):
                rows_of.extend(self.rows(event, inside))
            elif event.what == "collective":
                border = self._border(event, back, node.module, bool(rows_of) and not isinstance(rows_of[-1], Border))
                last = not node.module and not any(isinstance(e, Node) for e in node.events[node.events.index(event) :])
                rows_of.append(replace(border, reason="after the last module: the loss") if last else border)
            elif event.what == "kernel" and event.name in ("attention", "product"):
                rows_of.append(self._operation(event, whole))
        if back:
            rows.extend(self._entrance(node, back))
        rows.extend(partial(beside(merged(rows_of)), self.tp))
        rows = alike(rows)
        if inline:
            return rows
        block = node.module in self.blocks
        if not block and len(rows) == 1 and isinstance(rows[0], (Box, Frame)) and node.module not in self.own:
            only = rows[0]
            return [replace(only, name=f"{_label(node.module, prefix)}.{only.name}")]
        return [Frame(_label(node.module, prefix), self.classes.get(node.module, ""), tuple(rows), block=block)]

    def _drawn(self, node: Node) -> bool:
        if node.module in self.own or any(self._drawn(c) for c in node.children):
            return True
        return any(
            isinstance(e, ForwardEvent) and (e.what == "collective" or e.name in ("attention", "product")) for e in node.events
        )

    def _leaf(self, node: Node, prefix: str, arrives: State, leaves: State) -> list[Row]:
        back = self._pending(node)
        before, after, ran = list[Row](), list[Row](), False
        kinds = {e.name for e in node.events if isinstance(e, ForwardEvent) and e.what == "kernel"}
        first = "product" if "product" in kinds else "other"
        notes: list[str] = []
        for event in node.events:
            if not isinstance(event, ForwardEvent):
                continue
            if event.what == "kernel":
                ran = ran or event.name == first
                if event.name == "attention":
                    notes.append(self._operation(event, self._whole(node)).style)
            else:
                (after if ran else before).append(self._border(event, back, node.module, ran))
        entrance = self._entrance(node, back)
        if node.module not in self.own:  # an operation, or something with collectives only
            box = Box(_label(node.module, prefix), self.classes.get(node.module, ""), "no parameters", "", (), arrives, leaves)
        else:
            box = replace(self._own(node, prefix), name=_label(node.module, prefix), arrives=arrives, leaves=leaves)
        if any(isinstance(b, Border) and b.forward == "all-gather" for b in before) and arrives.kind == "tokens":
            box = replace(box, arrives=State(arrives.whole, arrives.whole, "whole"))
        if (
            any(isinstance(b, Border) and b.forward == "all-gather" for b in after)
            and box.cut == "columns"
            and leaves.kind == "whole"
        ):
            box = replace(box, leaves=State(leaves.whole, (*leaves.whole[:-1], -(-leaves.whole[-1] // self.tp)), "features"))
        box = replace(box, notes=(*box.notes, *notes), tensor=node.tensor)
        return [*entrance, *merged(before), box, *merged(after)]

    def _own(self, node: Node, prefix: str) -> Box:
        """The parameters of a module itself."""
        names = self.own[node.module]
        weights = tuple(self._weight(n, node.module) for n in names)
        entries = list({id(self.of[n]): self.of[n] for n in names}.values())
        matrices = [e for e in entries if any(len(s) > 1 for s in e.shapes.values())] or entries
        large = max(matrices, key=lambda e: max((math.prod(s) for s in e.shapes.values()), default=0))
        dims: list[int] = []
        words: list[str] = []
        for e in matrices:
            if e.style.name == "shard":
                dims += [d for d in dict.fromkeys(s.dim for s in e.splits.values()) if d is not None and d not in dims]
            else:
                words.append(STYLES.get(e.style.name, (str(e.style), ""))[0])
        along = ["split along " + " and ".join(f"dim {d}" for d in dims)] if dims else []
        style = "; ".join(dict.fromkeys([*along, *words]))
        cut = STYLES.get(large.style.name, ("", ""))[1]
        if not cut:  # split by its dim, or a style of the user
            found = next((w for w in weights if w.dim is not None), None)
            cut = "whole" if found is None else "columns" if found.dim == len(found.whole) - 1 else "rows"
        notes = tuple(
            f"{what}: {e.reason}" if e.reason else what
            for e in self.entries.get(node.module, ())
            if e.style.name == "local_ops"
            for what in (f"{len(getattr(e.style, 'calls', ()))} of the calls in its code with this rank's sizes",)
        )
        reason = "; ".join(dict.fromkeys(e.reason for e in matrices if e.reason))
        name = ", ".join(w.name for w in weights)
        return Box(name, self.classes.get(node.module, ""), style, cut, weights, reason=reason, notes=notes)

    def _weight(self, name: str, module: str) -> Weight:
        split, shape = self.plan.splits[name], self.plan.shapes[name]
        local = tuple(dict.fromkeys(split.local_shape(shape, r) for r in range(self.tp)))
        return Weight(name[len(module) + 1 :] if module else name, tuple(shape), local, split.dim, split.sum_over(self.tp))

    def _as_one(self, node: Node, prefix: str, arrives: State, leaves: State) -> Box | None:
        """A container of which nothing is split and nothing sent: one box."""
        if node.module in self.holds or (any(c.module in self.blocks for c in _nodes(node)) and node.module not in self.blocks):
            return None
        inside = list(_nodes(node))
        if any(isinstance(e, ForwardEvent) and e.what == "collective" for n in inside for e in n.events):
            return None
        if any(self.backward.get(n.source) for n in inside):
            return None
        names = list(dict.fromkeys(name for n in inside for name in self.own.get(n.module, ())))
        entries = [e for n in inside for e in self.entries.get(n.module, ())] + [self.of[n] for n in names]
        with_own = [n for n in inside if n.module in self.own]
        if any(e.style.name != "replicate" for e in entries) or len(with_own) < MANY:
            return None
        numel = sum(math.prod(self.plan.shapes[n]) for n in names)
        reason = next((e.reason for e in sorted(entries, key=lambda e: -sum(map(math.prod, e.shapes.values()))) if e.reason), "")
        many = f"{len(with_own)} modules, {numel:,} parameters"
        name, of = _label(node.module, prefix), self.classes.get(node.module, "")
        return Box(name, of, f"whole on every rank: {many}", "whole", (), arrives, leaves, reason, tensor=node.tensor)

    # ------------------------------------------------------------------------------------------------- what is in between

    def _pending(self, node: Node) -> list[ForwardEvent]:
        """The collectives of the backward of this call."""
        of, calls = self.backward.get(node.source, []), max(1, self.in_all[node.source])
        at = min(self.calls[node.module], calls) - 1
        return of[at * len(of) // calls : (at + 1) * len(of) // calls]

    def _border(self, step: ForwardEvent, back: list[ForwardEvent], module: str, late: bool) -> Border:
        twin = next((b for b in back if b.name == BACK.get(step.name) and b.bytes == step.bytes), None)
        if twin is None and step.name != "all-reduce":
            twin = next((b for b in back if b.name == BACK.get(step.name)), None)
        if twin is not None:
            back.remove(twin)
        return Border(
            step.name,
            twin.name if twin else "",
            step.bytes,
            reason=self._why(module, "prepare_output" if late else "prepare_input"),
        )

    def _entrance(self, node: Node, back: list[ForwardEvent]) -> list[Row]:
        """Collectives that the backward alone has: where the module is entered."""
        alone = not any(isinstance(e, ForwardEvent) and e.what == "collective" for e in node.events)
        reason = self._why(node.module, "prepare_input") if alone else ""
        return merged([Border("", b.name, b.bytes, reason=reason) for b in back])

    def _why(self, module: str, style: str) -> str:
        return next((e.reason for e in self.entries.get(module, ()) if e.style.name == style and e.reason), "")

    def _operation(self, step: ForwardEvent, whole: Node | None) -> Box:
        b, m, n, k = step.shape or (0, 0, 0, 0)
        same = [e.shape for e in (whole.events if whole else ()) if isinstance(e, ForwardEvent) and e.name == step.name and e.shape]
        of = f" of {same[0][0]}" if same and same[0][0] != b else ""
        if step.name == "attention":
            return Box("attention", "", f"{b}{of} heads x samples, {m:,} queries on {n:,} keys", "")
        return Box("product of activations", "", f"{b}{of} x ({m:,} x {k:,}) ({k:,} x {n:,})", "")

    def _whole(self, node: Node) -> Node | None:
        found = self.whole.get(node.module, [])
        at = min(self.calls[node.module] - 1, len(found) - 1)
        return found[at] if found and at >= 0 else None

    def _state(self, local: Shape, whole: Shape) -> State:
        if not local or not whole or len(local) != len(whole):
            return State((), local)
        differ = [d for d in range(len(local)) if local[d] != whole[d]]
        if not differ:
            return State(whole, local, "whole")
        if differ == [len(local) - 1]:
            return State(whole, local, "features")
        return State(whole, local, "tokens" if len(differ) == 1 and len(local) > 1 else "split")


def _label(module: str, prefix: str) -> str:
    return (module[len(prefix) + 1 :] if prefix else module) or "(the model)"


def _parents(name: str) -> Iterator[str]:
    while "." in name:
        name = name.rpartition(".")[0]
        yield name
