"""The private parts of torch do what this package counts on: run this on each version of torch that is allowed."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from lightning_tp import _compat
from lightning_tp.core.comm.fake_world import fake_world
from lightning_tp.testing import run_ranks


class Functions(TorchFunctionMode):
    """The names of the functions that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


class Operators(TorchDispatchMode):
    """The names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_versions() -> None:
    assert _compat.version_of("torch") == torch.__version__.partition("+")[0] or _compat.version_of("torch") == torch.__version__
    assert _compat.version_of("no-such-package") is None


def test_an_attribute_for_a_while() -> None:
    class Owner:
        there = 1

    class Heir(Owner):
        pass

    undo = _compat.patched(Owner, "there", 2)
    undo_other = _compat.patched(Heir, "there", 3)
    assert (Owner.there, Heir.there) == (2, 3)
    undo_other()
    assert Heir.there == 2 and "there" not in vars(Heir)
    undo()
    assert Owner.there == 1


# -------------------------------------------------------------------------------------------------------------- autograd


class InBackward(torch.autograd.Function):
    """Does something in its backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, do: Any) -> Tensor:
        ctx.do = do
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.do()
        return grad, None


def test_at_the_end_of_a_backward_pass() -> None:
    order: list[str] = []
    x = torch.ones(2, requires_grad=True)
    y = InBackward.apply(x * 2, lambda: _compat.queue_after_backward(lambda: order.append(f"end {x.grad}")))
    InBackward.apply(y, lambda: order.append("first")).sum().backward()
    assert order == ["first", "end tensor([2., 2.])"]


def test_kinds_of_backward() -> None:
    found: list[Any] = []
    w, other = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    assert _compat.backward_kind(w) is None

    def loss() -> Tensor:
        return InBackward.apply(w * other, lambda: found.append((_compat.backward_kind(w), _compat.backward_kind(other)))).sum()

    loss().backward()
    torch.autograd.grad(loss(), w)
    loss().backward(inputs=[other])
    assert found == [("backward", "backward"), ("grad", None), (None, "backward")]


def test_whether_the_graph_is_retained() -> None:
    found: list[bool] = []
    y = InBackward.apply(torch.ones(2, requires_grad=True), lambda: found.append(_compat.graph_is_retained())).sum()
    y.backward(retain_graph=True)
    y.backward()
    assert found == [True, False]


def test_apply_without_its_wrapper() -> None:
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            pass

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad * 2

    class Triple(InBackward):
        pass

    seen: list[int] = []
    apply = _compat.apply_of(Triple)
    x = torch.ones(2, requires_grad=True)
    y = apply(x, lambda: seen.append(1))
    y.sum().backward()
    assert x.grad.tolist() == [1, 1] and seen == [1] and "Triple" in type(y.grad_fn).__name__
    assert torch.func.grad(lambda t: _compat.apply_of(Double)(t).sum())(torch.ones(2)).tolist() == [2, 2]


def test_numbers_of_nodes() -> None:
    found: list[int | None] = []
    x = torch.ones(2, requires_grad=True)
    number = _compat.sequence_number()
    y = InBackward.apply(x, lambda: found.append(_compat.sequence_number_of_backward()))
    assert _compat.sequence_number() == number + 1 and _compat.sequence_number_of_backward() is None
    (y * 2).sum().backward()
    assert found == [number]


def test_modes_see_what_is_recomputed() -> None:
    x = torch.ones(2, requires_grad=True)
    with Functions() as seen:
        loss = checkpoint(lambda y: F.gelu(y), x, use_reentrant=False).sum()
        assert seen.names.count("gelu") == 1
        _compat.backward_under_modes(loss)
    assert seen.names.count("gelu") == 2 and x.grad is not None


# ------------------------------------------------------------------------------------------ function and dispatch modes


def test_modes_that_are_on() -> None:
    assert _compat.function_modes() == []
    with Functions() as a, Functions() as b:
        assert _compat.function_modes() == [a, b]


def test_contexts_without_modes() -> None:
    x = torch.ones(2)
    with Functions() as functions, Operators() as operators:
        for context in (_compat.without_torch_function(), _compat.without_torch_function_subclass()):
            with context:
                x.add(1)
        for context in (_compat.without_torch_dispatch(), _compat.without_dispatch_modes()):
            with context:
                x.mul(2)
        x.sub(3)
    assert functions.names == ["add", "mul", "mul", "sub"]  # the first is off, the second is only about subclasses
    assert operators.names == ["add", "add", "sub"]


class Wrapper(Tensor):
    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return "function"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return torch.full((1,), 5.0)


