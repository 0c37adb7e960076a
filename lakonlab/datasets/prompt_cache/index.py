"""The index of a cache: what it holds, in which shards; written last, so that what has one is finished."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import safetensors.numpy

from lakonlab.datasets.prompt_cache.errors import CacheError
from lakonlab.datasets.prompt_cache.shard import FORMAT, ShardInfo
from lakonlab.storage import files

INDEX_FILE = 'index.json'
PLAN_FILE = 'plan.json'
RECORDS_FILE = 'records.safetensors'
VERSION = 1
PROMPTS, LATENTS = 'prompts', 'latents'


@dataclass(frozen=True)
class Table:
    """Shards of rows of one kind.

    Args:
        rows: Number of rows in all.
        rows_per_shard: Rows of every shard but the last.
        shards: The shards in order.
    """

    rows: int
    rows_per_shard: int
    shards: tuple[ShardInfo, ...] = ()

    def place(self, row: int) -> tuple[int, int]:
        """Shard and number in it of a row."""
        return divmod(row, self.rows_per_shard)

    @property
    def num_shards(self) -> int:
        """Shards that so many rows take."""
        return -(-self.rows // self.rows_per_shard)

    def rows_of(self, shard: int) -> range:
        """Rows of a shard."""
        return range(shard * self.rows_per_shard, min(self.rows, (shard + 1) * self.rows_per_shard))


@dataclass
class Index:
    """What a finished cache holds.

    Args:
        kind: ``'prompts'`` or ``'latents'``.
        records: Number of records.
        tables: Tables by name.
        facts: How it was made, and what all records have in common.
        columns: What differs from record to record, by name; arrays whose first dimension is that of the records,
            and ``names`` with ``names_ends`` for texts.
    """

    kind: str
    records: int
    tables: dict[str, Table]
    facts: dict[str, Any] = field(default_factory=dict)
    columns: dict[str, np.ndarray] = field(default_factory=dict)

    def write(self, folder: str) -> None:
        """Write it; the file that makes the cache a finished one comes last."""
        content = safetensors.numpy.save(self.columns) if self.columns else b''
        if content:
            files.write_bytes(files.join(folder, RECORDS_FILE), content)
        value = {
            'format': FORMAT,
            'version': VERSION,
            'kind': self.kind,
            'records': self.records,
            'facts': self.facts,
            'records_sha256': hashlib.sha256(content).hexdigest() if content else None,
            'tables': {
                name: {
                    'rows': table.rows,
                    'rows_per_shard': table.rows_per_shard,
                    'shards': [shard.as_dict() for shard in table.shards],
                }
                for name, table in self.tables.items()
            },
        }
        value['sha256'] = digest_of(value)
        files.write_text(files.join(folder, INDEX_FILE), json.dumps(value, indent=1))


def read_index(folder: str, kind: str) -> Index:
    """Read and verify the index of a cache.

    Args:
        folder: The cache.
        kind: What it should be of.

    Raises:
        CacheError: There is none, it is damaged, or of another kind or version.
    """
    path = files.join(folder, INDEX_FILE)
    try:
        value = json.loads(files.read_bytes(path))
        expected = value.pop('sha256')
    except FileNotFoundError as error:
        raise CacheError(f'{folder} holds no finished cache: there is no {INDEX_FILE}') from error
    except (ValueError, KeyError, AttributeError) as error:
        raise CacheError(f'{path} is damaged: {error}. {MAKE_AGAIN}') from error
    if digest_of(value) != expected:
        raise CacheError(f'{path} is damaged: its checksum is wrong. {MAKE_AGAIN}')
    if value['format'] != FORMAT or value['version'] > VERSION:
        raise CacheError(f'{path} is of version {value["version"]} of {value["format"]}: update to read it')
    if value['kind'] != kind:
        raise CacheError(f'{folder} is a cache of {value["kind"]}, expected one of {kind}')
    tables = {
        name: Table(table['rows'], table['rows_per_shard'], tuple(ShardInfo(**shard) for shard in table['shards']))
        for name, table in value['tables'].items()
    }
    columns = {} if value['records_sha256'] is None else _read_columns(folder, value['records_sha256'])
    return Index(kind, value['records'], tables, value['facts'], columns)


MAKE_AGAIN = (
    f'Remove {INDEX_FILE} and run the command that made the cache again: it keeps the shards that are whole and writes '
    'the index anew'
)


def _read_columns(folder: str, expected: str) -> dict[str, np.ndarray]:
    path = files.join(folder, RECORDS_FILE)
    try:
        content = files.read_bytes(path)
    except FileNotFoundError as error:
        raise CacheError(f'{path} is missing, which the index of the cache lists. {MAKE_AGAIN}') from error
    if hashlib.sha256(content).hexdigest() != expected:
        raise CacheError(f'{path} is damaged: its checksum is wrong. {MAKE_AGAIN}')
    return safetensors.numpy.load(content)


def digest_of(value: Mapping[str, Any]) -> str:
    """SHA-256 of plain data, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def pack_texts(texts: Sequence[str], name: str) -> dict[str, np.ndarray]:
    """Texts as two columns: all of them as UTF-8, and where each ends."""
    encoded = [text.encode() for text in texts]
    ends = np.cumsum([len(text) for text in encoded], dtype=np.int64)
    return {name: np.frombuffer(b''.join(encoded), np.uint8).copy(), f'{name}_ends': ends}


def unpack_text(columns: Mapping[str, np.ndarray], name: str, number: int) -> str:
    """A text of :func:`pack_texts`."""
    ends = columns[f'{name}_ends']
    start = int(ends[number - 1]) if number else 0
    return columns[name][start : int(ends[number])].tobytes().decode()
