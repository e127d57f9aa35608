"""`colwise` and `rowwise`, alone, against the whole layer: shapes, values, gradients, collectives."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import lightning_tp as ltp
from lightning_tp.apply.unsplit import always_on_shards
from lightning_tp.core.comm.state import SEQUENCE, I
from lightning_tp.shards.view import local_view
from lightning_tp.styles import Colwise, PrepareInput, Rowwise, Sequence
from lightning_tp.testing import assert_trees_close, randomize_, run_ranks
from tests.harness import Collectives, alone, gradients, mesh

X = torch.randn(2, 17, 24, generator=torch.Generator().manual_seed(0))
WIDE = torch.randn(2, 17, 341, generator=torch.Generator().manual_seed(0))
SHARDS = {2: (171, 170), 4: (86, 86, 86, 83)}  # of 341


class MatmulLinear(nn.Linear):
    """A linear layer with a forward of its own, as Falcon's."""

    def forward(self, input: Tensor) -> Tensor:
        hidden = input @ self.weight.T
        return hidden if self.bias is None else hidden + self.bias


def conv1d(inputs: int, outputs: int) -> nn.Module:
    return pytest.importorskip("transformers.pytorch_utils").Conv1D(outputs, inputs)


def columns(tp: int, *rest: int) -> tuple[tuple[int, ...], ...]:
    return tuple((n, *rest) for n in SHARDS[tp])


@pytest.mark.parametrize("tp", [2, 4])
def test_colwise(tp: int) -> None:
    shapes = {"weight": columns(tp, 24), "bias": columns(tp)}

    def body() -> None:
        def check(make: Any, style: Colwise, forward: list[str], backward: list[str], **kwargs: Any) -> None:
            arrives, leaves = style.input or I, style.output
            alone(make, style, X, arrives=arrives, leaves=leaves, forward=forward, backward=backward, **kwargs)

        for inputs, before in (("R", ([], [])), ("I", ([], [AR])), ("S(1)", ([AG], [RS]))):
            for output, after in (("S(-1)", []), ("I", [AG])):
                style = Colwise(input=inputs, output=output)  # type: ignore[arg-type]
                for make in (
                    lambda: nn.Linear(24, 341),
                    lambda: nn.Linear(24, 341, bias=False),
                    lambda: MatmulLinear(24, 341),
                ):
                    check(make, style, before[0] + after, before[1], shapes=shapes)
        transposed = {"weight": tuple((24, n) for n in SHARDS[tp]), "bias": columns(tp)}
        for output, after in (("S(-1)", []), ("I", [AG])):
            style = Colwise(input="I", output=output)  # type: ignore[arg-type]
            check(lambda: conv1d(24, 341), style, after, [AR], shapes=transposed)

    run_ranks(body, tp)


AR, AG, RS = "all-reduce", "all-gather", "reduce-scatter"


@pytest.mark.parametrize("tp", [2, 4])
def test_rowwise(tp: int) -> None:
    shapes = {"weight": tuple((24, n) for n in SHARDS[tp]), "bias": (24,)}

    def body() -> None:
        def check(make: Any, style: Rowwise, shapes: Any, bias: bool) -> None:
            leaves = style.output or I
            forward = [RS] if leaves == SEQUENCE else [AR]
            backward = [AG] if leaves == SEQUENCE else []
            backward += [AG] if style.input == I else []
            backward += [AR] if bias and leaves == SEQUENCE else []  # of which a rank has the share of its own tokens
            kwargs: Any = dict(arrives=style.input, leaves=leaves, forward=forward, backward=backward, shapes=shapes)
            alone(make, style, WIDE, **kwargs)

        for inputs in ("S(-1)", "I"):
            for output in ("I", "S(1)"):
                style = Rowwise(input=inputs, output=output)  # type: ignore[arg-type]
                check(lambda: nn.Linear(341, 24), style, shapes, bias=True)
                check(lambda: nn.Linear(341, 24, bias=False), style, shapes, bias=False)
                check(lambda: MatmulLinear(341, 24), style, shapes, bias=True)
                transposed = {"weight": columns(tp, 24), "bias": (24,)}
                check(lambda: conv1d(341, 24), style, transposed, bias=True)

    run_ranks(body, tp)


