"""A deep model is followed through one block of each kind; the plan is the one of following all."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_tp import infer_plan
from lightning_tp.infer.blocks import identical
from lightning_tp.infer.blocks.identical import WatchedNumber, watch_numbers
from lightning_tp.infer.blocks.repeated import RepeatedBlocks
from lightning_tp.infer.follow import tracer as tracer_module

DEPTH = 7
FINDER = "lightning_tp.infer.blocks.workload.identical_blocks"


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, at: int) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(dim), nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.norm2, self.up, self.down = nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.heads, self.at = heads, at

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        B, T, C = x.size()
        q, k, v = self.qkv(self.norm(x)).view(B, T, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        x = x + self.out(y.transpose(1, 2).reshape(B, T, C))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class Model(nn.Module):
    """Blocks of two kinds, in turns: the sizes are the same, what they do is not."""

    def __init__(self, mixed: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(300, 32)
        self.layers = nn.ModuleList(Block(32, 4, i) for i in range(DEPTH))
        self.head, self.mixed = nn.Linear(32, 300), mixed

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        bias = x.new_zeros(1, 1, ids.shape[1], ids.shape[1])
        for i, layer in enumerate(self.layers):
            x = layer(x, bias if self.mixed and i % 2 else None)
        return self.head(x)


def _hf(name: str) -> tuple[nn.Module, dict[str, Any]]:
    hf = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": DEPTH, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 256}
    make = {
        "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, num_key_value_heads=2)),
        "gemma3": lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**sizes, num_key_value_heads=2, head_dim=8, sliding_window=4)),
        "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=32, n_layer=DEPTH, n_head=4, vocab_size=256)),
        "bert": lambda: hf.BertModel(hf.BertConfig(**sizes)),
        "mixtral": lambda: hf.MixtralForCausalLM(
            hf.MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=4, output_router_logits=True)
        ),
        "t5": lambda: hf.T5ForConditionalGeneration(
            hf.T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=DEPTH, num_heads=4, vocab_size=256, decoder_start_token_id=0)
        ),
    }[name]
    torch.manual_seed(0)
    ids = torch.randint(0, 256, (2, 9))
    return make(), {"input_ids": ids} | ({"labels": ids} if name == "t5" else {})


@pytest.mark.parametrize(
    ("name", "meta"),
    [
        *((name, False) for name in ("gpt2", "bert", "mixtral")),
        pytest.param("llama", False, marks=pytest.mark.slow),
        pytest.param("gemma3", False, marks=pytest.mark.slow),
        ("llama", True),
        ("gemma3", True),
        pytest.param("t5", False, marks=pytest.mark.slow),
        pytest.param("t5", True, marks=pytest.mark.slow),
    ],
)
def test_same_plan_as_following_all(name: str, meta: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = _hf(name)
    model = model.to("meta") if meta else model
    found: list[RepeatedBlocks] = []
    find = identical.identical_blocks
    monkeypatch.setattr(FINDER, lambda *a: found.append(find(*a)) or found[-1])
    quick = infer_plan(model, inputs, tp=2)
    monkeypatch.setattr(FINDER, lambda *a: RepeatedBlocks())
    assert quick == infer_plan(model, inputs, tp=2)
    assert len(found[0].copies) >= (DEPTH - 2 if name != "t5" else 2 * DEPTH - 5) or name == "mixtral"


@pytest.mark.parametrize(("mixed", "kinds"), [(False, 1), (True, 2)])
def test_what_is_alike(mixed: bool, kinds: int) -> None:
    model = Model(mixed)
    copies = identical.identical_blocks(model, lambda m, x: m(*x), (torch.zeros(1, 5, dtype=torch.long),)).copies
    assert len(copies) == DEPTH - kinds
    assert set(copies.values()) == {f"layers.{i}" for i in range(kinds)}


def test_code_that_looks_for_what_each_block_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that every block fills: skipping some of them fails, so that all are followed."""

    class Caching(Model):
        def forward(self, ids: Tensor) -> Tensor:
            kept: list[Tensor] = []
            handles = [b.up.register_forward_hook(lambda m, a, out: kept.append(out)) for b in self.layers]
            out = super().forward(ids)
            for h in handles:
                h.remove()
            return out + sum(kept[i].sum() for i in range(DEPTH)) * 0

    model = Caching(mixed=False)
    inputs = (torch.zeros(1, 5, dtype=torch.long),)
    quick = infer_plan(model, inputs, tp=2)
    monkeypatch.setattr(FINDER, lambda *a: RepeatedBlocks())
    assert quick == infer_plan(model, inputs, tp=2)


class Numbered(Block):
    """Does something else in some blocks, by its number."""

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        x = super().forward(x, bias)
        return nn.functional.silu(x) if self.every_third() else x

    def every_third(self) -> bool:
        return self.at % 3 == 0


class InAList(Numbered):
    """As the index of a list, which is seen by what the second and the last block do."""

    def every_third(self) -> bool:
        return [True, False, False, True, False, False, True][self.at]


class LastInAList(Numbered):
    """The same, where only the last block does something else."""

    def every_third(self) -> bool:
        return [*[False] * (DEPTH - 1), True][self.at]


class FromAStore(Block):
    """Its number is only where it keeps something."""

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        self.store[0][self.at] = x.shape
        return super().forward(x, bias)

    store = ([None] * 100,)


