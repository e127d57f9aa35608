"""What ranks draw on their GPUs is what one process draws on its own: when blocks run again, in a second fit, after a resume."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import numpy
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

import lightning_tp as ltp
from lightning_tp.core.comm.mesh import make_mesh
from lightning_tp.testing import run_ranks

WORDS = 32
QUIET: dict[str, Any] = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
Losses = list[float]


def on(n: int, body: Callable[..., Any], *args: Any, **options: Any) -> list[Any]:
    if n > torch.cuda.device_count():
        pytest.skip(f"needs {n} GPUs")
    return run_ranks(body, n, *args, timeout=120, **{"init": False, **options})


# ------------------------------------------------------------------------------------------------- blocks that run again


class Block(nn.Module):
    """A split MLP with dropout on whole activations, and on shards if asked to."""

    def __init__(self, on_shards: bool) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)
        self.inner, self.drop = nn.Dropout(0.5 if on_shards else 0.0), nn.Dropout(0.5)

    def forward(self, x: Any = None, *rest: Any, also: Any = None) -> Any:
        got = x[0] if isinstance(x, (list, tuple)) else x if isinstance(x, Tensor) and x.is_cuda else also
        return got + self.drop(self.down(self.inner(torch.relu(self.up(got)))))


CALLS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "by position": lambda block, x: block(x),
    "by keyword": lambda block, x: block(x=x),
    "a list by keyword": lambda block, x: block(x=[x]),
    "a tensor on the CPU by position": lambda block, x: block(torch.arange(3), also=x),
    "a number by position": lambda block, x: block(3, also=x),
}
KINDS: dict[str, Any] = {"block": "block", "selective": "selective", "a function": lambda name, module: isinstance(module, Block)}


class Blocks(nn.Module):
    def __init__(self, call: Callable[[nn.Module, Tensor], Tensor], on_shards: bool) -> None:
        super().__init__()
        self.blocks, self.call = nn.ModuleList(Block(on_shards) for _ in range(2)), call

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = self.call(block, x)
        return x


@pytest.mark.parametrize("on_shards", [False, True], ids=["whole activations", "shards"])
@pytest.mark.parametrize("dropout", ["independent", "exact"])
def test_blocks_that_run_again_drop_the_same(on_shards: bool, dropout: str) -> None:
    def gradients(call: str, how: Any) -> tuple[dict[str, Tensor], Tensor]:
        mesh = make_mesh("cuda", 1, 2)
        torch.manual_seed(0)
        model = Blocks(CALLS[call], on_shards).to("cuda")
        plan = {"blocks.*.up": "colwise", "blocks.*.down": "rowwise", "**": "replicate"}
        ltp.parallelize(model, mesh, plan, activation_checkpointing=how, dropout=dropout).train()
        x = torch.randn(4, 3, 16, generator=torch.Generator().manual_seed(1)).to("cuda")
        for _ in range(2):
            model.zero_grad()
            torch.manual_seed(5)
            model(x).square().sum().backward()
        return ltp.full_gradients(model), torch.cuda.get_rng_state()

    def body() -> None:
        for call in CALLS:
            kept, state = gradients(call, None)
            for name, how in KINDS.items():
                again, state_again = gradients(call, how)
                assert torch.equal(state, state_again), (call, name)
                for n, g in kept.items():
                    torch.testing.assert_close(again[n], g, rtol=1e-4, atol=1e-5, msg=f"{n} of a block called {call} under {name}")

    on(2, body, init=True, backend="nccl")


# ----------------------------------------------------------------------------------------------------------- fits, resumes


class Words(nn.Module):
    """Dropout on whole activations, so that the masks are those of one process; `inner` is that of shards."""

    def __init__(self, inner: float = 0.0) -> None:
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(WORDS, 16), nn.Linear(16, 32), nn.Linear(32, 16)
        self.head, self.inner = nn.Linear(16, WORDS), inner

    def forward(self, tokens: Tensor) -> Tensor:
        x = F.dropout(self.embed(tokens), 0.4, self.training)
        x = F.dropout(self.up(x).relu(), self.inner, self.training)
        return self.head(F.dropout(self.down(x), 0.4, self.training))


PLAN = {"model.up": "colwise", "model.down": "rowwise", "**": "replicate"}


class Net(L.LightningModule):
    """Keeps its losses, and what Python and NumPy draw."""

    def __init__(self, lr: float = 0.0, inner: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model, self.lr = Words(inner), lr
        self.losses: list[Tensor] = []
        self.drawn: Losses = []

    def training_step(self, batch: Tensor, i: int) -> Tensor:
        return F.cross_entropy(self.model(batch)[:, :-1].flatten(0, 1), batch[:, 1:].flatten())

    def on_train_batch_end(self, outputs: Any, *_: Any) -> None:  # `verify` runs steps of its own before
        self.losses.append(outputs["loss"].detach())
        self.drawn += [random.random(), float(numpy.random.rand())]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def loader() -> DataLoader:
    tokens = torch.randint(0, WORDS, (16, 12), generator=torch.Generator().manual_seed(1))
    return DataLoader(list(tokens), batch_size=2)  # type: ignore[arg-type]


def trainer(dp: int, tp: int, strategy: dict[str, Any] | None = None, **options: Any) -> L.Trainer:
    how: Any = "auto" if strategy is None else ltp.TPStrategy(tp=tp, dp=dp, **{"plan": PLAN, **strategy})
    return L.Trainer(accelerator="gpu", devices=dp * tp, strategy=how, **{**QUIET, "max_steps": 3, **options})


def fits(dp: int, tp: int, strategy: Any, between: Callable[[], Any], inner: float = 0.0) -> tuple[Losses, Losses]:
    """The losses of three fits that change no weight, and what Python and NumPy draw in their steps."""
    L.seed_everything(3, verbose=False)
    random.random(), numpy.random.rand()
    module = Net(inner=inner)
    for _ in range(3):
        between()
        trainer(dp, tp, strategy).fit(module, loader())
    return [float(x) for x in module.losses], module.drawn


BETWEEN: dict[str, Callable[[], Any]] = {
    "nothing": lambda: None,
    "a seed for the GPU": lambda: torch.cuda.manual_seed(9),
    "a seed for all": lambda: L.seed_everything(4, verbose=False),
    "draws": lambda: (torch.rand(3), torch.rand(5, device="cuda") if torch.cuda.is_initialized() else 0),
}


@pytest.mark.parametrize("between", BETWEEN)
@pytest.mark.parametrize("strategy", [{}, {"verify": True}, {"dropout": "exact"}, {"plan": None}], ids=str)
def test_fits_draw_what_one_process_draws(strategy: dict[str, Any], between: str) -> None:
    if strategy and between not in ("nothing", "a seed for the GPU"):
        pytest.skip("runs without options only")
    inner = 0.3 if "dropout" in strategy else 0.0
    one = on(1, fits, 1, 1, None, BETWEEN[between], inner)[0]
    for losses, drawn in on(2, fits, 1, 2, strategy, BETWEEN[between], inner):
        assert losses == pytest.approx(one[0], rel=1e-4) and drawn == one[1]
    assert ("seed" in between) == (one[0][:3] == pytest.approx(one[0][3:6], rel=1e-6))


def test_streams_of_a_mesh_go_on() -> None:
    """On 2 x 2: groups differ from each other, ranks of a group don't, and a second fit repeats nothing."""

    def body() -> tuple[list[Tensor], list[Tensor]]:
        states: list[Tensor] = []

        class Look(Callback):
            def on_train_batch_start(self, *_: Any) -> None:
                states.append(torch.cuda.get_rng_state())

        L.seed_everything(3, verbose=False)
        module = Net(inner=0.3)
        for _ in range(2):
            trainer(2, 2, {}, callbacks=[Look()]).fit(module, loader())
        return states, [torch.get_rng_state()]

    ranks = on(4, body)
    for a, b in ((0, 1), (2, 3)):
        assert all(torch.equal(x, y) for x, y in zip(ranks[a][0], ranks[b][0], strict=True))
    streams = {tuple(state.tolist()) for rank in (0, 2) for state in ranks[rank][0]}
    assert len(streams) == len(ranks[0][0]) + len(ranks[2][0])


