"""What the strategies of Trainer and Fabric share: sizes of the mesh and the launcher."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Literal

from lightning.fabric.utilities import imports as lightning_imports

from lightning_tp._compat import limit_waiting
from lightning_tp.core.comm.mesh import mesh_sizes
from lightning_tp.errors import TPError, raise_on_rank_zero
from lightning_tp.trainer.launch.processes import end_with_children
from lightning_tp.trainer.launch.rendezvous import agree_on_start

Launcher = Literal["auto", "popen", "fork", "spawn"]


LAUNCHERS = ("auto", "popen", "fork", "spawn")


def start_method(launcher: Launcher) -> Literal["popen", "fork", "spawn"]:
    """How ranks are started here: "auto" forks in an interactive session, and starts the script again elsewhere.

    Raises:
        TPError: in an interactive session, for a way that does not work there.
    """
    if not lightning_imports._IS_INTERACTIVE:
        return "popen" if launcher == "auto" else launcher
    if launcher in ("popen", "spawn"):
        raise TPError(
            f"`launcher={launcher!r}` starts processes that know nothing of what was defined in a notebook or at a prompt. Leave it out, or "
            "use `launcher='fork'` (`strategy=\"tp_notebook\"`); or run a script."
        )
    return "fork"


class MeshStrategyMixin:
    """What the strategies of a Trainer and of Fabric share: the sizes of the mesh, and how ranks are started."""

    _asked: tuple[int | Literal["auto"], int | Literal["auto"]]  # tp, dp
    _launch_by: Launcher
    _launcher_class: Any  # for ranks that are forked or spawned

    def _check_package(self) -> None:
        """Raise `TPError` if this belongs to the other of Lightning's two packages."""

    def _configure_launcher(self: Any) -> None:
        assert self.cluster_environment is not None
        external = self.cluster_environment.creates_processes_externally
        with raise_on_rank_zero(self.cluster_environment.global_rank() if external else 0):
            self._check_package()
            self.sizes  # noqa: B018  refuse sizes that don't fit here, before any other process is started
            method = "popen" if external else start_method(self._launch_by)
        if method == "popen":
            super()._configure_launcher()  # type: ignore[misc]  # that of the strategy beside
        else:
            self._launcher = self._launcher_class(self, start_method=method)

    def _one_start(self: Any) -> AbstractContextManager[None]:
        """Around the making of the process group."""
        end_with_children(self._launcher)
        dp, tp = self.sizes
        return agree_on_start(self.cluster_environment.global_rank(), dp * tp, self._timeout)

    def _limit_waiting(self: Any) -> None:
        if self._timeout is not None:
            limit_waiting(self.device_mesh.get_all_groups(), self._timeout)

    @property
    def sizes(self: Any) -> tuple[int, int]:
        """(dp, tp) in this world.

        Raises:
            TPError: if there are none.
        """
        tp, dp = self._asked
        return mesh_sizes(tp, dp, self.num_nodes * self.num_processes, ranks_per_node=self.num_processes)


def check_launcher(launcher: Launcher) -> None:
    """Refuse a launcher that does not exist.

    Raises:
        TPError: it says which there are.
    """
    if launcher not in LAUNCHERS:
        raise TPError(f"`launcher={launcher!r}`: there are {', '.join(map(repr, LAUNCHERS))}.")
