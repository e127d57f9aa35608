"""A dataset of random tokens, of any length and without storage: item i is a hash of (seed, i).

For benchmarks and parity tests, where every rank, worker and run must see the same item i. A model can only memorise
them: on new items its loss does not fall below ln(vocab_size).

Samplers are not covered. The dataset takes no memory, but torch's `RandomSampler` and `DistributedSampler` list every index
(tens of bytes each), and Lightning adds the latter on several ranks: keep `num_items` to what a run needs.
"""

from __future__ import annotations

import hashlib
import operator

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_tp.errors import TPError


class RandomTokens(Dataset[dict[str, Tensor]]):
    """Uniform random tokens for next-token prediction: `{"tokens": (seq_len,), "targets": (seq_len,)}`, both int64.

    `targets` is `tokens` shifted by one. Item i depends on (seed, i, vocab_size) only: it is the same on every rank, in
    every worker and in every order, and a longer `seq_len` begins with the tokens of a shorter one.

    Args:
        num_items: The length of the dataset; 2**40 takes no more memory than 1.
        seq_len: Tokens in an item.
        vocab_size: Tokens are drawn from 0 .. vocab_size - 1.
        seed: Another seed gives other items.

    Raises:
        TPError: If a size is less than 1.

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
                raise TPError(f"RandomTokens: `{name}={value}` is less than 1. Pass an integer of at least 1.")
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
        # Not torch.Generator().manual_seed(...): on CPU it keeps 32 bits of the seed, so that of 100 thousand items
        # some would be equal. 63 bits per token leave a bias of less than vocab_size / 2**63.
        raw = hashlib.shake_128(f"{self.seed},{index}".encode()).digest(8 * (self.seq_len + 1))
        bits = torch.frombuffer(bytearray(raw), dtype=torch.int64)  # (seq_len + 1,)
        tokens = (bits & (2**63 - 1)) % self.vocab_size
        return {"tokens": tokens[:-1], "targets": tokens[1:]}
