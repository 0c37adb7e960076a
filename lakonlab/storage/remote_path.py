"""Paths of other places than the local file system, with the part of pathlib's interface that checkpoints need.

``as_path`` gives a ``pathlib.Path`` for what is local and a :class:`RemotePath` for ``s3://bucket/key`` and the like,
so that what finds, reads and prunes checkpoints is written once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from lakonlab.storage import files
from lakonlab.storage.paths import is_remote


@dataclass(frozen=True)
class RemotePath:
    """A file or directory that a URL names.

    Nothing opens it by accident: it is no ``os.PathLike``.

    Args:
        url: Scheme, ``://``, and names with slashes between them; without a slash at the end.
    """

    url: str

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(files.join(self.url, name))

    @property
    def name(self) -> str:
        """The last name."""
        return files.name_of(self.url)

    @property
    def parent(self) -> RemotePath:
        """The directory that it lies in."""
        return RemotePath(files.parent_of(self.url))

    @property
    def suffix(self) -> str:
        """What follows the last dot of the name, with the dot."""
        return PurePosixPath(self.name).suffix

    def with_name(self, name: str) -> RemotePath:
        """Another name in the same directory."""
        return self.parent / name

    def with_suffix(self, suffix: str) -> RemotePath:
        """The same name with another suffix."""
        return self.with_name(PurePosixPath(self.name).with_suffix(suffix).name)

    def expanduser(self) -> RemotePath:
        """Itself: there is no home directory."""
        return self

    def absolute(self) -> RemotePath:
        """Itself: there is no working directory."""
        return self

    def exists(self) -> bool:
        """Whether there is something."""
        return files.exists(self.url)

    def is_file(self) -> bool:
        """Whether it is a file."""
        return files.is_file(self.url)

    def is_dir(self) -> bool:
        """Whether there are files below it."""
        return files.is_directory(self.url)

    def iterdir(self) -> Iterator[RemotePath]:
        """What lies in it, in the order of the names."""
        for name in sorted(files.list_names(self.url)):
            yield self / name.rstrip('/')

    def read_text(self, encoding: str = 'utf-8') -> str:
        """The content of a file."""
        return files.read_bytes(self.url).decode(encoding)


AnyPath = Path | RemotePath
"""Where a checkpoint may lie."""


def as_path(path: str | AnyPath) -> AnyPath:
    """A path that can be walked, wherever it leads.

    Args:
        path: Local, with ``~`` for the home directory, or a URL.
    """
    if isinstance(path, RemotePath):
        return path
    return RemotePath(str(path).rstrip('/')) if is_remote(path) else Path(path).expanduser()


def open_path(path: AnyPath) -> BinaryIO:
    """A stream of the content of a file."""
    return open(path, 'rb') if isinstance(path, Path) else files.open_read(path.url)


def files_below(folder: AnyPath) -> list[str]:
    """Names of all files in a folder, at any depth, sorted; relative, with slashes."""
    if isinstance(folder, Path):
        return sorted(path.relative_to(folder).as_posix() for path in folder.rglob('*') if path.is_file())
    return sorted(info.name for info in files.list_files(folder.url))