def test_tensors_of_a_subclass_without_memory() -> None:
    x = _compat.wrapper_tensor(Wrapper, [2, 3], dtype=torch.bfloat16, device=torch.device("cpu"))
    assert x.add(1) == "function"
    for context in (_compat.without_torch_function_subclass(), _compat.without_torch_function()):
        with context:
            assert (type(x), tuple(x.shape), x.dtype, x.requires_grad) == (Wrapper, (2, 3), torch.bfloat16, False)
            assert x.add(1).item() == 5


def test_arguments_that_operators_write_to() -> None:
    aten = torch.ops.aten
    assert _compat.written_arguments(aten.add.Tensor) == []
    assert _compat.written_arguments(aten.add_.Tensor) == [(0, "self")]
    assert _compat.written_arguments(aten.add.out) == [(3, "out")]
    assert _compat.written_arguments(aten.view.default) == []  # a view is no write
    assert [i for i, _ in _compat.written_arguments(torch.ops.c10d.allreduce_.default)] == [0]


# --------------------------------------------------------------------------------------------------------------- tensors


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_keys_of_storages(device: str) -> None:
    x, y = torch.empty(2, 2, device=device), torch.empty(2, 2, device=device)
    assert _compat.storage_key(x) == _compat.storage_key(x.T[1:]) == _compat.storage_key(x.untyped_storage())
    assert _compat.storage_key(x) != _compat.storage_key(y)


def test_negative_views() -> None:
    x = torch.ones(2)
    y = _compat.negative_view(x)
    assert y.is_neg() and y.tolist() == [-1, -1] and _compat.storage_key(y) == _compat.storage_key(x)


def test_attention_weights_of_the_math_kernel() -> None:
    q, k, v = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    mask = torch.rand(3, 5) > 0.3
    for options in ({}, {"mask": mask}, {"mask": torch.randn(3, 5)}, {"is_causal": True}, {"scale": 0.1}):
        full = {"mask": None, "is_causal": False, "scale": None, "enable_gqa": True, **options}
        weights = _compat.math_attention_weights(q, k, v, full.pop("mask"), full.pop("is_causal"), **full)
        options["attn_mask"] = options.pop("mask", None)
        expected = F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **options)
        torch.testing.assert_close(weights @ v.repeat_interleave(2, 1), expected)


# --------------------------------------------------------------------------------------------------------------- DTensor


def test_dtensors_and_their_pieces() -> None:
    with fake_world(2, rank=1):
        mesh = init_device_mesh("cpu", (2,))
        plain = torch.arange(10.0).view(5, 2)
        even = distribute_tensor(plain, mesh, [Shard(0)], src_data_rank=None)
        assert _compat.local_tensor(plain) is plain and _compat.local_tensor(even).shape == (2, 2)
        assert not _compat.is_in_pieces(even)
        ((offset, piece),) = _compat.pieces_of_dtensor(even)
        assert offset == (3, 0) and torch.equal(piece, plain[3:])
        pieces, offsets = [plain[1:2], plain[4:]], [(1, 0), (4, 0)]
        fused = _compat.dtensor_of_pieces(pieces, offsets, mesh, (Shard(0),), torch.Size((5, 2)))
        assert _compat.is_in_pieces(fused) and fused.shape == (5, 2) and fused.placements == (Shard(0),)
        assert [(o, p.tolist()) for o, p in _compat.pieces_of_dtensor(fused)] == [((1, 0), [[2, 3]]), ((4, 0), [[8, 9]])]
        names: list[str] = []
        for tensor in (even, fused):
            twin = _compat.copy_dtensor(tensor, lambda t, name: names.append(name) or t + 1)
            assert twin.placements == tensor.placements and twin.shape == tensor.shape
            for (a, x), (b, y) in zip(_compat.pieces_of_dtensor(tensor), _compat.pieces_of_dtensor(twin), strict=True):
                assert a == b and torch.equal(x + 1, y)
        assert names == ["", "0", "1"]
        strided = _compat.strided_shard(0, 2)
        assert strided.dim == 0 and strided.split_factor == 2 and type(strided).__name__ == "_StridedShard"


# ----------------------------------------------------------------------------------------- FSDP2, precision, grad norm


def test_units_that_are_frozen_at_first() -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    with fake_world(2):
        mesh = init_device_mesh("cpu", (2,))
        model = nn.Linear(4, 4)
        model.requires_grad_(False)
        fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.bfloat16))
        _compat.remember_dtypes(model)
        model(torch.ones(2, 4))
        model.requires_grad_(True)
        model(torch.ones(2, 4)).sum().backward()
        assert model.weight.grad is not None and model.weight.grad.dtype == torch.float32


def test_gradients_are_unscaled_together() -> None:
    grads, found = [torch.tensor([2.0, 4.0]), torch.tensor([6.0])], torch.zeros(1)
    _compat.non_finite_check_and_unscale_(grads, found, torch.tensor(0.5))
    assert [g.tolist() for g in grads] == [[1, 2], [3]] and found.item() == 0
    _compat.non_finite_check_and_unscale_([torch.tensor([torch.inf])], found, torch.tensor(0.5))
    assert found.item() == 1


