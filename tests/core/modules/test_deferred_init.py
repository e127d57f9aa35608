"""Deferred construction against the ordinary one: the same bits, the same random state, in little memory."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from lightning_tp.core.modules.deferred_init import deferred_init, values
from lightning_tp.core.modules.tape import InitTape
from lightning_tp.errors import TPError


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}


def same_bits(a: Tensor, b: Tensor) -> bool:
    layout = a.dtype == b.dtype and a.shape == b.shape and a.stride() == b.stride()
    return layout and torch.equal(as_bytes(a), as_bytes(b))


def as_bytes(t: Tensor) -> Tensor:
    return t.detach().resolve_conj().resolve_neg().contiguous().view(-1).view(torch.uint8)


def assert_as_ordinary(make: Callable[[], nn.Module], *, real: tuple[str, ...] = ()) -> tuple[nn.Module, InitTape]:
    """Build both ways under one seed; compare every parameter and buffer, and the random states."""
    torch.manual_seed(3)
    start = torch.get_rng_state()
    ordinary = make()
    end = torch.get_rng_state()

    torch.manual_seed(3)
    with deferred_init() as tape:
        model = make()
    assert torch.equal(torch.get_rng_state(), start)

    torch.manual_seed(99)  # the caller's own stream
    mine = torch.get_rng_state()
    want = tensors_of(ordinary)
    got = {name: tensor for name, tensor in tensors_of(model).items() if not tensor.is_meta}
    assert set(got) == set(real)
    for names, value in values(model, tape):
        assert torch.equal(torch.get_rng_state(), mine)
        assert not set(names) & set(got)
        got |= dict.fromkeys(names, value)
    assert torch.equal(torch.get_rng_state(), mine)
    assert tape.rng_state is not None and torch.equal(tape.rng_state, end)
    assert set(got) == set(want)
    assert [name for name in want if not same_bits(got[name], want[name])] == []
    return model, tape


def with_module(fill: Callable[[nn.Module], None]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        module = nn.Module()
        fill(module)
        return module

    return make


# ---- models


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.c_attn = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width)
        self.ln_2 = nn.LayerNorm(width)
        self.c_fc = nn.Linear(width, 4 * width)
        self.mlp = nn.ModuleDict({"c_proj": nn.Linear(4 * width, width)})
        self.register_buffer("mask", torch.tril(torch.ones(16, 16)).view(1, 1, 16, 16), persistent=False)


class GPT(nn.Module):
    """The initialization of nanoGPT: all at construction, all again by `apply`, some again by name; tied head."""

    def __init__(self, width: int = 32, layers: int = 2, vocab: int = 48) -> None:
        super().__init__()
        self.wte = nn.Embedding(vocab, width)
        self.wpe = nn.Embedding(16, width)
        self.h = nn.ModuleList(Block(width) for _ in range(layers))
        self.ln_f = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, vocab, bias=False)
        self.wte.weight = self.lm_head.weight
        self.apply(self._init_weights)
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(p, mean=0.0, std=0.02 / math.sqrt(2 * layers))

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, mean=0.0, std=0.02)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)


class Llama(nn.Module):
    """torchtitan's: truncated normal by hand or torch's, angles as a complex buffer and as a plain attribute."""

    def __init__(self, std: float = 0.02, a: float = -2.0, b: float = 2.0) -> None:
        super().__init__()
        self.tok = nn.Embedding(48, 32)
        self.layers = nn.ModuleList(nn.Linear(32, 32, bias=False) for _ in range(3))
        self.norm = nn.RMSNorm(32)
        freqs = 1.0 / (10000 ** (torch.arange(0, 8, 2)[:4].float() / 8))
        angles = torch.outer(torch.arange(16, device=freqs.device), freqs).float()
        self.register_buffer("freqs_cis", torch.polar(torch.ones_like(angles), angles))
        self.register_buffer("cos", angles.cos().to(torch.bfloat16))
        self.register_buffer("sin", torch.cat((angles.sin(), angles.sin()), dim=-1), persistent=False)
        self.register_buffer("mask", torch.triu(torch.full((1, 1, 8, 8), float("-inf")), diagonal=1))
        self.register_buffer("positions", torch.arange(16).expand(1, -1))
        self.freqs = self.freqs_cis.clone()
        nn.init.normal_(self.tok.weight)
        for i, layer in enumerate(self.layers):
            nn.init.trunc_normal_(layer.weight, mean=0.0, std=std / (i + 1), a=a, b=b)


class Initializers(nn.Module):
    """Those of torch.nn.init that look at values or do nothing on meta, and the rest."""

    def __init__(self) -> None:
        super().__init__()
        names = ["orthogonal_", "kaiming_normal_", "kaiming_uniform_", "xavier_normal_", "xavier_uniform_", "eye_"]
        for name in names:
            self.register_parameter(name, nn.Parameter(getattr(nn.init, name)(torch.empty(12, 8))))
        self.wide = nn.Parameter(nn.init.orthogonal_(torch.empty(8, 12), gain=2.0))
        self.sparse = nn.Parameter(nn.init.sparse_(torch.empty(12, 8), sparsity=0.3))
        self.conv = nn.Conv2d(4, 4, 3)
        nn.init.dirac_(self.conv.weight, groups=2)


def old_trunc_normal(tensor: Tensor, std: float = 0.02) -> Tensor:
    with torch.no_grad():  # torch's until 2.12, and timm's
        bound = math.erf(2 / math.sqrt(2))
        return tensor.uniform_(-bound, bound).erfinv_().mul_(std * math.sqrt(2.0)).add_(0.1).clamp_(min=-0.05, max=0.2)


# ---- the same bits


@pytest.mark.filterwarnings("ignore:mean is more than 2 std")
@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Linear(7, 5),
        lambda: nn.Embedding(9, 4, padding_idx=2),
        lambda: nn.MultiheadAttention(16, 4),
        lambda: nn.MultiheadAttention(16, 4, kdim=8, vdim=8),
        lambda: nn.Transformer(16, 4, 2, 2, 32, batch_first=True),
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 3),
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.LSTM(4, 4, 2), nn.GroupNorm(2, 4)),
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 5)),
        GPT,
        Llama,
        lambda: Llama(std=1.0),  # many draws rejected
        lambda: Llama(std=1.0, a=1.0, b=1.5),  # torch's other way to draw
        Initializers,
        lambda: GPT().to(torch.bfloat16),
        lambda: GPT().half().double(),
        lambda: copy.deepcopy(GPT()),
    ],
)
def test_as_ordinary(make: Callable[[], nn.Module]) -> None:
    assert_as_ordinary(make)


def test_tied_weights_come_once_with_all_names() -> None:
    model, tape = assert_as_ordinary(GPT)
    assert [names for names, _ in values(model, tape) if len(names) > 1] == [["wte.weight", "lm_head.weight"]]


def test_replay_is_repeatable_and_its_values_are_the_callers() -> None:
    with deferred_init() as tape:
        model = GPT()
    first = {names[0]: value for names, value in values(model, tape)}
    kept = {name: value.clone() for name, value in first.items()}
    for value in first.values():
        value.zero_()
    assert all(torch.equal(value, kept[names[0]]) for names, value in values(model, tape))


def aliases(m: nn.Module) -> None:
    base = torch.empty(6, 4)
    m.whole = nn.Parameter(base)  # another object, the same memory
    m.part = nn.Parameter(base[2:4].t())
    nn.init.normal_(m.whole)
    m.whole.data.mul_(2)
    with torch.no_grad():
        m.part.view(4, 2)[1] += 5
        m.whole[0] = 7.0
        m.whole[torch.tensor([1, 5]), 0] = 9.0
        m.whole[m.whole > 8] = 0.0
    m.replaced = nn.Parameter(torch.randn(3))
    m.replaced.data = torch.cat([m.replaced.data, torch.ones(2)])
    m.fused = nn.Parameter(torch.empty(9, 4))
    for part in m.fused.chunk(3):
        nn.init.xavier_uniform_(part)
    m.unwritten_rows = nn.Parameter(torch.zeros(4, 4))
    nn.init.uniform_(m.unwritten_rows[1:3])
    m.truncated = nn.Parameter(old_trunc_normal(torch.empty(8, 8)))
    m.square = nn.Parameter(torch.randn(4, 4))
    m.square.data[:2].copy_(m.square.data[2:])
    m.register_buffer("imaginary", torch.polar(torch.ones(3), torch.arange(3.0)).conj().imag)
    m.none = nn.Parameter(torch.empty(0, 4))


def constants(m: nn.Module) -> None:
    weights = torch.arange(12.0, device="cpu").view(4, 3)
    m.loaded = nn.Parameter(torch.empty(4, 3))
    m.loaded.data.copy_(weights)
    weights.zero_()  # the tape has a copy
    m.register_buffer("literal", torch.tensor([1.0, 2.0]))
    m.register_buffer("like", m.loaded.new_tensor([[3, 4]]))
    m.register_buffer("numpy", torch.as_tensor(weights.numpy() + 2))
    m.register_buffer("mixed", torch.ones(4, 3) * (weights + 1))
    m.register_buffer("kept", weights + 3)
    m.register_buffer("scaled", torch.arange(3) / torch.tensor(3))
    rates = [x.item() for x in torch.linspace(0, 0.1, 3)]  # a drop path schedule
    m.register_buffer("rates", torch.tensor(rates) * 2)
    if (torch.ones(2) > 0).all() and len(torch.arange(3).tolist()) == 3:
        m.branch = nn.Linear(int(torch.randint(3, 9, ())), 2)


def streams(m: nn.Module) -> None:
    m.a = nn.Linear(4, 4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        m.b = nn.Linear(4, 4)
    m.c = nn.Linear(4, 4)  # goes on where `a` ended
    m.register_buffer("real", torch.randn(4, device="cpu"))  # a real draw, in between
    m.d = nn.Parameter(torch.Tensor(4, 4))  # not reached by the device context: real
    nn.init.kaiming_uniform_(m.d)
    m.e = nn.Linear(4, 4)
    generator = torch.Generator().manual_seed(5)
    nn.init.normal_(m.e.weight, generator=generator)
    nn.init.trunc_normal_(m.e.bias, generator=generator)
    state = torch.get_rng_state()
    m.f = nn.Linear(4, 4)
    torch.set_rng_state(state)
    m.g = nn.Linear(4, 4)  # as `f`
    torch.manual_seed(0)
    m.h = nn.Linear(4, 4)
    torch.manual_seed(0)
    m.i = nn.Linear(4, 4)  # as `h`
    nn.init.normal_(m.a.weight)
    m.register_buffer("permutation", torch.randperm(5))
    m.register_buffer("sample", torch.bernoulli(torch.full((4,), 0.5)) + torch.rand_like(m.a.bias))


def default_dtypes(m: nn.Module) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        m.double = nn.Linear(3, 3)
        m.register_buffer("halves", torch.arange(3) / 2)
    finally:
        torch.set_default_dtype(torch.float32)
    m.single = nn.Linear(3, 3)


@pytest.mark.parametrize(
    ("fill", "real"),
    [(aliases, ()), (constants, ("kept",)), (streams, ("real", "d")), (default_dtypes, ())],
)
def test_as_ordinary_in_odd_cases(fill: Callable[[nn.Module], None], real: tuple[str, ...]) -> None:
    assert_as_ordinary(with_module(fill), real=real)


def random_program(seed: int) -> Callable[[nn.Module], None]:
    """A few dozen operations of all kinds, on views of each other, with buffers kept of some."""

    def run(m: nn.Module) -> None:
        pick = random.Random(seed)
        pool, states, generator = [torch.zeros(4, 4)], [torch.get_rng_state()], torch.Generator().manual_seed(seed)

        def steps(t: Tensor, u: Tensor, v: Tensor, step: int) -> list[Callable[[], object]]:
            return [
                lambda: pool.append(torch.randn(4, 4)),
                lambda: pool.append(torch.empty(4, 4).uniform_()),
                lambda: pool.append(torch.bernoulli(t.sigmoid())),
                lambda: pool.append(t + u),
                lambda: pool.append(t.t()),
                lambda: v.normal_(),
                lambda: v.normal_(generator=generator),
                lambda: v.bernoulli_(0.5),
                lambda: v.fill_(step),
                lambda: v.mul_(0.5),
                lambda: t.copy_(u),
                lambda: t.add_(u.t()),
                lambda: nn.init.trunc_normal_(t, std=0.5),
                lambda: torch.manual_seed(step % 3),
                lambda: states.append(torch.get_rng_state()),
                lambda: torch.set_rng_state(pick.choice(states)),
                lambda: m.register_buffer(f"real{step}", torch.randn(2, device="cpu")),
                lambda: t.mul_(1 if float(t.sum()) > 0 else 2),
            ]

        for step in range(pick.randint(5, 50)):
            t, u = pick.choice(pool), pick.choice(pool).clone()
            pick.choice(steps(t, u, pick.choice([t, t, t[1:3], t.t(), t[:, 2]]), step))()
        for i, t in enumerate(pick.sample(pool, pick.randint(1, len(pool)))):
            m.register_buffer(f"kept{i}", t)

    return run


@pytest.mark.parametrize("seed", range(60))
def test_as_ordinary_in_random_programs(seed: int) -> None:
    make = with_module(random_program(seed))
    assert_as_ordinary(make, real=tuple(name for name in tensors_of(make()) if name.startswith("real")))


def test_plain_attributes_are_given_their_values() -> None:
    torchmetrics = pytest.importorskip("torchmetrics")

    def fill(m: nn.Module) -> None:
        m.llama = Llama()
        m.metric = torchmetrics.MeanMetric()
        m.tables = {"a": torch.ones(2), "b": [1]}
        m.listed = [torch.arange(3), m.llama.tok.weight]  # the second is a parameter, and its owner's business

    model, _ = assert_as_ordinary(with_module(fill))
    assert torch.equal(model.llama.freqs, with_module(fill)().llama.freqs)
    assert model.tables["a"].tolist() == [1, 1]
    assert model.listed[0].tolist() == [0, 1, 2]
    assert model.listed[1] is model.llama.tok.weight
    model.metric.update(torch.tensor([1.0, 3.0]))
    assert model.metric.compute() == 2
    model.metric.reset()


SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 96,
    "max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    ("config", "options", "kwargs"),
    [
        ("LlamaConfig", {**SMALL, "num_key_value_heads": 2}, {}),
        ("LlamaConfig", {**SMALL, "tie_word_embeddings": True}, {"dtype": torch.bfloat16}),
        ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 96, "n_positions": 64}, {}),
        ("MixtralConfig", {**SMALL, "num_key_value_heads": 2, "num_local_experts": 4}, {}),
        ("GPTNeoXConfig", SMALL, {}),
    ],
)
def test_hugging_face(config: str, options: dict[str, object], kwargs: dict[str, object]) -> None:
    transformers = pytest.importorskip("transformers")

    def make() -> nn.Module:
        ids = {"bos_token_id": 1, "eos_token_id": 2}
        return transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**options, **ids), **kwargs)

    model, tape = assert_as_ordinary(make)
    assert not all(value.abs().max() in (0, 1) for names, value in values(model, tape) if names[0].endswith("weight"))


# ---- in little memory and time


def measured_peak(run: Callable[[], object]) -> int:
    """The most CPU memory that torch's allocator gave out at once."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        run()
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


