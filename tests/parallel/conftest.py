"""Small runs in processes that the tests of a module share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import tiny_text_image
from tests.parallel.small_runs import train
from tests.processes import ProcessPool


class Runs:
    """Calls functions in groups of processes, and remembers the runs of one process, which others are compared with.

    Args:
        folder: For the weights of teachers.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._pools: dict[int, ProcessPool] = {}
        self._references: dict[str, dict[str, Any]] = {}

    def weights(self, kind: str) -> str | None:
        """File of the teacher's weights of a kind, if it reads one."""
        family = kind.partition('-')[0]
        if family not in tiny_text_image.SIZES:
            return None
        path = self.folder / f'{family}_0.safetensors'
        return str(path) if path.exists() else tiny_text_image.teacher_file(family, self.folder)

    def call(self, world_size: int, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """Results of a function by rank, see :meth:`tests.processes.ProcessPool.run`."""
        pool = self._pools.setdefault(world_size, ProcessPool(world_size))
        return pool.run(function, *args, **kwargs)

    def train(self, world_size: int, kind: str, strategy: str, **run: Any) -> list[dict[str, Any]]:
        """Results of :func:`tests.parallel.small_runs.train` by rank."""
        return self.call(world_size, train, kind, strategy, weights=self.weights(kind), **run)

    def reference(self, kind: str, **run: Any) -> dict[str, Any]:
        """The same of one process."""
        key = repr((kind, sorted(run.items())))
        if key not in self._references:
            (self._references[key],) = self.train(1, kind, 'single', **run)
        return self._references[key]

    def close(self) -> None:
        """End the processes."""
        for pool in self._pools.values():
            pool.close()


@pytest.fixture(scope='module')
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    """Small runs in several processes."""
    runs = Runs(tmp_path_factory.mktemp('weights'))
    yield runs
    runs.close()
