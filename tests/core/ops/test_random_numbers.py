"""Masks of split models: whose are equal, whose differ, what is run again, and those of one process."""

from __future__ import annotations

import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_tp as ltp
from lightning_tp.core.comm.mesh import make_mesh
from lightning_tp.core.ops.rng import seed_mesh
from lightning_tp.styles import Colwise
from lightning_tp.testing import assert_trees_close, randomize_, run_ranks

DIM, HEADS, VOCAB = 32, 4, 23


class Attention(nn.Module):
    """Three ways to drop attention weights."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.q, self.k, self.v, self.o = (nn.Linear(DIM, DIM) for _ in range(4))
        self.weights_dropout, self.out_dropout = nn.Dropout(0.3), nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, DIM // HEADS)).transpose(1, 2) for f in (self.q, self.k, self.v))
        if self.how == "sdpa":
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=0.3 if self.training else 0.0)
        else:
            weights = torch.softmax(q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5, -1)
            weights = self.weights_dropout(weights) if self.how == "module" else F.dropout(weights, 0.3, self.training)
            y = weights @ v
        return self.out_dropout(self.o(y.transpose(1, 2).flatten(2)))


class DropPath(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        keep = 0.7 + torch.rand((x.shape[0], *(1 for _ in x.shape[1:])), dtype=x.dtype, device=x.device)
        return x.div(0.7) * keep.floor()


class Block(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.norm1, self.attention, self.norm2 = nn.LayerNorm(DIM), Attention(how), nn.LayerNorm(DIM)
        self.up, self.down, self.inner, self.path = nn.Linear(DIM, 50), nn.Linear(50, DIM), nn.Dropout(0.3), DropPath()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.path(self.attention(self.norm1(x)))
        y = self.down(self.inner(F.gelu(self.up(self.norm2(x)))))
        return x + self.path(F.dropout(y, 0.3, self.training))  # in the block's own code


class Net(nn.Module):
    def __init__(self, how: str = "sdpa") -> None:
        super().__init__()
        self.embed, self.drop, self.head = nn.Embedding(VOCAB, DIM), nn.Dropout(0.3), nn.Linear(DIM, VOCAB)
        self.blocks = nn.Sequential(Block(how), Block(how))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.blocks(self.drop(self.embed(tokens))))


def plan(sequence: bool) -> dict[str, Any]:
    return {
        "embed": "vocab_embedding",
        "blocks.*.norm*": "sequence" if sequence else "replicate",
        **{f"blocks.*.attention.{name}": Colwise(heads=HEADS) for name in "qkv"},
        "blocks.*.attention.o": "rowwise",
        "blocks.*.up": "colwise",
        "blocks.*.down": "rowwise",
        "head": "vocab_head",
    }


def batch(seed: int, length: int = 10) -> Tensor:
    return torch.randint(0, VOCAB, (3, length), generator=torch.Generator().manual_seed(seed))


def steps(model: nn.Module, seeds: tuple[int, ...] = (0, 1, 2, 3)) -> list[float]:
    """A few steps of SGD, on batches of several lengths; step 3 is one that nobody observes."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for seed in seeds:
        tokens = batch(seed, 9 + seed)
        loss = F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("sequence", [False, True], ids=["whole stream", "sequence parallel"])
def test_exact_masks_are_those_of_one_process(sequence: bool) -> None:
    ways = ("sdpa", "module", "function")
    refs: dict[str, tuple[list[float], dict[str, Tensor]]] = {}
    for how in ways:
        model = randomize_(Net(how))
        torch.manual_seed(7)
        refs[how] = steps(model), ltp.full_state_dict(model)

    def body() -> None:
        mesh = make_mesh("cpu", 1, dist.get_world_size())
        for how in ways:
            for checkpointing in (None, "block"):
                model = randomize_(Net(how))
                ltp.parallelize(model, mesh, plan(sequence), dropout="exact", activation_checkpointing=checkpointing)
                torch.manual_seed(7)
                assert steps(model) == pytest.approx(refs[how][0], rel=1e-5), how
                assert_trees_close(ltp.full_state_dict(model), refs[how][1], rtol=1e-4, name=f"{how}, {checkpointing}")

    run_ranks(body, 2)


def test_nothing_is_there_to_be_exact_about_in_evaluation() -> None:
    def body() -> None:
        model = ltp.parallelize(randomize_(Net()), make_mesh("cpu", 1, 2), plan(True)).eval()
        state = torch.get_rng_state()
        model(batch(0))
        assert torch.equal(state, torch.get_rng_state())

    run_ranks(body, 2)


# ------------------------------------------------------------------------------------------------------------ independent