def test_the_norm_that_gradients_are_clipped_by(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.nn import utils
    from torch.nn.utils import clip_grad

    own = utils.clip_grad._get_total_norm
    original = getattr(own, "__wrapped__", own)

    def plain(*args: Any, **kwargs: Any) -> Tensor:
        return original(*args, **kwargs)

    monkeypatch.setattr(clip_grad, "_get_total_norm", plain)
    monkeypatch.setattr(utils, "get_total_norm", plain)
    makes: list[int] = []

    def make(norm: Any) -> Any:
        makes.append(1)
        return lambda *args, **kwargs: norm(*args, **kwargs) * 10

    _compat.wrap_total_norm(make)
    _compat.wrap_total_norm(make)
    assert makes == [1] and utils.get_total_norm is clip_grad._get_total_norm
    p = nn.Parameter(torch.zeros(1))
    p.grad = torch.tensor([3.0])
    assert nn.utils.clip_grad_norm_([p], 15.0).item() == 30 and p.grad.item() == pytest.approx(1.5)


def test_small_tensors_are_flattened() -> None:
    tensors = [torch.ones(2), torch.zeros(3, 1)]
    flat = _compat.flatten(tensors)
    assert flat.tolist() == [1, 1, 0, 0, 0]
    assert [t.shape for t in _compat.unflatten(flat, tensors)] == [(2,), (3, 1)]
    assert {"READY", "UNSCALED", "STEPPED"} <= {state.name for state in _compat.OptState}


# -------------------------------------------------------------------------------------------------------- process groups


def test_process_groups() -> None:
    def body() -> None:
        dist.init_process_group("gloo")  # by the environment: over TCP
        rank, group = dist.get_rank(), dist.group.WORLD
        assert _compat.gather_rows(torch.tensor([[rank, 7]]), group).tolist() == [[[0, 7]], [[1, 7]]]
        store = _compat.clone_store()
        assert store is not None
        store.set(f"from {rank}", "here")
        dist.barrier()
        assert store.get(f"from {1 - rank}") == b"here"
        _compat.let_store_fail(timedelta(seconds=20))  # a healthy one goes on
        assert store.check([f"from {rank}"])
        _compat.limit_waiting([group], timedelta(seconds=1))
        if rank == 0:
            with pytest.raises(RuntimeError, match=r"[Tt]imed out"):
                dist.all_reduce(torch.ones(1))  # the other does not come
            store.set("done", "")
        store.wait(["done"])

    run_ranks(body, 2, init=False)


def test_groups_that_are_not_there() -> None:
    group = _compat.fake_process_group(3, 8)
    assert (group.rank(), group.size()) == (3, 8)
    group.allreduce([torch.ones(2)]).wait()
    assert _compat.fake_store() is not None
    with fake_world(2):
        assert _compat.clone_store() is None
        _compat.let_store_fail(timedelta(seconds=1))


# -------------------------------------------------------------------------------------------------------------- compiler


def test_compilers() -> None:
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = _compat.compile_function(lambda x: x * 2 + 1, backend, 8)
    assert compiled(torch.ones(2)).tolist() == [3, 3] and len(graphs) == 1
    assert callable(_compat.backend_of("eager")) and callable(_compat.backend_of("inductor"))
    with pytest.raises(ValueError, match=r"there are .*inductor"):
        _compat.backend_of("nothing")

    def fails(graph: Any, inputs: Any) -> Any:
        raise KeyError("no")

    with pytest.raises(Exception) as caught:
        _compat.compile_function(lambda x: x - 2, fails, 8)(torch.ones(2))
    assert _compat.is_compiler_error(caught.value) and not _compat.is_compiler_error(KeyError("no"))


def test_what_users_compile_is_found() -> None:
    def backend(graph: Any, inputs: Any) -> Any:
        return graph.forward

    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    inner, own = model[1][0], model[1][1]
    model[1][0] = torch.compile(inner, backend=backend)
    own.compile()
    found = _compat.take_compiled(model)
    assert getattr(found["1.0"], "compiler_fn", found["1.0"]) is backend and found == {"1.0": found["1.0"], "1.1": "inductor"}
    assert model[1][0] is inner and own._compiled_call_impl is None
    assert _compat.take_compiled(model) == {}
    wrapped = torch.compile(nn.Linear(2, 2), backend="eager")
    assert callable(_compat.backend_of_context(wrapped.dynamo_ctx))  # type: ignore[attr-defined]


def test_classes_in_the_metadata_of_a_checkpoint() -> None:
    import importlib
    import sys

    for module, names in _compat.METADATA_CLASSES.items():
        if module == "pathlib._local" and sys.version_info < (3, 13):
            continue
        assert all(hasattr(importlib.import_module(module), name) for name in names), module
