"""Processes played by threads, which notice when they are not all in the same place."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from lakonlab.ranks import Ranks

WAIT_SECONDS = 10.0


class _Table:
    """Where the values of a collective operation are laid."""

    def __init__(self, size: int):
        self.barrier = threading.Barrier(size, timeout=WAIT_SECONDS)
        self.values: list[Any] = [None] * size


@dataclass(frozen=True)
class ThreadRanks(Ranks):
    """A rank whose peers are threads; values travel pickled, and a rank that waits in vain fails."""

    table: _Table = field(default_factory=lambda: _Table(1))

    def _exchange(self, operation: str, value: Any) -> list[Any]:
        self.table.values[self.rank] = operation, pickle.dumps(value)
        self.table.barrier.wait()
        operations, values = zip(*self.table.values, strict=True)
        self.table.barrier.wait()
        assert len(set(operations)) == 1, f'the ranks are in different operations: {operations}'
        return [pickle.loads(found) for found in values]

    def all_gather(self, value):
        return self._exchange('all_gather', value)

    def gather(self, value):
        values = self._exchange('gather', value)
        return values if self.is_main else None

    def broadcast(self, value):
        return self._exchange('broadcast', value if self.is_main else None)[0]


def run_threads(function: Callable[[Ranks], Any], world_size: int) -> list[Any]:
    """Call ``function(ranks)`` in as many threads; what each returned or raised, by rank."""
    table = _Table(world_size)

    def call(rank: int) -> Any:
        try:
            return function(ThreadRanks(rank, world_size, rank, world_size, table=table))
        except Exception as error:
            return error

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(call, range(world_size)))