@pytest.mark.parametrize(
    ("block", "kinds", "all_of_them"),
    [(Block, 1, False), (FromAStore, 1, False), (Numbered, 2, True), (InAList, 2, True), (LastInAList, 2, True)],
)
def test_few_blocks_are_run_where_their_number_says_nothing(
    block: type[Block], kinds: int, all_of_them: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model(mixed=False)
    model.layers = nn.ModuleList(block(32, 4, i) for i in range(DEPTH))
    inputs = (torch.zeros(1, 5, dtype=torch.long),)
    ran: list[set[str]] = []
    skip = identical.skip_copies
    monkeypatch.setattr(
        identical, "skip_copies", lambda model, blocks, tracer: skip(model, blocks, tracer, ran.append(set()) or ran[-1])
    )
    copies = identical.identical_blocks(model, lambda m, x: m(*x), inputs).copies
    assert len(copies) == DEPTH - kinds and ("layers.3" in copies) and copies["layers.3"] == "layers.0"
    assert ran[0] == {"layers.0"}  # of those that may be skipped: the second and the last are not among them
    assert len(ran) == (2 if all_of_them else 1)
    assert [layer.at for layer in model.layers] == list(range(DEPTH)) and type(model.layers[2].at) is int  # type: ignore[union-attr]


def test_the_model_is_left_as_it_was() -> None:
    model = Model(mixed=False)
    infer_plan(model, (torch.zeros(1, 5, dtype=torch.long),), tp=2)
    assert all("forward" not in m.__dict__ and not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


FORWARDS: list[nn.Module] = []


class Telling(Block):
    """Gives its probabilities, too, as Bloom's do."""

    def forward(self, x: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        FORWARDS.append(self)
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        probabilities = (q @ k.transpose(-1, -2)).softmax(-1)
        x = x + self.out((probabilities @ v).transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x)))), probabilities


class Listening(Model):
    """Where they are `read`, those of all blocks meet."""

    def __init__(self, read: bool) -> None:
        super().__init__(mixed=False)
        self.layers, self.read = nn.ModuleList(Telling(32, 4, i) for i in range(DEPTH)), read

    def forward(self, ids: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        x, seen = self.table(ids), torch.zeros(())
        for layer in self.layers:
            x, probabilities = layer(x)
            seen = seen + probabilities
        return (self.head(x), seen.mean(1)) if self.read else (self.head(x),)


@pytest.mark.parametrize("read", [False, True])
def test_blocks_that_give_features_of_their_own(read: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = Listening(read), torch.zeros(1, 5, dtype=torch.long)
    FORWARDS.clear()
    quick = infer_plan(model, (ids,), tp=2)
    assert FORWARDS.count(model.layers[3]) <= 2  # on a rank, the plan is tried on all
    monkeypatch.setattr(FINDER, lambda *a: RepeatedBlocks())
    assert quick == infer_plan(model, (ids,), tp=2) and FORWARDS.count(model.layers[3]) > 4


def test_cost_does_not_grow_with_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    """A count, not a time: operations that are followed with labels."""
    counts = []
    for depth in (4, 12):
        monkeypatch.setattr(f"{__name__}.DEPTH", depth)
        model = Model(mixed=False)
        count = [0]
        follow = tracer_module.FeatureTracer.put
        with monkeypatch.context() as patch:
            patch.setattr(tracer_module.FeatureTracer, "put", lambda *a, n=count, f=follow: (n.__setitem__(0, n[0] + 1), f(*a))[1])
            infer_plan(model, (torch.zeros(1, 5, dtype=torch.long),), tp=2)
        counts.append(count[0])
    assert counts[0] > 0 and counts[1] <= counts[0] + 8 * 5  # of a block that is skipped: its outputs, and the residual stream


def test_llama_70b_on_meta() -> None:
    """All 80 blocks, without memory for their weights."""
    hf = pytest.importorskip("transformers")
    config = hf.LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=32000,
    )
    with torch.device("meta"):
        model = hf.LlamaForCausalLM(config)
    ids = torch.zeros(1, 512, dtype=torch.long)
    plan = infer_plan(model, {"input_ids": ids, "labels": ids, "use_cache": False}, tp=8)
    assert {r.pattern: r.style.name for r in plan.rules if "self_attn." in r.pattern} == {
        f"model.layers.*.self_attn.{n}_proj": "rowwise" if n == "o" else "colwise" for n in "qkvo"
    }


@pytest.mark.parametrize(
    "use",
    [
        lambda n: n == 2,
        lambda n: n < 3,
        lambda n: n % 2,
        lambda n: 7 - n,
        lambda n: {n: 0},
        lambda n: f"{n}",
        lambda n: bool(n),
        lambda n: n & 1,
    ],
)
def test_operations_are_noticed_and_give_what_the_number_gives(use: Callable[[Any], Any]) -> None:
    uses: list[str] = []
    assert use(WatchedNumber(2, uses)) == use(2)
    assert uses


def test_an_index_of_a_list_is_not() -> None:
    uses: list[str] = []
    store = [None, None, None]
    store[WatchedNumber(2, uses)] = "kept"  # type: ignore[call-overload]
    assert (store, uses) == ([None, None, "kept"], [])


def test_a_copy_is_watched_by_itself() -> None:
    number = copy.deepcopy(WatchedNumber(2, []))
    assert number + 1 == 3 and number.uses == ["__add__"]


def test_numbers_are_watched_for_a_while() -> None:
    module = nn.Module()
    module.index = 3
    with pytest.raises(ZeroDivisionError), watch_numbers([(module, "index")]) as uses:
        assert type(module.index) is WatchedNumber and not uses
        module.index // 0
    assert uses == ["__floordiv__"] and type(module.index) is int and module.index == 3