def test_ranks_that_seed_their_gpus_by_the_rank_continue_alike() -> None:
    def body() -> list[Tensor]:
        states: list[Tensor] = []

        class Seeds(Callback):
            def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
                torch.cuda.manual_seed(module.global_rank)

            def on_train_batch_start(self, *_: Any) -> None:
                states.append(torch.cuda.get_rng_state())

        trainer(1, 2, {}, callbacks=[Seeds()]).fit(Net(), loader())
        return states[1:]  # the first batch was read before

    a, b = on(2, body)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def resumed(first: tuple[int, int], then: tuple[int, int], folder: Path, one_file: bool, **strategy: Any) -> None:
    """Hold if a run saved on one mesh continues on another as one process without interruption."""

    def run(mesh: tuple[int, int], where: str, path: str | None, steps: int, alone: bool) -> Losses:
        L.seed_everything(7 if path is None else 8, verbose=False)
        module = Net(lr=0.05, inner=0.3 if "dropout" in strategy else 0.0)
        saves: list[Callback] = [ModelCheckpoint(where, filename="{step}", every_n_train_steps=2, save_top_k=-1)]
        how = None if alone else {"save_distributed_checkpoint": not one_file, **strategy}
        options: dict[str, Any] = {"enable_checkpointing": path is None, "callbacks": saves if path is None else []}
        trainer(*mesh, how, **options, max_steps=steps).fit(module, loader(), ckpt_path=path)
        return [float(x) for x in module.losses]

    one = on(1, run, (1, 1), f"{folder}/whole", None, 5, True)[0]
    saved = on(first[0] * first[1], run, first, f"{folder}/first", None, 2, False)[0]
    assert saved == pytest.approx(one[:2], rel=1e-4)
    more = on(then[0] * then[1], run, then, f"{folder}", f"{folder}/first/step=2.ckpt", 5, False)
    for losses in more:
        assert losses == pytest.approx(one[2:], rel=1e-4)


