"""RandomTokens: the same item everywhere, different items elsewhere, uniform, shaped for next-token training."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_tp.data.random_tokens import RandomTokens
from lightning_tp.errors import TPError


def test_item_is_next_token_pair() -> None:
    item = RandomTokens(10, seq_len=6, vocab_size=50)[3]
    assert item["tokens"].shape == item["targets"].shape == (6,)
    assert item["tokens"].dtype == item["targets"].dtype == torch.int64
    assert torch.equal(item["tokens"][1:], item["targets"][:-1])


def test_item_depends_on_seed_and_index_only() -> None:
    first, again = RandomTokens(100, 16, 1000), RandomTokens(7, 16, 1000)
    torch.manual_seed(1)
    forward = [first[i]["tokens"] for i in range(7)]
    torch.manual_seed(2)
    backward = [again[i]["tokens"] for i in reversed(range(7))]
    assert all(torch.equal(a, b) for a, b in zip(forward, reversed(backward), strict=True))
    assert not torch.equal(forward[0], forward[1])
    assert not torch.equal(forward[0], RandomTokens(100, 16, 1000, seed=1)[0]["tokens"])
    assert torch.equal(RandomTokens(100, 4, 1000)[0]["tokens"], forward[0][:4])


def test_items_are_pinned() -> None:
    """Benchmarks of two versions must see the same tokens: a change of this line is a break."""
    assert RandomTokens(1, 6, 1000, seed=3)[0]["tokens"].tolist() == [567, 823, 50, 548, 506, 699]


def test_seed_and_index_do_not_run_together() -> None:
    one, eleven = RandomTokens(100, 16, 1000, seed=1), RandomTokens(100, 16, 1000, seed=11)
    assert not torch.equal(one[11]["tokens"], eleven[1]["tokens"])
    # torch's own CPU generator keeps 32 bits of its seed and would give these two the same tokens
    huge = RandomTokens(2**40, 16, 1000)
    assert not torch.equal(huge[5]["tokens"], huge[5 + 2**32]["tokens"])


def test_workers_see_the_same_items() -> None:
    dataset = RandomTokens(12, 8, 100)
    loaded = torch.cat([batch["tokens"] for batch in DataLoader(dataset, batch_size=2, num_workers=2)])
    assert torch.equal(loaded, torch.stack([dataset[i]["tokens"] for i in range(12)]))


def test_tokens_are_uniform() -> None:
    dataset = RandomTokens(2000, 100, vocab_size=10)
    counts = torch.bincount(torch.cat([dataset[i]["tokens"] for i in range(2000)]), minlength=10)
    assert counts.sum() == 200_000
    assert counts.shape == (10,)
    chi_squared = float(((counts - 20_000.0) ** 2 / 20_000).sum())
    assert chi_squared < 27.9  # 9 degrees of freedom: 1 in 1000


def test_huge_dataset_is_free_and_ends() -> None:
    huge = RandomTokens(2**40, 4, 100)
    assert len(huge) == 2**40
    assert huge[2**40 - 1]["tokens"].shape == (4,)
    with pytest.raises(IndexError, match="1099511627776 is not in"):
        huge[2**40]
    assert len(list(RandomTokens(5, 4, 100))) == 5  # type: ignore[call-overload]


@pytest.mark.parametrize("name", ["num_items", "seq_len", "vocab_size"])
def test_zero_is_refused(name: str) -> None:
    with pytest.raises(TPError, match=f"`{name}=0`"):
        RandomTokens(**{"num_items": 1, "seq_len": 1, "vocab_size": 1, name: 0})
