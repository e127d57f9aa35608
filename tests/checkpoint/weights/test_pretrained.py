"""Weights in: each rank reads its own bytes and no others, into what was split or will be; and a folder in one process."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

import lightning_tp as ltp
from examples.llama import PLAN, LlamaConfig
from examples.llama import Llama as Handwritten
from lightning_tp._compat import local_tensor
from lightning_tp.core.comm.mesh import make_mesh
from lightning_tp.testing import assert_trees_close, randomize_, run_ranks
from tests.checkpoint.lit import CONFIG, QUIET, TOKENS, Lit, loader, train
from tests.checkpoint.weights.counted import bytes_read

transformers = pytest.importorskip("transformers")
SIZES: dict[str, Any] = dict(vocab_size=103, num_hidden_layers=2, num_attention_heads=4)
MODELS: dict[str, Any] = {
    # a shared key/value head, an uneven width and vocabulary, with and without a tie; fused projections; experts
    "llama": lambda: transformers.LlamaConfig(
        hidden_size=64, intermediate_size=90, num_key_value_heads=1, max_position_embeddings=64, **SIZES
    ),
    "tied": lambda: transformers.LlamaConfig(
        hidden_size=64, intermediate_size=90, num_key_value_heads=1, tie_word_embeddings=True, max_position_embeddings=64, **SIZES
    ),
    "gpt2": lambda: transformers.GPT2Config(
        n_embd=64, n_layer=2, n_head=4, vocab_size=103, n_positions=64, bos_token_id=1, eos_token_id=1
    ),
    "mixtral": lambda: transformers.MixtralConfig(
        hidden_size=64, intermediate_size=48, num_key_value_heads=2, num_local_experts=4, max_position_embeddings=64, **SIZES
    ),
}


def build(name: str) -> Any:
    return transformers.AutoModelForCausalLM.from_config(MODELS[name](), dtype=torch.float32)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As Hugging Face writes them, in several files."""
    path = tmp_path_factory.mktemp("hf")
    for name in MODELS:
        randomize_(build(name)).save_pretrained(path / name, max_shard_size="150KB")
    return path


def test_each_rank_reads_its_slices(folders: Path) -> None:
    """Of a model that was built without memory: as many bytes as the rank then holds; whole, they are the folder's."""

    def body(dp: int, tp: int, *names: str) -> None:
        mesh = make_mesh("cpu", dp, tp)
        for name in names:
            ref = transformers.AutoModelForCausalLM.from_pretrained(folders / name, dtype=torch.float32)
            with ltp.init_on_meta():
                model = build(name)
            with bytes_read() as counts:
                assert ltp.load_pretrained(model, folders / name) is model and all(p.is_meta for p in model.parameters())
            assert sum(counts) == 0
            plan = ltp.infer_plan(build(name), {"input_ids": torch.zeros(2, 8, dtype=torch.long)}, tp=tp)
            ltp.parallelize(model, mesh, plan)
            held = sum(local_tensor(p).nbytes for p in model.parameters())
            whole = sum(p.nbytes for p in ref.parameters())
            assert sum(counts) == held < 0.7 * whole, (name, sum(counts), held, whole)
            got = ltp.full_state_dict(model)
            for n, t in ref.state_dict().items():
                assert torch.equal(got[n], t), (name, n)
            with torch.no_grad():
                out, expected = model.eval()(input_ids=TOKENS).logits, ref(input_ids=TOKENS).logits
            torch.testing.assert_close(out + 0, expected, rtol=1e-4, atol=1e-4)
            # into one that is split already: other weights before
            for p in model.parameters():
                local_tensor(p).data.zero_()
            ltp.load_pretrained(model, folders / name)
            got = ltp.full_state_dict(model)
            assert all(torch.equal(got[n], t) for n, t in ref.state_dict().items()), name

    run_ranks(body, 4, 2, 2, "tied", "gpt2")
    run_ranks(body, 2, 1, 2, "llama", "mixtral")


