"""Tools for tests of sharded models: real ranks on one machine, and comparisons with a single process.

`run_ranks` runs a function in several real processes, `fake_world` simulates a world of any size in this one, `assert_trees_close`
compares named tensors, `assert_parity` a sharded model with the full one, and `randomize_` gives a model weights that hide no mistake.
The pytest fixtures and `run_if` need pytest, so they are imported from `lightning_tp.testing.fixtures`.
"""

from lightning_tp.core.comm.fake_world import fake_world as fake_world
from lightning_tp.core.comm.fake_world import single_rank_mesh as single_rank_mesh
from lightning_tp.testing.compare import assert_parity as assert_parity
from lightning_tp.testing.compare import assert_trees_close as assert_trees_close
from lightning_tp.testing.randomize import randomize_ as randomize_
from lightning_tp.verify.rank_process import RankFailure as RankFailure
from lightning_tp.verify.run_ranks import RankError as RankError
from lightning_tp.verify.run_ranks import run_ranks as run_ranks
