"""`nn.MultiheadAttention` written out gives the numbers of torch's own forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_tp.core.ops.attention import can_be_written_out, readable_attention, written_out
from lightning_tp.testing import assert_trees_close, randomize_

CAUSAL = torch.ones(5, 5).triu(1).bool()
PADDING = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
PER_HEAD = torch.randn(8, 5, 5, generator=torch.Generator().manual_seed(1))


def outputs(model: nn.MultiheadAttention, inputs: tuple[torch.Tensor, ...], kwargs: dict[str, Any]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    y, weights = model(*inputs, **kwargs)
    y.pow(2).sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), **({} if weights is None else {"weights": weights.detach()}), **grads}


@pytest.mark.parametrize(
    ("options", "kwargs"),
    [
        ({}, {}),
        ({"bias": False}, {"need_weights": False}),
        ({"batch_first": False}, {}),
        ({}, {"attn_mask": CAUSAL}),
        ({}, {"attn_mask": CAUSAL, "is_causal": True, "need_weights": False}),
        ({}, {"key_padding_mask": PADDING}),
        ({}, {"key_padding_mask": PADDING, "attn_mask": PER_HEAD}),
        ({}, {"average_attn_weights": False}),
        ({"kdim": 6, "vdim": 4}, {}),
        ({"add_bias_kv": True}, {"attn_mask": CAUSAL}),
        ({"add_bias_kv": True, "add_zero_attn": True, "bias": False}, {"key_padding_mask": PADDING}),
        ({"add_bias_kv": True}, {"attn_mask": CAUSAL, "is_causal": True, "need_weights": False}),
        ({"add_zero_attn": True, "batch_first": False}, {"attn_mask": CAUSAL, "need_weights": False}),
    ],
)
def test_as_torch(options: dict[str, Any], kwargs: dict[str, Any]) -> None:
    model = randomize_(nn.MultiheadAttention(16, 4, **{"batch_first": True, **options}))
    first = model.batch_first
    shape = (2, 5) if first else (5, 2)
    if "key_padding_mask" in kwargs:
        kwargs = (
            {**kwargs, "key_padding_mask": torch.zeros(2, 5).masked_fill(kwargs["key_padding_mask"], float("-inf"))}
            if "attn_mask" in kwargs
            else kwargs
        )
    g = torch.Generator().manual_seed(0)
    inputs = tuple(torch.randn(*shape, d, generator=g) for d in (16, options.get("kdim", 16), options.get("vdim", 16)))
    ref = outputs(model, inputs, kwargs)
    with readable_attention(model):
        assert type(model) is not nn.MultiheadAttention
        got = outputs(model, inputs, kwargs)
    assert type(model) is nn.MultiheadAttention
    assert_trees_close(got, ref, rtol=1e-5)


def test_without_a_batch() -> None:
    model = randomize_(nn.MultiheadAttention(16, 4))
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    ref = outputs(model, (x, x, x), {})
    with readable_attention(model):
        assert_trees_close(outputs(model, (x, x, x), {}), ref, rtol=1e-5)


def test_what_is_left_to_torch() -> None:
    class Own(nn.MultiheadAttention):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    assert can_be_written_out(nn.MultiheadAttention(8, 2))
    assert can_be_written_out(nn.MultiheadAttention(8, 2, add_bias_kv=True, add_zero_attn=True))
    assert not can_be_written_out(Own(8, 2))


def test_the_fast_path_comes_back() -> None:
    before = torch.backends.mha.get_fastpath_enabled()
    with readable_attention(nn.MultiheadAttention(8, 2)):
        assert not torch.backends.mha.get_fastpath_enabled()
    assert torch.backends.mha.get_fastpath_enabled() == before


@pytest.mark.parametrize("batch", [(), (2,)])
@pytest.mark.parametrize("need_weights", [False, True])
def test_the_function(batch: tuple[int, ...], need_weights: bool) -> None:
    model = randomize_(nn.MultiheadAttention(16, 4, add_bias_kv=True))
    x = torch.randn(5, *batch, 16, generator=torch.Generator().manual_seed(0))
    of = (
        16,
        4,
        model.in_proj_weight,
        model.in_proj_bias,
        model.bias_k,
        model.bias_v,
        True,
        0.0,
        model.out_proj.weight,
        model.out_proj.bias,
    )
    more = {"need_weights": need_weights, "attn_mask": CAUSAL, "average_attn_weights": False}
    ref = torch.nn.functional.multi_head_attention_forward(x, x, x, *of, **more)
    got = written_out(None)(x, x, x, *of, **more)
    with readable_attention(nn.Identity()):
        again = torch.nn.functional.multi_head_attention_forward(x, x, x, *of, **more)
    assert (got[1] is None) == (ref[1] is None) == (not need_weights)
    for one in (got, again):
        assert_trees_close(
            dict(enumerate(t for t in one if t is not None)), dict(enumerate(t for t in ref if t is not None)), rtol=1e-5
        )


def test_keys_that_are_there_already_are_left_to_torch() -> None:
    model = randomize_(nn.MultiheadAttention(16, 4))
    g = torch.Generator().manual_seed(0)
    x, static = torch.randn(5, 2, 16, generator=g), torch.randn(8, 7, 4, generator=g)
    of = (16, 4, model.in_proj_weight, model.in_proj_bias, None, None, False, 0.0, model.out_proj.weight, model.out_proj.bias)
    ref, _ = torch.nn.functional.multi_head_attention_forward(x, x, x, *of, static_k=static, static_v=static)
    assert torch.equal(written_out(None)(x, x, x, *of, static_k=static, static_v=static)[0], ref)
