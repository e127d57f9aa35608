"""What a convolution does to the features of a picture or a sequence (B, C, ..): a product of its channels with a weight, at each place.

A weight (C_out, C_in, ..) is split as that of a linear layer is: by its output channels where its input is whole, by its input channels
where the features of these differ. With groups, the channels of one group belong together; then, and where each channel has a filter of its
own (depthwise), a weight goes with the channels that it works on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_tp.infer.follow.features import shrunk

if TYPE_CHECKING:
    from lightning_tp.infer.follow.tracer import FeatureTracer

Kernel = tuple[str, tuple[Tensor, ...]]  # the parameter, and for each dim of it the coordinate (C_out, C_in) of each element


def kernel_of(param: tuple[str, tuple[Tensor, ...]] | None, transposed: bool) -> Kernel | None:
    """The weight as a matrix, at one place of the kernel; None where its channels are not known, or are others at other places."""
    if param is None:
        return None
    matrix = []
    for coordinates in param[1]:
        small = shrunk(coordinates).flatten(2)
        first = small[:, :, 0].expand(coordinates.shape[:2])
        if bool((small != small[:, :, :1]).any()) and bool((first != first[:1, :1]).any()):
            return None
        matrix.append(first.t() if transposed else first)
    return param[0], tuple(matrix)


def channels_of(classes: Tensor) -> Tensor | None:
    """The classes (C,) of a tensor (B, C, ..) in which they differ along the channels only; None for another one."""
    small = shrunk(classes).flatten(2)
    first = small[:1, :, :1]
    return first.reshape(-1).expand(classes.shape[1]) if bool((small == first).all()) else None


def convolved(tracer: FeatureTracer, x: Tensor, kernel: Kernel, groups: int, out: Tensor) -> Tensor | None:
    """The labels of a convolution of `x` (B, C_in, ..); None for a whole result."""
    name, matrix = kernel
    label, trace = tracer.shadow(x).label, tracer.trace
    trace.convolved.add(name)
    channels = None
    if label is not None:
        channels = channels_of(trace.classes.find(shrunk(label)).expand(label.shape))
        if channels is None:  # all of a picture meets; what differs along the batch (heads, folded into it) does not
            tracer._use([name], [label])
            return trace.classes.join_along(label, tuple(range(1, label.ndim)), keepdim=True).expand(out.shape)
    if groups == 1:
        rows = None if channels is None else channels.view(1, 1, -1)
        made = tracer._with_weight(rows, (name, tuple(c.t().unsqueeze(0) for c in matrix)), (1, 1, x.shape[1]), out_dim=2)
    else:
        made = _in_groups(tracer, name, matrix, channels, groups)
    return None if made is None else made.view(1, -1, *[1] * (out.ndim - 2)).expand(out.shape)


def _in_groups(tracer: FeatureTracer, name: str, matrix: tuple[Tensor, ...], channels: Tensor | None, groups: int) -> Tensor | None:
    """Labels (C_out,): those of a group meet, and its weights go with them."""
    n_out, per_group = matrix[0].shape
    classes = tracer.trace.classes
    dim = next((d for d, c in enumerate(matrix) if torch.equal(c[:, 0], torch.arange(n_out))), None)
    free = dim is not None and (name, dim) not in tracer.whole
    if channels is not None and not bool(channels.any()):  # every rank has it, beside its shards
        if not (tracer.gathered and (name, dim, "out") in tracer.known):
            tracer._use([name], [channels])
            return torch.zeros((), dtype=torch.int64).expand(n_out)
        channels = None
    if channels is None and (dim is None or not free or per_group == 1):  # a filter for each whole channel is small
        tracer.trace.whole_uses.setdefault(name, set()).add(tracer.stack[-1])
        return None
    tops = None if channels is None else classes.join_along(channels.view(groups, -1), (1,), keepdim=True)  # (groups, 1)
    if dim is None or not free or (channels is not None and not bool((channels > 0).all())):
        tracer._use([name], [] if channels is None else [channels])
        return None if channels is None else classes.join_along(channels, (0,)).expand(n_out)
    weights = tracer._nodes(name, dim).view(groups, -1)
    kind = "out" if tops is None else "along"
    if tops is None:
        tracer.events.append(("out", name))
        tops = classes.join_along(weights, (1,), keepdim=True)
    else:
        classes.join(tops, weights)
    tracer._used(name, dim, kind)
    return tops.expand(groups, n_out // groups).reshape(-1)
