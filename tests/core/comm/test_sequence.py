"""The length of a sharded sequence: remembered, told apart, refused."""

from __future__ import annotations

import pytest
import torch

from lightning_tp.core.comm.state import SEQUENCE, I, P, R
from lightning_tp.core.comm.transitions import invariant_to_sequence, sequence_to_replicate
from lightning_tp.errors import TPError
from lightning_tp.testing import run_ranks
from tests.core.comm.test_transitions import Pair, axis_of, function


def test_a_shard_of_another_length_is_refused() -> None:
    def body() -> None:
        axis = axis_of()
        with pytest.raises(TPError, match=r"\(1, 4, 2\).*no sequence was sharded.*`replicate`.*sequence_parallel=False"):
            sequence_to_replicate(torch.zeros(1, 4, 2), axis)
        invariant_to_sequence(torch.zeros(1, 9, 2), axis)  # 5 and 4
        assert sequence_to_replicate(torch.zeros(1, 5, 2), axis).shape == (1, 9, 2)
        for pair in ((SEQUENCE, R), (SEQUENCE, I)):
            for wrong in (4, 9):
                with pytest.raises(TPError, match=rf"\(1, {wrong}, 2\).*tp=2 ranks has 9 tokens, 5 per rank"):
                    function(pair, 2)(torch.zeros(1, wrong, 2), axis)

    run_ranks(body, 2)


@pytest.mark.parametrize("pair", [(I, SEQUENCE), (P, SEQUENCE)], ids=str)
def test_two_sequences_whose_shards_are_as_long_are_told_apart(pair: Pair) -> None:
    """An encoder's 9 tokens, then a decoder's 10, both 5 a rank: the first would get a token of padding, without a word."""

    def body() -> None:
        axis = axis_of()
        cut_first = function(pair, 2)
        first = torch.tanh(cut_first(torch.ones(1, 9, 2, requires_grad=True), axis)) * 2
        assert sequence_to_replicate(first, axis).shape == (1, 9, 2)
        second = torch.tanh(cut_first(torch.ones(1, 10, 2, requires_grad=True), axis)) * 2
        assert sequence_to_replicate(second, axis).shape == (1, 10, 2)  # another batch is well
        with pytest.raises(TPError, match=r"of 9 tokens .* of 10 tokens .* tp=2 ranks \(5 tokens per rank in both\).*output='I'"):
            sequence_to_replicate(first + 1, axis)
        third = cut_first(torch.ones(1, 9, 2, requires_grad=True), axis)
        assert sequence_to_replicate(third, axis).shape == (1, 9, 2)

    run_ranks(body, 2)


def test_the_length_is_that_of_the_last_cut() -> None:
    def body() -> None:
        axis = axis_of()
        for pair, length in (((I, SEQUENCE), 9), ((P, SEQUENCE), 6)):
            function(pair, 2)(torch.zeros(1, length, 2), axis)
            assert axis.seq_len == length

    run_ranks(body, 2)