def alike(model: nn.Module) -> nn.Module:
    """Every head and every half of the MLP has nearly the same weights: what differs much over the ranks is dropped differently."""
    with torch.no_grad():
        for block in model.blocks:
            for layer in (block.attention.q, block.attention.k, block.attention.v, block.up):
                for p in layer.parameters():
                    half = p[: len(p) // 2] if layer is block.up else p[: DIM // HEADS]
                    p.copy_(half.repeat(len(p) // len(half), *(1 for _ in p.shape[1:])))
                    p.mul_(1 + 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    return model


def far(x: Tensor, y: Tensor) -> bool:
    return bool((x - y).norm() > 0.3 * x.norm())


def seen(model: nn.Module) -> dict[str, Tensor]:
    """What goes into, or comes out of, some modules, in the next forward."""
    found: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if name.endswith((".o", ".inner", ".path", "drop", "out_dropout")):
            module.register_forward_hook(
                lambda m, args, out, name=name: found.__setitem__(name, (args[0] if name.endswith(".o") else out).detach().clone())
            )
    return found


@pytest.mark.parametrize("how", ["sdpa", "module", "function"])
@pytest.mark.parametrize("sequence", [False, True], ids=["whole stream", "sequence parallel"])
def test_whose_masks_are_equal(how: str, sequence: bool) -> None:
    """Over 2 x 2 ranks: those of whole activations inside a tensor-parallel group; no others."""

    def body() -> list[dict[str, Tensor]]:
        mesh = make_mesh("cpu", 2, 2)
        model = ltp.parallelize(alike(randomize_(Net(how))), mesh, plan(sequence))
        torch.manual_seed(3)
        seed_mesh(mesh)
        found, each = seen(model), []
        for step in range(5):  # the fourth is one that nobody observes
            model(batch(0))
            if step in (0, 3, 4):
                each.append(dict(found))
        return each

    ranks = run_ranks(body, 4)
    for a, b, c, d in zip(*ranks):
        for name in a:
            assert far(a[name], c[name]) and far(b[name], d[name]), name  # over dp
            x, y = a[name], b[name]
            if name.endswith((".o", ".inner")):
                assert far(x, y), name
            elif not sequence:
                assert torch.equal(x, y), name
            elif name.endswith("path"):  # a sample is dropped as a whole, on all ranks
                assert torch.equal((x == 0).all(2).all(1), (y == 0).all(2).all(1)), name
            else:
                assert not torch.equal(x == 0, y == 0), name
    assert any((r["blocks.0.path"] == 0).all(2).all(1).any() for of in ranks for r in of)
    for rank in ranks:  # and never the same twice
        assert not torch.equal(rank[1]["blocks.0.inner"] == 0, rank[2]["blocks.0.inner"] == 0)


@pytest.mark.parametrize("mesh", [pytest.param((1, 2), id="tp2"), pytest.param((2, 2), id="2x2", marks=pytest.mark.slow)])
def test_a_block_that_is_run_again_drops_the_same(mesh: tuple[int, int]) -> None:
    """Bitwise the same steps with activation checkpointing, ours or one around the modules; replicas stay equal."""
    from torch.utils.checkpoint import checkpoint

    class Around(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            for block in self:
                x = checkpoint(block, x, use_reentrant=False)
            return x

    def body() -> None:
        device_mesh = make_mesh("cpu", *mesh)
        for how in ("sdpa", "module", "function"):
            ends = []
            for checkpointing in (None, "block", "around"):
                model = randomize_(Net(how))
                if checkpointing == "around":
                    model.blocks = Around(*model.blocks)
                ltp.parallelize(
                    model, device_mesh, plan(True), activation_checkpointing="block" if checkpointing == "block" else None
                )
                torch.manual_seed(3)
                seed_mesh(device_mesh)
                losses = steps(model, (0, 1, 2, 3, 4))
                ends.append((losses, ltp.full_state_dict(model)))
            for losses, weights in ends[1:]:
                assert losses == ends[0][0]
                assert all(torch.equal(t, ends[0][1][n]) for n, t in weights.items())
            every: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(every, ends[0])
            for _, weights in every:
                assert all(torch.equal(t, weights[n]) for n, t in ends[0][1].items())

    run_ranks(body, mesh[0] * mesh[1])


def test_half_of_a_shard_is_kept_and_scaled() -> None:
    """The law of the masks, on a rank's own stream."""

    class MLP(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 4000), nn.Linear(4000, 8)

        def forward(self, x: Tensor) -> Tensor:
            self.kept = F.dropout(self.up(x), 0.25, self.training)
            return self.down(self.kept)

    def body() -> tuple[Tensor, Tensor]:
        model = randomize_(MLP())
        ltp.parallelize(model, make_mesh("cpu", 1, 2), {"up": "colwise", "down": "rowwise"})
        x = torch.ones(5, 8)
        model(x)
        model(x)
        return model.kept, model.up(x)

    ranks = run_ranks(body, 2)
    for kept, whole in ranks:
        on = kept != 0
        assert on.float().mean().item() == pytest.approx(0.75, abs=0.02)
        torch.testing.assert_close(kept[on], whole[on] / 0.75)
    agree = ((ranks[0][0] == 0) == (ranks[1][0] == 0)).float().mean().item()
    assert agree == pytest.approx(0.75**2 + 0.25**2, abs=0.02)  # by chance


def test_a_model_without_dropout_is_left_alone() -> None:
    def body() -> None:
        model = randomize_(Net())
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            if isinstance(module, Attention):
                module.how = "module"
        model.blocks = nn.Sequential(*(Plain(block) for block in model.blocks))
        names = {n.replace("blocks.*", "blocks.*.block"): s for n, s in plan(False).items()}
        ltp.parallelize(model, make_mesh("cpu", 1, 2), names)
        steps(model)
        assert not any("_per_rank_calls" in m.__dict__ for m in model.modules())

    class Plain(nn.Module):
        def __init__(self, block: Block) -> None:
            super().__init__()
            self.block = block

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.block.attention(self.block.norm1(x))
            return x + self.block.down(self.block.inner(F.gelu(self.block.up(self.block.norm2(x)))))

    run_ranks(body, 2)


# --------------------------------------------------------------------------------------------------------------- refused


class Noise(nn.Module):
    """An MLP with random numbers of some kind inside."""

    def __init__(self, how: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.up, self.down, self.how = nn.Linear(8, 16), nn.Linear(16, 8), how

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.how(self.up(x)))


@pytest.mark.parametrize(
    "how, message",
    [
        (lambda x: x + torch.rand(x.shape), "draws `rand` of shape"),
        (lambda x: x * torch.bernoulli(torch.full_like(x, 0.5)), "draws `bernoulli` of shape"),
        (lambda x: F.alpha_dropout(x, 0.5, True), r"draws random numbers \(`alpha_dropout`\) for a shard of shape \(2, 3, 8\)"),
        (lambda x: F.dropout(x.flatten(), 0.5, True).view_as(x), "it can't be told which region of the full activation"),
    ],
)
def test_what_cant_be_exact_is_refused(how: Callable[[Tensor], Tensor], message: str) -> None:
    def body() -> None:
        model = ltp.parallelize(
            randomize_(Noise(how)), make_mesh("cpu", 1, 2), {"up": "colwise", "down": "rowwise"}, dropout="exact"
        )
        x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
        with pytest.raises(ltp.TPError, match=message):
            model(x)

    run_ranks(body, 2)


def test_options() -> None:
    def body() -> None:
        for options in ({"dropout": "exactly"}, {"dropout": "exact", "backend": "dtensor"}):
            with pytest.raises(ltp.TPError, match="there is 'independent', and 'exact'"):
                ltp.parallelize(Net(), make_mesh("cpu", 1, 2), plan(False), **options)

    run_ranks(body, 2)


# ------------------------------------------------------------------------------------------- models that nobody here wrote


def of_others(name: str, attention: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    p, common = 0.2, dict(num_hidden_layers=2, num_attention_heads=4, hidden_size=32, intermediate_size=48)
    drop = dict(hidden_dropout_prob=p, attention_probs_dropout_prob=p, attn_implementation=attention)
    if name == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=VOCAB,
            n_embd=32,
            n_layer=2,
            n_head=4,
            resid_pdrop=p,
            embd_pdrop=p,
            attn_pdrop=p,
            use_cache=False,
            attn_implementation=attention,
        )
        return transformers.GPT2LMHeadModel(config)
    if name == "bert":
        return transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=VOCAB, **common, **drop))
    if name == "bart":
        config = transformers.BartConfig(
            vocab_size=VOCAB, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
            encoder_ffn_dim=48, decoder_ffn_dim=48, dropout=p, attention_dropout=p, activation_dropout=p, use_cache=False,
            attn_implementation=attention,
        )  # fmt: skip
        return transformers.BartForConditionalGeneration(config)
    if name == "encoder":
        return Encoder(need_weights=attention == "eager")
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(image_size=8, patch_size=2, num_labels=VOCAB, **common, **drop)
    )


class Encoder(nn.Module):
    """Layers of torch, whose attention is one call that is written out when it is split."""

    def __init__(self, need_weights: bool) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, 32), nn.Linear(32, VOCAB)
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(32, 4, 48, 0.2, batch_first=True, norm_first=True) for _ in range(2))
        self.need_weights = need_weights
        if need_weights:
            for block in self.blocks:
                block._sa_block = lambda x, *_, b=block, **__: b.dropout1(b.self_attn(x, x, x, need_weights=True)[0])

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return SimpleNamespace(loss=F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten()))


