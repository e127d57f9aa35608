"""The calls of modules in one traced forward pass, as a tree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from torch import nn

from lightning_tp.estimate.trace.forward_log import ForwardEvent, Shape


@dataclass
class Call:
    """A call of a module.

    Args:
        module: its name.
        source: the module that was traced for it: itself, or that of a block that is like its own.
        arrives, leaves: shapes of its input and output on this rank.
        tensor: a number of the input; see `ForwardEvent`.
        events: what happened in it, in order.
        nth: how many times the module was called before.
    """

    module: str
    source: str
    arrives: Shape = ()
    leaves: Shape = ()
    tensor: int = 0
    events: list[Call | ForwardEvent] = field(default_factory=list)
    nth: int = 0

    @property
    def children(self) -> list[Call]:
        """The calls of modules in it."""
        return [event for event in self.events if isinstance(event, Call)]

    @property
    def own(self) -> list[ForwardEvent]:
        """The kernels and collectives in it that are in no child."""
        return [event for event in self.events if isinstance(event, ForwardEvent)]

    def walk(self) -> Iterator[Call]:
        """Walk over this call and all below it, in the order in which they began."""
        yield self
        for child in self.children:
            yield from child.walk()


def call_tree(events: Iterable[ForwardEvent], followed: Mapping[str, str]) -> Call:
    """Read the tree from the log of a forward pass; blocks that were not traced get the calls of the one that stands for them.

    Args:
        events: of the log.
        followed: block -> the block that was traced for it.

    Returns:
        The call of the model, with what a loss does behind it; or, for a loss that calls parts of the model, one around all calls.

    Example:
        >>> log = [ForwardEvent("enter", ""), ForwardEvent("enter", "up"), ForwardEvent("leave", "up"), ForwardEvent("leave", "")]
        >>> [call.module for call in call_tree(log, {}).walk()]
        ['', 'up']
    """
    top = Call("", "")
    open_calls = [top]
    for event in events:
        if event.what == "enter":
            call = Call(event.module, event.module, event.shape, tensor=event.tensor)
            open_calls[-1].events.append(call)
            open_calls.append(call)
        elif event.what == "leave":
            open_calls.pop().leaves = event.shape
        else:
            open_calls[-1].events.append(event)
    _fill_in(top, followed, {})
    if [call.module for call in top.children] == [""]:
        model = top.children[0]
        at = top.events.index(model)
        model.events = [*top.events[:at], *model.events, *top.events[at + 1 :]]
        top = model
    return _numbered(top)


def registered_tree(model: nn.Module) -> Call:
    """Make the tree as if all modules called their children once, in the order of their registration."""

    def call_of(module: nn.Module, name: str) -> Call:
        children: list[Call | ForwardEvent] = [call_of(m, f"{name}.{n}" if name else n) for n, m in module.named_children()]
        return Call(name, name, events=children)

    return _numbered(call_of(model, ""))


def _fill_in(call: Call, followed: Mapping[str, str], traced: dict[str, Call]) -> None:
    like = followed.get(call.module, call.module)
    if like != call.module and like in traced and not call.children:
        call.source = like
        call.events = [_renamed(event, like, call.module) for event in traced[like].events]
    for child in call.children:
        _fill_in(child, followed, traced)
    traced.setdefault(call.module, call)


def _renamed(event: Call | ForwardEvent, old: str, new: str) -> Call | ForwardEvent:
    name = new + event.module[len(old) :] if event.module.startswith(old) else event.module
    if isinstance(event, ForwardEvent):
        return event._replace(module=name)
    events = [_renamed(e, old, new) for e in event.events]
    return Call(name, event.source, event.arrives, event.leaves, event.tensor, events)


def _numbered(root: Call) -> Call:
    calls: Counter[str] = Counter()
    for call in root.walk():
        call.nth = calls[call.module]
        calls[call.module] += 1
    return root
