"""Room on a disk for what cannot be streamed."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from lakonlab.storage.errors import StorageError
from lakonlab.storage.local import DirectoryInUseError, directory_lock

SCRATCH_VARIABLE = 'LAKONLAB_TMPDIR'
CACHE_VARIABLE = 'LAKONLAB_CACHE_DIR'
#: What is younger may be about to be locked.
YOUNG_SECONDS = 60
_PREFIX = 'lakonlab-scratch-'


def require_space(folder: Path, needed: int, variable: str, what: str) -> None:
    """Refuse to begin what would not fit on a disk.

    Args:
        folder: Where it would be written; need not exist.
        needed: Bytes.
        variable: Environment variable that names another folder.
        what: What needs the space, for the message.

    Raises:
        StorageError: There is less space.
    """
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise StorageError(
            f'{what} needs {needed:,} bytes in {folder}, where {free:,} are free: make room, or name a folder on '
            f'another disk with {variable}'
        )


def scratch_root() -> Path:
    """``$LAKONLAB_TMPDIR``, by default the system's directory of temporary files; made if needed."""
    root = Path(os.environ.get(SCRATCH_VARIABLE) or tempfile.gettempdir())
    root.mkdir(parents=True, exist_ok=True)
    return root


@contextlib.contextmanager
def scratch_directory(needed: int, what: str) -> Iterator[Path]:
    """An empty directory in ``$LAKONLAB_TMPDIR``, by default that of the system, removed at the end of the block.

    What killed processes of this machine have left there is removed too.

    Args:
        needed: Bytes that will be written.
        what: What needs them, for messages.

    Raises:
        StorageError: There is not as much space.
    """
    root = scratch_root()
    prefix = f'{_PREFIX}{socket.gethostname()}-'
    _remove_abandoned(root, prefix)
    require_space(root, needed, SCRATCH_VARIABLE, what)
    own = Path(tempfile.mkdtemp(prefix=f'{prefix}{os.getpid()}-', dir=root))
    try:
        with directory_lock(own):
            yield own
    finally:
        shutil.rmtree(own, ignore_errors=True)


def _remove_abandoned(root: Path, prefix: str) -> None:
    for folder in root.glob(f'{prefix}*'):
        if folder.name.startswith(f'{prefix}{os.getpid()}-'):
            continue  # a lock does not keep a process from its own
        with contextlib.suppress(DirectoryInUseError, FileNotFoundError, PermissionError):  # in use, or of another user
            if time.time() - folder.stat().st_mtime > YOUNG_SECONDS:
                with directory_lock(folder, wait_seconds=0):
                    shutil.rmtree(folder)
