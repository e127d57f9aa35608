"""`run_ranks` and its errors under the name of an earlier version: `from lightning_tp.testing.ranks import RankError`."""

from lightning_tp.verify.rank_process import RankFailure as RankFailure
from lightning_tp.verify.run_ranks import RankError as RankError
from lightning_tp.verify.run_ranks import run_ranks as run_ranks
