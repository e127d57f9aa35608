from __future__ import annotations

from torch import nn

from lightning_tp.estimate.drawn.call_tree import Call, call_tree, registered_tree
from lightning_tp.estimate.trace.forward_log import ForwardEvent


def enter(module: str) -> ForwardEvent:
    return ForwardEvent("enter", module, shape=(2, 4), tensor=7)


def leave(module: str) -> ForwardEvent:
    return ForwardEvent("leave", module, shape=(2, 8))


def sent(module: str, kind: str = "all-reduce") -> ForwardEvent:
    return ForwardEvent("sent", module, kind, bytes=64)


def names(call: Call) -> list[str]:
    return [c.module for c in call.walk()]


def test_calls_lie_in_those_that_made_them() -> None:
    log = [enter(""), enter("up"), sent("up"), leave("up"), enter("down"), leave("down"), sent(""), leave("")]
    root = call_tree(log, {})
    up, down = root.children
    assert names(root) == ["", "up", "down"] and root.own == [sent("")] and up.own == [sent("up")] and not down.own
    assert (up.arrives, up.leaves, up.tensor, up.source) == ((2, 4), (2, 8), 7, "up")


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
    root = call_tree(log, {"h.0": "h.0", "h.1": "h.0"})
    assert names(root) == ["", "h.0", "h.0.q", "h.1", "h.1.q"]
    copied = root.children[1]
    assert copied.source == "h.0" and copied.children[0].source == "h.0.q" and copied.children[0].own == [sent("h.1.q")]


def test_what_a_loss_does_is_behind_the_model() -> None:
    root = call_tree([sent("", "before"), enter(""), enter("a"), leave("a"), leave(""), sent("", "after")], {})
    assert root.module == "" and [getattr(e, "name", e) for e in root.events if isinstance(e, ForwardEvent)] == ["before", "after"]
    assert names(root) == ["", "a"]


def test_a_loss_that_calls_parts_of_the_model() -> None:
    root = call_tree([enter("a"), leave("a"), enter("b"), leave("b")], {})
    assert names(root) == ["", "a", "b"]


def test_calls_of_a_module_are_numbered() -> None:
    root = call_tree([enter(""), enter("a"), leave("a"), enter("b"), enter("a"), leave("a"), leave("b"), leave("")], {})
    assert [(c.module, c.nth) for c in root.walk()] == [("", 0), ("a", 0), ("b", 0), ("a", 1)]


def test_registered() -> None:
    root = registered_tree(nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.ReLU())))
    assert names(root) == ["", "0", "1", "1.0"] and all(c.source == c.module for c in root.walk())
