"""What is made up on the meta device is what torch makes there."""

from typing import Any

import pytest
import torch
from torch import nn

from lightning_tp.errors import TPError
from lightning_tp.infer.follow.meta import _MAKERS, KEEP_BLOCK, Values, made

aten = torch.ops.aten
SHAPES = [(6,), (4, 6), (2, 4, 6), (1, 1, 6), (2, 1, 6), (1,), (4, 1), (3, 2, 4, 6)]


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, device="meta", dtype=dtype)


def tensors() -> list[torch.Tensor]:
    plain = [empty(*s, dtype=d) for s in SHAPES for d in (torch.float32, torch.bfloat16, torch.int64, torch.complex64)]
    strided = [empty(2, 6, 4).transpose(1, 2), empty(2, 1, 6).expand(2, 4, 6), empty(2, 4, 12)[..., ::2]]
    return [*plain, *strided, empty(), torch.nn.Parameter(empty(6)), torch.empty(2, 4, 6)]


def calls() -> list[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    some = tensors()
    one = [f for f in _MAKERS if len([a for a in f._schema.arguments if not a.has_default_value()]) == 1]
    found: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [(f, (x,), {}) for f in one for x in some]
    found += [(aten.gelu.default, (x,), {"approximate": "tanh"}) for x in some]
    found += [(f, (x, n), {}) for f in (aten.mul.Scalar, aten.pow.Tensor_Scalar) for x in some for n in (2, 0.5, 1j)]
    found += [(f, (x, -1, False), {}) for f in (aten._softmax.default, aten._log_softmax.default) for x in some]
    found += [(aten._safe_softmax.default, (x, -1), {}) for x in some] + [
        (aten._safe_softmax.default, (some[0], -1, torch.float64), {})
    ]
    pairs = (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor)
    found += [(f, (x, y), {}) for f in pairs for x in some for y in (*some, 2, 0.5)]
    found += [(aten.add.Tensor, (some[0], some[0]), {"alpha": 2})]
    weights = [empty(6, 5), empty(5, 6).t(), empty(6, 5, dtype=torch.bfloat16), empty(3, 5), torch.empty(6, 5)]
    found += [
        (aten.addmm.default, (b, x, w), {}) for b in (empty(5), empty(1), empty(4, 5)) for x in some if x.ndim == 2 for w in weights
    ]
    ends = (None, empty(6), empty(4, 6), empty(6, dtype=torch.bfloat16), empty(5))
    found += [
        (aten.native_layer_norm.default, (x, n, w, b, 1e-5), {})
        for x in some
        for n in ([6], [4, 6])
        for w in ends
        for b in (None, w)
    ]
    return found


def test_what_is_made_up_is_what_torch_makes() -> None:
    taken: dict[Any, int] = {}
    for func, args, kwargs in calls():
        out = made(func, args, kwargs)
        if out is None:
            continue
        taken[func] = taken.get(func, 0) + 1
        want = func(*args, **kwargs)
        for o, w in zip(out if isinstance(out, tuple) else (out,), want if isinstance(want, tuple) else (want,), strict=True):
            assert (o.shape, o.dtype, o.stride(), o.device) == (w.shape, w.dtype, w.stride(), w.device), (func, args, kwargs)
    assert set(taken) == set(_MAKERS)  # each has a plain case


@pytest.mark.parametrize("bad", [(empty(5), empty(4, 6), empty(7, 5)), (empty(4), empty(4, 6), empty(6, 5))])
def test_errors_are_torchs(bad: tuple[torch.Tensor, ...]) -> None:
    assert made(aten.addmm.default, bad, {}) is None


def test_tensors_of_the_cpu_that_meet_some_on_the_meta_device() -> None:
    layer, held = nn.Linear(4, 4).to("meta"), torch.arange(4.0)
    values = Values(layer)
    known = values.onto_meta(torch.ones(4))
    with values:
        assert (layer(torch.zeros(2, 4)) * held).is_meta  # as the inputs are not moved by hand either
        assert (known + held).sum().item() == 10  # no weight has a part in it
        written = torch.zeros(4)
        written += known
        assert not written.is_meta and (written * known).is_meta
        with pytest.raises(TPError, match="depends on weights"):
            (written * known).sum().item()  # what it holds now is not known
    assert held.tolist() == [0, 1, 2, 3]


def test_values_of_inputs_and_buffers_are_known() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(3, device="meta"))
            self.register_buffer("seen", torch.zeros(3, dtype=torch.bool, device="meta"))
            self.register_buffer("scale", torch.zeros(3, device="meta"))

    model = Masked()
    values = Values(model)
    x = values.onto_meta({"x": torch.arange(3), "there": torch.zeros(2, device="meta")})
    assert values.value(x["x"]).tolist() == [0, 1, 2]  # type: ignore[union-attr]
    assert values.value(x["there"]).tolist() == [1, 1]  # type: ignore[union-attr]
    assert values.value(model.seen).tolist() == [True] * 3  # type: ignore[union-attr]
    assert values.value(model.scale) is None
    with values:
        assert int((x["x"] * torch.arange(3, device="meta")).sum()) == 5
        assert values.value(x["x"] * model.w) is None


def test_a_batch_is_not_written_into() -> None:
    values, batch = Values(nn.Linear(3, 3, device="meta")), torch.arange(3)
    with values:
        values.onto_meta(batch).add_(1)
    assert batch.tolist() == [0, 1, 2]


def test_a_parameter_is_known_by_its_name() -> None:
    layer = nn.Linear(3, 2)
    facts = Values(layer).shadow(layer.weight)
    assert facts.param is not None and facts.param.name == "weight" and facts.grad
    assert [c.tolist() for c in facts.param.coordinates] == [[[0] * 3, [1] * 3], [[0, 1, 2]] * 2]


def test_stochastic_depth_skips_no_block() -> None:
    with Values(nn.Linear(1, 1)):
        assert torch.rand(()).item() == torch.empty(1).uniform_().item() == pytest.approx(KEEP_BLOCK)
        assert torch.rand(100).std() > 0
