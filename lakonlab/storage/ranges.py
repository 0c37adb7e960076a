"""Streams over files of which a server sends any stretch, taken up again where a connection was lost."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from lakonlab.storage.errors import RestartError, StorageError, TransientError
from lakonlab.storage.retry import Patience

CHUNK_BYTES = 1 << 20
#: Bytes after which an earlier failure does not count any more.
PROGRESS_BYTES = 8 << 20
FIRST_WINDOW, LARGEST_WINDOW = 1 << 20, 64 << 20


@dataclass
class Answer:
    """What a server sends for a stretch of a file.

    Args:
        start: First byte of the file that it sends; 0 if it sends all of it whatever was asked.
        total: Bytes of the whole file; None if it does not say.
        version: What changes with the content; None if it does not say.
        read: Bytes of the body, at most so many; empty at the end. Raises :class:`TransientError`.
        close: Lets go of the connection.
    """

    start: int
    total: int | None
    version: str | None
    read: Callable[[int], bytes]
    close: Callable[[], None]


#: (first byte, byte after the last or None for the end, version that it must be or None) -> the answer; None if the
#: file ends before the first byte.
Opener = Callable[[int, int | None, str | None], Answer | None]


def chunks_of(
    open_at: Opener, what: str, start: int = 0, stop: int | None = None, version: str | None = None
) -> Iterator[bytes]:
    """The bytes of a stretch of a file, in pieces, however often the connection is lost.

    Args:
        open_at: Asks the server.
        what: What is read, for messages.
        start: First byte.
        stop: Byte after the last; None for the end. Less is yielded where the file ends.
        version: What the file must be; None for whatever it is when first asked, and the same from then on.

    Raises:
        RestartError: The connection was lost, and the server does not say what the rest must belong to.
        StorageError: It cannot be read, or has changed in between.
    """
    position, reached = start, start
    patience = Patience(f'reading {what}')
    while stop is None or position < stop:
        try:
            answer = open_at(position, stop, version)
            if answer is None:
                return
            try:
                version = version or answer.version
                if version is not None and answer.version is not None and answer.version != version:
                    raise StorageError(f'{what} was replaced while it was read; run again')
                if answer.total is not None:
                    stop = answer.total if stop is None else min(stop, answer.total)
                skip = position - answer.start
                while stop is None or position < stop:
                    chunk = answer.read(CHUNK_BYTES if stop is None else min(CHUNK_BYTES, stop - position + skip))
                    if not chunk:
                        break
                    skipped, skip = min(skip, len(chunk)), max(0, skip - len(chunk))
                    if chunk := chunk[skipped:]:
                        position += len(chunk)
                        yield chunk
            finally:
                answer.close()
            if stop is None:
                return
            if position < stop:
                raise TransientError(f'{what}: the connection ended after {position} of {stop} bytes')
        except TransientError as error:
            if version is None and position > start:
                raise RestartError(str(error)) from error
            if position - reached >= PROGRESS_BYTES:
                patience.progress()
                reached = position
            patience.wait_after(error)


class RangeReader(io.RawIOBase):
    """A stream that can seek, over :func:`chunks_of`.

    It asks for windows that double while it is read in order, so that jumping about costs little and reading through
    takes few requests.

    Args:
        chunks: (first byte, byte after the last) -> the bytes between, in pieces.
        size: Bytes of the file.
    """

    def __init__(self, chunks: Callable[[int, int], Iterator[bytes]], size: int):
        self._chunks, self._size = chunks, size
        self._position = 0
        self._forget()

    def _forget(self) -> None:
        self._incoming: Iterator[bytes] = iter(())
        self._rest = memoryview(b'')
        self._asked = -1
        self._window = FIRST_WINDOW

    def readable(self) -> bool:
        """See the base class."""
        return True

    def seekable(self) -> bool:
        """See the base class."""
        return True

    def tell(self) -> int:
        """See the base class."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """See the base class."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise ValueError(f'seek to byte {base + offset}')
        if base + offset != self._position:
            self._position = base + offset
            self._forget()
        return self._position

    def readinto(self, buffer) -> int:
        """See the base class."""
        if not self._rest and self._position < self._size:
            self._rest = memoryview(self._next())
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        self._position += count
        return count

    def _next(self) -> bytes:
        chunk = next(self._incoming, b'')
        if not chunk:
            if self._asked == self._position:
                self._window = min(2 * self._window, LARGEST_WINDOW)
            self._asked = min(self._position + self._window, self._size)
            self._incoming = self._chunks(self._position, self._asked)
            chunk = next(self._incoming, b'')
        return chunk


def open_ranges(chunks: Callable[[int, int], Iterator[bytes]], size: int) -> io.BufferedReader:
    """A buffered stream over :class:`RangeReader`; see there for the arguments."""
    return io.BufferedReader(RangeReader(chunks, size), CHUNK_BYTES)
