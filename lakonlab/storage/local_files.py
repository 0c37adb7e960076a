"""Files of the local file system."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from lakonlab.storage.backend import Backend, FileInfo
from lakonlab.storage.errors import MissingFileError
from lakonlab.storage.local import LOCK_FILE, TEMPORARY_MARK, fsync_directory, remove_directory


class LocalFiles(Backend):
    """Files of the local file system; what interrupted writers left is not shown."""

    def stat(self, path: str) -> FileInfo | None:
        """See the base class."""
        if not os.path.isfile(path):
            return None
        entry = os.stat(path)
        return FileInfo(os.path.basename(path), entry.st_size, f'{entry.st_size}-{entry.st_mtime_ns}')

    def is_directory(self, path: str) -> bool:
        """See the base class."""
        return os.path.isdir(path)

    def open_read(self, path: str) -> BinaryIO:
        """See the base class."""
        try:
            return open(path, 'rb')
        except FileNotFoundError as error:
            raise MissingFileError(f'{path!r} does not exist (working directory {str(Path.cwd())!r})') from error

    @contextlib.contextmanager
    def open_write(self, path: str, size: int | None = None) -> Iterator[BinaryIO]:
        """See the base class; a file beside it that is flushed to the disk and renamed."""
        final = Path(path)
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary = final.with_name(f'.{final.name}{TEMPORARY_MARK}{os.getpid()}-{uuid.uuid4().hex[:8]}')
        try:
            with open(temporary, 'wb') as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, final)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        fsync_directory(final.parent)

    def create(self, path: str, content: bytes) -> bool:
        """See the base class."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(path, 'xb') as stream:
                stream.write(content)
        except FileExistsError:
            return False
        return True

    def clean_uploads(self, path: str, names: re.Pattern[str] | None = None) -> list[str]:
        """See the base class; files that killed writers left under temporary names."""
        ended = []
        for folder, _, found in os.walk(path):
            for name in sorted(found):
                target = Path(folder, name[1:].rpartition(TEMPORARY_MARK)[0])
                if not name.startswith('.') or TEMPORARY_MARK not in name:
                    continue
                if names is None or names.fullmatch(target.relative_to(path).as_posix()):
                    os.remove(os.path.join(folder, name))
                    ended.append(str(target))
        return ended

    def list_names(self, path: str) -> list[str]:
        """See the base class."""
        if not os.path.isdir(path):
            return []
        return sorted(name for name in os.listdir(path) if not _is_bookkeeping(name))

    def list_files(self, path: str) -> Iterator[FileInfo]:
        """See the base class."""
        found = []
        for folder, inner, names in os.walk(path, followlinks=True):
            inner[:] = [name for name in inner if not _is_bookkeeping(name)]
            for name in names:
                file = Path(folder, name)
                if _is_bookkeeping(name):
                    continue
                with contextlib.suppress(FileNotFoundError):  # removed since the directory was read
                    entry = file.stat()
                    if stat.S_ISREG(entry.st_mode):
                        found.append(FileInfo(file.relative_to(path).as_posix(), entry.st_size))
        yield from sorted(found, key=lambda info: info.name)

    def remove_file(self, path: str) -> None:
        """See the base class."""
        Path(path).unlink(missing_ok=True)

    def remove_directory(self, path: str, seal: str | None = None) -> None:
        """See the base class; it loses its name first."""
        with contextlib.suppress(FileNotFoundError):
            remove_directory(Path(path))


def _is_bookkeeping(name: str) -> bool:
    return name == LOCK_FILE or (name.startswith('.') and TEMPORARY_MARK in name)


def copy_file(source: str | Path, target: BinaryIO, chunk_bytes: int = 1 << 20) -> None:
    """Append the content of a local file to a stream."""
    with open(source, 'rb') as stream:
        shutil.copyfileobj(stream, target, chunk_bytes)
