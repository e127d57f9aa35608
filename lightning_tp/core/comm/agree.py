"""Let ranks that do something together agree on its outcome; one process without a process group agrees with itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from lightning_tp.errors import TPError

T = TypeVar("T")


class Peers:
    """This rank and the others of its group.

    Args:
        group: default: all ranks.
        alone: without the others, even if there is a process group.

    Example:
        >>> Peers().gather("here")
        ['here']
    """

    def __init__(self, group: dist.ProcessGroup | None = None, *, alone: bool = False) -> None:
        self.group = group
        here = dist.is_available() and dist.is_initialized() and not alone
        self.rank, self.size = (dist.get_rank(group), dist.get_world_size(group)) if here else (0, 1)

    def gather(self, value: Any) -> list[Any]:
        """Return each rank's value on every rank. A collective."""
        if self.size == 1:
            return [value]
        every: list[Any] = [None] * self.size
        dist.all_gather_object(every, value, group=self.group)
        return every

    def from_first(self, work: Callable[[], T]) -> T:
        """Call `work` on the first rank, and return its result on every rank. A collective.

        Raises:
            TPError: on every rank, with the message of what it raised on the first.
        """
        answer: list[Any] = [None, None]
        if self.rank == 0:
            try:
                answer[0] = work()
            except Exception as error:  # the others wait for the answer
                if self.size == 1:
                    raise
                answer[1] = str(error) if isinstance(error, TPError) else f"{type(error).__name__}: {error}"
        if self.size > 1:
            dist.broadcast_object_list(
                answer, src=0 if self.group is None else dist.get_global_rank(self.group, 0), group=self.group
            )
        if answer[1] is not None:
            raise TPError(answer[1])
        result: T = answer[0]
        return result

    def first_message(self, message: str | None) -> str | None:
        """Return the message of the lowest rank that has one, on every rank. A collective."""
        return next((m for m in self.gather(message) if m is not None), None)
