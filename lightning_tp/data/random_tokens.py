"""Random tokens of any number, held nowhere: item i is a hash of (seed, i).

For benchmarks and parity tests, where every rank, worker and run must see the same item i. There is nothing to learn
from them but by heart: on new items no model gets below a loss of ln(vocab_size). For text see `text.py`.

Left out: samplers. The dataset costs no memory, but torch's `RandomSampler` and `DistributedSampler` list every index
(tens of bytes each), and Lightning puts in the latter by itself on several ranks: keep `num_items` to what a run needs.
"""

from __future__ import annotations

import hashlib
import operator

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_tp.errors import TPError


class RandomTokens(Dataset[dict[str, Tensor]]):
    """Uniform random tokens for next-token training: `{"tokens": (seq_len,), "targets": (seq_len,)}`, both int64.

    `targets` is `tokens` moved by one. Item i depends on (seed, i, vocab_size) only: it is the same on every rank, in
    every worker and in every order, and a longer `seq_len` begins with the shorter one's tokens.

    Args:
        num_items: how many items; 2**40 costs no more memory than 1.
        seq_len: tokens in an item.
        vocab_size: tokens are drawn from 0 .. vocab_size - 1.
        seed: another seed, other items.

    Example:
        >>> item = RandomTokens(num_items=2**40, seq_len=8, vocab_size=100)[12345]
        >>> item["tokens"].shape, item["targets"].shape
        (torch.Size([8]), torch.Size([8]))
        >>> bool((item["tokens"][1:] == item["targets"][:-1]).all())
        True
    """

    def __init__(self, num_items: int, seq_len: int, vocab_size: int, *, seed: int = 0) -> None:
        for name, value in {"num_items": num_items, "seq_len": seq_len, "vocab_size": vocab_size}.items():
            if value < 1:
                raise TPError(f"RandomTokens: `{name}={value}` is less than 1. Use a whole number of at least 1.")
        self.num_items = num_items
        self.seq_len = seq_len
        self.vocab_size = vocab_size
        self.seed = seed

    def __len__(self) -> int:
        return self.num_items

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        index = operator.index(index)
        if not 0 <= index < self.num_items:  # an IndexError, because it is what ends a `for` loop over the dataset
            raise IndexError(f"RandomTokens: item {index} is not in 0 .. {self.num_items - 1}.")
        # Why not torch.Generator().manual_seed(...): on CPU it keeps 32 bits of the seed, so that among 100 thousand
        # items some would be equal. 63 bits per token leave a bias of less than vocab_size / 2**63.
        raw = hashlib.shake_128(f"{self.seed},{index}".encode()).digest(8 * (self.seq_len + 1))
        bits = torch.frombuffer(bytearray(raw), dtype=torch.int64)  # (seq_len + 1,)
        drawn = (bits & (2**63 - 1)) % self.vocab_size
        return {"tokens": drawn[:-1], "targets": drawn[1:]}