def test_ranges_that_are_no_even_cut() -> None:
    """As inference finds them: here a rank has the columns that the other rank's rows do not read, and not in halves."""

    def body() -> None:
        ranges = (((0, 3), (10, 13)), ((3, 10), (13, 16)))
        shapes = {"0.weight": ((6, 24), (10, 24)), "0.bias": ((6,), (10,)), "1.weight": ((24, 6), (24, 10)), "1.bias": (24,)}
        rules = {"0": Colwise(ranges=ranges, input="I"), "1": Rowwise(ranges=ranges)}
        make = lambda: nn.Sequential(nn.Linear(24, 16), nn.Linear(16, 24))  # noqa: E731
        alone(make, "", X, rules=rules, shapes=shapes, forward=[AR], backward=[AR])

    run_ranks(body, 2)


def test_layers_show_the_sizes_that_they_hold() -> None:
    def body() -> None:
        model = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 8), conv1d(8, 12), conv1d(12, 8), nn.Embedding(5, 6))
        plan = {"0": "colwise", "1": "rowwise", "2": "colwise", "3": "rowwise", "4": "colwise"}
        ltp.parallelize(model, mesh(), plan)
        up, down, up_conv, down_conv, embedding = model
        assert (up.in_features, up.out_features, down.in_features, down.out_features) == (8, 12, 12, 8)
        with local_view():  # outside of it, full sizes are shown
            assert (up.in_features, up.out_features, down.in_features, down.out_features) == (8, 6, 6, 8)
            assert (up_conv.nx, up_conv.nf, down_conv.nx, down_conv.nf) == (8, 6, 6, 8)
            assert (embedding.num_embeddings, embedding.embedding_dim) == (5, 3)
        for layer in model:
            assert isinstance(layer, (nn.Linear, nn.Embedding)) or type(layer).__name__.endswith("Conv1D")

    run_ranks(body, 2)


@pytest.mark.parametrize("tp", [2, 4])
def test_colwise_embedding(tp: int) -> None:
    ids = torch.randint(0, 11, (2, 17), generator=torch.Generator().manual_seed(0))
    shapes = {"weight": {2: ((11, 13), (11, 13)), 4: ((11, 7), (11, 7), (11, 7), (11, 5))}[tp]}

    def body() -> None:
        for padding in (None, 3):
            make = lambda padding=padding: nn.Embedding(11, 26, padding_idx=padding)  # noqa: E731
            alone(make, Colwise(), ids, shapes=shapes, forward=[AG], backward=[])
            style = Colwise(output="S(1)")
            alone(make, style, ids, leaves="S(1)", shapes=shapes, forward=[AG], backward=[AG])
            alone(make, Colwise(output="I"), ids, shapes=shapes, forward=[AG], backward=[])

    run_ranks(body, tp)


# --------------------------------------------------------------------------------------------------------------- heads


