"""Parts of safetensors files in object stores, without downloading the rest.

The layout of such a file: eight bytes with the length of the header (little endian), the header (JSON: tensor name ->
dtype, shape, first and last byte), and the tensors, one after the other in row-major order.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from lakonlab.storage import files
from lakonlab.storage.remote_path import AnyPath

HEAD_BYTES = 1 << 16
"""What is read first; most headers are shorter."""
LARGEST_HEADER = 100_000_000
"""The limit of the format."""
REQUEST_BYTES = 1 << 25
"""What lies near is read with one request, up to so many bytes."""
GAP_BYTES = 1 << 18
"""Bytes that are read for nothing rather than with one more request."""
REQUESTS_AHEAD = 4

DTYPES = {
    'F64': torch.float64,
    'F32': torch.float32,
    'F16': torch.float16,
    'BF16': torch.bfloat16,
    'F8_E4M3': torch.float8_e4m3fn,
    'F8_E5M2': torch.float8_e5m2,
    'I64': torch.int64,
    'I32': torch.int32,
    'I16': torch.int16,
    'I8': torch.int8,
    'U8': torch.uint8,
    'BOOL': torch.bool,
    'C64': torch.complex64,
}
"""Name in the header of a file -> dtype."""

Box = tuple[slice, ...]
"""A slice with start and stop for every dimension."""


@dataclass(frozen=True)
class Entry:
    """A tensor of a file.

    Args:
        dtype: Name of its dtype.
        shape: Its shape.
        start: Where it begins in the file.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int

    def get_dtype(self) -> str:
        """Name of its dtype."""
        return self.dtype

    def get_shape(self) -> tuple[int, ...]:
        """Its shape."""
        return self.shape

    def span(self, box: Box) -> tuple[int, int]:
        """First byte and first byte after the elements of a box, and whatever lies between them."""
        first = last = 0
        for size, part in zip(self.shape, box):
            if part.stop <= part.start:
                return self.start, self.start
            first, last = first * size + part.start, last * size + part.stop - 1
        itemsize = DTYPES[self.dtype].itemsize
        return self.start + first * itemsize, self.start + (last + 1) * itemsize

    def cut(self, content: bytes, box: Box) -> Tensor:
        """A box out of the bytes of its span."""
        dtype, sizes = DTYPES[self.dtype], [part.stop - part.start for part in box]
        if not math.prod(sizes):
            return torch.empty(sizes, dtype=dtype)
        flat = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(dtype)
        strides = [math.prod(self.shape[dim + 1 :]) for dim in range(len(self.shape))]
        return flat.as_strided(sizes, strides)


class RangedSafetensors:
    """The part of safetensors' own reader that checkpoints need, over ranged reads.

    Args:
        path: URL of the file.

    Raises:
        StorageError: It is no such file, or cannot be read.
    """

    def __init__(self, path: str):
        self.path = path
        head = files.read_bytes(path, 0, HEAD_BYTES)
        size = int.from_bytes(head[:8], 'little')
        if len(head) < 8 or size > LARGEST_HEADER:
            raise files.StorageError(f'{path!r} is no safetensors file')
        if len(head) < 8 + size:
            head += files.read_bytes(path, len(head), 8 + size - len(head))
        try:
            header: dict[str, Any] = json.loads(head[8 : 8 + size])
            self._metadata = header.pop('__metadata__', None)
            self.entries = {
                key: Entry(str(entry['dtype']), tuple(entry['shape']), 8 + size + int(entry['data_offsets'][0]))
                for key, entry in header.items()
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise files.StorageError(f'{path!r} is no safetensors file ({error})') from error

    def metadata(self) -> dict[str, str] | None:
        """Free text in the header."""
        return self._metadata

    def keys(self) -> list[str]:
        """Names of the tensors."""
        return list(self.entries)

    def get_slice(self, key: str) -> Entry:
        """What the header says of a tensor."""
        return self.entries[key]

    def read(self, wanted: Sequence[tuple[str, Box]]) -> Iterator[tuple[int, Tensor]]:
        """Read boxes of tensors, with few requests.

        Args:
            wanted: Names and boxes.

        Yields:
            Number of the entry of ``wanted``, and the box; in the order of the file.

        Raises:
            StorageError: A request failed, or the file has ended early.
        """
        spans = sorted((*self.entries[key].span(box), number) for number, (key, box) in enumerate(wanted))
        groups: list[list[tuple[int, int, int]]] = []
        for start, stop, number in spans:
            group = groups[-1] if groups else None
            if group and start - group[-1][1] <= GAP_BYTES and stop - group[0][0] <= REQUEST_BYTES:
                group.append((start, stop, number))
            else:
                groups.append([(start, stop, number)])
        with ThreadPoolExecutor(REQUESTS_AHEAD, thread_name_prefix='read') as threads:
            pending: deque = deque()
            try:
                for group in groups:
                    pending.append((group, threads.submit(self._bytes, group)))
                    if len(pending) > REQUESTS_AHEAD:
                        yield from self._boxes(*pending.popleft(), wanted)
                while pending:
                    yield from self._boxes(*pending.popleft(), wanted)
            except BaseException:
                threads.shutdown(wait=False, cancel_futures=True)
                raise

    def _bytes(self, group: Sequence[tuple[int, int, int]]) -> bytes:
        start, stop = group[0][0], max(stop for _, stop, _ in group)
        content = files.read_bytes(self.path, start, stop - start) if stop > start else b''
        if len(content) != stop - start:
            raise files.StorageError(f'{self.path!r} ends before byte {stop}, where its header says that tensors lie')
        return content

    def _boxes(self, group, future, wanted) -> Iterator[tuple[int, Tensor]]:
        content, first = future.result(), group[0][0]
        for start, stop, number in group:
            key, box = wanted[number]
            yield number, self.entries[key].cut(content[start - first : stop - first], box)


class _Local:
    """Safetensors' own reader, with the same method for many boxes."""

    def __init__(self, file):
        self.metadata, self.keys, self.get_slice = file.metadata, file.keys, file.get_slice
        self._file = file

    def read(self, wanted: Sequence[tuple[str, Box]]) -> Iterator[tuple[int, Tensor]]:
        """See :meth:`RangedSafetensors.read`; a file of a disk is mapped, so only what is needed is read."""
        for number, (key, box) in enumerate(wanted):
            yield number, self._file.get_slice(key)[box] if box else self._file.get_tensor(key)


def open_safetensors(path: AnyPath) -> AbstractContextManager[RangedSafetensors | _Local]:
    """A safetensors file, wherever it lies."""
    return _open_local(path) if isinstance(path, Path) else contextlib.nullcontext(RangedSafetensors(path.url))


@contextlib.contextmanager
def _open_local(path: Path) -> Iterator[_Local]:
    with safe_open(path, framework='pt') as file:
        yield _Local(file)
