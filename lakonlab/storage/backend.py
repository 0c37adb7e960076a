"""What a scheme has to offer."""

from __future__ import annotations

import re
from abc import ABC
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import BinaryIO

from lakonlab.storage.errors import MissingFileError, StorageError
from lakonlab.storage.paths import scheme_of


@dataclass(frozen=True)
class FileInfo:
    """A file, as a listing shows it.

    Args:
        name: Its name, relative to what was listed, with ``/`` between parts.
        size: Bytes; -1 where the server does not say.
        version: What changes with the content, where the server says so (an ETag).
        sha256: Checksum of the content, where the server states it.
        md5: The same.
        is_md5_guessed: Whether what is given as the MD5 only looks like one, and may be something else.
    """

    name: str
    size: int
    version: str | None = None
    sha256: str | None = None
    md5: str | None = None
    is_md5_guessed: bool = False


class Backend(ABC):  # noqa: B024 - every method has a meaning where a scheme cannot do it
    """Files of one scheme. What is not overridden is refused; paths come in their normal spelling."""

    def stat(self, path: str) -> FileInfo | None:
        """Facts about a file; None if there is none of this name."""
        raise _cannot(path, 'read')

    def is_directory(self, path: str) -> bool:
        """Whether there is a directory, or something whose name begins like that of something in it."""
        raise _cannot(path, 'listed')

    def open_read(self, path: str) -> BinaryIO:
        """A stream of the content that can seek."""
        raise _cannot(path, 'read')

    def read_bytes(self, path: str, start: int = 0, length: int | None = None) -> bytes:
        """A stretch of the content; shorter where the file ends."""
        with self.open_read(path) as stream:
            stream.seek(start)
            return stream.read() if length is None else stream.read(length)

    def chunks(self, path: str, start: int = 0, stop: int | None = None, version: str | None = None) -> Iterator[bytes]:
        """See :func:`~lakonlab.storage.ranges.chunks_of`."""
        raise _cannot(path, 'read')

    def open_write(self, path: str, size: int | None = None) -> AbstractContextManager[BinaryIO]:
        """A stream whose content becomes the file when the block ends well."""
        raise _cannot(path, 'written')

    def create(self, path: str, content: bytes) -> bool:
        """Make a small file unless there is one of this name; whether that was done."""
        raise _cannot(path, 'written')

    def clean_uploads(self, path: str, names: re.Pattern[str] | None = None) -> list[str]:
        """End unfinished uploads below a directory, which no listing shows; the paths that they would have had.

        Args:
            path: The directory.
            names: Only of files whose whole name, relative to the directory, matches; None for all.
        """
        return []

    def list_names(self, path: str) -> list[str]:
        """Names of files and directories in a directory, sorted; none if it does not exist."""
        raise _cannot(path, 'listed')

    def list_files(self, path: str) -> Iterator[FileInfo]:
        """All files below a directory, at any depth, by name."""
        raise _cannot(path, 'listed')

    def remove_file(self, path: str) -> None:
        """Remove a file; fine if there is none."""
        raise _cannot(path, 'written')

    def remove_directory(self, path: str, seal: str | None = None) -> None:
        """Remove a directory with all in it; fine if there is none."""
        raise _cannot(path, 'written')

    def require_stat(self, path: str) -> FileInfo:
        """Like :meth:`stat`, of a file that must exist.

        Raises:
            MissingFileError: There is no such file.
        """
        info = self.stat(path)
        if info is None:
            raise MissingFileError(f'{path!r} does not exist, or is no file')
        return info


def _cannot(path: str, what: str) -> StorageError:
    return StorageError(f'{path!r}: {scheme_of(path)}:// cannot be {what}')