@pytest.mark.parametrize("one_file", [False, True], ids=["folder", "file"])
@pytest.mark.parametrize(
    ("first", "then"), [((1, 2), (1, 4)), ((1, 4), (1, 2)), ((1, 1), (1, 2)), ((1, 2), (1, 1)), ((1, 2), (1, 2))], ids=str
)
def test_resumed_on_another_mesh(first: tuple[int, int], then: tuple[int, int], one_file: bool, tmp_path: Path) -> None:
    resumed(first, then, tmp_path, one_file)


def test_resumed_on_another_mesh_with_exact_masks_of_shards(tmp_path: Path) -> None:
    resumed((1, 2), (1, 1), tmp_path, False, dropout="exact")


def test_groups_that_are_new_draw_streams_of_their_own(tmp_path: Path) -> None:
    """Saved with dp=1, resumed with dp=2; and saved by ranks on the CPU."""

    def run(accelerator: str, dp: int, path: str | None) -> list[Tensor]:
        seen: list[Tensor] = []

        class Look(Callback):
            def on_train_batch_start(self, *_: Any) -> None:
                seen.append(torch.cuda.get_rng_state())

        L.seed_everything(7, verbose=False)
        how = ltp.TPStrategy(tp=2 // dp, dp=dp, plan=PLAN)
        more: dict[str, Any] = {"max_steps": 2} if path is None else {"max_steps": 3, "callbacks": [Look()]}
        t = L.Trainer(accelerator=accelerator, devices=2, strategy=how, **QUIET, **more)
        t.fit(Net(), loader(), ckpt_path=path)
        if path is None:
            t.save_checkpoint(f"{tmp_path}/{accelerator}.ckpt")
        return seen

    for accelerator in ("gpu", "cpu"):
        on(2, run, accelerator, 1, None)
        (a,), (b,) = on(2, run, "gpu", 2, f"{tmp_path}/{accelerator}.ckpt")
        assert not torch.equal(a, b)


class Stream(IterableDataset[Any]):
    """Draws on the GPU what it yields."""

    def __iter__(self) -> Iterator[Tensor]:
        for _ in range(4):
            yield torch.randint(0, WORDS, (12,), device="cuda")


def test_a_stream_that_draws_on_the_gpu() -> None:
    def body(tp: int) -> Losses:
        L.seed_everything(3, verbose=False)
        module = Net()
        trainer(1, tp, None if tp == 1 else {}).fit(module, DataLoader(Stream(), batch_size=2))
        return [float(x) for x in module.losses]

    one = on(1, body, 1)[0]
    for losses in on(2, body, 2):
        assert losses == pytest.approx(one, rel=1e-4)
