"""`fused_colwise`, alone and in an attention: every part split by itself, in the order in which the model's code looks for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lightning_tp as ltp
from lightning_tp.shards.view import local_view
from lightning_tp.styles import FusedColwise, PrepareInput, Rowwise
from lightning_tp.testing import run_ranks
from tests.harness import alone, mesh

AR, AG, RS = "all-reduce", "all-gather", "reduce-scatter"
X = torch.randn(2, 17, 24, generator=torch.Generator().manual_seed(0))


def conv1d(inputs: int, outputs: int) -> nn.Module:
    return pytest.importorskip("transformers.pytorch_utils").Conv1D(outputs, inputs)


class FusedAttention(nn.Module):
    """q, k and v of one layer, cut apart by `chunk` or by the sizes of what this rank has; heads counted by -1."""

    def __init__(
        self, heads: int, kv_heads: int, head_dim: int = 4, width: int = 24, bias: bool = True, conv: bool = False
    ) -> None:
        super().__init__()
        self.head_size_ = head_dim
        self.groups = heads // kv_heads
        inner, outer = (heads + 2 * kv_heads) * head_dim, heads * head_dim
        self.qkv = conv1d(width, inner) if conv else nn.Linear(width, inner, bias=bias)
        self.out = conv1d(outer, width) if conv else nn.Linear(outer, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        qkv = self.qkv(x)
        if self.groups == 1:
            q, k, v = qkv.chunk(3, dim=-1)
        else:
            kv = qkv.shape[-1] // (self.groups + 2)
            q, k, v = qkv.split((qkv.shape[-1] - 2 * kv, kv, kv), dim=-1)
        q, k, v = (t.reshape(b, s, -1, self.head_size_).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.out(y.transpose(1, 2).reshape(b, s, -1))


class SharedKV(FusedAttention):
    """As above for fewer key/value heads than ranks: then each rank has one of them, so the sizes are told."""

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        qkv = self.qkv(x)
        kv = self.head_size_ * self.kv_heads
        q, k, v = qkv.split((qkv.shape[-1] - 2 * kv, kv, kv), dim=-1)
        q, k, v = (t.reshape(b, s, -1, self.head_size_).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.out(y.transpose(1, 2).reshape(b, s, -1))


class GatedMLP(nn.Module):
    def __init__(self, hidden: int, bias: bool = True) -> None:
        super().__init__()
        self.gate_up = nn.Linear(24, 2 * hidden, bias=bias)
        self.down = nn.Linear(hidden, 24, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


@pytest.mark.parametrize("tp", [2, 4])
def test_attention(tp: int) -> None:
    def body() -> None:
        cases: list[tuple[int, int, FusedColwise]] = [
            (4, 4, FusedColwise(parts=3, heads=4)),
            (4, 4, FusedColwise()),  # by width: 16 columns over 2 and 4 ranks are whole heads all the same
            (8, 4, FusedColwise(parts=(32, 16, 16), heads=(8, 4, 4))),
        ]
        for heads, kv_heads, style in cases:
            inner, outer = (heads + 2 * kv_heads) * 4 // tp, heads * 4 // tp
            for inputs, forward, backward in (("I", [AR], [AR]), ("S(1)", [AG, AR], [RS])):
                for bias, conv in ((True, False), (False, False), (True, True)):
                    door = PrepareInput(arrives=inputs)  # type: ignore[arg-type]
                    weight, out = ((24, inner), (outer, 24)) if conv else ((inner, 24), (24, outer))
                    shapes = {"qkv.weight": weight, "qkv.bias": (inner,), "out.weight": out, "out.bias": (24,)}
                    alone(
                        lambda h=heads, k=kv_heads, b=bias, c=conv: FusedAttention(h, k, bias=b, conv=c),
                        door,
                        X,
                        arrives=inputs,
                        rules={"qkv": style, "out": Rowwise(output="I")},
                        shapes=shapes,
                        forward=forward,
                        backward=backward,
                        what=f"{heads} heads, {kv_heads} kv, {inputs}, {style}, bias={bias}, conv={conv}",
                    )

    run_ranks(body, tp)


def test_shared_heads() -> None:
    """4 query heads, 2 or 1 key/value heads, 4 ranks: the rows of k and v are there on several ranks, their gradients summed."""

    def body() -> None:
        for kv_heads in (2, 1):
            for bias in (True, False):

                def make(kv_heads: int = kv_heads, bias: bool = bias) -> nn.Module:
                    module = SharedKV(4, kv_heads, bias=bias)
                    module.kv_heads = kv_heads  # type: ignore[assignment]
                    return module

                alone(
                    make,
                    PrepareInput(arrives="I", attributes=(("kv_heads", 1),)),
                    X,
                    rules={
                        "qkv": FusedColwise(parts=(16, 4 * kv_heads, 4 * kv_heads), heads=(4, kv_heads, kv_heads)),
                        "out": "rowwise",
                    },
                    shapes={"qkv.weight": (12, 24), "qkv.bias": (12,), "out.weight": (24, 4), "out.bias": (24,)},
                    forward=[AR],
                    backward=[AR, AR],
                    what=f"{kv_heads} kv heads",
                )

    run_ranks(body, 4)


@pytest.mark.parametrize("tp", [2, 4])
def test_gate_and_up_of_a_width_that_does_not_divide(tp: int) -> None:
    shards = {2: (171, 170), 4: (86, 86, 86, 83)}[tp]

    def body() -> None:
        for parts in (2, (341, 341)):
            for inputs, forward, backward in (("I", [AR], [AR]), ("S(1)", [AG, AR], [RS])):
                alone(
                    lambda: GatedMLP(341),
                    "",
                    X,
                    arrives=inputs,
                    rules={"gate_up": FusedColwise(parts=parts, input=inputs), "down": Rowwise(output="I")},  # type: ignore[arg-type]
                    shapes={
                        "gate_up.weight": tuple((2 * n, 24) for n in shards),
                        "gate_up.bias": tuple((2 * n,) for n in shards),
                        "down.weight": tuple((24, n) for n in shards),
                        "down.bias": (24,),
                    },
                    forward=forward,
                    backward=backward,
                    what=f"{parts}, {inputs}",
                )

    run_ranks(body, tp)


def test_alone_the_output_is_this_ranks_shard_of_every_part() -> None:
    def body() -> None:
        import torch.distributed as dist

        layer = nn.Linear(1, 12, bias=False)
        layer.weight.data = torch.arange(12.0)[:, None]
        model = nn.Sequential(layer)

        ltp.parallelize(model, mesh(), {"0": FusedColwise(parts=(6, 2, 4), input="I")})
        mine = [[0, 1, 2, 6, 8, 9], [3, 4, 5, 7, 10, 11]][dist.get_rank()]
        assert model(torch.ones(1, 1)).tolist() == [mine]
        with local_view():  # outside of it, full sizes are shown
            assert model[0].out_features == 6

    run_ranks(body, 2)


def test_splits_by_hand() -> None:
    def of(style: FusedColwise, out: int, tp: int) -> Any:
        return style.splits(nn.Linear(8, out), "qkv", tp)["bias"]

    assert of(FusedColwise(), 12, 2).ranges == (((0, 2), (4, 6), (8, 10)), ((2, 4), (6, 8), (10, 12)))
    assert of(FusedColwise(parts=2), 10, 2).ranges == (((0, 3), (5, 8)), ((3, 5), (8, 10)))
    shared = of(FusedColwise(parts=(8, 4, 4), heads=(4, 2, 2)), 16, 4)
    assert shared.ranges == (
        ((0, 2), (8, 10), (12, 14)),
        ((2, 4), (8, 10), (12, 14)),
        ((4, 6), (10, 12), (14, 16)),
        ((6, 8), (10, 12), (14, 16)),
    )
    assert (shared.sum_over(4), shared.shared_rows) == (2, (2, 6))
    assert FusedColwise(parts=[8, 4], heads=[2, 1]) == FusedColwise(parts=(8, 4), heads=(2, 1))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "style, out, tp, message",
    [
        (FusedColwise(), 16, 2, r"16 output features are not 3 equal parts.*`parts=\(.., ..\)`"),
        (FusedColwise(parts=(8, 4)), 16, 2, r"the parts \(8, 4\) add up to 12, the layer has 16"),
        (FusedColwise(parts=(8, 8), heads=(2,)), 16, 2, r"1 numbers of heads for 2 parts"),
        (FusedColwise(parts=(12, 4), heads=(6, 2)), 16, 4, r"6 heads do not split over tp=4. Use tp=1, 2, 3, 6"),
        (
            FusedColwise(parts=(12, 6), heads=(6, 3)),
            18,
            2,
            r"3 key/value heads \(of 6 heads\) do not split over tp=2. Use tp=1, 3, 6",
        ),
        (FusedColwise(parts=(8, 2, 2), heads=(4, 1, 1)), 12, 8, r"tp is larger than the 4 heads"),
        (FusedColwise(parts=(8, 2, 4, 2), heads=(4, 1, None, 1)), 16, 2, r"parts that ranks share have to lie side by side"),
        (FusedColwise(parts=(8, 4, 2), heads=(4, 2, 1)), 14, 4, r"parts that ranks share have to lie side by side"),
    ],
)
def test_parts_that_do_not_fit(style: FusedColwise, out: int, tp: int, message: str) -> None:
    with pytest.raises(ltp.TPError, match=r"`qkv`: .*" + message):
        style.splits(nn.Linear(8, out), "qkv", tp)


def test_a_state_that_its_input_can_not_have() -> None:
    with pytest.raises(ltp.TPError, match=r"`fused_colwise\(input=S\(-1\)\)`: input can be R or I or S\(1\)"):
        FusedColwise(input="S(-1)")  # type: ignore[arg-type]


def test_torch_has_no_counterpart() -> None:
    with pytest.raises(ltp.TPError, match=r"no style for a fused weight.*`backend='local'`"):
        FusedColwise().to_torch(nn.Linear(8, 12))
