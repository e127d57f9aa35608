"""Every test is guarded by the package's own fixtures: nothing may be left behind."""

import pytorch_lightning  # noqa: F401  here, before `lightning`: whichever is imported last takes the messages of both

pytest_plugins = ["lightning_tp.testing.fixtures", "pytester"]