class Attention(nn.Module):
    """Counts heads by -1, as examples/llama.py; no attribute tells how many there are."""

    def __init__(self, heads: int, kv_heads: int, head_dim: int = 6, width: int = 24, bias: bool = True) -> None:
        super().__init__()
        self.width_of_a_head = head_dim
        self.q = nn.Linear(width, heads * head_dim, bias=bias)
        self.k = nn.Linear(width, kv_heads * head_dim, bias=bias)
        self.v = nn.Linear(width, kv_heads * head_dim, bias=bias)
        self.o = nn.Linear(heads * head_dim, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        q, k, v = (m(x).view(b, s, -1, self.width_of_a_head).transpose(1, 2) for m in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o(y.transpose(1, 2).reshape(b, s, -1))


@pytest.mark.parametrize("tp", [2, 4])
def test_heads(tp: int) -> None:
    """Whole heads on each rank; fewer key/value heads than ranks are shared, and their gradients summed."""

    def body() -> None:
        for heads, kv_heads in ((4, 4), (8, 4), (8, 2), (4, 1), (4, 2)):
            kv = max(kv_heads // tp, 1) * 6
            shapes = {
                "q.weight": (heads // tp * 6, 24),
                "k.weight": (kv, 24),
                "v.weight": (kv, 24),
                "o.weight": (24, heads // tp * 6),
                "q.bias": (heads // tp * 6,),
                "k.bias": (kv,),
                "v.bias": (kv,),
                "o.bias": (24,),
            }
            sums = [AR] if kv_heads < tp else []  # of all shared weights together
            for inputs, forward, backward in (("I", [AR], [AR, *sums]), ("S(1)", [AG, AR], [RS, *sums])):
                # in shards of the sequence, the attention's input is gathered at its door: it reads the length from it
                door, read = (PrepareInput(arrives=inputs), "R") if inputs == "S(1)" else ("", inputs)
                rules = {
                    "q": Colwise(heads=heads, input=read),
                    "k": Colwise(heads=kv_heads, query_heads=heads, input=read),
                    "v": Colwise(heads=kv_heads, query_heads=heads, input=read),
                    "o": Rowwise(output="I"),
                }
                make = lambda h=heads, k=kv_heads: Attention(h, k)  # noqa: E731
                what = f"{heads} heads, {kv_heads} key/value heads, {inputs}"
                sent: Any = dict(forward=forward, backward=backward, what=what)
                alone(make, door, X, arrives=inputs, rules=rules, shapes=shapes, **sent)

    run_ranks(body, tp)


def test_shared_heads_lie_side_by_side() -> None:
    split = Colwise(heads=2, query_heads=8).splits(nn.Linear(24, 12), "k", tp=4)["weight"]
    assert split.ranges == (((0, 6),), ((0, 6),), ((6, 12),), ((6, 12),))
    assert (split.dim, split.sum_over(4), split.shared_rows) == (0, 2, None)
    assert Colwise(heads=4, query_heads=8).splits(nn.Linear(24, 24), "k", tp=4)["weight"].sum_over(4) == 1


def test_a_gathered_output_needs_no_whole_heads() -> None:
    """Who gathers the output again may cut through a head: nobody sees it."""

    def body() -> None:
        for heads, tp in ((1, dist.get_world_size()), (3, dist.get_world_size())):
            style = Colwise(heads=heads, input="I", output="I")
            shapes = {"weight": (24 // tp, 24), "bias": (24 // tp,)}
            alone(lambda: nn.Linear(24, 24), style, X, shapes=shapes, forward=[AG], backward=[AR])

    run_ranks(body, 2)


# ----------------------------------------------------------------------------------------------------- in and out of use


def test_evaluation_sends_the_forward_half() -> None:
    """Under `no_grad` and `inference_mode`, also after the same input was seen while gradients were recorded."""

    def body() -> None:
        whole = randomize_(nn.Sequential(nn.Linear(24, 32), nn.Linear(32, 24)))
        model = copy.deepcopy(whole)
        ltp.parallelize(model, mesh(), {"0": Colwise(input="I"), "1": "rowwise"})
        x = X.clone()
        for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode, torch.enable_grad):
            with mode(), Collectives() as comm, always_on_shards():
                y = model(x)
            assert comm.kinds == [AR], mode
            torch.testing.assert_close(y, whole(x))
        x.requires_grad_()
        model(x).sum().backward()
        whole(x_whole := X.clone().requires_grad_()).sum().backward()
        assert_trees_close({"x": x.grad, **ltp.full_gradients(model)}, {"x": x_whole.grad, **gradients(whole)})

    run_ranks(body, 2)


def test_a_copy_trains_by_itself() -> None:
    def body() -> None:
        whole = randomize_(nn.Sequential(nn.Linear(24, 32), nn.Linear(32, 24), nn.LayerNorm(24)))
        model = copy.deepcopy(whole)
        plan = {"0": Colwise(input="I"), "1": Rowwise(output="S(1)"), "2": Sequence(output="I")}
        ltp.parallelize(model, mesh(), plan)
        twin = copy.deepcopy(model)
        with torch.no_grad():
            for p in model.parameters():
                p.zero_()
        model(X).square().mean().backward()
        before = ltp.full_gradients(model)
        twin(X).square().mean().backward()
        whole(X).square().mean().backward()
        assert_trees_close(ltp.full_gradients(twin), gradients(whole))
        assert_trees_close(ltp.full_gradients(model), before, rtol=0.0)

    run_ranks(body, 2)


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("style", [Colwise(), Rowwise()], ids=str)
@pytest.mark.parametrize(
    "module", [nn.LayerNorm(8), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Bilinear(2, 2, 2)], ids=lambda m: type(m).__name__
)
def test_only_linear_layers(style: Any, module: nn.Module) -> None:
    with pytest.raises(ltp.TPError, match=f"`blocks.0.x`: the style `{style.name}` splits a linear.*{type(module).__name__}"):
        style.splits(module, "blocks.0.x", 2)


@pytest.mark.parametrize("option", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}, {"sparse": True}], ids=str)
def test_embedding_options_that_look_at_whole_rows_are_refused(option: Any) -> None:
    with pytest.raises(ltp.TPError, match=f"`tok`.*`{next(iter(option))}=.*`replicate`"):
        Colwise().splits(nn.Embedding(8, 8, **option), "tok", 2)


def test_heads_that_do_not_fit() -> None:
    with pytest.raises(ltp.TPError, match=r"`k`: 25 features are not 4 equal heads.*`heads=`"):
        Colwise(heads=4).splits(nn.Linear(8, 25), "k", 2)
    with pytest.raises(ltp.TPError, match=r"`q`: 6 heads do not split over tp=4. Use tp=1, 2, 3, 6, or .*`replicate`"):
        Colwise(heads=6).splits(nn.Linear(8, 24), "q", 4)
    with pytest.raises(ltp.TPError, match=r"`q`: 4 heads do not split over tp=8: tp is larger than the 4 heads. Use tp=1, 2, 4,"):
        Colwise(heads=4).splits(nn.Linear(8, 24), "q", 8)
    with pytest.raises(ltp.TPError, match=r"`k`: 3 key/value heads \(of 6 heads\) do not split over tp=2. Use tp=1, 3, 6, or"):
        Colwise(heads=3, query_heads=6).splits(nn.Linear(8, 24), "k", 2)


@pytest.mark.parametrize(
    "style, options, allowed",
    [
        (Colwise, {"input": "S(-1)"}, "R or I or S(1)"),
        (Colwise, {"output": "R"}, "S(-1) or I or S(1)"),
        (Rowwise, {"input": "S(1)"}, "S(-1) or I"),
        (Rowwise, {"output": "S(-1)"}, "I or S(1) or P"),
    ],
    ids=str,
)
def test_states_that_a_layer_can_not_take_or_leave(style: Any, options: dict[str, Any], allowed: str) -> None:
    ((option, state),) = options.items()
    says = re.escape(f"`{style.name}({option}={state})`: {option} can be {allowed}.")
    with pytest.raises(ltp.TPError, match=says):
        style(**options)
    with pytest.raises(ltp.TPError, match="`up`.*" + says):
        ltp.Plan({"up": {"style": style.name, **options}})


def test_what_is_no_state() -> None:
    with pytest.raises(ltp.TPError, match=r"`rowwise\(output='all'\)`: 'all' is not a state.*'R'.*'I'.*'P'.*'S\(1\)'.*'S\(-1\)'"):
        Rowwise(output="all")  # type: ignore[arg-type]


def test_only_embeddings_leave_sequence_shards_of_their_columns() -> None:
    with pytest.raises(
        ltp.TPError, match=r"`up`: `colwise\(output=S\(1\)\)` is not for a linear layer: output can be S\(-1\) or I"
    ):
        Colwise(output="S(1)").splits(nn.Linear(8, 8), "up", 2)  # type: ignore[arg-type]
