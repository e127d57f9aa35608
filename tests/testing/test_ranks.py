from __future__ import annotations

import lightning_tp.testing
from lightning_tp.testing import ranks


def test_the_names_of_an_earlier_version_are_those_of_today() -> None:
    assert ranks.run_ranks is lightning_tp.testing.run_ranks
    assert (ranks.RankError, ranks.RankFailure) == (lightning_tp.testing.RankError, lightning_tp.testing.RankFailure)
