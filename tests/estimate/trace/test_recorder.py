"""One step as it is recorded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_tp import TPError
from lightning_tp.core.comm.fake_world import FakeGroup
from lightning_tp.estimate import estimate
from lightning_tp.estimate.trace.device_kernels import Kernels
from lightning_tp.estimate.trace.recorder import OpRecorder
from lightning_tp.estimate.trace.step_trace import CollectiveCall, Label, StepTrace
from tests.estimate.models import MODELS


class Net(nn.Module):
    def __init__(self, group: FakeGroup) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8, device="meta"), nn.Linear(8, 4, bias=False, device="meta")
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.up(x))
        self.group.allreduce([y])
        return self.down(y)


def recorded(half: torch.dtype | None = None) -> StepTrace:
    group = FakeGroup(0, 2)
    model, kernels = Net(group), Kernels("cuda", half)
    recorder = OpRecorder(model, {}, {}, group, kernels)
    x = recorder.onto_meta(torch.ones(2, 4))
    with recorder.recording([x]), kernels:
        loss = model(x).sum()
        recorder.begin_backward()
        loss.backward()
        del loss
    return recorder.step_trace()


def by_kind(live: dict[Label, int]) -> dict[str, int]:
    found: dict[str, int] = {}
    for label, n in live.items():
        found[label.kind] = found.get(label.kind, 0) + n
    return {kind: n for kind, n in found.items() if n}


def test_kernels_belong_to_their_module_and_pass() -> None:
    forward, backward = recorded().segments
    matmuls = [(op.module, op.phase, op.shape) for op in [*forward.ops, *backward.ops] if op.kind == "product"]
    assert matmuls == [
        ("up", "forward", (1, 2, 8, 4)),
        ("down", "forward", (1, 2, 4, 8)),
        ("down", "backward", (1, 4, 8, 2)),
        ("down", "backward", (1, 2, 8, 4)),
        ("up", "backward", (1, 8, 4, 2)),
    ]
    assert forward.collectives == {CollectiveCall("all-reduce", 2 * 8 * 4, "", "forward"): 1}


def test_what_is_alive() -> None:
    forward, backward = recorded().segments
    # relu saves its output, which `down` reads; the output of `down` and its sum are the loss's
    assert by_kind(forward.end) == {"activation": 4 * (2 * 8 + 1)}
    assert by_kind(backward.end)["gradient"] == 4 * (4 * 8 + 8 + 8 * 4)
    assert {label.module for label, n in backward.end.items() if label.kind == "gradient" and n} == {
        "up.weight",
        "up.bias",
        "down.weight",
    }
    assert recorded().gradients == {"up.weight": 128, "up.bias": 32, "down.weight": 128}


def test_fused_kernels_stand_between_matmuls() -> None:
    forward, _ = recorded().segments
    names = [op.name for op in forward.fused]
    assert names == ["addmm", "fused", "mm", "fused"]  # relu, and the sum of the loss


def test_autocast_frees_its_casts_after_the_forward() -> None:
    assert recorded().freed_after_forward == {}
    found = recorded(torch.bfloat16)
    # the bias of `up` is saved by nothing; the weights are, for the gradients of inputs, but the first input needs none
    assert found.freed_after_forward == {Label("up", "activation"): 2 * (4 * 8 + 8)}


def test_the_order_of_modules() -> None:
    events = [(e.what, e.module) for e in recorded().forward if e.what in ("enter", "leave", "collective")]
    assert events == [
        ("enter", ""), ("enter", "up"), ("leave", "up"), ("collective", ""), ("enter", "down"), ("leave", "down"), ("leave", ""),
    ]  # fmt: skip


def test_a_sequence_longer_than_the_table_of_positions() -> None:
    build, inputs, _ = MODELS["gpt2"]()
    for mesh in ((1, 1), (2, 2)):
        assert estimate(build(), inputs, mesh, seq=64).tokens == 128 * mesh[0]
        with pytest.raises(TPError, match=r"`transformer.wpe` is asked for row 127 of a table of 64 rows.*`seq`"):
            estimate(build(), inputs, mesh, seq=128)
    build, inputs, _ = MODELS["bert"]()
    with pytest.raises(TPError, match=r"`bert.embeddings`"):
        estimate(build(), inputs, (1, 2), seq=128)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_products_of_experts_count(precision: str) -> None:
    hf: Any = pytest.importorskip("transformers")
    config = hf.MixtralConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=64,
        num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    with torch.device("meta"):
        model = hf.MixtralForCausalLM(config)
    ids = torch.zeros(2, 8, dtype=torch.long)
    found = estimate(model, {"input_ids": ids, "labels": ids, "use_cache": False}, (1, 2), precision=precision)
    rows = 2 * 8 * 2  # each token goes to two experts
    flops = sum(p.flops for p in found.products if p.module.endswith("experts"))
    # blocks x (forward and two gradients) x .. x (gate and up, down) of this rank
    assert flops == 2 * 3 * 2 * rows * 32 * (2 * 32 + 32)


def test_a_loss_may_hold_tensors_of_the_cpu() -> None:
    """Labels, class weights and masks that a function closes over: the model is on the meta device, and they are not."""
    model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 10))
    labels, weight, mask = torch.tensor([3, 7]), torch.ones(10), torch.tensor([True, False])

    def over(labels: Tensor, weight: Tensor, mask: Tensor) -> Any:
        def loss_fn(y: Tensor) -> Tensor:
            each = nn.functional.cross_entropy(y, labels, weight, reduction="none")
            seen = torch.zeros(10)
            seen += y.detach().abs().sum(0)  # in place, too
            return (each * mask.float()).sum() / mask.sum() + (y * weight / seen).square().mean()

        return estimate(model, (torch.ones(2, 8),), (2, 2), loss_fn=loss_fn)

    held, there = over(labels, weight, mask), over(labels.to("meta"), weight.to("meta"), mask.to("meta"))
    # what is computed of them alone stays on the CPU: the mask as floats and its sum
    assert abs(held.memory.peak.total - there.memory.peak.total) <= 16
    assert held.flops == there.flops and held.time.step == pytest.approx(there.time.step, rel=0.1)
    assert labels.tolist() == [3, 7] and not weight.is_meta and weight.tolist() == [1.0] * 10