@pytest.mark.parametrize("cast", [lambda m: m, lambda m: m.to(torch.bfloat16)])
def test_memory_stays_near_the_largest_tensor(cast: Callable[[nn.Module], nn.Module]) -> None:
    with deferred_init() as tape:
        model = cast(GPT(width=128, layers=12, vocab=500))
    largest = max(p.numel() * 4 for p in model.parameters())
    total = sum(p.numel() * 4 for p in model.parameters())
    assert total > 20 * largest

    def run() -> None:
        for _, value in values(model, tape):
            del value

    assert largest < measured_peak(run) < 2.5 * largest
    assert 0 < tape.peak_bytes < 2.5 * largest


def test_recording_allocates_nothing_to_speak_of() -> None:
    def record() -> None:
        with deferred_init():
            GPT(width=128, layers=12, vocab=500)

    record()
    assert measured_peak(record) < 200_000  # a parameter has up to 262 144 bytes


def test_what_is_known_from_elsewhere_is_not_drawn() -> None:
    """Of the rest each value is the ordinary one, though what is left out comes before it in the stream."""

    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))

    torch.manual_seed(3)
    ordinary = tensors_of(make())
    torch.manual_seed(3)
    with deferred_init() as tape:
        model = make()
    skip = {"0.weight", "1.bias", "2.weight", "2.bias"}
    got = {names[0]: value for names, value in values(model, tape, skip)}
    assert got.keys() == ordinary.keys() - skip and all(same_bits(got[name], ordinary[name]) for name in got)
    assert tape.rng_state is None  # what comes behind the last one was not drawn
    list(values(model, tape))
    assert tape.rng_state is not None


