"""Classes of operators, by name: which move data, reduce, multiply, draw random numbers, write into their input.

Names with `ATEN_` in front are of aten operators, as a `TorchDispatchMode` sees them; the others are of torch functions and methods, as a
`TorchFunctionMode` sees them.
"""

from __future__ import annotations

from collections.abc import Container

from lightning_tp.styles.calls.call import CONVOLUTIONS, SIZE_CALLS, SPLIT_CALLS


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# ------------------------------------------------------------------------------------------------------- aten operators

# Only move data: what they do to an activation they do to its labels.
ATEN_MOVES = _names(
    "view _unsafe_view reshape _reshape_alias permute transpose t unsqueeze squeeze expand slice select split split_with_sizes chunk unbind "
    "clone contiguous alias detach roll flip repeat unfold as_strided narrow diagonal movedim tril triu lift_fresh constant_pad_nd "
    "index_select index gather cat stack repeat_interleave pixel_shuffle squeeze_ unsqueeze_ transpose_ view_as_real view_as_complex _conj "
    "swapaxes flatten unflatten"
)
# Combine the elements along some dims; the other dims are as before.
ATEN_REDUCTIONS = _names(
    "sum mean amax amin max min var std var_mean prod logsumexp argmax argmin any all linalg_vector_norm norm _softmax _log_softmax "
    "_safe_softmax softmax log_softmax cumsum cumprod topk sort"
)
# Work on each element by itself, without torch's tag for it.
ATEN_POINTWISE = _names("dropout native_dropout masked_fill where copy_ fill_")
# Write values that depend on no features into a tensor.
ATEN_FILLS = _names("bernoulli bernoulli_ uniform_ normal_ exponential_ random_ zero_")
# Make a tensor like another one, of values that depend on no features.
ATEN_LIKE = _names("zeros_like ones_like empty_like full_like rand_like randn_like")
# Copy a tensor to another dtype or device.
ATEN_CASTS = _names("_to_copy to type_as")

# ------------------------------------------------------------------------------------------------------ torch functions

# Only move data, so that a parameter that is moved is followed as an activation is.
MOVES = SIZE_CALLS | SPLIT_CALLS | _names("__getitem__ narrow select index_select unbind narrow_copy movedim")
# Move data along one dim; along the split one they do something else on shards.
MOVES_ALONG_ONE_DIM = _names("narrow select index_select unbind narrow_copy movedim")
# Multiply matrices: rows and columns of an operand do not lie beside those of another one.
PRODUCTS = _names("matmul __matmul__ __rmatmul__ bmm baddbmm mm addmm mv dot chain_matmul addbmm _grouped_mm")
# Of these, those that add something to the product, as their first argument.
PRODUCTS_WITH_SUMMAND = _names("baddbmm addmm addmv addbmm")
# Put tensors one behind the other.
JOINS = _names("cat stack concat concatenate")
# Combine operands that need not broadcast against each other.
NOT_BROADCASTING = JOINS | _names("scaled_dot_product_attention gather scatter scatter_add take_along_dim")
# Read whole operands whatever their sizes: a weight, an index.
OPERANDS_STAY_WHOLE = CONVOLUTIONS | _names("linear embedding layer_norm rms_norm expand view reshape __getitem__ index_select")
# Give another result each time, so that two results can't be compared.
RANDOM = _names(
    "dropout alpha_dropout feature_alpha_dropout dropout1d dropout2d dropout3d rand_like randn_like randint_like bernoulli bernoulli_ "
    "uniform_ normal_ exponential_ random_ multinomial rrelu gumbel_softmax empty_like new_empty empty"
)
# Hand the values of a tensor, or how they lie in memory, to code that is not torch's.
READS_VALUES = _names("numpy tolist __array__ __dlpack__ __repr__ stride data_ptr untyped_storage storage")
# Keep one triangle of matrices.
TRIANGLES = _names("tril triu tril_ triu_")
# Compute each element of a result from the same ones of what they are given.
ON_EACH_ELEMENT = _names(
    "add sub mul div neg abs lerp clamp sqrt square pow exp sign __add__ __radd__ __sub__ __rsub__ __mul__ __rmul__ __truediv__ __neg__ __pow__"
)
# Treat elements by their position, so that a shard is treated otherwise than its part of the whole.
BY_POSITION = TRIANGLES | _names("roll rot90 outer ger __setitem__")
# Write into their first argument, beside the functions that end in an underscore.
IN_PLACE = _names("__setitem__ __iadd__ __isub__ __imul__ __idiv__ __itruediv__ __iand__ __ior__ __ixor__")


def writes_in_place(name: str, keywords: Container[str] = ()) -> bool:
    """Return whether a torch function of this name, called with these keywords, writes into a tensor that it is given.

    Example:
        >>> writes_in_place("add_"), writes_in_place("__add__"), writes_in_place("__iadd__")
        (True, False, True)
    """
    return name in IN_PLACE or (name.endswith("_") and not name.endswith("__")) or "out" in keywords
