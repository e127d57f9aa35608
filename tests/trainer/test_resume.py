"""What a run resumes from: random states and loaders' positions, on the same mesh and on another one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader

from lightning_tp.core.comm.mesh import make_mesh
from lightning_tp.core.ops.rng import rng_state
from lightning_tp.data.resume import ResumableLoader
from lightning_tp.testing import run_ranks, single_rank_mesh
from lightning_tp.trainer.resume import LOADERS, RNG_STATE, Resume, is_mid_epoch


def loops(ready: int, last: bool = False, states: list[Any] | None = None) -> dict[str, Any]:
    """The progress of a Trainer, in the middle of an epoch or at its end."""
    progress = {
        "current": {"ready": ready, "completed": ready},
        "total": {"ready": ready, "completed": ready},
        "is_last_batch": last,
    }
    return {"loops": {"fit_loop": {"state_dict": {"combined_loader": states or []}, "epoch_loop.batch_progress": progress}}}


def trainer_of(fn: TrainerFn = TrainerFn.FITTING, loaders: Any = (), prefetched: int = 0, accumulate: int = 1) -> Any:
    combined = SimpleNamespace(flattened=list(loaders))
    loop = SimpleNamespace(_combined_loader=combined, _data_fetcher=SimpleNamespace(batches=[None] * prefetched))
    return SimpleNamespace(state=SimpleNamespace(fn=fn), fit_loop=loop, accumulate_grad_batches=accumulate)


@pytest.mark.parametrize("ready, last, expected", [(0, False, False), (3, False, True), (3, True, False)])
def test_the_middle_of_an_epoch(ready: int, last: bool, expected: bool) -> None:
    assert is_mid_epoch(loops(ready, last)) is expected
    assert not is_mid_epoch({})


def test_positions_are_saved_for_each_data_parallel_rank() -> None:
    def body() -> tuple[Any, ...]:
        mesh = make_mesh("cpu", 2, 2)
        loader = ResumableLoader(DataLoader(range(20)))  # type: ignore[arg-type]
        batches = iter(loader)
        for _ in range(3 + dist.get_rank() // 2):
            next(batches)
        saved = loops(3)
        Resume().save(saved, trainer_of(loaders=[loader], prefetched=1, accumulate=4), mesh, global_batch=8)
        assert "combined_loader" not in saved["loops"]["fit_loop"]["state_dict"]
        found = saved[LOADERS]
        without = loops(3)
        Resume().save(without, trainer_of(TrainerFn.TESTING, loaders=[loader]), mesh, global_batch=None)
        assert LOADERS not in without and without[RNG_STATE]["mesh"] == saved[RNG_STATE]["mesh"]
        return found["prefetched"], [[p["read"] for p in rank] for rank in found["ranks"]], found["accumulated"]

    assert run_ranks(body, 4) == [(1, [[2], [3]], 4)] * 4


def test_positions_and_random_states_are_loaded() -> None:
    """In training only; those of this rank; a state of the middle of an epoch is restored once more at its step."""
    with single_rank_mesh() as mesh:
        torch.manual_seed(5)
        state = rng_state(mesh)
        drawn = torch.rand(2)
        saved = {**loops(3, states=["own"]), RNG_STATE: state, LOADERS: {"prefetched": 0, "ranks": [[{"read": 3}]]}}
        resume = Resume()
        resume.load(dict(saved), trainer_of(TrainerFn.VALIDATING), mesh, global_batch=None)
        assert (resume.positions, resume.rng_at_step, resume.mid_epoch) == ([], None, False)
        resume.load(saved, trainer_of(), mesh, global_batch=None)
        assert resume.positions == [{"read": 3, "prefetched": False}] and resume.mid_epoch
        assert torch.equal(torch.rand(2), drawn)
        resume.restore_rng(mesh)
        assert torch.equal(torch.rand(2), drawn) and resume.rng_at_step is None
        resume.restore_rng(mesh)
        assert not torch.equal(torch.rand(2), drawn)
        over = Resume()
        over.load({**saved, **loops(3, last=True)}, trainer_of(), mesh, global_batch=None)
        assert over.epoch_is_over and over.rng_at_step is None and not over.mid_epoch


def test_a_checkpoint_of_another_trainer_says_how_many_batches_were_read() -> None:
    with single_rank_mesh() as mesh:
        for states, expected in (([], [{"read": 3}]), (["a", "b"], [{"read": 3, "loader": "a"}, {"read": 3, "loader": "b"}])):
            resume = Resume()
            resume.load(loops(3, states=states), trainer_of(), mesh, global_batch=None)
            assert resume.positions == expected


def test_another_mesh_counts_in_its_own_batches() -> None:
    with single_rank_mesh() as mesh:
        saved = {**loops(6), LOADERS: {"prefetched": 0, "accumulated": 2, "ranks": [[{"read": 6}], [{"read": 6}]]}}
        resume = Resume()
        resume.load(saved, trainer_of(), mesh, global_batch=8)
        assert resume.accumulate == 4 and resume.positions[0]["read"] == 12
        assert saved["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]["ready"] == 12


@pytest.mark.parametrize("states", [("a", "a"), ("a", "b")])
def test_loader_states_of_several_ranks_for_one(states: tuple[str, str], recwarn: pytest.WarningsRecorder) -> None:
    with single_rank_mesh() as mesh:
        ranks = [[{"read": 1, "loader": state}] for state in states]
        resume = Resume()
        resume.load({**loops(1), LOADERS: {"prefetched": 0, "ranks": ranks}}, trainer_of(), mesh, global_batch=None)
        assert resume.positions[0]["loader"] == "a"
    told = [w for w in recwarn if "all resume from the state of the first" in str(w.message)]
    assert len(told) == (states == ("a", "b"))


@pytest.mark.parametrize("over, prefetched, expected", [(False, False, [3, 4]), (True, False, [0, 1]), (False, True, [3, 4])])
def test_a_loader_continues(over: bool, prefetched: bool, expected: list[int]) -> None:
    """After the batches that were read; from the start of the next epoch, if that one was over. Then the random states are those of the step,
    unless batches were prefetched."""
    with single_rank_mesh() as mesh:
        first = ResumableLoader(DataLoader(range(9)))  # type: ignore[arg-type]
        batches = iter(first)
        for _ in range(3):
            next(batches)
        resume = Resume()
        resume.positions = [{**first.position(), "prefetched": prefetched}]
        resume.epoch_is_over, resume.rng_at_step = over, rng_state(mesh)
        loader = resume.resumable(DataLoader(range(9)), mesh)  # type: ignore[arg-type]
        assert resume.positions == []
        assert [int(x) for x, _ in zip(loader, range(2))] == expected
        assert (resume.rng_at_step is None) == (not over and not prefetched)
