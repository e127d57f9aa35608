"""What is wrapped of torch for modules, optimizers and the compiler, and of what is built on them, on this version."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_tp import _compat


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


def test_compiled_methods_of_code_that_calls_models_are_found() -> None:
    class Base(nn.Module):
        @torch.compile(backend="eager")
        def training_step(self, x: Tensor) -> Tensor:
            return x + 1

        @torch.compile(backend="eager")
        def validation_step(self, x: Tensor) -> Tensor:
            return x + 2

    class Module(Base):
        def validation_step(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return x + 3

        def test_step(self, x: Tensor) -> Tensor:
            return x + 4

    module = Module()
    module.test_step = torch.compile(module.test_step, backend="eager")  # type: ignore[method-assign]
    assert set(_compat.take_compiled(module)) == {"training_step", "test_step"}
    methods = (module.training_step, module.validation_step, module.test_step)
    assert [int(method(torch.zeros(()))) for method in methods] == [1, 3, 4]
    assert not any(hasattr(method, "_torchdynamo_orig_callable") for method in methods)
    assert _compat.take_compiled(module) == {}
