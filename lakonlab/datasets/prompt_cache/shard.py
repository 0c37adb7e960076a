"""Shards: safetensors files of rows, with what says where each row is in front of the rows themselves.

Column ``c`` of a shard has a table ``c.rows`` (N, 5 + D) int64, see :mod:`lakonlab.datasets.prompt_cache.rows`. Its
bytes are in ``c.data``; or, in a shard by rows, those of all columns are in ``.data``, the columns of a row side by
side, so that one request gets them from far away. All tables come first, so that one read of a known length gets them;
and what they say is covered by one checksum, the bytes of every row and column by another.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from lakonlab.datasets.prompt_cache.errors import CacheError
from lakonlab.datasets.prompt_cache.rows import (
    ABSENT,
    CHECKSUM,
    CODEC,
    DTYPE,
    DTYPES,
    LENGTH,
    RAW,
    SHAPE,
    START,
    Row,
    checksum,
    decode,
)
from lakonlab.storage import files

ROWS, DATA = '.rows', '.data'
#: Stands for a column in the name of the data of a shard by rows.
TOGETHER = ''
#: Rows begin at multiples of this, so that memory maps are aligned for every dtype.
ALIGNMENT = 8
FORMAT = 'lakonlab-cache'
#: What is read first of a shard whose head is of unknown size.
USUAL_HEAD_BYTES = 1 << 18


@dataclass(frozen=True)
class ShardInfo:
    """A shard as an index lists it.

    Args:
        file: Its name.
        rows: Number of rows.
        bytes: Size of the file.
        head_bytes: Size of everything before the data.
        head_checksum: CRC-32 of that.
    """

    file: str
    rows: int
    bytes: int
    head_bytes: int
    head_checksum: int

    def as_dict(self) -> dict[str, int | str]:
        """Plain data."""
        return asdict(self)


def write_shard(
    stream: BinaryIO, name: str, columns: Mapping[str, Sequence[Row]], plan: str, by_row: bool = False
) -> ShardInfo:
    """Write a shard.

    Args:
        stream: Where to.
        name: Name of the file.
        columns: Rows by the name of their column, equally many.
        plan: Digest of what the cache is to hold, so that no shard of another one is taken for its own.
        by_row: Whether the columns of a row are next to each other, to be read together; else the rows of a column are.
    """
    count = len(next(iter(columns.values())))
    tables = {column: _table(rows) for column, rows in columns.items()}
    if by_row:
        content = [rows[number] for number in range(count) for rows in columns.values()]
        groups = {TOGETHER: content}
        starts = np.cumsum([0, *(_padded(len(row.content)) for row in content)], dtype=np.int64)[:-1]
        for place, table in enumerate(tables.values()):
            table[:, START] = starts[place :: len(tables)]
    else:
        groups = dict(columns)
    entries: dict[str, object] = {'__metadata__': {'format': FORMAT, 'plan': plan}}
    position = 0
    for column, table in tables.items():
        entries[column + ROWS] = _entry('I64', list(table.shape), position, table.nbytes)
        position += table.nbytes
    for group, rows in groups.items():
        size = sum(_padded(len(row.content)) for row in rows)
        entries[group + DATA] = _entry('U8', [size], position, size)
        position += size
    header = json.dumps(entries, separators=(',', ':')).encode()
    header += b' ' * (-len(header) % ALIGNMENT)
    head = b''.join(
        [len(header).to_bytes(8, 'little'), header, *(table.astype('<i8').tobytes() for table in tables.values())]
    )
    stream.write(head)
    for rows in groups.values():
        for row in rows:
            stream.write(row.content)
            stream.write(b'\0' * (_padded(len(row.content)) - len(row.content)))
    size = 8 + len(header) + position
    return ShardInfo(name, count, size, len(head), zlib.crc32(head))


def _table(rows: Sequence[Row]) -> np.ndarray:
    dimensions = max((len(row.shape) for row in rows), default=0)
    table = np.full((len(rows), SHAPE + dimensions), ABSENT, dtype=np.int64)
    start = 0
    for number, row in enumerate(rows):
        table[number, :SHAPE] = start, len(row.content), row.checksum(number), row.codec, row.dtype
        table[number, SHAPE : SHAPE + len(row.shape)] = row.shape
        start += _padded(len(row.content))
    return table


def _entry(dtype: str, shape: list[int], start: int, size: int) -> dict[str, object]:
    return {'dtype': dtype, 'shape': shape, 'data_offsets': [start, start + size]}


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def read_info(path: str) -> tuple[ShardInfo, str]:
    """What an index lists of a shard that is there, and the digest of the plan it was made for.

    Args:
        path: The file, which is whole, for it is published in one step.

    Raises:
        CacheError: It is damaged.
    """
    size = files.size_of(path)
    head = files.read_bytes(path, 0, USUAL_HEAD_BYTES)
    length = int.from_bytes(head[:8], 'little')
    if not 0 < length <= size - 8:
        raise CacheError(f'{path} is no shard of a cache')
    if len(head) < 8 + length:
        head = files.read_bytes(path, 0, 8 + length)
    entries = _parse_header(head[8 : 8 + length], path)
    head_bytes = 8 + length + _tables_size(entries)
    head = head[:head_bytes] if len(head) >= head_bytes else files.read_bytes(path, 0, head_bytes)
    rows = next((entry['shape'][0] for name, entry in entries.items() if name.endswith(ROWS)), 0)
    end = max((entry['data_offsets'][1] for name, entry in entries.items() if name != '__metadata__'), default=0)
    if 8 + length + end != size:
        raise CacheError(f'{path} has {size} bytes, but should have {8 + length + end}')
    plan = entries.get('__metadata__', {}).get('plan', '')
    return ShardInfo(files.name_of(path), rows, size, head_bytes, zlib.crc32(head)), plan


def _parse_header(text: bytes, path: str) -> dict[str, dict]:
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CacheError(f'{path} is damaged: its header cannot be read ({type(error).__name__})') from error
    if not isinstance(entries, dict) or not all(_is_entry(name, entry) for name, entry in entries.items()):
        raise CacheError(f'{path} is damaged: its header is none of a shard')
    return entries


def _is_entry(name: str, entry: object) -> bool:
    """Whether a header may have such an entry."""
    if not isinstance(entry, dict):
        return False
    if name == '__metadata__':
        return isinstance(entry.get('plan'), str)
    shape, offsets = entry.get('shape'), entry.get('data_offsets')
    if not isinstance(shape, list) or not isinstance(offsets, list):
        return False
    if not all(type(number) is int and number >= 0 for number in (*shape, *offsets)):
        return False
    return len(offsets) == 2 and offsets[0] <= offsets[1] and len(shape) == (2 if name.endswith(ROWS) else 1)


def _tables_size(entries: Mapping[str, dict]) -> int:
    return sum(
        entry['data_offsets'][1] - entry['data_offsets'][0] for name, entry in entries.items() if name.endswith(ROWS)
    )


class UniformRows:
    """Rows of a shard that are stored as they are, and all alike.

    Args:
        content: Their bytes, (N, bytes of a row), uint8; a view of the file.
        dtype: Dtype of every row.
        shape: Shape of every row.
        checksums: Checksum of each row.
    """

    def __init__(self, content: np.ndarray, dtype: torch.dtype, shape: tuple[int, ...], checksums: list[int]):
        self.content, self.dtype, self.shape = content, dtype, shape
        self._checksums = checksums
        self._kind = DTYPES.index(dtype)
        self._is_verified = bytearray(len(checksums))

    def is_whole(self, number: int) -> bool:
        """Whether the checksum of a row is right; looked at once."""
        if not self._is_verified[number]:
            found = checksum(self.content[number].data, number, RAW, self._kind, self.shape)
            self._is_verified[number] = found == self._checksums[number]
        return bool(self._is_verified[number])


class Shard:
    """An open shard.

    Args:
        path: The file.
        info: What the index lists of it.
        whole: Whether to have all of it at hand, as a memory map of the file or of a copy in the download cache; False
            to read rows one by one from where they are.

    Raises:
        CacheError: It is missing, or not what the index lists.
    """

    def __init__(self, path: str, info: ShardInfo, whole: bool = True):
        self.path, self.info = path, info
        self._map: np.ndarray | None = None
        try:
            if whole:
                self._map = _mapped(files.fetch(path), path)
                head = self._map[: info.head_bytes].tobytes()
            else:
                head = files.read_bytes(path, 0, info.head_bytes)
        except FileNotFoundError as error:
            raise CacheError(f'{path} is missing, which the index of the cache lists') from error
        if self._map is not None and len(self._map) != info.bytes:
            size = len(self._map)
            raise CacheError(f'{path} is truncated or damaged: it has {size} bytes, its index lists {info.bytes}')
        if zlib.crc32(head) != info.head_checksum:
            raise CacheError(f'{path} is damaged: the checksum of its first {info.head_bytes} bytes is wrong')
        length = int.from_bytes(head[:8], 'little')
        entries = _parse_header(head[8 : 8 + length], path)
        self._uniform: dict[str, UniformRows | None] = {}
        self._tables: dict[str, np.ndarray] = {}
        self._starts: dict[str, int] = {}
        for name, entry in entries.items():
            start = 8 + length + entry['data_offsets'][0] if name != '__metadata__' else 0
            if name.endswith(ROWS):
                table = np.frombuffer(head, '<i8', int(np.prod(entry['shape'])), start)
                self._tables[name.removesuffix(ROWS)] = table.reshape(entry['shape'])
            elif name.endswith(DATA):
                self._starts[name.removesuffix(DATA)] = start

    @property
    def columns(self) -> list[str]:
        """Names of the columns."""
        return list(self._tables)

    def rows(self, columns: Sequence[str], number: int, where: str) -> dict[str, Tensor]:
        """Tensors of several columns, those that the row has; from far away by one request, if they lie together.

        Args:
            columns: Names of columns.
            number: Number of the row in this shard.
            where: What the row belongs to, for messages.

        Raises:
            CacheError: A checksum is wrong.
        """
        columns = [column for column in columns if column in self._tables]
        window = None
        if self._map is None and TOGETHER in self._starts and columns:
            places = [self.entry(column, number) for column in columns]
            first = min(int(place[START]) for place in places)
            last = max(int(place[START] + place[LENGTH]) for place in places)
            window = first, self._content(TOGETHER, first, last - first)
        found = {column: self.row(column, number, where, window) for column in columns}
        return {column: value for column, value in found.items() if value is not None}

    def begin_of(self, column: str) -> int:
        """Byte of the file from which the rows of a column are counted."""
        return self._starts[TOGETHER if TOGETHER in self._starts else column]

    def entry(self, column: str, number: int) -> np.ndarray:
        """What the table says of a row."""
        return self._tables[column][number]

    def row(
        self, column: str, number: int, where: str, window: tuple[int, bytes | np.ndarray] | None = None
    ) -> Tensor | None:
        """One tensor, of its own memory.

        Args:
            column: Name of the column.
            number: Number of the row in this shard.
            where: What the row belongs to, for messages.
            window: Bytes that were read before, and where in the data they begin; the row is in them.

        Returns:
            None if the row holds nothing.

        Raises:
            CacheError: Its checksum is wrong.
        """
        start, length, expected, codec, dtype, *shape = self.entry(column, number).tolist()
        shape = [size for size in shape if size != ABSENT]
        if window is None:
            content = self._content(column, start, length)
        else:
            content = window[1][start - window[0] : start - window[0] + length]
        found = f'{column} of {where} in {self.path}'
        if len(content) != length or checksum(content, number, codec, dtype, shape) != expected:
            raise CacheError(
                f'{found} is damaged: its checksum is wrong. Copy the file {files.name_of(self.path)} again, or remove '
                'it with the index and run the command that made the cache, which makes what is missing'
            )
        return decode(content, codec, dtype, shape, found)

    def uniform(self, column: str) -> UniformRows | None:
        """All rows of a column as one array.

        Args:
            column: Name of the column.

        Returns:
            None unless the shard is at hand as a whole, and all rows are stored as they are, have one dtype and shape,
            and follow one another.
        """
        if column not in self._uniform:
            self._uniform[column] = self._find_uniform(column)
        return self._uniform[column]

    def _find_uniform(self, column: str) -> UniformRows | None:
        table = self._tables.get(column)
        if self._map is None or table is None or not len(table) or table[0, DTYPE] not in range(len(DTYPES)):
            return None
        length = int(table[0, LENGTH])
        step = _padded(length)
        form = np.delete(table, [START, CHECKSUM], axis=1)
        starts = np.arange(len(table)) * step
        if table[0, CODEC] != RAW or (form != form[0]).any() or (table[:, START] != starts).any():
            return None
        first = self._starts.get(column)
        if first is None or not length or first + len(table) * step > len(self._map):
            return None
        content = np.frombuffer(self._map, np.uint8, len(table) * step, first).reshape(-1, step)[:, :length]
        shape = tuple(int(size) for size in table[0, SHAPE:] if size != ABSENT)
        return UniformRows(content, DTYPES[table[0, DTYPE]], shape, table[:, CHECKSUM].tolist())

    def stored_bytes(self, column: str) -> np.ndarray:
        """Bytes that each row of a column takes."""
        return self._tables[column][:, LENGTH]

    def _content(self, column: str, start: int, length: int) -> bytes | np.ndarray:
        first = self.begin_of(column) + start
        if self._map is not None:
            return self._map[first : first + length]
        return files.read_bytes(self.path, first, length) if length else b''


def _mapped(local: Path, path: str) -> np.ndarray:
    """The bytes of a file, mapped into memory; unlike Python's own maps, this one keeps no file descriptor."""
    size = local.stat().st_size
    if size == 0:
        raise CacheError(f'{path} is empty')
    return torch.from_file(str(local), shared=False, size=size, dtype=torch.uint8).numpy()
