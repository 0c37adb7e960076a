"""The shards of a cache, opened when they are needed."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from torch import Tensor

from lakonlab.datasets.prompt_cache.errors import CacheError
from lakonlab.datasets.prompt_cache.index import Table
from lakonlab.datasets.prompt_cache.shard import Shard, UniformRows
from lakonlab.storage import files

Value = TypeVar('Value')
Item = TypeVar('Item')

#: Shards that a process keeps mapped or, far away, the tables of which (some 60 kB each) it keeps; the one that was not
#: used for longest is closed first.
MAX_OPEN_SHARDS = 2048
#: Far away, smaller rows are not worth a request each: their shards are fetched whole, into the download cache.
SMALL_ROW_BYTES = 1 << 16
PARALLEL_READS = 8


class ShardStore:
    """One table of a cache.

    Shards of a local cache are mapped into memory. Of one far away, shards of small rows (latents of 256 pixels) are
    fetched whole, once for all processes of a node, and rows of others (embedded prompts) are read one by one: by one
    request each, and one for the tables of each shard that is not open.

    Args:
        folder: The cache.
        table: What the index lists.
    """

    def __init__(self, folder: str, table: Table):
        self.folder, self.table = folder, table
        self.is_local = not files.is_remote(folder)
        stored = sum(shard.bytes for shard in table.shards)
        self.whole = self.is_local or stored < SMALL_ROW_BYTES * table.rows
        self._open: OrderedDict[int, Shard] = OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ('_open', '_lock')}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _open=OrderedDict(), _lock=threading.Lock())

    def shard(self, number: int) -> Shard:
        """A shard, opened if it is not.

        Raises:
            CacheError: It is missing or damaged.
        """
        with self._lock:
            shard = self._open.get(number)
            if shard is not None:
                self._open.move_to_end(number)
                return shard
        info = self.table.shards[number]
        shard = Shard(files.join(self.folder, info.file), info, self.whole)
        with self._lock:
            self._open[number] = shard
            while len(self._open) > MAX_OPEN_SHARDS:
                self._open.popitem(last=False)
        return shard

    def open(self, rows: Iterable[int]) -> None:
        """Open the shards of some rows, several at a time where that is mostly waiting; each only once.

        Raises:
            CacheError: One is missing or damaged.
        """
        wanted = dict.fromkeys(self.table.place(row)[0] for row in rows)
        self.map(self.shard, [number for number in wanted if number not in self._open])

    def read(self, row: int, columns: Iterable[str], where: str) -> dict[str, Tensor]:
        """Columns of a row, those that it has.

        Raises:
            CacheError: It is damaged.
        """
        number, position = self.table.place(row)
        return self.shard(number).rows(list(columns), position, where)

    def uniform(self, shard: int, column: str) -> UniformRows | None:
        """See :meth:`Shard.uniform`.

        Raises:
            CacheError: The shard is missing or damaged.
        """
        return self.shard(shard).uniform(column)

    def all_columns(self, row: int) -> list[str]:
        """Names of the columns of the shard of a row."""
        return self.shard(self.table.place(row)[0]).columns

    def map(self, function: Callable[[Item], Value], items: Sequence[Item]) -> list[Value]:
        """Call a function that reads for every item, several at a time where reading is mostly waiting."""
        if self.whole or len(items) < 2:
            return [function(item) for item in items]
        with ThreadPoolExecutor(min(PARALLEL_READS, len(items)), thread_name_prefix='cache') as threads:
            return list(threads.map(function, items))

    def check(self, name_of: Callable[[int], str]) -> Iterator[tuple[str, CacheError | None]]:
        """Read every row of every shard; yields each row's name and what is wrong with it, None if nothing is."""
        for number, info in enumerate(self.table.shards):
            rows = self.table.rows_of(number)
            path = files.join(self.folder, info.file)
            try:
                shard = Shard(path, info, whole=True)
            except CacheError as error:
                for row in rows:
                    yield f'{name_of(row)} in {path}', error
                continue
            for position, row in enumerate(rows):
                error = None
                for column in shard.columns:
                    try:
                        shard.row(column, position, name_of(row))
                    except CacheError as raised:
                        error = error or raised
                yield f'{name_of(row)} in {path}', error