class Module(L.LightningModule):
    def __init__(self, name: str, attention: str) -> None:
        super().__init__()
        self.name, self.model, self.losses = name, randomize_(of_others(name, attention)), []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        tokens = batch["tokens"]
        if self.name == "vit":
            images = F.one_hot(tokens, VOCAB).float()[:, :, :12].reshape(len(tokens), 3, 8, 8)  # 16 tokens
            return self.model(pixel_values=images, labels=tokens[:, 0]).loss
        return self.model(input_ids=tokens, labels=tokens).loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(outputs["loss"].item())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(name: str, attention: str, how: Any) -> tuple[list[float], dict[str, Tensor]]:
    L.seed_everything(3, verbose=False)  # before anything of the Trainer: nothing of ours may draw
    module = Module(name, attention)
    trainer = L.Trainer(
        accelerator="cpu", devices=int(os.environ["WORLD_SIZE"]), strategy=how, max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(ltp.RandomTokens(20, 16, VOCAB), batch_size=4))
    return module.losses, ltp.full_state_dict(module)


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_models_of_others_under_a_trainer(attention: str) -> None:
    """Derived plans: exact masks are those of one process; independent ones are others, and keep what is whole equal."""
    names = ["gpt2", "bert", "vit", "bart", "encoder"]
    refs = run_ranks(lambda: [fit(n, attention, "auto") for n in names], 1, init=False)[0]

    def body() -> list[Any]:
        exact = [fit(n, attention, ltp.TPStrategy(tp=2, dropout="exact")) for n in names]
        return [exact, [fit(n, attention, ltp.TPStrategy(tp=2, activation_checkpointing="block")) for n in names]]

    (exact, one), (_, other) = run_ranks(body, 2, init=False, timeout=150)
    for i, (name, (losses, weights)) in enumerate(zip(names, refs)):
        assert exact[i][0] == pytest.approx(losses, rel=1e-5), name
        assert_trees_close(exact[i][1], weights, rtol=1e-4, name=name)
        assert one[i][0] == other[i][0] and one[i][0] != pytest.approx(losses, rel=1e-3), name
        assert one[i][0] == pytest.approx(losses, rel=0.3), name
        assert all(torch.equal(t, other[i][1][n]) for n, t in one[i][1].items()), name


