"""`prepare_input` and `prepare_output`: the collective at a module's own door, whichever argument or output it is about."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import lightning_tp as ltp
from lightning_tp.plan.rule import Rule
from lightning_tp.shards.view import local_view
from lightning_tp.styles import Colwise, PrepareInput, PrepareOutput, Rowwise, Sequence
from lightning_tp.testing import assert_trees_close, randomize_, run_ranks
from tests.harness import Alone, Collectives, alone, held, mesh, whole_gradient_of, whole_of

AR, AG, RS = "all-reduce", "all-gather", "reduce-scatter"
X = torch.randn(2, 17, 24, generator=torch.Generator().manual_seed(0))


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(24, 32)
        self.up = nn.Linear(24, 32)
        self.down = nn.Linear(32, 24)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.gate(x).sigmoid() * self.up(x))


SPLIT = {"gate": Colwise(input="R"), "up": Colwise(input="R"), "down": Rowwise(output="I")}
SHAPES = {
    "gate.weight": (16, 24),
    "gate.bias": (16,),
    "up.weight": (16, 24),
    "up.bias": (16,),
    "down.weight": (24, 16),
    "down.bias": (24,),
}


def test_an_input_is_gathered_once_for_all_layers_behind_the_door() -> None:
    def body() -> None:
        for arrives, forward, backward in (("I", [AR], [AR]), ("S(1)", [AG, AR], [RS])):
            door = PrepareInput(arrives=arrives)  # type: ignore[arg-type]
            alone(MLP, door, X, arrives=arrives, rules=SPLIT, shapes=SHAPES, forward=forward, backward=backward)

    run_ranks(body, 2)


def test_an_output() -> None:
    def body() -> None:
        rules = {**SPLIT, "gate": Colwise(input="I"), "up": Colwise(input="I")}
        for leaves, inner, sent, back in (
            ("I", "S(1)", [RS, AG], [AG, AR, AR]),  # the last: the bias, added to this rank's tokens
            ("S(1)", "I", [AR], [AG, AR]),
        ):
            door = PrepareOutput(arrives=inner, wanted=leaves)  # type: ignore[arg-type]
            rules["down"] = Rowwise(output=inner)  # type: ignore[arg-type]
            alone(MLP, door, X, leaves=leaves, rules=rules, shapes=SHAPES, forward=sent, backward=back)

    run_ranks(body, 2)


class Scaled(nn.Module):
    """Two tensors in, in any way of calling; a tuple out, with one thing that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(24, 32)
        self.down = nn.Linear(32, 24)

    def forward(self, ids: Tensor | None, x: Tensor, scale: Tensor | None = None, *, shift: Tensor | None = None) -> Any:
        y = self.down(self.up(x))
        for t in (scale, shift):
            y = y if t is None else y * t
        return y, "word", y.detach() + 1


LAYERS = {"m.up": Colwise(input="R"), "m.down": Rowwise(output="S(1)"), "other": Colwise(input="R")}


def split(*rules: Rule, module: nn.Module | None = None) -> Any:
    model = Alone(randomize_(module or Scaled()))
    plan = ltp.Plan([*(Rule(p, s) for p, s in LAYERS.items()), *rules])
    ltp.parallelize(model, mesh(), plan)
    model._tp_registry.gradients.axis.seq_len = 17
    return model


def test_which_argument() -> None:
    def body() -> None:
        shard = held(X, "S(1)", dist.get_rank(), 2)
        scale = torch.rand(2, 17, 24, generator=torch.Generator().manual_seed(1))
        scale_shard = held(scale, "S(1)", dist.get_rank(), 2)
        ids = torch.zeros(2, 9, dtype=torch.long)
        calls: list[tuple[PrepareInput, tuple[Any, ...], dict[str, Any]]] = [
            (PrepareInput(arrives="S(1)"), (None, shard), {}),  # the first floating-point tensor
            (PrepareInput(arrives="S(1)"), (ids, shard), {}),
            (PrepareInput(arrives="S(1)"), (ids,), {"x": shard}),
            (PrepareInput(arrives="S(1)"), (), {"ids": ids, "x": shard}),
            (PrepareInput(arrives="S(1)", arg=1), (shard, shard), {}),
            (PrepareInput(arrives="S(1)", arg="x"), (ids,), {"x": shard, "shift": scale_shard}),
        ]
        reference = randomize_(Scaled())
        for style, args, kwargs in calls:
            model = split(Rule("m", style), Rule("m", PrepareOutput()))
            shift = kwargs.pop("shift", None)
            with Collectives() as comm:
                y, word, _ = model(*args, **kwargs)
            assert (word, comm.kinds) == ("word", [AG, RS, AG]), (style, comm.sent)
            torch.testing.assert_close(y, reference(None, X)[0], msg=str(style))
            if shift is not None:
                with pytest.raises(RuntimeError, match=r"size of tensor"):  # it is not touched: a shard times a whole
                    model(*args, **kwargs, shift=scale_shard[:, :3])

    run_ranks(body, 2)


