"""Tensors of which each process holds a part, as checkpoints see them.

Whatever a strategy does to a tensor, what a process holds of it is a set of boxes: all of it, some of its rows, or a
stretch of its elements in row-major order. :class:`Pieces` says which boxes of which tensor, and
torch.distributed.checkpoint plans from that who writes what and who reads what.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offsets and sizes, one number per dimension."""


@dataclass(frozen=True)
class Pieces:
    """What one process holds of a tensor.

    Args:
        shape: Shape of the whole tensor.
        dtype: Its dtype.
        boxes: Where each piece lies.
        tensors: The pieces; views of what is trained, or copies of it.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    boxes: tuple[Box, ...]
    tensors: tuple[Tensor, ...]

    @classmethod
    def whole(cls, tensor: Tensor) -> Pieces:
        """A tensor that this process holds in full."""
        shape = tuple(tensor.shape)
        return cls(shape, tensor.dtype, (((0,) * len(shape), shape),), (tensor.detach(),))

    @classmethod
    def stretch(cls, shape: Sequence[int], start: int, elements: Tensor) -> Pieces:
        """Consecutive elements, in row-major order.

        Args:
            shape: Shape of the whole tensor.
            start: Number of the first element that is held.
            elements: The elements, one-dimensional.
        """
        boxes = tuple(boxes_of_stretch(tuple(shape), start, start + elements.numel()))
        parts = elements.detach().reshape(-1).split([math.prod(sizes) for _, sizes in boxes]) if boxes else ()
        views = tuple(part.view(sizes) for part, (_, sizes) in zip(parts, boxes))
        return cls(tuple(shape), elements.dtype, boxes, views)

    def size(self) -> torch.Size:
        """Shape of the whole tensor."""
        return torch.Size(self.shape)

    @property
    def num_bytes(self) -> int:
        """Bytes that this process holds."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors)

    def at(self, offsets: Sequence[int] | None) -> Tensor:
        """The piece that begins at some offsets; None for that of a tensor held in full."""
        if offsets is None:
            return self.tensors[0]
        return next(tensor for box, tensor in zip(self.boxes, self.tensors) if box[0] == tuple(offsets))

    # what torch.distributed.checkpoint asks of objects that are no plain tensors

    def __create_chunk_list__(self):
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

        return [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in self.boxes]

    def __create_write_items__(self, name: str, _):
        from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties
        from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

        return [
            WriteItem(
                index=MetadataIndex(name, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, TensorProperties(self.dtype), self.size()),
            )
            for chunk in self.__create_chunk_list__()
        ]


def boxes_of_stretch(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    """The fewest boxes that hold the elements ``start`` to ``stop`` of a tensor in row-major order.

    Args:
        shape: Shape of the tensor.
        start: First element.
        stop: One more than the last.

    Yields:
        Offsets and sizes, in the order of the elements.
    """
    if start >= stop:
        return
    if len(shape) <= 1:
        yield ((start,), (stop - start,)) if shape else ((), ())
        return
    row = math.prod(shape[1:])
    first, last = start // row, stop // row
    if first == last or (first + 1 == last and stop % row == 0 and start % row):
        for offsets, sizes in boxes_of_stretch(shape[1:], start - first * row, stop - first * row):
            yield (first, *offsets), (1, *sizes)
        return
    if start % row:
        for offsets, sizes in boxes_of_stretch(shape[1:], start % row, row):
            yield (first, *offsets), (1, *sizes)
        first += 1
    if first < last:
        yield (first, *(0,) * (len(shape) - 1)), (last - first, *shape[1:])
    if stop % row:
        for offsets, sizes in boxes_of_stretch(shape[1:], 0, stop % row):
            yield (last, *offsets), (1, *sizes)
