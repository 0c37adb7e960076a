"""The processes of a run, and plain data passed among them.

Results, decisions and errors travel here, pickled, over a group of their own on the CPU; weights and gradients are the
business of the strategies. In one process every method is the identity.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist

Value = TypeVar('Value')
Failure = TypeVar('Failure', bound=BaseException)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ranks:
    """Which process this is, of how many.

    Args:
        rank: Number of this process, ``0 <= rank < world_size``.
        world_size: Number of processes.
        local_rank: Number of this process on its node.
        local_world_size: Number of processes on this node.
        group: Group over which plain data travels; None for the default group.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    group: Any = None

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes what only one may write."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until every process is here."""
        self.all_gather(None)

    def all_gather(self, value: Value) -> list[Value]:
        """The values of all processes, by rank, on all of them."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def gather(self, value: Value) -> list[Value] | None:
        """The values of all processes, by rank, on the main one; None on the others."""
        if self.world_size == 1:
            return [value]
        values: list[Any] | None = [None] * self.world_size if self.is_main else None
        dist.gather_object(value, values, dst=0, group=self.group)
        return values

    def broadcast(self, value: Value) -> Value:
        """The value of the main process."""
        if self.world_size == 1:
            return value
        values = [value if self.is_main else None]
        dist.broadcast_object_list(values, src=0, group=self.group)
        return values[0]

    def on_main(self, function: Callable[[], Value]) -> Value:
        """Call a function in the main process alone.

        Returns:
            Its result, in every process.

        Raises:
            Exception: What the function raised, in every process.
        """
        if self.world_size == 1:
            return function()
        result, error = None, None
        if self.is_main:
            try:
                result = function()
            except Exception as raised:  # travels to the other processes, which would wait for ever otherwise
                error = portable(raised)
        result, error = self.broadcast((result, error))
        if error is not None:
            raise self.common(error)
        return result

    def together(self, function: Callable[[], Value], exchanges: bool = False) -> Value:
        """Call a function in every process, and fail in every process if it fails in any.

        Args:
            function: What to call.
            exchanges: Whether the function itself exchanges something among the processes, as networks do that are
                divided. The others then wait inside of it for a process that fails there, which can tell them nothing:
                it logs its error, raises it at once, and its launcher ends the others.

        Returns:
            Its result in this process.

        Raises:
            Exception: What the function raised here, or what it raised in the first process where it failed.
        """
        result, error = None, None
        try:
            result = function()
        except Exception as raised:
            if exchanges and self.world_size > 1:
                logger.error('process %d of %d has failed', self.rank, self.world_size, exc_info=raised)
                raise
            error = raised
        errors = self.all_gather(None if error is None else portable(error))
        first = next((found for found in errors if found is not None), None)
        if first is not None:
            raise self.common(error if error is not None else first)
        return result

    def common(self, error: Failure) -> Failure:
        """Mark an error that every process raises at the same place, so that only the main one reports it.

        Args:
            error: The error.

        Returns:
            The same.
        """
        error.is_common = True
        if not self.is_main:
            error.is_reported_by_main = True
        return error

    def is_common(self, error: BaseException) -> bool:
        """Whether every process raises an error at the same place, so that they can still do something together.

        Args:
            error: What was raised in this process.
        """
        return self.world_size == 1 or getattr(error, 'is_common', False)


ALONE = Ranks()
"""One process on its own."""


def portable(error: Exception, kind: type[Exception] = RuntimeError) -> Exception:
    """An error that can be sent to another process.

    Args:
        error: The error.
        kind: Class of the one that says the same, where the error itself cannot be sent.
    """
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever its class does when it is taken apart and put together
        return kind(f'{type(error).__name__}: {error}').with_traceback(error.__traceback__)
    return error


def is_reported_by_main(error: BaseException) -> bool:
    """Whether an error, or what caused it, is one that the main process raises too and this one is not.

    Args:
        error: What was raised in this process, see :meth:`Ranks.common`.
    """
    cause: BaseException | None = error
    while cause is not None:
        if getattr(cause, 'is_reported_by_main', False):
            return True
        cause = cause.__cause__
    return False