def test_several_arguments_and_several_outputs() -> None:
    def body() -> None:
        scale = torch.rand(2, 17, 24, generator=torch.Generator().manual_seed(1))
        model = split(
            Rule("m", PrepareInput(arrives="S(1)", arg=1)),
            Rule("m", PrepareInput(arrives="I", wanted="S(1)", arg=2)),
            Rule("m", PrepareInput(arrives="I", wanted="S(1)", arg="shift")),
            Rule("m", PrepareOutput(index=0)),
            Rule("m", PrepareOutput(index=2)),
        )
        shard = held(X, "S(1)", dist.get_rank(), 2).requires_grad_()
        with Collectives() as comm:
            y, _, more = model(None, shard, scale, shift=scale)
        assert comm.kinds == [AG, RS, AG, AG]
        x = X.clone().requires_grad_()
        want, _, want_more = randomize_(Scaled())(None, x, scale, shift=scale)
        assert_trees_close({"y": y, "more": more}, {"y": want, "more": want_more})
        y.square().sum().backward()
        want.square().sum().backward()
        assert shard.grad is not None and x.grad is not None
        assert_trees_close({"x": whole_gradient_of(shard.grad, "S(1)", X.shape)}, {"x": x.grad})

    run_ranks(body, 2)


def test_around_a_module_that_has_a_style_of_its_own() -> None:
    """A row-wise layer, or a norm on this rank's tokens, with another transition around it."""

    def body() -> None:
        reference = randomize_(Alone(nn.Sequential(nn.Linear(24, 32), nn.Linear(32, 24), nn.LayerNorm(24))))
        model = randomize_(Alone(nn.Sequential(nn.Linear(24, 32), nn.Linear(32, 24), nn.LayerNorm(24))))
        rules = [
            Rule("other", "colwise"),
            Rule("m.0", Colwise(input="R")),
            Rule("m.0", PrepareInput(arrives="I", wanted="R")),
            Rule("m.1", Rowwise(output="I")),
            Rule("m.1", PrepareOutput(arrives="I", wanted="S(1)")),
            Rule("m.2", Sequence()),
            Rule("m.2", PrepareOutput(arrives="S(1)", wanted="I")),
        ]
        ltp.parallelize(model, mesh(), ltp.Plan(rules))
        with Collectives() as comm:
            y = model(X)
        assert comm.kinds == [AR, AG]
        torch.testing.assert_close(y, reference(X))
        y.square().sum().backward()
        reference(X).square().sum().backward()
        grads = {n: p.grad for n, p in reference.named_parameters() if p.grad is not None}
        assert_trees_close(ltp.full_gradients(model), grads)

    run_ranks(body, 2)


def test_attributes_are_set_and_nothing_else_is_done() -> None:
    def body() -> None:
        module = Scaled()
        module.groups, module.name = 4, 7  # type: ignore[assignment]
        style = PrepareInput(arrives="I", wanted="I", attributes=[("groups", 2)])  # type: ignore[arg-type]
        assert style.attributes == (("groups", 2),) and hash(style) is not None
        model = split(Rule("m", style), module=module)
        with local_view():  # outside of it, full sizes are shown
            assert (model.m.groups, model.m.name, type(model.m).__name__) == (2, 7, "Scaled")

    run_ranks(body, 2)


def test_wrong_arguments_and_outputs() -> None:
    def body() -> None:
        shard = torch.zeros(2, 9, 24)
        model = split(Rule("m", PrepareInput(arrives="S(1)", arg="scale")))
        with pytest.raises(ltp.TPError, match=r"Scaled: the plan prepares the argument 'scale'.*\[0, 1\].*`arg=`"):
            model(None, shard)
        model = split(Rule("m", PrepareInput(arrives="S(1)", arg=1)))
        with pytest.raises(ltp.TPError, match=r"the argument 1 of this module, and it was called with \['ids', 'x'\]"):
            model(ids=None, x=shard)
        model = split(Rule("m", PrepareInput(arrives="S(1)")))
        with pytest.raises(ltp.TPError, match=r"a floating-point tensor of this module, and it was called with \[0, 1\]"):
            model(None, torch.zeros(2, 9, dtype=torch.long))
        model = split(Rule("m", PrepareOutput(arrives="S(1)", wanted="I", index=1)))
        with pytest.raises(ltp.TPError, match=r"the outputs \[1\], and they are \['Tensor', 'str', 'Tensor'\].*`index=`"):
            model(None, X)
        model = split(Rule("m", PrepareOutput(index=3)))
        with pytest.raises(ltp.TPError, match=r"the outputs \[3\]"):
            model(None, X)

        class Named(Scaled):
            def forward(self, *args: Any) -> Any:
                return {"y": super().forward(*args)[0]}

        model = split(Rule("m", PrepareOutput()), module=Named())
        with pytest.raises(ltp.TPError, match=r"a tensor or a tuple, and it is a dict"):
            model(None, X)

    run_ranks(body, 2)


def test_a_transition_that_there_is_not() -> None:
    def body() -> None:
        model = Alone(Scaled())
        plan = ltp.Plan([*(Rule(p, s) for p, s in LAYERS.items()), Rule("m", PrepareOutput(arrives="S(-1)", wanted="S(1)"))])
        with pytest.raises(ltp.TPError, match=r"`m`: .*from S\(-1\) to S\(1\)"):
            ltp.parallelize(model, mesh(), plan)
        assert model.m.up.weight.shape == (32, 24)  # nothing is changed

    run_ranks(body, 2)


def test_whole_of_undoes_held() -> None:
    """The tests' own tool."""

    def body() -> None:
        for state in ("I", "S(1)", "S(-1)", "P"):
            mine = held(X, state, dist.get_rank(), dist.get_world_size())
            torch.testing.assert_close(whole_of(mine, state, X.shape), X, msg=state)

    run_ranks(body, 4)