# ---- errors


def test_meta_tensors_from_elsewhere() -> None:
    with torch.device("meta"):
        foreign = nn.Linear(2, 2)
    with deferred_init() as tape:
        model = nn.Sequential(nn.Linear(2, 2), foreign, nn.LayerNorm(2))
    with pytest.raises(TPError, match=r"`1\.weight`, `1\.bias`: on the meta device, but not made inside"):
        values(model, tape)
    with pytest.raises(TPError, match="tensor 1 of 2"):
        tape.replay([model[0].weight, foreign.weight])
    with deferred_init() as tape:
        model = nn.Linear(2, 2)
        model.weight.data.copy_(foreign.weight.data)
    with pytest.raises(TPError, match="did not see being made"):
        list(values(model, tape))
    with deferred_init() as tape:
        model = nn.Linear(2, 2)
        model.weight.data[[0, 1]] = 1.0
    with pytest.raises(TPError, match="Python list in an index"):
        list(values(model, tape))


def test_lazy_modules() -> None:
    with deferred_init() as tape:
        model = nn.LazyLinear(3)
    with pytest.raises(TPError, match="`weight`"):
        values(model, tape)


@pytest.mark.parametrize("ask", [torch.nonzero, lambda t: t[t > 0], lambda t: torch.equal(t, t)])
def test_asking_for_what_a_meta_tensor_has_not(ask: Callable[[Tensor], object]) -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    with pytest.raises(TPError, match=r"build the model without `deferred_init\(\)`"), deferred_init():
        ask(torch.rand(3))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.empty(1).device.type == "cpu"  # no mode left behind


def test_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match="metadata") as caught, deferred_init():
        raise RuntimeError("bad metadata")
    assert not isinstance(caught.value, TPError)
    with pytest.raises(TPError, match="inside another one"), deferred_init(), deferred_init():
        pass
    with deferred_init():
        pass


def test_an_abandoned_replay_leaves_nothing_behind() -> None:
    with deferred_init() as tape:
        model = GPT().double()
    state = torch.get_rng_state()
    stream: Iterator[object] = values(model, tape)
    next(stream)
    assert torch.is_grad_enabled() and torch.get_default_dtype() == torch.float32
    del stream
    assert torch.equal(torch.get_rng_state(), state)
    assert tape.rng_state is None


def test_replay_inside_other_modes() -> None:
    with deferred_init() as tape:
        model = Initializers()
    want = {names[0]: value for names, value in values(model, tape)}
    with torch.device("meta"), torch.inference_mode(False):
        got = {names[0]: value for names, value in values(model, tape)}
    assert all(torch.equal(got[name], want[name]) for name in want)
