from __future__ import annotations

import lightning_tp.testing as testing
from lightning_tp.testing import ranks
from lightning_tp.verify import rank_process, run_ranks


def test_the_names_are_those_of_run_ranks() -> None:
    for found in (testing, ranks):
        assert found.run_ranks is run_ranks.run_ranks
        assert found.RankError is run_ranks.RankError
        assert found.RankFailure is rank_process.RankFailure
