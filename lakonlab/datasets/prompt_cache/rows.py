"""Tensors as rows of bytes: which are compressed, how, and a checksum of each."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lakonlab.datasets.prompt_cache.errors import CacheError
from lakonlab.datasets.prompt_cache.zstd import DamagedStreamError, pack, unpack

RAW, ZSTD, TRANSPOSED = range(3)
#: Numbers of the entry of a row before its shape: where its bytes begin, how many there are, their checksum, how they
#: are compressed, and the number of the dtype in DTYPES.
START, LENGTH, CHECKSUM, CODEC, DTYPE, SHAPE = range(6)
ABSENT = -1
DTYPES = (
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.bool,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)
LEVEL = 3


@dataclass(frozen=True)
class Row:
    """A tensor as bytes.

    Args:
        content: The bytes.
        codec: How they are compressed.
        dtype: Number of the dtype in ``DTYPES``; ``ABSENT`` of a row that holds nothing.
        shape: Shape of the tensor.
    """

    content: bytes
    codec: int
    dtype: int
    shape: tuple[int, ...]

    def checksum(self, number: int) -> int:
        """CRC-32 of the bytes and of what says how to read them.

        Args:
            number: Number of the row in its shard, so that no row is taken for another one.
        """
        return checksum(self.content, number, self.codec, self.dtype, self.shape)


def checksum(content: bytes | np.ndarray, number: int, codec: int, dtype: int, shape: Sequence[int]) -> int:
    """See :meth:`Row.checksum`."""
    return zlib.crc32(f'{number}:{codec}:{dtype}:{list(shape)}'.encode(), zlib.crc32(content))


def encode(value: Tensor | None, compressed: bool = True) -> Row:
    """Bytes of a tensor.

    Args:
        value: On the CPU; None for nothing.
        compressed: Whether to look for the smallest form: the bytes as they are, compressed, or compressed after
            bringing together the same byte and channel (last dimension) of all tokens, which resemble each other.
    """
    if value is None:
        return Row(b'', RAW, ABSENT, ())
    value = value.detach().contiguous()
    if value.dtype not in DTYPES:
        raise CacheError(f'a tensor of {value.dtype} cannot be stored; expected one of {", ".join(map(str, DTYPES))}')
    content = _bytes_of(value)
    forms = [(RAW, content)]
    if compressed:
        forms.append((ZSTD, pack(content, LEVEL)))
        if value.dim() > 1 and value.numel():
            planes = value.view(torch.uint8).reshape(-1, value.shape[-1], value.dtype.itemsize).permute(2, 1, 0)
            forms.append((TRANSPOSED, pack(_bytes_of(planes.contiguous()), LEVEL)))
    codec, content = min(forms, key=lambda form: len(form[1]))
    return Row(content, codec, DTYPES.index(value.dtype), tuple(value.shape))


def decode(content: bytes | np.ndarray, codec: int, dtype: int, shape: Sequence[int], where: str) -> Tensor | None:
    """The tensor of a row whose checksum is right.

    Args:
        content: Its bytes.
        codec: How they are compressed.
        dtype: Number of the dtype.
        shape: Shape.
        where: File and record, for messages.

    Returns:
        A tensor of its own memory; None if the row holds nothing.

    Raises:
        CacheError: The bytes do not make such a tensor.
    """
    if dtype == ABSENT:
        return None
    if not 0 <= dtype < len(DTYPES) or codec not in (RAW, ZSTD, TRANSPOSED):
        raise CacheError(f'{where} was written by a later version: update to read it')
    kind = DTYPES[dtype]
    size = math.prod(shape) * kind.itemsize
    try:
        unpacked = content if codec == RAW else unpack(bytes(content), size)
    except DamagedStreamError as error:
        raise CacheError(f'{where} is damaged: {error}') from error
    if len(unpacked) != size:
        raise CacheError(f'{where} is damaged: {len(unpacked)} bytes for a tensor of {size}')
    if not size:
        return torch.empty(tuple(shape), dtype=kind)
    array = torch.frombuffer(bytearray(unpacked), dtype=torch.uint8)
    if codec == TRANSPOSED:
        array = array.reshape(kind.itemsize, shape[-1], -1).permute(2, 1, 0).contiguous().flatten()
    return array.view(kind).reshape(tuple(shape))


def _bytes_of(value: Tensor) -> bytes:
    return value.reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b''


def text_tensor(text: str) -> Tensor:
    """A text as UTF-8 in a tensor."""
    return torch.from_numpy(np.frombuffer(text.encode(), np.uint8).copy())


def text_of(value: Tensor) -> str:
    """The text of :func:`text_tensor`."""
    return value.numpy().tobytes().decode()
