"""Sort the functions and attributes of tensors by what they do with a sharded one; see `parameter.py`."""

from __future__ import annotations


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# attributes that are functions of the values
VALUE_ATTRIBUTES = _names("T mT H mH real imag")
# attributes that are known from the shape
SHAPE_ATTRIBUTES = _names("shape ndim nbytes")
# methods that are answered from the full shape
SIZES = _names("size dim ndimension numel nelement stride __len__ is_contiguous")
# functions that are the same for a shard
AS_IT_IS = _names(
    """requires_grad_ retain_grad backward is_floating_point is_complex is_signed is_inference is_conj is_neg element_size get_device
    __hash__ __dir__ is_shared share_memory_ is_pinned is_set_to is_same_size _is_view _has_compatible_shallow_copy_type"""
)
# functions whose result is sharded as the argument is
ALIKE = _names("detach zeros_like ones_like empty_like full_like")
# copies, which are sharded as the argument is where no gradient is recorded
COPIES = _names("detach_ clone to cpu cuda float double half bfloat16 type type_as contiguous pin_memory copy_")
# likewise pointwise functions of tensors that are sharded alike
POINTWISE = _names(
    """add sub mul div add_ sub_ mul_ div_ neg neg_ abs abs_ zero_ fill_ lerp lerp_ clamp clamp_ sqrt sqrt_ square square_ pow pow_ addcmul addcmul_
    addcdiv addcdiv_ sign sign_ exp exp_ reciprocal reciprocal_ __add__ __radd__ __sub__ __mul__ __rmul__ __truediv__ __iadd__ __isub__ __imul__
    __itruediv__ true_divide true_divide_ divide divide_ multiply multiply_ subtract subtract_"""
)
# methods that write in place beside those that end with an underscore
WRITES = _names("__setitem__ __iadd__ __isub__ __imul__ __itruediv__ __ifloordiv__ __imod__ __ipow__ __iand__ __ior__ __ixor__")
# functions that return views: what is written into them reaches the shards
VIEWS = _names(
    """__getitem__ view reshape view_as reshape_as flatten ravel unflatten select narrow unbind split split_with_sizes chunk tensor_split
    unsqueeze squeeze transpose t permute movedim moveaxis swapaxes swapdims diagonal expand as_strided unfold __iter__ hsplit vsplit"""
)
# functions that give out the memory of the full tensor
POINTERS = _names("data_ptr untyped_storage storage _typed_storage __dlpack__ numpy __array__")
