"""What goes wrong with files, wherever they are."""

from __future__ import annotations


class StorageError(OSError):
    """A path that cannot be read or written; trying again would not help."""


class MissingFileError(StorageError, FileNotFoundError):
    """There is no such file."""


class TransientError(StorageError):
    """A failure that the next attempt may not meet: a lost connection, a busy server."""


class RestartError(TransientError):
    """A failure after which only reading from the beginning could help."""
