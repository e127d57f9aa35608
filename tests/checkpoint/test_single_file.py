"""A checkpoint in one file: rank 0 writes what the others send, one tensor at a time; what can't be written is said on all ranks."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import lightning_tp as ltp
from benchmarks.checkpoint_memory import Peak
from examples.llama import PLAN, Llama, LlamaConfig
from lightning_tp.checkpoint.single_file import save_single_file
from lightning_tp.checkpoint.storage.path import StoragePath
from lightning_tp.checkpoint.weights.stored import StoredTensor
from lightning_tp.core.comm.mesh import make_mesh
from lightning_tp.core.comm.state import S
from lightning_tp.shards import state_dict
from lightning_tp.shards.shard import ParamShard
from lightning_tp.styles import Split
from lightning_tp.testing import randomize_, run_ranks
from tests.checkpoint.lit import CONFIG


def split(dp: int, tp: int) -> nn.Module:
    return ltp.parallelize(randomize_(Llama(LlamaConfig(**{**CONFIG, "tied": True}))), make_mesh("cpu", dp, tp), PLAN)


@pytest.mark.parametrize("mesh", [(2, 2), (1, 4)], ids=str)
def test_what_is_written_is_whole(mesh: tuple[int, int], tmp_path: Path) -> None:
    """In whatever nesting: uneven rows of FSDP2, shared heads, a tie that is written once; what is no DTensor is rank 0's."""

    def body() -> dict[str, torch.Tensor]:
        model = split(*mesh)
        state = dict(model.state_dict())
        save_single_file(
            {"a": [(state, {"rank": dist.get_rank()})], "t": torch.arange(3) + dist.get_rank()}, StoragePath(tmp_path / "a.ckpt")
        )
        return ltp.full_state_dict(model)

    whole = run_ranks(body, 4)[0]
    got = torch.load(tmp_path / "a.ckpt", weights_only=True)
    ((state, rest),) = got["a"]
    assert set(state) == set(whole) and all(torch.equal(state[n], t) for n, t in whole.items())
    assert rest == {"rank": 0} and got["t"].tolist() == [0, 1, 2]
    assert state["output.weight"].data_ptr() == state["tok_embeddings.weight"].data_ptr()
    assert [p.name for p in tmp_path.iterdir()] == ["a.ckpt"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.int16, torch.complex64, torch.bool], ids=str)
def test_every_dtype_is_written_and_loaded_as_it_is(dtype: torch.dtype, tmp_path: Path) -> None:
    """Also of tensors in several pieces on a rank, as fused weights are: their DTensor is one of torch's that says float32 of all."""

    def body() -> None:
        whole = torch.arange(24).view(6, 4).to(dtype) / 7 if dtype.is_floating_point else torch.arange(24).view(6, 4).to(dtype)
        splits = {"even": (((0, 3),), ((3, 6),)), "pieces": (((0, 1), (4, 6)), ((1, 4),))}
        shards = {name: ParamShard(name, Split(S(0), ranges), (6, 4), make_mesh("cpu", 1, 2)) for name, ranges in splits.items()}
        state = {name: shard.to_dtensor(shard.take(whole)) for name, shard in shards.items()}
        save_single_file(state, StoragePath(tmp_path / "a.ckpt"))
        save_single_file({name: t.detach() for name, t in state.items()}, StoragePath(tmp_path / "b.ckpt"))
        dist.barrier()
        for file in ("a", "b"):
            for name, got in torch.load(tmp_path / f"{file}.ckpt").items():
                assert got.dtype == dtype and torch.equal(got, whole), name
        for name, shard in shards.items():
            for value in (state[name], state[name].detach()):
                assert shard.to_local(value, name).dtype == dtype and torch.equal(shard.to_local(value, name), shard.take(whole))

    run_ranks(body, 2)


def test_errors_are_those_of_all_ranks(tmp_path: Path) -> None:
    (tmp_path / "old.ckpt").write_text("old")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine").write_text("mine")

    def body() -> None:
        state: dict[str, Any] = dict(split(1, 2).state_dict())
        with pytest.raises(ltp.TPError, match="other things in it than a checkpoint"):
            save_single_file(state, StoragePath(tmp_path / "folder"))
        own, done = StoredTensor.read, []

        def full(self: Any) -> Any:
            done.append(self)
            if len(done) > 3:
                raise OSError(28, "No space left on device")
            return own(self)

        StoredTensor.read = full  # type: ignore[assignment]
        with pytest.raises(ltp.TPError, match=r"old\.ckpt` could not be written: no space left"):
            save_single_file(state, StoragePath(tmp_path / "old.ckpt"))
        StoredTensor.read = own  # type: ignore[method-assign]
        if dist.get_rank() == 1:
            del state["norm.weight"]
        with pytest.raises(ltp.TPError, match=r"`norm\.weight` is in the checkpoint of rank 0, but not in that of rank 1"):
            save_single_file(state, StoragePath(tmp_path / "old.ckpt"))

    run_ranks(body, 2)
    assert (
        sorted(p.name for p in tmp_path.rglob("*")) == ["folder", "mine", "old.ckpt"]
        and (tmp_path / "old.ckpt").read_text() == "old"
    )


def test_memory(tmp_path: Path) -> None:
    """Six weights of 16 MiB: less than two of them beside what is held, to write and to read."""
    one = 2**24

    def body() -> None:
        ctypes.CDLL(None).mallopt(-3, 2**20)  # M_MMAP_THRESHOLD: what is freed goes back at once, and is not counted
        sizes = [(1024, 4096), (4096, 1024)] * 3
        model = nn.Sequential(*(nn.Linear(*size, bias=False) for size in sizes))
        mesh = make_mesh("cpu", 1, 2)
        ltp.parallelize(model, mesh, {str(i): "colwise" if i % 2 == 0 else "rowwise" for i in range(6)})
        state = dict(model.state_dict())
        with Peak() as writing:
            save_single_file(state, StoragePath(tmp_path / "a.ckpt"))
        dist.barrier()
        assert writing.extra < (2 * one if dist.get_rank() == 0 else one), writing.extra / one
        with Peak() as reading:
            model.load_state_dict(torch.load(tmp_path / "a.ckpt", mmap=True))
        assert reading.extra < one, reading.extra / one
        state_dict.reshard(model)

    run_ranks(body, 2)
