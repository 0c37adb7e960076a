"""How directories such as checkpoints become visible all at once, and go, on each kind of storage.

A save is a *draft*: a folder in which files are written, which no reader looks at. Publishing makes it the directory of
the final name in one step. A local draft is a temporary directory that is renamed
(:mod:`lakonlab.storage.local_publisher`); in an object store, which cannot rename, it is a folder of a unique name
inside of the final directory, to which the manifest that is put last refers
(:mod:`lakonlab.storage.object_publisher`).
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from lakonlab.storage.remote_path import AnyPath

MANIFEST = 'manifest.json'
"""The file that makes a directory a whole; written last."""
DATA = 'data'
"""Key of a manifest: the folder of the directory in which its files lie; absent where that is the directory itself."""

Record = dict[str, Any]
"""``size`` and ``sha256`` of a file."""


def record_of(content: bytes) -> Record:
    """What a manifest says of a file with some content."""
    return {'size': len(content), 'sha256': hashlib.sha256(content).hexdigest()}


class Publisher(ABC):
    """What differs between kinds of storage when directories are written; without state, and picklable."""

    has_folders: bool
    """Whether the files of a directory lie in a folder of it that its manifest names."""

    @abstractmethod
    def begin(self, final: AnyPath, parts: Iterable[str]) -> AnyPath:
        """Begin to write a directory.

        Args:
            final: The name that it will have.
            parts: Folders that it will hold.

        Returns:
            The draft.
        """

    @abstractmethod
    def require_seen(self, draft: AnyPath, part: str) -> None:
        """Make sure that this process sees a draft that the main one has begun.

        Raises:
            OSError: It does not.
        """

    @abstractmethod
    def write(self, path: AnyPath, content: bytes) -> Record:
        """Write a file of a draft; when this returns, it lasts."""

    @abstractmethod
    def settle(self, draft: AnyPath, names: Iterable[str]) -> None:
        """Wait until listing a draft shows the files that all processes have written.

        Raises:
            OSError: One of them does not appear.
        """

    @abstractmethod
    def publish(self, draft: AnyPath, final: AnyPath, manifest: Mapping[str, Any]) -> None:
        """Complete a draft with its manifest and give it its final name, replacing what stood there."""

    @abstractmethod
    def discard(self, draft: AnyPath) -> None:
        """Remove a draft as far as that is possible, unless it has been published after all.

        What is left is removed by :meth:`clean`.
        """

    @abstractmethod
    def is_published(self, path: AnyPath) -> bool:
        """Whether there is a directory, rather than what an interrupted save left under its name."""

    @abstractmethod
    def sizes(self, folder: AnyPath, names: Iterable[str]) -> dict[str, int]:
        """Bytes of those of some files that exist in a folder, by name."""

    @abstractmethod
    def remove(self, path: AnyPath) -> None:
        """Remove a directory so that a crash half way leaves nothing that looks whole under its name."""

    @abstractmethod
    def set_aside(self, path: AnyPath) -> str:
        """Take a directory out of the way, without losing it.

        Returns:
            What it is called now.
        """

    @abstractmethod
    def tidy(self, path: AnyPath) -> list[str]:
        """Remove what is left under the name of a directory that a :meth:`remove` before has removed in part.

        Returns:
            Names of what was removed.
        """

    @abstractmethod
    def clean(self, parent: AnyPath) -> list[str]:
        """Remove what interrupted writers left in a directory; only for the one that holds it.

        Returns:
            Names of what was removed.
        """

    @abstractmethod
    def restore(self, parent: AnyPath) -> list[str]:
        """Give directories back their names that they had lost to newer ones which then were not published.

        Returns:
            The names.
        """

    @abstractmethod
    def hold(self, parent: AnyPath) -> AbstractContextManager[str | None]:
        """Keep other runs from writing to a directory.

        Returns:
            A context whose value is for :meth:`confirm`.

        Raises:
            DirectoryInUseError: Another run holds it.
        """

    @abstractmethod
    def confirm(self, parent: AnyPath, holder: str | None) -> None:
        """Make sure that a directory is still held.

        Args:
            parent: The directory.
            holder: The value of :meth:`hold`.

        Raises:
            DirectoryInUseError: Another run has taken it over.
        """

    @abstractmethod
    def require_shared(self, path: AnyPath) -> None:
        """Make sure that this process sees a directory that another process of the run holds.

        Raises:
            OSError: It does not.
        """


def publisher_of(path: AnyPath) -> Publisher:
    """The publisher for the place where a directory lies."""
    if isinstance(path, Path):
        from lakonlab.storage.local_publisher import LocalPublisher

        return LocalPublisher()
    from lakonlab.storage.object_publisher import ObjectPublisher

    return ObjectPublisher()
