"""Making a cache of ours, by one process or several, in one go or in many.

What is to be made is written down first, as a plan. Rows are dealt out to shards by their number alone, and shards to
processes; a shard becomes visible whole or not at all. So whatever was interrupted, and however many processes there
were, the shards that are there are those of an uninterrupted run, and a restart makes the others. The index is written
when all are there.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor
from tqdm import tqdm

from lakonlab.datasets.prompt_cache.errors import CacheError
from lakonlab.datasets.prompt_cache.index import (
    INDEX_FILE,
    PLAN_FILE,
    PROMPTS,
    VERSION,
    Index,
    Table,
    digest_of,
    read_index,
)
from lakonlab.datasets.prompt_cache.plan import plain, require_plan
from lakonlab.datasets.prompt_cache.rows import Row, encode
from lakonlab.datasets.prompt_cache.shard import FORMAT, ShardInfo, read_info, write_shard
from lakonlab.ranks import ALONE, Ranks
from lakonlab.storage import files
from lakonlab.storage.local import directory_lock

logger = logging.getLogger('lakonlab.datasets')

#: Makes the fields of some rows, in their order.
MakeRows = Callable[[Sequence[int]], Iterable[Mapping[str, Tensor | None]]]
SUFFIX = '.safetensors'
PARALLEL_READS = 16


def num_threads() -> int:
    """Threads of a process that compress rows."""
    return max(1, min(8, len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1))


class CacheWriter:
    """Writes the shards that a cache lacks, and then its index.

    Args:
        folder: Folder of the cache, anywhere that can be written to.
        kind: Kind of the cache.
        records: Number of records.
        tables: Tables by name, without shards.
        plan: Plain data: what the rows depend on. A cache that was begun with another plan is not gone on with.
        ranks: The processes that make it together; each calls every method.
    """

    def __init__(
        self,
        folder: str,
        kind: str,
        records: int,
        tables: Mapping[str, Table],
        plan: Mapping[str, Any],
        ranks: Ranks = ALONE,
    ):
        self.folder, self.kind, self.records, self.tables, self.ranks = str(folder), kind, records, dict(tables), ranks
        sizes = {name: [table.rows, table.rows_per_shard] for name, table in tables.items()}
        self.plan = plain(
            {'format': FORMAT, 'version': VERSION, 'kind': kind, 'records': records, 'tables': sizes, **plan}
        )
        self.digest = digest_of(self.plan)
        self._made: dict[str, dict[int, ShardInfo]] = {name: {} for name in tables}
        self._missing: dict[str, list[int]] = {}
        self._lock = contextlib.ExitStack()

    def start(self) -> bool:
        """Write the plan, or compare it with that of a cache which was begun before, and find what is missing.

        Returns:
            Whether there is anything to do.

        Raises:
            CacheError: The folder holds a cache of another plan.
            DirectoryInUseError: Another run is making it; only noticed in a local folder.
        """
        is_finished, made = self.ranks.on_main(self._look)
        self._made = made
        self._missing = {
            name: [number for number in range(table.num_shards) if number not in made[name]]
            for name, table in self.tables.items()
        }
        return not is_finished

    def _look(self) -> tuple[bool, dict[str, dict[int, ShardInfo]]]:
        if not files.is_remote(self.folder):
            self._lock.enter_context(directory_lock(files.as_local(self.folder)))
        path = files.join(self.folder, PLAN_FILE)
        if files.is_file(path):
            require_plan(path, self.plan, self.folder)
        elif files.is_file(files.join(self.folder, INDEX_FILE)):
            raise CacheError(f'{self.folder} holds a cache whose {PLAN_FILE} is missing: choose another folder')
        else:
            files.write_text(path, json.dumps(self.plan, indent=1))
        if files.is_file(files.join(self.folder, INDEX_FILE)):
            read_index(self.folder, self.kind)
            self._lock.close()
            return True, {name: {} for name in self.tables}
        files.clean_uploads(self.folder)
        names = set(files.list_names(self.folder))
        made = {name: self._whole_shards(name, names) for name in self.tables}
        count = sum(len(shards) for shards in made.values())
        if count:
            total = sum(table.num_shards for table in self.tables.values())
            logger.info('%s: %d of %d shards are there already and kept', self.folder, count, total)
        return False, made

    def _whole_shards(self, table: str, names: set[str]) -> dict[int, ShardInfo]:
        present = [number for number in range(self.tables[table].num_shards) if self.name_of(table, number) in names]

        def look(number: int) -> ShardInfo | None:
            path = files.join(self.folder, self.name_of(table, number))
            try:
                info, plan = read_info(path)
            except CacheError as error:
                logger.warning('%s; it is made again', error)
                return None
            if plan != self.digest or info.rows != len(self.tables[table].rows_of(number)):
                logger.warning('%s belongs to another cache; it is made again', path)
                return None
            return info

        with ThreadPoolExecutor(PARALLEL_READS, thread_name_prefix='cache') as threads:
            found = zip(present, threads.map(look, present), strict=True)
            return {number: info for number, info in found if info is not None}

    def name_of(self, table: str, shard: int) -> str:
        """File name of a shard."""
        return f'{table}-{shard:06d}{SUFFIX}'

    def share(self, table: str) -> list[int]:
        """Missing shards that this process makes."""
        return self._missing[table][self.ranks.rank :: self.ranks.world_size]

    def made(self, table: str, shard: int) -> ShardInfo:
        """A shard that is there."""
        return self._made[table][shard]

    def fill(
        self,
        table: str,
        make: MakeRows,
        batch_size: int,
        label: str,
        compressed: bool = True,
        before_shard: Callable[[int], None] | None = None,
    ) -> None:
        """Make this process's share of a table.

        Args:
            table: Its name.
            make: Makes the rows of a batch. Batches never span two shards, so that what a row is made with depends
                on its number alone.
            batch_size: Largest number of rows to make at once.
            label: What is made, for the progress bar.
            compressed: See :func:`~lakonlab.datasets.prompt_cache.rows.encode`.
            before_shard: Called with the number of each shard before its first row is made.

        Raises:
            CacheError: What was made is of no use.
            OSError: A shard cannot be written.
        """
        share = self.share(table)
        total = sum(len(self.tables[table].rows_of(number)) for number in share)
        if self.ranks.world_size > 1:
            label = f'{label} (share of process 0)'
        with tqdm(total=total, desc=label, disable=not self.ranks.is_main, unit='') as progress:
            for number in share:
                if before_shard is not None:
                    before_shard(number)
                rows = list(self.tables[table].rows_of(number))
                self.write(table, number, _encoded(rows, make, batch_size, compressed, progress))

    def write(self, table: str, shard: int, columns: Mapping[str, Sequence[Row]]) -> None:
        """Write a shard."""
        name = self.name_of(table, shard)
        with files.open_write(files.join(self.folder, name)) as stream:
            self._made[table][shard] = write_shard(stream, name, columns, self.digest, by_row=self.kind == PROMPTS)

    def finish(self, facts: Mapping[str, Any], columns: Mapping[str, np.ndarray] | None = None) -> None:
        """Wait for all processes, and write the index.

        Args:
            facts: See :class:`~lakonlab.datasets.prompt_cache.index.Index`.
            columns: As there.

        Raises:
            CacheError: A shard is missing.
        """
        parts = self.ranks.gather(self._made)

        def write() -> None:
            made: dict[str, dict[int, ShardInfo]] = {name: {} for name in self.tables}
            for part in parts:
                for name, shards in part.items():
                    made[name].update(shards)
            tables = {}
            for name, table in self.tables.items():
                missing = [number for number in range(table.num_shards) if number not in made[name]]
                if missing:
                    raise CacheError(f'{self.folder}: {len(missing)} shards of {name} were not made; start again')
                tables[name] = replace(table, shards=tuple(made[name][number] for number in range(table.num_shards)))
            Index(self.kind, self.records, tables, {**self.plan, **facts}, dict(columns or {})).write(self.folder)

        self.ranks.on_main(write)
        self._lock.close()


def _encoded(
    rows: Sequence[int], make: MakeRows, batch_size: int, compressed: bool, progress: tqdm
) -> dict[str, list[Row]]:
    """The columns of a shard; rows are compressed while the next batch is made."""
    jobs: list[dict[str, Future[Row]]] = []
    with ThreadPoolExecutor(num_threads(), thread_name_prefix='compress') as threads:
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            made = list(make(batch))
            if len(made) != len(batch):
                raise CacheError(f'{len(made)} rows were made of {len(batch)}')
            jobs += [{name: threads.submit(encode, value, compressed) for name, value in row.items()} for row in made]
            progress.update(len(batch))
        names = list(dict.fromkeys(name for row in jobs for name in row))
        absent = encode(None)
        return {name: [row[name].result() if name in row else absent for row in jobs] for name in names}