class Fine(L.LightningModule):
    """Builds itself without memory, around a pretrained model, with a head that no folder has."""

    def configure_model(self) -> None:
        if hasattr(self, "net"):
            return
        torch.manual_seed(3)
        with ltp.init_on_meta():
            self.net = build("llama")
            self.head = nn.Linear(103, 103)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        tokens = TOKENS.to(self.device)
        return F.cross_entropy(self.head(self.net(input_ids=tokens[:, :-1]).logits).flatten(0, 1), tokens[:, 1:].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2, eps=1e-3)


def test_there_and_back(folders: Path, tmp_path: Path) -> None:
    """`TPStrategy.load_pretrained`, train, save, export, `from_pretrained`: the weights of the same in one process."""

    def split() -> dict[str, Tensor]:
        strategy = ltp.TPStrategy(tp=2)
        strategy.load_pretrained(folders / "llama")
        t = L.Trainer(accelerator="cpu", devices=2, strategy=strategy, max_steps=2, **QUIET)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            t.fit(module := Fine(), loader())
        assert any("lacks 2 tensors of the model, which keep their initial values: head.weight" in str(w.message) for w in seen)
        t.save_checkpoint(tmp_path / "a.ckpt")
        return ltp.full_state_dict(module)

    got = run_ranks(split, 2, init=False)[0]
    torch.manual_seed(3)
    alone = Fine()
    alone.net, alone.head = build("llama"), nn.Linear(103, 103)
    with pytest.warns(UserWarning, match="keep their initial values"):
        ltp.load_pretrained(alone, folders / "llama")
    t = L.Trainer(accelerator="cpu", devices=1, max_steps=2, **QUIET)
    t.fit(alone, loader())
    assert_trees_close(got, {k: v.detach() for k, v in alone.state_dict().items()}, rtol=1e-4)
    with pytest.warns(UserWarning, match="left out"):
        ltp.export(tmp_path / "a.ckpt", tmp_path / "hf", "hf")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert all(torch.equal(t, got[f"net.{n}"]) for n, t in back.state_dict().items())


def test_what_does_not_fit_is_one_error(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    state = {k: torch.randn_like(v) for k, v in model.state_dict().items()}
    before = {k: v.clone() for k, v in model.state_dict().items()}
    wrong = {**state, "0.weight": torch.randn(4, 8), "more": torch.ones(1)}
    del wrong["2.bias"]
    save_file(wrong, tmp_path / "wrong.safetensors")
    with pytest.raises(ltp.TPError) as error:
        ltp.load_pretrained(model, tmp_path / "wrong.safetensors")
    text = str(error.value)
    for part in (
        "`0.weight` has shape (4, 8) in the checkpoint, but (8, 4) in the model",
        "`2.bias` is missing from the checkpoint",
        "`more` is not in the model",
    ):
        assert part in text
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    save_file({"other": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ltp.TPError, match=r"no name is the same: `other` in the checkpoint, `0\.weight` in the model"):
        ltp.load_pretrained(model, tmp_path / "other.safetensors")
    wrong["0.weight"] = state["0.weight"]
    save_file(wrong, tmp_path / "some.safetensors")
    with pytest.raises(ltp.TPError, match="`strict=False` loads what fits"):
        ltp.load_pretrained(model, tmp_path / "some.safetensors")
    with pytest.warns(UserWarning, match=r"lacks 1 tensors of the model, which keep their initial values: 2\.bias"):
        ltp.load_pretrained(model, tmp_path / "some.safetensors", strict=False)
    assert torch.equal(model[0].weight, state["0.weight"]) and torch.equal(model[2].bias, before["2.bias"])
    with pytest.raises(ltp.TPError, match="there is no such file or folder"):
        ltp.load_pretrained(model, tmp_path / "none")


def test_names_deeper_and_less_deep(tmp_path: Path) -> None:
    """A base model's folder into what is built around it, and the other way round; from any checkpoint."""
    inner = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    outer = nn.Module()
    outer.a, outer.head = nn.ModuleDict({"b": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))}), nn.Linear(4, 1)
    save_file(dict(inner.state_dict()), tmp_path / "inner.safetensors")
    with pytest.warns(UserWarning, match=r"lacks 2 tensors.*head\.weight"):
        ltp.load_pretrained(outer, tmp_path / "inner.safetensors")
    assert torch.equal(outer.a["b"][1].weight, inner[1].weight)
    torch.save({"state_dict": outer.state_dict()}, tmp_path / "outer.ckpt")
    fresh = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(ltp.TPError, match=r"`head\.\w+` is not in the model"):
        ltp.load_pretrained(fresh, tmp_path / "outer.ckpt")
    ltp.load_pretrained(fresh, tmp_path / "outer.ckpt", strict=False)
    assert torch.equal(fresh[1].weight, inner[1].weight)


