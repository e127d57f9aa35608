"""Sets of features that have to lie on the same rank: a union-find over feature numbers, on whole tensors of labels at once.

A label is an integer for each element of an activation: 0 where every rank has the element, else the number of the feature that
it was computed from. Two features are joined where code needs both in one place (a product of q and k sums over a head; a gate multiplies
its up projection). Features that are never joined may lie on different ranks.
"""

from __future__ import annotations

import bisect
import itertools
import operator
from collections.abc import Sequence

import torch
from torch import Tensor

LARGE = 2**12  # elements from which labels are kept without memory for constant dims
MANY = 2**18  # pairs above which duplicates are removed first


class FeatureSets:
    """Disjoint sets of the features 1, 2, ..; 0 is no feature.

    Example:
        >>> classes = FeatureSets()
        >>> a = classes.new(4)
        >>> _ = classes.join(a[:2], a[2:])
        >>> classes.find(a).tolist()
        [1, 2, 1, 2]
    """

    def __init__(self) -> None:
        self.parent = torch.arange(1024)
        self.joins: list[tuple[int, str]] = []  # (a feature, the operation that joined its set with another), in order
        self.why = ""  # the operation that runs now
        self.count = 1

    def new(self, n: int) -> Tensor:
        """Return the numbers of `n` new features, each in a set by itself."""
        first, self.count = self.count, self.count + n
        if self.count > self.parent.numel():  # grow by doubling
            self.parent = torch.cat((self.parent, torch.arange(self.parent.numel(), 2 * self.count)))
        return torch.arange(first, self.count)

    def find(self, labels: Tensor) -> Tensor:
        """Return the representative of each label: the smallest feature of its set."""
        found = self.parent[labels]
        while not torch.equal(above := self.parent[found], found):
            found = above
        return found

    def join(self, a: Tensor, b: Tensor) -> Tensor:
        """Join the features of two label tensors element by element (they broadcast); zeros join nothing.

        Returns:
            The labels of the result: those of `a`, and where these are 0, of `b`.
        """
        shape = torch.broadcast_shapes(a.shape, b.shape)
        a, b = shrunk(a), shrunk(b)
        self._join_pairs(self.find(a), self.find(b))
        return torch.where(a > 0, a, b).expand(shape)

    def join_along(self, labels: Tensor, dims: tuple[int, ...], *, keepdim: bool = False) -> Tensor:
        """Join labels that differ only along `dims` (zeros join nothing).

        Returns:
            The labels without these dims, or with length 1 there.
        """
        small, dims = shrunk(labels), tuple(d % labels.ndim for d in dims)
        top = small.amax(dims, keepdim=True) if small.numel() else small.sum(dims, keepdim=True)
        self._join_pairs(self.find(small), self.find(top))
        top = top.expand([1 if d in dims else n for d, n in enumerate(labels.shape)])
        return top if keepdim else top.squeeze(dims)

    def _join_pairs(self, a: Tensor, b: Tensor) -> None:
        a, b = torch.broadcast_tensors(a, b)
        both_constant = [sa == 0 and sb == 0 for sa, sb in zip(a.stride(), b.stride(), strict=True)]  # by construction
        index = tuple(slice(0, 1) if constant else slice(None) for constant in both_constant)
        a, b = a[index], b[index]
        differ = (a != b) & (a > 0) & (b > 0)
        if not bool(differ.any()):
            return
        pairs = torch.stack((a[differ], b[differ]))
        if pairs.shape[1] > MANY:
            both = torch.unique(pairs[0] * self.count + pairs[1])  # as one number: unique columns are slow to find
            pairs = torch.stack((both // self.count, both % self.count))
        while True:  # hook each larger root to the smallest one it is paired with, until all pairs agree
            low, high = torch.aminmax(self.find(pairs), dim=0)
            todo = low != high
            if not bool(todo.any()):
                return
            self.joins.append((int(high[todo][0]), self.why))
            self.parent.scatter_reduce_(0, high[todo], low[todo], "amin")


def shrunk(labels: Tensor) -> Tensor:
    """Return the labels with length 1 in the dims along which they are constant by construction (stride 0).

    Example:
        >>> shrunk(torch.arange(4).view(1, 4, 1).expand(7, 4, 5)).shape
        torch.Size([1, 4, 1])
    """
    if not labels.ndim or not labels.numel():
        return labels
    return labels[tuple(slice(0, 1) if s == 0 else slice(None) for s in labels.stride())]


def no_features(*shape: int) -> Tensor:
    """Return labels of this shape that name no feature, without memory for any dim."""
    return torch.zeros((), dtype=torch.int64).expand(shape)


def gradient_is_partial(label: Tensor | None) -> bool:
    """Return whether a tensor with this label has equal values on all ranks and a partial gradient on each (state R).

    It does where the label names no feature: every rank computes all elements, for use with its own shards. Without a label, values and
    gradients are equal on all ranks (state I).
    """
    return label is not None and not bool(shrunk(label).any())


def compact(labels: Tensor) -> Tensor:
    """Return the same labels without memory for the dims along which they are constant."""
    shape, small = labels.shape, shrunk(labels)
    if small.numel() < LARGE:
        return labels
    for dim in range(small.ndim):
        first = small.narrow(dim, 0, 1)
        if small.shape[dim] > 1 and bool((small == first).all()):
            small = first
    return small.expand(shape)


def reshaped(labels: Tensor, shape: Sequence[int]) -> Tensor:
    """Return `labels.reshape(shape)`, without memory for the dims along which they are constant by construction.

    Dims of both shapes are paired in groups with equal products, as a view pairs them; a group that is constant stays of length 1.
    """
    if not labels.numel() or labels.numel() < LARGE:
        return labels.reshape(shape)
    ends, new_ends = (list(itertools.accumulate(of, operator.mul)) for of in (labels.shape, shape))
    index: list[slice] = []
    small: list[int] = []
    for end in sorted({*ends} & {*new_ends}):  # of a group
        dims, new_dims = range(len(index), bisect.bisect(ends, end)), range(len(small), bisect.bisect(new_ends, end))
        constant = all(labels.stride(d) == 0 or labels.shape[d] == 1 for d in dims)
        index += [slice(0, 1) if constant else slice(None)] * len(dims)
        small += [1 if constant else shape[d] for d in new_dims]
    return labels[tuple(index)].reshape(small).expand(list(shape))
