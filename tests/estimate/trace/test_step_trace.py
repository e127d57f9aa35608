from __future__ import annotations

from lightning_tp.estimate.trace.step_trace import Alloc, CollectiveCall, End, FusedOp, Label, StepTrace, Tape, replay
from tests.estimate.by_hand import GATHERED, PEAK, SAVED, block_tape, op, outside, step

X, Y = Label("x", "activation"), Label("y", "backward")


def test_live_bytes_at_start_peak_and_end() -> None:
    first, second = replay([
        Tape("", "forward", events=[Alloc(X, 8), Alloc(Y, 4), Alloc(Y, -4), Alloc(Y, 3), End()]),
        Tape("", "backward", events=[Alloc(X, -8), Alloc(Y, 2), End()]),
    ])  # fmt: skip
    assert first.start == {} and first.peak == {X: 8, Y: 4} and first.end == {X: 8, Y: 3}
    assert second.start == second.peak == first.end  # it is never more than at its start
    assert second.end == {X: 0, Y: 5} and first.freed == second.freed == 0


def test_of_several_peaks_the_first_counts() -> None:
    (found,) = replay([Tape("", "forward", events=[Alloc(X, 8), Alloc(X, -8), Alloc(Y, 8), End()])])
    assert found.peak == {X: 8}


def test_what_follows_the_end_frees_the_gradients_of_a_block() -> None:
    segments = replay(step())
    backward = next(s for s in segments if s.block == "layers.2" and s.phase == "backward")
    gradient = Label("layers.2.w", "gradient")
    assert backward.freed == GATHERED["layers.2"] == backward.end[gradient]
    assert segments[segments.index(backward) + 1].start[gradient] == 0
    assert sum(backward.start.values()) == 3 * SAVED + GATHERED[""]
    assert sum(backward.peak.values()) == sum(backward.start.values()) + GATHERED["layers.2"] + PEAK


def test_the_last_end_counts_where_segments_were_joined() -> None:
    (found,) = replay([Tape("b", "forward", events=[Alloc(X, 8), End(), Alloc(Y, 4), End()])])
    assert found.end == found.peak == {X: 8, Y: 4} and found.freed == 0


def test_kernels_are_counted() -> None:
    call = CollectiveCall("all-gather", 8, "x", "forward")
    (found,) = replay([outside("forward", op("add"), op("mm"), FusedOp(op("mm")), call, op("add"), call)])
    assert found.ops == {op("add"): 2, op("mm"): 1} and found.fused == {op("mm"): 1} and found.collectives == {call: 2}


def test_representatives() -> None:
    tapes = [block_tape(b, p, representative=r) for p in ("forward", "backward") for b, r in (("0", None), ("1", None), ("2", "1"))]
    trace = StepTrace(replay(tapes), {"0": "0", "1": "1", "2": "1"}, {})
    assert trace.copies == {"2": "1"}
    for segment in trace.segments:
        found = trace.representative(segment)
        assert (found.block, found.phase) == (segment.representative or segment.block, segment.phase)
