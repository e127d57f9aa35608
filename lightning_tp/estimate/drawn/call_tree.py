"""The calls of modules in one forward pass, as a tree."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from torch import nn

from lightning_tp.estimate.trace.forward_log import ForwardEvent, Shape


@dataclass
class Call:
    """A call of a module."""

    module: str  # its name
    source: str  # the module that was traced for it: itself, or of a block that was not traced the one that stands for it
    nth: int = 0  # how many times it was called before
    # arrives, leaves: shapes of its input and output on this rank
    arrives: Shape = ()
    leaves: Shape = ()
    tensor: int = 0  # a number of the input; see `ForwardEvent`
    events: list[Call | ForwardEvent] = field(default_factory=list)  # what happened in `source`, in order

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


@dataclass(frozen=True)
class CallTree:
    """All calls of a forward pass."""

    # the call of the model, with what a loss does behind it; or, for a loss that calls parts of the model, one around all calls
    root: Call
    calls: Mapping[str, list[Call]]  # module -> its calls
    followed: Mapping[str, str]  # block -> the block that was traced for it

    def traced(self, module: str) -> str:
        """Return the module that was traced for one: itself, unless it is in a block that was not traced."""
        for parent in (module, *parents(module)):
            if parent in self.followed:
                return self.followed[parent] + module[len(parent) :]
        return module


def call_tree(events: Iterable[ForwardEvent], followed: Mapping[str, str]) -> CallTree:
    """Read the calls from the log of a forward pass.

    Example:
        >>> log = [ForwardEvent("enter", ""), ForwardEvent("enter", "up"), ForwardEvent("leave", "up"), ForwardEvent("leave", "")]
        >>> [call.module for call in call_tree(log, {}).root.walk()]
        ['', 'up']
    """
    top = Call("", "")
    stack, calls = [top], dict[str, list[Call]]()
    for event in events:
        if event.what == "enter":
            call = Call(event.module, event.module, len(calls.setdefault(event.module, [])), event.shape, tensor=event.tensor)
            calls[event.module].append(call)
            stack[-1].events.append(call)
            stack.append(call)
        elif event.what == "leave":
            call = stack.pop()
            call.leaves = event.shape
            like = followed.get(call.module, call.module)
            if like != call.module and like in calls and not call.children:
                call.source, call.events = like, calls[like][0].events
        else:
            stack[-1].events.append(event)
    if [call.module for call in top.children] == [""]:
        model = top.children[0]
        at = top.events.index(model)
        model.events = [*top.events[:at], *model.events, *top.events[at + 1 :]]
        top = model
    return CallTree(top, calls, followed)


def registered_tree(model: nn.Module) -> CallTree:
    """Make the tree as if all modules called their children once, in the order of their registration."""
    calls = {name: [Call(name, name)] for name, _ in model.named_modules()}
    for name in list(calls)[1:]:
        calls[name.rpartition(".")[0]][0].events += calls[name]
    return CallTree(calls[""][0], calls, {})


def parents(name: str) -> Iterator[str]:
    """Walk over the names of the modules that a module is in, the nearest first, without the root.

    Example:
        >>> list(parents("model.layers.3"))
        ['model.layers', 'model']
    """
    while "." in name:
        name = name.rpartition(".")[0]
        yield name
