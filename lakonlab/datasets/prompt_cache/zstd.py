"""Zstandard streams of unknown origin: bounded, whole, and nothing behind them."""

from __future__ import annotations

#: A record that unpacks to more than this is refused; the largest published ones take 3 MB.
MAX_UNPACKED_BYTES = 1 << 30
#: Fed bit by bit, so that a stream of a few bytes that unpacks to gigabytes is noticed in time.
PIECE_BYTES = 1 << 13


class DamagedStreamError(ValueError):
    """A stream that is truncated, damaged, followed by something or too large."""


def unpack(content: bytes, limit: int = MAX_UNPACKED_BYTES) -> bytes:
    """Unpack one Zstandard frame.

    Args:
        content: The whole frame.
        limit: Largest size of the result in bytes.

    Raises:
        DamagedStreamError: It is not one whole, undamaged frame, or the result is larger than ``limit``.
    """
    import zstandard

    reader = zstandard.ZstdDecompressor().decompressobj()
    pieces: list[bytes] = []
    size = 0
    try:
        for start in range(0, len(content), PIECE_BYTES):
            if reader.eof:
                raise DamagedStreamError('there are bytes behind the end of the compressed stream')
            pieces.append(reader.decompress(content[start : start + PIECE_BYTES]))
            size += len(pieces[-1])
            if size > limit:
                raise DamagedStreamError(f'the compressed stream unpacks to more than {limit} bytes')
    except zstandard.ZstdError as error:
        raise DamagedStreamError(f'the compressed stream is damaged ({error})') from error
    if not reader.eof:
        raise DamagedStreamError(f'the compressed stream is truncated: it ends after {len(content)} bytes')
    if reader.unused_data:
        raise DamagedStreamError('there are bytes behind the end of the compressed stream')
    return b''.join(pieces)


def pack(content: bytes, level: int = 3) -> bytes:
    """Compress into one Zstandard frame with a checksum."""
    import zstandard

    return zstandard.ZstdCompressor(level=level, write_checksum=True).compress(content)
