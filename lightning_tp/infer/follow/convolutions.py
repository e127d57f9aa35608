"""The rule of convolutions: at each position of a picture or a sequence (B, C, ..), a product of its channels with a weight.

A weight (C_out, C_in, ..) is split as that of a linear layer is: by its output channels where the input is equal on all ranks, by its input
channels where the features of these differ. With groups, the channels of one group are joined; then, and where each channel has a filter of its
own (depthwise), a weight goes with the channels that it works on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_tp.infer.follow.features import gradient_is_partial, no_features, shrunk
from lightning_tp.infer.follow.moves import combine
from lightning_tp.infer.follow.products import with_bias, with_weight
from lightning_tp.infer.follow.trace import ParamView, TensorFacts
from lightning_tp.infer.follow.tracer import AtenCall, FeatureTracer, follows


@follows("convolution")
def convolution(tracer: FeatureTracer, op: AtenCall) -> list[TensorFacts]:
    """(B, C_in, ..) and a weight (C_out, C_in / groups, ..) -> (B, C_out, ..)."""
    x, weight, bias, *_, transposed, _, groups = op.args
    kernel = None if transposed and groups > 1 else kernel_of(tracer.shadow(weight).param, transposed)
    if kernel is None or any(t is not None and tracer.shadow(t).label is not None for t in (weight, bias)):
        return combine(tracer, op)
    label = _convolved(tracer, x, kernel, groups, op.out)
    return op.labelled(label if bias is None else with_bias(tracer, bias, label))


def kernel_of(param: ParamView | None, transposed: bool) -> ParamView | None:
    """Return the weight at one position of the kernel, as a matrix (C_out, C_in); None if its channels differ between positions."""
    if param is None:
        return None
    matrix = []
    for coordinates in param.coordinates:
        small = shrunk(coordinates).flatten(2)
        first = small[:, :, 0].expand(coordinates.shape[:2])
        if bool((small != small[:, :, :1]).any()) and bool((first != first[:1, :1]).any()):
            return None
        matrix.append(first.t() if transposed else first)
    return ParamView(param.name, tuple(matrix))


def channels_of(classes: Tensor) -> Tensor | None:
    """Return the representatives (C,) of a tensor (B, C, ..) in which they differ along the channels only; None for another one."""
    small = shrunk(classes).flatten(2)
    first = small[:1, :, :1]
    return first.reshape(-1).expand(classes.shape[1]) if bool((small == first).all()) else None


def _convolved(tracer: FeatureTracer, x: Tensor, kernel: ParamView, groups: int, out: Tensor) -> Tensor | None:
    """Return the labels of a convolution of `x`; None for a result that is equal on all ranks."""
    label, trace = tracer.shadow(x).label, tracer.trace
    trace.convolved.add(kernel.name)
    channels = None
    if label is not None:
        channels = channels_of(trace.classes.find(shrunk(label)).expand(label.shape))
        if channels is None:  # all of a picture is joined; what differs along the batch (heads, folded into it) is not
            tracer.note_operands([kernel.name], [label])
            return trace.classes.join_along(label, tuple(range(1, label.ndim)), keepdim=True).expand(out.shape)
    if groups == 1:
        rows = None if channels is None else channels.view(1, 1, -1)
        weight = ParamView(kernel.name, tuple(c.t().unsqueeze(0) for c in kernel.coordinates))
        made = with_weight(tracer, rows, weight, rows=1)
    else:
        made = _in_groups(tracer, kernel, channels, groups)
    return None if made is None else made.view(1, -1, *[1] * (out.ndim - 2)).expand(out.shape)


def _in_groups(tracer: FeatureTracer, kernel: ParamView, channels: Tensor | None, groups: int) -> Tensor | None:
    """Return labels (C_out,), one for each group; its weights go with the channels that it reads."""
    name, (num_out, per_group), classes = kernel.name, kernel.coordinates[0].shape, tracer.trace.classes
    dim = next((d for d, c in enumerate(kernel.coordinates) if torch.equal(c[:, 0], torch.arange(num_out))), None)
    dim = None if (name, dim) in tracer.whole else dim
    if gradient_is_partial(channels):
        if not (tracer.gathered and (name, dim, "out") in tracer.known):
            tracer.note_operands([name], [channels])  # type: ignore[list-item]
            return no_features(num_out)
        channels = None
    if channels is None:
        if dim is None or per_group == 1:  # a filter for each channel is small
            tracer.trace.whole_uses.setdefault(name, set()).add(tracer.stack[-1])
            return None
        weights = tracer.features(name, dim).view(groups, -1)
        tracer.events.append(("out", name))
        tops = classes.join_along(weights, (1,), keepdim=True)  # (groups, 1)
    else:
        tops = classes.join_along(channels.view(groups, -1), (1,), keepdim=True)
        if dim is None or not bool((channels > 0).all()):
            tracer.note_operands([name], [channels])
            return classes.join_along(channels, (0,)).expand(num_out)
        classes.join(tops, tracer.features(name, dim).view(groups, -1))
    tracer.note_product(name, dim, "out" if channels is None else "along")
    return tops.expand(groups, num_out // groups).reshape(-1)
