"""Every test is guarded by the package's own fixtures: nothing may be left behind."""

pytest_plugins = ["lightning_tp.testing.fixtures", "pytester"]
