"""What a playback runs, when a value is complete, and when it is freed: on recordings made by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_tp._compat import storage_key
from lightning_tp.core.modules.playback import (
    Playback,
    RecordedOp,
    Recording,
    StorageView,
)
from lightning_tp.errors import TPError

DEFAULT = torch.default_generator


def op(
    call: Any = None, *, reads: set[int] = frozenset(), writes: set[int] = frozenset(), over: set[int] = frozenset(), **more: Any
) -> RecordedOp:  # type: ignore[assignment]
    """An operation on storages 1, 2, ..; `draws` is the point after which its generator stands."""
    makes = {i: view_of(key) for i, key in enumerate(more.get("makes", ()))}
    start = more.get("draws")
    return RecordedOp(
        call,
        more.get("args", []),
        {},
        torch.float32,
        set(reads),
        set(writes),
        set(over),
        makes,
        None if start is None else DEFAULT,
        start,
    )


def view_of(key: int, size: int = 2) -> StorageView:
    return StorageView(key, torch.float32, (size,), (1,), 0, False, False)


def schedule(recording: Recording, wanted: set[int], end: Any = None) -> list[tuple[int | None, set[int], set[int]]]:
    return [tuple(step) for step in recording.schedule(wanted, torch.empty(0) if end is None else end)]  # type: ignore[misc]


def test_only_what_matters_runs() -> None:
    recording = Recording([
        op(makes=(1,)),  # 0
        op(makes=(2,)),  # 1: nobody wants it
        op(writes={1}, over={1}),  # 2: what was there before is dead
        op(reads={1}, makes=(3,)),  # 3
        op(reads={1}, writes={3}),  # 4
    ])  # fmt: skip
    assert schedule(recording, {1}) == [(2, {1}, {1})]
    assert schedule(recording, {3}) == [(2, set(), set()), (3, set(), set()), (4, {3}, {1, 3})]
    assert schedule(recording, {1, 3}) == [(2, set(), set()), (3, set(), set()), (4, {1, 3}, {1, 3})]
    assert schedule(recording, {2}) == [(1, {2}, {2})]
    assert schedule(recording, set()) == []
    assert schedule(Recording([op(makes=(1,)), op(reads={1}, writes={1})]), {1}) == [
        (0, set(), set()),
        (1, {1}, {1}),
    ]  # not overwritten


def test_what_was_never_written_is_complete_at_once() -> None:
    assert schedule(Recording([op(makes=(1,))]), {1, 7}) == [(None, {7}, {7}), (0, {1}, {1})]


def test_dead_draws_run_for_the_stream() -> None:
    """The later draw starts where the earlier one ended; a draw from a state of its own needs no other."""
    first, state = torch.empty(3), torch.empty(5)
    recording = Recording([
        op(makes=(1,), draws=first),  # 0
        op(writes={1}, over={1}, draws=0),  # 1
        op(makes=(2,), draws=1),  # 2
        op(makes=(3,), draws=state),  # 3
    ])  # fmt: skip
    assert [index for index, _, _ in schedule(recording, {2})] == [0, 1, 2]
    assert schedule(recording, {2})[0] == (0, set(), {1})  # on scratch memory
    assert [index for index, _, _ in schedule(recording, {3})] == [3]
    assert [index for index, _, _ in schedule(recording, set(), 1)] == [0, 1]
    assert [index for index, _, _ in schedule(recording, {3}, 2)] == [0, 1, 2, 3]


def test_in_the_order_that_was_chosen() -> None:
    recording = Recording([op(makes=(1,)), op(makes=(2,)), op(reads={1}, makes=(3,))], order=[0, 2, 1])
    assert [(index, free) for index, _, free in schedule(recording, {2, 3})] == [(0, set()), (2, {1, 3}), (1, {2})]


def test_what_depends_on_a_foreign_storage_is_refused() -> None:
    recording = Recording([op(reads={9}, makes=(1,)), op(writes={2}, over={2})], foreign={2, 9})
    with pytest.raises(TPError, match="did not see being made"):
        schedule(recording, {1})
    assert schedule(recording, {2}) == [(1, {2}, {2})]  # it was overwritten


# ----------------------------------------------------------------------------------------------------------------- a run


def test_values_are_handed_out_and_freed() -> None:
    keep = [torch.empty(2, dtype=dtype, device="meta") for dtype in (torch.float32, torch.float64, torch.float64)]
    a, b, c = (StorageView.of(t) for t in keep)
    seen: list[int] = []

    def ones() -> Tensor:
        return torch.ones(2)

    def add(x: Tensor, y: Tensor) -> Tensor:
        seen.append(len(playback._memory))
        return x + y

    recording = Recording(
        [
            RecordedOp(ones, [], {}, torch.float32, set(), makes={0: a}),
            RecordedOp(ones, [], {}, torch.float64, set(), makes={0: b}),  # of its default dtype
            RecordedOp(add, [a, b], {}, torch.float32, {a.key, b.key}, makes={0: c}),
        ],
        storages={v.key: t.untyped_storage() for v, t in zip((a, b, c), keep)},
    )
    playback = Playback(recording)
    got = playback.run({a.key: {a: [0, 2]}, c.key: {c: [1]}}, torch.empty(0))
    (positions, first), (others, last) = list(got)
    assert (positions, others) == ([0, 2], [1])
    assert first.tolist() == [1, 1] and last.tolist() == [2, 2] and seen == [2]
    assert playback._memory == {} and playback.peak_bytes == 8 + 16 + 16


def test_memory_that_nobody_wrote_is_zero() -> None:
    meta = torch.empty(3, device="meta")
    view = StorageView.of(meta)
    recording = Recording(storages={view.key: meta.untyped_storage()})
    ((positions, value),) = Playback(recording).run({view.key: {view: [0]}}, torch.empty(0))
    assert positions == [0] and value.tolist() == [0, 0, 0]


def test_views_of_one_storage_share_memory() -> None:
    meta = torch.empty(2, 3, dtype=torch.complex64, device="meta")
    views = [StorageView.of(t) for t in (meta, meta.T, meta[1], meta.conj(), meta.conj().imag)]
    assert {v.key for v in views} == {storage_key(meta)} and views[1].stride == (1, 3) and views[2].offset == 3
    assert [(v.conj, v.neg) for v in views[-2:]] == [(True, False), (False, True)]
    full = torch.arange(6).view(2, 3) * (1 + 1j)
    fill = RecordedOp(lambda t: t.copy_(full), [views[0]], {}, torch.float32, set(), {meta.untyped_storage()._cdata})
    recording = Recording([fill], storages={views[0].key: meta.untyped_storage()})
    got = {tuple(p): v for p, v in Playback(recording).run({views[0].key: {v: [i] for i, v in enumerate(views)}}, torch.empty(0))}
    for i, expected in enumerate((full, full.T, full[1], full.conj(), full.conj().imag)):
        assert torch.equal(got[i,], expected.to(got[i,].dtype)) and got[i,].stride() == views[i].stride
    assert len({t.untyped_storage()._cdata for t in got.values()}) == 1


def test_a_stream_that_is_resumed_later() -> None:
    """Draw 2 starts after draw 0, though draw 1 from another state came between."""
    torch.manual_seed(3)
    start = torch.get_rng_state()
    expected = torch.rand(4)
    other = torch.Generator().manual_seed(9).get_state()
    metas = [torch.empty(2, device="meta") for _ in range(3)]
    views = [StorageView.of(t) for t in metas]

    def draw(start: Any, view: StorageView) -> RecordedOp:
        return RecordedOp(lambda: torch.rand(2), [], {}, torch.float32, set(), makes={0: view}, generator=DEFAULT, start=start)

    recording = Recording(
        [draw(start, views[0]), draw(other, views[1]), draw(0, views[2])],
        storages={v.key: t.untyped_storage() for v, t in zip(views, metas)},
        generators={DEFAULT: start},
        resumed={0},
    )
    torch.manual_seed(4)
    before = torch.get_rng_state()
    playback = Playback(recording)
    got = [value for _, value in playback.run({v.key: {v: [i]} for i, v in enumerate(views)}, 2)]
    assert torch.equal(torch.cat((got[0], got[2])), expected)
    assert torch.equal(got[1], torch.rand(2, generator=torch.Generator().manual_seed(9)))
    assert torch.equal(torch.get_rng_state(), before)
    torch.set_rng_state(playback.states[2])
    after = torch.rand(1)
    torch.set_rng_state(start)
    torch.rand(4)
    assert torch.equal(after, torch.rand(1))


def test_the_process_is_as_it_was_whenever_the_caller_has_control() -> None:
    generator = torch.Generator().manual_seed(1)
    playback = Playback(Recording(generators={generator: generator.get_state()}))
    assert playback.generators[generator] is not generator and playback.generators[DEFAULT] is DEFAULT
    torch.manual_seed(7)
    mine = torch.get_rng_state()
    with playback.process():
        torch.set_default_dtype(torch.float64)
        assert not torch.is_grad_enabled()
        inside = torch.rand(1)
    assert torch.equal(torch.get_rng_state(), mine) and torch.get_default_dtype() == torch.float32 and torch.is_grad_enabled()
    with playback.process():
        assert torch.rand(1) != inside  # its own stream went on
    assert torch.equal(torch.get_rng_state(), mine)
