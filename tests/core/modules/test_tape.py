"""What a tape records of an operation: the storages it reads, writes and makes, and where its draws start."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_tp._compat import storage_key
from lightning_tp.core.modules.playback import RecordedOp, Recording, StorageView
from lightning_tp.core.modules.tape import InitTape, is_meta


def recorded(tape: InitTape) -> Recording:
    return tape._recording


def record(tape: InitTape, run: object) -> list[RecordedOp]:
    before = len(recorded(tape).ops)
    with torch.device("meta"), tape:
        run()  # type: ignore[operator]
    return recorded(tape).ops[before:]


def test_reads_writes_and_makes() -> None:
    tape = InitTape()
    made: dict[str, Tensor] = {}
    (ones,) = record(tape, lambda: made.update(x=torch.ones(4)))
    x = made["x"]
    key = storage_key(x)
    assert ones.made == {key} and ones.reads == ones.writes == set() and ones.generator is None
    (add,) = record(tape, lambda: made.update(y=x + 1))
    assert add.reads == {key} and add.made == {storage_key(made["y"])} and add.writes == set()
    (mul,) = record(tape, lambda: x.mul_(2))
    assert mul.reads == mul.writes == {key} and mul.overwrites == set() and mul.made == set()
    (fill,) = record(tape, lambda: x.fill_(2))
    assert (fill.reads, fill.writes, fill.overwrites) == (set(), {key}, {key})
    (part,) = record(tape, lambda: x[:2].fill_(3))
    assert (part.reads, part.writes, part.overwrites) == (set(), {key}, set())  # something remains
    (copy,) = record(tape, lambda: x.copy_(made["y"]))
    assert (copy.reads, copy.overwrites) == ({storage_key(made["y"])}, {key})
    m = made.setdefault("m", torch.empty(0))
    record(tape, lambda: made.update(m=torch.ones(2, 2)))
    m = made["m"]
    (turn,) = record(tape, lambda: m.copy_(m.T))
    assert turn.reads == turn.writes == {storage_key(m)} and turn.overwrites == set()  # it reads what it overwrites
    assert all(tape.holds(t) for t in made.values())


def test_views_and_empty_memory_need_no_entry() -> None:
    tape = InitTape()
    made: list[Tensor] = []
    assert record(tape, lambda: made.append(torch.empty(2, 3))) == []
    assert record(tape, lambda: made.extend((made[0].T, made[0][1], made[0].view(6), nn.Parameter(made[0]).data))) == []
    assert {storage_key(t) for t in made} == set(recorded(tape).storages)
    assert all(tape.holds(t) for t in made)
    assert len({StorageView.of(t) for t in made}) == 4  # the parameter's data is the first again


def test_meta_tensors_from_elsewhere_are_foreign() -> None:
    foreign, tape = torch.ones(3, device="meta"), InitTape()
    made: list[Tensor] = []
    (add,) = record(tape, lambda: made.append(foreign + 1))
    assert recorded(tape).foreign == {storage_key(foreign)} and add.reads == {storage_key(foreign)}
    assert not tape.holds(foreign) and tape.holds(made[0]) and not tape.holds(torch.ones(1, device="meta"))


def test_real_tensors_are_copied_onto_the_tape() -> None:
    tape, real = InitTape(), torch.ones(2)
    made: list[Tensor] = []
    with tape:
        made.append(torch.zeros(2, device="meta") + real)
    real.fill_(5)
    tape.close()
    ((_, value),) = tape.replay(made)
    assert value.tolist() == [1, 1]
    assert record(InitTape(), lambda: torch.ones(2, device="cpu") + real) == []  # real ones alone are left alone


def test_a_generator_shows_the_draw_after_which_it_stands() -> None:
    torch.manual_seed(2)
    start = torch.get_rng_state()
    tape = InitTape()
    a, b = record(tape, lambda: (torch.rand(2), torch.randn(2)))
    assert a.generator is b.generator is torch.default_generator
    assert isinstance(a.start, Tensor) and torch.equal(a.start, start) and b.start == 0
    assert recorded(tape).resumed == set()
    own = torch.Generator().manual_seed(8)
    at_8 = own.get_state()
    c, d = record(tape, lambda: (torch.empty(2).normal_(generator=own), torch.rand(1)))
    assert c.generator is not d.generator and isinstance(c.start, Tensor) and torch.equal(c.start, at_8) and d.start == 1
    saved: list[Tensor] = []
    record(tape, lambda: (saved.append(torch.get_rng_state()), torch.rand(1), torch.rand(1)))
    torch.set_rng_state(saved[0])
    (again,) = record(tape, lambda: torch.rand(1))
    assert again.start == 3 and recorded(tape).resumed == {3}
    tape.close()
    assert torch.equal(torch.get_rng_state(), start) and own.initial_seed() == 8


def test_a_real_draw_is_from_the_real_state() -> None:
    torch.manual_seed(2)
    ordinary = (torch.rand(3), torch.rand(2))
    torch.manual_seed(2)
    tape, found = InitTape(), []
    with tape:
        torch.rand(3, device="meta")
        found.append(torch.rand(2, device="cpu"))
    assert torch.equal(found[0], ordinary[1])
    tape.close()


def test_what_does_not_draw_runs_after_what_it_is_made_from() -> None:
    tape = InitTape()
    made: list[Tensor] = []
    ops = record(tape, lambda: made.extend((torch.rand(2), torch.rand(2))))
    ops += record(tape, lambda: made.extend([t.half() for t in made]))
    assert len(ops) == 4
    tape.close()
    assert recorded(tape).order == [0, 2, 1, 3]
    assert [positions for positions, _ in tape.replay(made[2:])] == [[0], [1]]


def test_a_replay_to_the_end() -> None:
    torch.manual_seed(2)
    torch.rand(5)
    end = torch.get_rng_state()
    torch.manual_seed(2)
    tape, made = InitTape(), []
    record(tape, lambda: made.extend((torch.rand(3), torch.rand(2))))
    tape.close()
    assert len(list(tape.replay(made[:1], to_the_end=False))) == 1 and tape.rng_state is None
    ((positions, value),) = tape.replay([made[0], made[0]])
    assert positions == [0, 1] and value.shape == (3,) and tape.peak_bytes >= 12
    assert tape.rng_state is not None and torch.equal(tape.rng_state, end)


def test_what_is_on_the_meta_device() -> None:
    assert is_meta(torch.empty(1, device="meta")) and not is_meta(torch.empty(1)) and not is_meta("meta")


def test_a_second_recording_of_one_draw_is_not_shared() -> None:
    """Tokens are of one tape."""
    torch.manual_seed(1)
    first = InitTape()
    with first:
        torch.rand(2, device="meta")
    first.close()
    second, made = InitTape(), []
    record(second, lambda: made.append(torch.rand(2)))
    second.close()
    torch.manual_seed(1)
    assert torch.equal(next(second.replay(made))[1], torch.rand(2))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_draws_on_a_gpu_are_refused() -> None:
    with pytest.raises(ValueError, match="Pass a CPU generator"), torch.device("meta"), InitTape():
        torch.rand(2, generator=torch.Generator("cuda"))
