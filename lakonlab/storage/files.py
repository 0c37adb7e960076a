"""One way to read and write files, wherever they are: local, ``s3://``, ``huggingface://``, ``http(s)://``.

Every function takes a path of any scheme, text or :class:`~pathlib.Path`; which scheme can do what is the table in
:mod:`lakonlab.storage.schemes`. What is written becomes visible whole or not at all, on every scheme. What fails by
chance is tried again for a limited time (:mod:`lakonlab.storage.retry`). Nothing here holds a connection that a forked
or spawned process could inherit.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import BinaryIO

from lakonlab.storage.backend import FileInfo
from lakonlab.storage.errors import MissingFileError, StorageError
from lakonlab.storage.fetch import fetch
from lakonlab.storage.local_files import copy_file
from lakonlab.storage.paths import as_local, is_remote, join, name_of, normal, parent_of, scheme_of, sibling
from lakonlab.storage.schemes import LIST, READ, WRITE, backend_of, can, require
from lakonlab.storage.scratch import scratch_directory

__all__ = [
    'FileInfo',
    'MissingFileError',
    'StorageError',
    'as_local',
    'clean_uploads',
    'create',
    'exists',
    'fetch',
    'is_directory',
    'is_file',
    'is_remote',
    'join',
    'list_files',
    'list_names',
    'name_of',
    'open_read',
    'open_write',
    'parent_of',
    'read_bytes',
    'read_text',
    'remove_directory',
    'remove_file',
    'require',
    'scheme_of',
    'sibling',
    'size_of',
    'staged',
    'upload',
    'write_bytes',
    'write_json',
    'write_text',
]

logger = logging.getLogger(__name__)

#: Files that are uploaded at the same time.
PARALLEL_FILES = 8


def exists(path: str | Path) -> bool:
    """Whether there is a file or a directory."""
    return is_file(path) or is_directory(path)


def is_file(path: str | Path) -> bool:
    """Whether there is a file of this name."""
    return backend_of(path, READ).stat(normal(path)) is not None


def is_directory(path: str | Path) -> bool:
    """Whether there is a directory of this name; on an object store, whether anything is in it.

    Where a scheme cannot list (``http(s)://``) there are no directories.
    """
    backend = backend_of(path, READ)
    return can(path, LIST) and backend.is_directory(normal(path))


def size_of(path: str | Path) -> int:
    """Bytes of a file.

    Raises:
        MissingFileError: There is no such file.
    """
    return backend_of(path, READ).require_stat(normal(path)).size


def read_bytes(path: str | Path, start: int = 0, length: int | None = None) -> bytes:
    """A stretch of a file.

    Args:
        path: The file.
        start: First byte.
        length: Bytes; None for all up to the end. Less is returned where the file ends.

    Raises:
        MissingFileError: There is no such file.
    """
    return backend_of(path, READ).read_bytes(normal(path), start, length)


def read_text(path: str | Path) -> str:
    """The content of a file in UTF-8.

    Raises:
        MissingFileError: There is no such file.
    """
    return read_bytes(path).decode()


def open_read(path: str | Path) -> BinaryIO:
    """A stream of a file that can seek; a lost connection is taken up again where it was lost.

    Raises:
        MissingFileError: There is no such file.
    """
    return backend_of(path, READ).open_read(normal(path))


def open_write(path: str | Path, size: int | None = None) -> AbstractContextManager[BinaryIO]:
    """A stream whose content becomes the file when the ``with`` block ends well; if it does not, nothing is visible.

    Args:
        path: The file; directories above it are made.
        size: Bytes that will be written, if known; only a hint.
    """
    return backend_of(path, WRITE).open_write(normal(path), size)


def write_bytes(path: str | Path, content: bytes) -> None:
    """Make a file, replacing what stood there in one step."""
    with open_write(path, len(content)) as stream:
        stream.write(content)


def write_text(path: str | Path, text: str) -> None:
    """Like :func:`write_bytes`, of text in UTF-8."""
    write_bytes(path, text.encode())


def write_json(path: str | Path, value: object) -> None:
    """Like :func:`write_text`, of plain data as JSON."""
    write_text(path, json.dumps(value, indent=1))


def create(path: str | Path, content: bytes) -> bool:
    """Make a small file, unless there is one of this name already.

    Servers that speak the protocol of S3 and do not know the condition replace a file that is there.

    Returns:
        Whether it was made.
    """
    return backend_of(path, WRITE).create(normal(path), content)


def clean_uploads(path: str | Path, names: re.Pattern[str] | None = None) -> list[str]:
    """End unfinished uploads below a directory: killed processes leave them, invisible but not free of charge.

    Only for who knows that no other process is writing there. That they cannot be listed or ended, as where the right
    to do so is not given, is only reported: nobody reads them.

    Args:
        path: The directory.
        names: Only of files whose whole name, relative to the directory, matches; None for all.

    Returns:
        Paths of the files that they would have become.
    """
    try:
        return backend_of(path, WRITE).clean_uploads(normal(path), names)
    except StorageError as error:
        logger.warning(
            'unfinished uploads below %s stay, and take space (%s): give the right to list and to abort uploads, or '
            'have the bucket expire them',
            path,
            error,
        )
        return []


def list_names(path: str | Path) -> list[str]:
    """Names of the files and directories in a directory, sorted; none if it does not exist."""
    return backend_of(path, LIST).list_names(normal(path))


def list_files(path: str | Path) -> list[FileInfo]:
    """All files below a directory, at any depth, sorted by name; none if it does not exist."""
    return list(backend_of(path, LIST).list_files(normal(path)))


def remove_file(path: str | Path) -> None:
    """Remove a file; fine if there is none."""
    backend_of(path, WRITE).remove_file(normal(path))


def remove_directory(path: str | Path, seal: str | None = None) -> None:
    """Remove a directory with all in it; fine if there is none.

    Args:
        path: The directory.
        seal: Name of the file in it that says that it is whole; it is removed first, so that what an interruption
            leaves is not taken for whole. A local directory loses its name in one step anyway.
    """
    backend_of(path, WRITE).remove_directory(normal(path), seal)


@contextlib.contextmanager
def staged(path: str | Path, needed: int = 0) -> Iterator[Path]:
    """A local file to write to, which becomes the file when the block ends well; for writers that need a file.

    Args:
        path: The file; directories above it are made.
        needed: Bytes that will be written, if known; they must be free in ``$LAKONLAB_TMPDIR``.

    Yields:
        A path of the same name, in a directory of its own.
    """
    with scratch_directory(needed, f'writing {path}') as folder:
        local = folder / name_of(path)
        yield local
        upload(local, path)


def upload(local: str | Path, path: str | Path, seal: str | None = None) -> None:
    """Copy a local file or directory to a path of any scheme.

    Files become visible one by one, each whole.

    Args:
        local: A file, or a directory whose content is copied.
        path: Name of the copy.
        seal: Name of the file in the directory that says that it is whole; it is copied when all others are there.

    Raises:
        MissingFileError: There is nothing to copy.
    """
    local = as_local(local)
    if local.is_file():
        _upload_file(local, path)
        return
    if not local.is_dir():
        raise MissingFileError(f'{str(local)!r} does not exist: there is nothing to copy to {str(path)!r}')
    names = [info.name for info in list_files(local)]
    with ThreadPoolExecutor(PARALLEL_FILES, thread_name_prefix='upload') as threads:
        jobs = [threads.submit(_upload_file, local / name, join(path, name)) for name in names if name != seal]
        try:
            for job in jobs:
                job.result()
        except BaseException:
            threads.shutdown(cancel_futures=True)
            raise
    if seal in names:
        _upload_file(local / seal, join(path, seal))


def _upload_file(local: Path, path: str | Path) -> None:
    with open_write(path, local.stat().st_size) as stream:
        copy_file(local, stream)
