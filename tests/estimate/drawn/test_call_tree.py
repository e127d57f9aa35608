from __future__ import annotations

from torch import nn

from lightning_tp.estimate.drawn.call_tree import Call, call_tree, registered_tree
from lightning_tp.estimate.trace.forward_log import ForwardEvent


def enter(module: str) -> ForwardEvent:
    return ForwardEvent("enter", module, shape=(2, 4), tensor=7)


def leave(module: str) -> ForwardEvent:
    return ForwardEvent("leave", module, shape=(2, 8))


def sent(module: str, kind: str = "all-reduce") -> ForwardEvent:
    return ForwardEvent("collective", module, kind, bytes=64)


def names(call: Call) -> list[str]:
    return [c.module for c in call.walk()]


def test_calls_lie_in_those_that_made_them() -> None:
    log = [enter(""), enter("up"), sent("up"), leave("up"), enter("down"), leave("down"), sent(""), leave("")]
    tree = call_tree(log, {})
    up, down = tree.root.children
    assert names(tree.root) == ["", "up", "down"] and tree.root.own == [sent("")] and up.own == [sent("up")] and not down.own
    assert (up.arrives, up.leaves, up.tensor, up.source) == ((2, 4), (2, 8), 7, "up")
    assert tree.calls == {"": [tree.root], "up": [up], "down": [down]}


def test_blocks_that_were_not_traced_are_like_the_one_that_stands_for_them() -> None:
    log = [
        enter(""),
        enter("h.0"),
        enter("h.0.q"),
        sent("h.0.q"),
        leave("h.0.q"),
        leave("h.0"),
        enter("h.1"),
        leave("h.1"),
        leave(""),
    ]
    tree = call_tree(log, {"h.0": "h.0", "h.1": "h.0"})
    traced, other = tree.root.children
    assert (other.module, other.source, other.events) == ("h.1", "h.0", traced.events) and traced.source == "h.0"
    assert [tree.traced(name) for name in ("h.1.q", "h.1", "h.0.q", "h.10.q", "head")] == [
        "h.0.q",
        "h.0",
        "h.0.q",
        "h.10.q",
        "head",
    ]


def test_a_block_that_was_traced_keeps_what_happened_in_it() -> None:
    log = [enter(""), enter("h.0"), leave("h.0"), enter("h.1"), enter("h.1.q"), leave("h.1.q"), leave("h.1"), leave("")]
    _, second = call_tree(log, {"h.0": "h.0", "h.1": "h.0"}).root.children
    assert second.source == "h.1" and [c.module for c in second.children] == ["h.1.q"]


def test_what_a_loss_does_is_behind_the_model() -> None:
    root = call_tree([sent("", "before"), enter(""), enter("a"), leave("a"), leave(""), sent("", "after")], {}).root
    assert [event.name for event in root.own] == ["before", "after"] and root.events[-1] == sent("", "after")
    assert names(root) == ["", "a"]


def test_a_loss_that_calls_parts_of_the_model() -> None:
    assert names(call_tree([enter("a"), leave("a"), enter("b"), leave("b")], {}).root) == ["", "a", "b"]


def test_calls_of_a_module_are_numbered() -> None:
    tree = call_tree([enter(""), enter("a"), leave("a"), enter("b"), enter("a"), leave("a"), leave("b"), leave("")], {})
    assert [(c.module, c.nth) for c in tree.root.walk()] == [("", 0), ("a", 0), ("b", 0), ("a", 1)]


def test_registered() -> None:
    tree = registered_tree(nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.ReLU())))
    assert names(tree.root) == ["", "0", "1", "1.0"] and tree.calls["1"] == [tree.root.children[1]]