# ------------------------------------------------------------------------------------------------- seeds and indices


class Seeded(nn.Module):
    """Seeds by itself in its forward, drops a whole activation, looks at some tokens only."""

    def __init__(self, seed: Callable[[], Any] | None, *, sampled: bool = False) -> None:
        super().__init__()
        self.seed, self.sampled = seed, sampled
        self.up, self.down = nn.Linear(DIM, 48), nn.Linear(48, DIM)

    def forward(self, x: Tensor) -> Tensor:
        if self.seed is not None:
            self.seed()
        y = self.up(x).relu()
        if self.sampled:
            y = y.index_select(1, torch.randint(0, y.shape[1], (4,))) + y.mean(1, keepdim=True)
        y = self.down(y)
        return y if self.sampled else F.dropout(y, 0.5, self.training)


def seeded_steps(model: nn.Module) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for seed in range(5):  # the fourth is one that nobody observes
        x = torch.randn(2, 9, DIM, generator=torch.Generator().manual_seed(seed))
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


SEEDED_PLAN = {"up": "colwise", "down": "rowwise"}


def test_a_model_that_seeds_anew_draws_the_same_on_all_ranks() -> None:
    before = torch.seed

    def body() -> None:
        model = ltp.parallelize(randomize_(Seeded(lambda: torch.seed())), make_mesh("cpu", 1, 2), SEEDED_PLAN)
        losses = torch.tensor(seeded_steps(model))
        other = losses.clone()
        dist.broadcast(other, 0)
        assert torch.equal(losses, other)
        assert torch.seed is before

    run_ranks(body, 2)


def test_ranks_that_seed_themselves_otherwise_are_refused() -> None:
    def body() -> None:
        model = ltp.parallelize(randomize_(Seeded(lambda: torch.manual_seed(dist.get_rank()))), make_mesh("cpu", 1, 2), SEEDED_PLAN)
        with pytest.raises(ltp.TPError, match="generator for cpu is not in the same state on all tp=2 ranks"):
            model(torch.randn(2, 9, DIM, generator=torch.Generator().manual_seed(0)))

    run_ranks(body, 2)


def test_places_that_are_drawn_are_those_of_one_process() -> None:
    whole = randomize_(Seeded(None, sampled=True))
    torch.manual_seed(3)
    ref = seeded_steps(whole)

    def body() -> None:
        model = ltp.parallelize(randomize_(Seeded(None, sampled=True)), make_mesh("cpu", 1, 2), SEEDED_PLAN)
        torch.manual_seed(3)
        assert seeded_steps(model) == pytest.approx(ref, rel=1e-5)

    run_ranks(body, 2)
