"""Whether a directory can be written, found out by writing to it."""

from __future__ import annotations

from pathlib import Path

from lakonlab.storage import files, local
from lakonlab.storage.errors import StorageError
from lakonlab.storage.remote_path import AnyPath, as_path
from lakonlab.storage.schemes import LIST, PUBLISH, READ, WRITE, require

PROBE = '.writable'
"""The file that is written; of one name, so that those of killed processes do not heap up."""


def require_writable(path: str | AnyPath, setting: str) -> None:
    """Make a directory if needed, and try to write to it; of what is remote, write, list and remove a small file.

    Args:
        path: The directory.
        setting: What names it in the config, for the message.

    Raises:
        OSError: It cannot be made or written to.
    """
    path = as_path(path)
    if isinstance(path, Path):
        local.require_writable(path, setting)
        return
    require(path.url, READ, WRITE, LIST, PUBLISH, setting=setting)
    probe = path / PROBE
    try:
        files.write_bytes(probe.url, b'written to find out whether that is possible')
        files.list_names(path.url)
        files.remove_file(probe.url)
    except OSError as error:
        raise StorageError(
            f'cannot write to {path} ({error}): check that the bucket exists and that the credentials may write, list '
            f'and delete there, or choose another directory with {setting}'
        ) from error