def test_what_the_file_has_is_not_drawn(tmp_path: Path) -> None:
    """On the meta device: what is left out of the file is what one process would draw; numbers come in the model's dtype."""
    torch.manual_seed(5)
    ref = Handwritten(LlamaConfig(**CONFIG))
    some = {k: torch.randn_like(v).bfloat16() for k, v in ref.state_dict().items() if "feed_forward" in k}
    save_file(some, tmp_path / "some.safetensors")
    torch.manual_seed(5)
    with ltp.init_on_meta():
        model = Handwritten(LlamaConfig(**CONFIG))
    with pytest.warns(UserWarning, match="keep their initial values"):
        ltp.load_pretrained(model, tmp_path / "some.safetensors", strict=False)
    from lightning_tp.testing import single_rank_mesh

    with single_rank_mesh() as mesh:
        ltp.parallelize(model, mesh, PLAN)
        got = ltp.full_state_dict(model)
    assert all(torch.equal(got[n], some[n].float() if n in some else t) for n, t in ref.state_dict().items())


# -------------------------------------------------------------------------------------------------- a folder in one process


class Adapter(Lit):
    """Looks at what it loads."""

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = {k: v * 2 for k, v in checkpoint["state_dict"].items()}


class Loose(Lit):
    def __init__(self, seed: int = 0, tied: bool = False) -> None:
        super().__init__(seed, tied)
        self.extra = nn.Linear(2, 2)
        self.strict_loading = False


class Strict(Loose):
    def __init__(self, seed: int = 0, tied: bool = False) -> None:
        super().__init__(seed, tied)
        self.strict_loading = True


def test_load_from_checkpoint_of_a_folder(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    weights = run_ranks(train, 2, 2, 2, 1, save=path, init=False)[0]
    for module in (
        Lit.load_from_checkpoint(path),
        Lit.load_from_checkpoint(str(path), seed=4),
        ltp.load_from_checkpoint(Lit, path),
    ):
        assert (
            all(torch.equal(v, weights[k]) for k, v in module.state_dict().items())
            and type(module) is Lit
            and module.strict_loading
        )
    assert Lit.load_from_checkpoint(path, seed=4).hparams["seed"] == 4 and "load_state_dict" not in vars(Lit)
    doubled = Adapter.load_from_checkpoint(path).state_dict()
    assert all(torch.equal(v, weights[k] * 2) for k, v in doubled.items())
    loose = Loose.load_from_checkpoint(path)
    assert loose.strict_loading is False and torch.equal(loose.model.norm.weight, weights["model.norm.weight"])
    with pytest.raises(
        ltp.TPError,
        match=r"does not fit Strict: `extra\.weight` is missing from the checkpoint; `extra\.bias` is missing.*`strict=False` loads what fits",
    ):
        Strict.load_from_checkpoint(path)
    (tmp_path / "b").mkdir()
    with pytest.raises(ltp.TPError, match="is no checkpoint"):
        ltp.load_from_checkpoint(Lit, tmp_path / "b")
