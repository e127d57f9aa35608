"""Ranks that differ: other plans are refused, other weights become the first rank's."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import lightning_tp as ltp
from examples.llama import PLAN, Llama, LlamaConfig
from lightning_tp._compat import local_tensor
from lightning_tp.core.comm.mesh import TENSOR_PARALLEL, make_mesh
from lightning_tp.testing import run_ranks
from tests.apply.test_parallelize import ODD, Case, loss_of


def replicated(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(n, p) for n, p in model.named_parameters() if p._tp_shard.split.dim is None]


def assert_equal_on(group: dist.ProcessGroup, tensors: list[tuple[str, Tensor]]) -> None:
    for name, t in tensors:
        every = [torch.empty_like(t) for _ in range(group.size())]
        dist.all_gather(every, t.contiguous(), group=group)
        assert all(torch.equal(other, t) for other in every), f"{name} differs"


@pytest.mark.parametrize("mesh", [(1, 4), (2, 2)], ids=["tp4", "2x2"])
def test_ranks_seeded_differently_become_and_stay_equal(mesh: tuple[int, int]) -> None:
    case = Case(*mesh, model=dict(num_kv_heads=1))

    def body() -> dict[str, Tensor]:
        device_mesh = make_mesh("cpu", *mesh)
        torch.manual_seed(dist.get_rank())
        model = Llama(LlamaConfig(**{**ODD, **case.model}))
        for p in model.parameters():
            p.data += torch.randn(p.shape) * 0.1
        model.rope += dist.get_rank()
        first = {n: t.clone() for n, t in model.state_dict().items()}
        ltp.parallelize(model, device_mesh, PLAN)
        group = device_mesh.get_group(TENSOR_PARALLEL)
        found = [(n, local_tensor(p.detach())) for n, p in replicated(model)]
        assert len(found) == 2 * 4 + 1  # wo, w2 and two norms in each of two blocks, and the last norm
        assert_equal_on(group, [*found, ("rope", model.rope)])
        start = ltp.full_state_dict(model)
        if dist.get_rank() == 0:
            assert all(torch.equal(start[n], t) for n, t in first.items())
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for step in range(5):
            tokens = torch.randint(0, 1003, (2, 18), generator=torch.Generator().manual_seed(step))
            loss_of(model, tokens).backward()
            ltp.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
        end = [(n, local_tensor(p.detach())) for n, p in replicated(model)]
        assert_equal_on(group, end)
        shared = [(n, p.detach()) for n, p in model.named_parameters() if ".wk." in n or ".wv." in n]
        assert_equal_on(group, [(n, local_tensor(p)) for n, p in shared])  # the one key/value head is on every rank
        return start

    results = run_ranks(body, 4)
    for other in results[1:]:
        assert all(torch.equal(other[n], t) for n, t in results[0].items())


@pytest.mark.parametrize("mesh", [(1, 2), (2, 2), (2, 1)], ids=["tp2", "2x2", "dp2"])
def test_different_models_on_the_ranks(mesh: tuple[int, int]) -> None:
    def body() -> str:
        device_mesh = make_mesh("cpu", *mesh)
        model = Llama(LlamaConfig(**{**ODD, "hidden_dim": 348 if dist.get_rank() == 1 else 344}))
        with pytest.raises(ltp.TPError) as info:
            ltp.parallelize(model, device_mesh, PLAN)
        assert model.output.weight.shape == (1003, 64)  # nothing is changed
        return str(info.value)

    messages = run_ranks(body, mesh[0] * mesh[1], timeout=30)
    assert len(set(messages)) == 1 and "2 different plans" in messages[0]
