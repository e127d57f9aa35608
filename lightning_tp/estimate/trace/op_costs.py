"""Find the kernel that an operator runs, its FLOPs and the bytes that it reads and writes: one small function for each kind of operator.

`RULES` has the operators that need their own function. All others are bound by memory bandwidth: they read their inputs and write their outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from lightning_tp.errors import TPError
from lightning_tp.estimate.trace.step_trace import Op, Phase


@dataclass(frozen=True)
class Call:
    """One call of an operator on the meta device."""

    name: str  # of the operator, such as "addmm"
    # module, phase: where it is called
    module: str
    phase: Phase
    # inputs, outputs: its tensors, in order
    inputs: list[Tensor]
    outputs: list[Tensor]
    in_place: bool = False  # whether it writes into an input
    flag: bool = False  # whether any of its arguments is True: `is_causal` of attention

    @property
    def bytes(self) -> int:
        """What it reads and writes."""
        return sum(map(bytes_of, (*self.inputs, *self.outputs)))

    def op(self, kind: str, size: int, flops: int = 0, work: int = 0, shape: tuple[int, ...] = ()) -> Op:
        """Return the kernel, with its `size` in bytes."""
        dtype = (self.inputs or self.outputs)[0].dtype
        return Op(kind, self.name, self.module, self.phase, flops, work, size, shape, dtype)


def kernel_of(call: Call) -> Op | None:
    """Return the kernel that a call runs; None if it runs none.

    Raises:
        TPError: for a matmul of two dtypes, which the meta device takes and no other.

    Example:
        >>> import torch
        >>> a, b, c = (torch.empty(size, device="meta") for size in ((8, 4), (4, 2), (8, 2)))
        >>> op = kernel_of(Call("mm", "proj", "forward", [a, b], [c]))
        >>> op.shape, op.flops, op.bytes
        ((1, 8, 2, 4), 128, 224)
    """
    if call.name in NO_KERNEL:
        return None
    rule = RULES.get(call.name) or (_in_place if call.in_place and call.outputs else _pointwise)
    op = rule(call)
    return op if op.bytes or op.kind != "other" else None


def bytes_of(t: Tensor) -> int:
    """Return the bytes of a tensor's elements; of an expanded tensor, those that are stored."""
    return min(t.numel() * t.itemsize, t.untyped_storage().nbytes())


# ------------------------------------------------------------------------------------------ (batch, m, k) x (batch, k, n)


def _mm(call: Call) -> Op:
    a, b = call.inputs[-2:]  # of addmm, the bias comes first
    return _product(call, a.shape[0] if a.ndim == 3 else 1, a.shape[-2], b.shape[-1], a.shape[-1])


def _grouped_mm(call: Call) -> Op:
    """Groups of rows, each times its own matrix; for gradients, groups of the inner dimension."""
    a, b = call.inputs[:2]
    return _product(call, 1, a.shape[0], b.shape[-1], a.shape[1])


def _mv(call: Call) -> Op:
    matrix = call.inputs[0]
    return _product(call, 1, matrix.shape[0], 1, matrix.shape[1])


def _dot(call: Call) -> Op:
    return _product(call, 1, 1, 1, call.inputs[0].shape[0])


def _product(call: Call, batch: int, m: int, n: int, k: int) -> Op:
    _check_dtypes(call)
    flops = 2 * batch * m * n * k
    return call.op("product", call.bytes, flops, flops, (batch, m, n, k))


def _convolution(call: Call) -> Op:
    _check_dtypes(call)
    weight = call.inputs[1]
    flops = 2 * call.outputs[0].numel() * weight[0].numel()
    return call.op("product", call.bytes, flops, flops)


def _convolution_backward(call: Call) -> Op:
    _check_dtypes(call)
    grad, _, weight = call.inputs[:3]
    flops = 2 * grad.numel() * weight[0].numel() * len(call.outputs[:2])  # gradients of input and weight
    return call.op("product", call.bytes, flops, flops)


def _check_dtypes(call: Call) -> None:
    if len({t.dtype for t in call.inputs if t.ndim > 1}) > 1:
        dtypes = " and ".join(sorted({str(t.dtype).removeprefix("torch.") for t in call.inputs}))
        raise TPError(
            f"`{call.module or 'the loss'}` multiplies {dtypes}, which raises on a real device. Cast one of them in the model (a table of "
            "positions, for example), or use a precision with autocast ('bf16-mixed')."
        )


# ---------------------------------------------------------------------------------------------------------------- attention


def _attention(call: Call) -> Op:
    return _fused_attention(call, call.inputs[:3], products=2)


def _attention_backward(call: Call) -> Op:
    return _fused_attention(call, call.inputs[1:4], products=5)


def _fused_attention(call: Call, operands: list[Tensor], products: int) -> Op:
    """Scores and weighted sums, both in full; the backward takes five matmuls for the forward's two."""
    q, k, v = operands
    batch, heads, length, width = q.shape
    flops = 2 * batch * heads * length * k.shape[-2] * (width + v.shape[-1]) * products // 2
    shape = (batch * heads, length, k.shape[2], width)
    return call.op("attention", call.bytes, flops, flops // 2 if call.flag else flops, shape)


# ------------------------------------------------------------------------------------------------ bound by memory bandwidth


def _lookup(call: Call) -> Op:
    return call.op("other", 2 * sum(map(bytes_of, call.outputs)))  # of the table, only the rows that are looked up


def _copy(call: Call) -> Op:
    return call.op("other", sum(map(bytes_of, call.inputs)))  # the target is among them


def _in_place(call: Call) -> Op:
    return call.op("other", sum(map(bytes_of, call.inputs)) + bytes_of(call.outputs[0]))


def _pointwise(call: Call) -> Op:
    return call.op("other", call.bytes)


EMPTY = frozenset({"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "empty_permuted"})
NO_KERNEL = EMPTY | {"_local_scalar_dense"}
FUSED_ATTENTION = (
    "flash_attention",
    "flash_attention_for_cpu",
    "efficient_attention",
    "cudnn_attention",
    "fused_attention_overrideable",
)
RULES: dict[str, Callable[[Call], Op]] = {
    **dict.fromkeys(("mm", "addmm", "bmm", "baddbmm"), _mm),
    "_grouped_mm": _grouped_mm,
    "mv": _mv,
    "dot": _dot,
    "convolution": _convolution,
    "convolution_backward": _convolution_backward,
    **{f"_scaled_dot_product_{name}": _attention for name in FUSED_ATTENTION},
    **{f"_scaled_dot_product_{name}_backward": _attention_backward for name in FUSED_ATTENTION},
    **dict.fromkeys(("embedding", "index", "gather", "index_select"), _lookup),
    "copy_": _copy,
    **dict.fromkeys(("fill_", "zero_"), _pointwise),
}
