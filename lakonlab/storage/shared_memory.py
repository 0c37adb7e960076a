"""Memory that another process sees too, not limited by the size of ``/dev/shm``."""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from lakonlab.storage.scratch import SCRATCH_VARIABLE, require_space, scratch_root

ALIGNMENT = 64


class SharedMemory:
    """A stretch of anonymous memory.

    Args:
        size: Bytes; at least one.
        descriptor: File descriptor of memory that another process made; None to make some.
    """

    def __init__(self, size: int, descriptor: int | None = None):
        self.size = max(size, 1)
        if descriptor is None:
            descriptor = _anonymous_file(self.size)
            os.ftruncate(descriptor, self.size)
        self.descriptor = descriptor
        self._map = mmap.mmap(descriptor, self.size)
        self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)

    def tensor(self, start: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The memory from a position on, as a tensor."""
        count = torch.Size(shape).numel() * dtype.itemsize
        if count == 0:
            return torch.empty(shape, dtype=dtype)
        return self._bytes[start : start + count].view(dtype).view(shape)

    def close(self) -> None:
        """Let go of the descriptor; the memory stays as long as tensors use it."""
        os.close(self.descriptor)


def positions(tensors: Iterable[Tensor]) -> Iterator[tuple[int, int]]:
    """Where tensors begin and end if they lie one after the other, each aligned.

    Args:
        tensors: What is to be stored.

    Yields:
        First byte of each tensor and first byte after it.
    """
    start = 0
    for tensor in tensors:
        end = start + tensor.numel() * tensor.element_size()
        yield start, end
        start = -(-end // ALIGNMENT) * ALIGNMENT


def _anonymous_file(size: int) -> int:
    if hasattr(os, 'memfd_create'):
        return os.memfd_create('lakonlab')
    root = scratch_root()  # other systems: a file without a name
    require_space(root, size, SCRATCH_VARIABLE, 'a copy of what is saved')
    with tempfile.TemporaryFile(dir=root) as stream:
        return os.dup(stream.fileno())
