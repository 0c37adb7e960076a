"""Durable writes on a local file system: nothing is visible under its final name before all of it is on the disk.

A directory is filled under a temporary name in the same parent, every file and directory in it is flushed to the disk,
and one rename publishes it. A crash at any moment leaves either the old state or the new one, plus at most a temporary
directory that the next run removes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import socket
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

TEMPORARY_MARK = '.tmp-'
LOCK_FILE = '.lock'
REPLACED_NAME = re.compile(rf'\.(.+){re.escape(TEMPORARY_MARK)}replaced-[0-9a-f]+')


class DirectoryInUseError(OSError):
    """Another process writes to a directory."""


def write_bytes(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path`` and flush it to the disk."""
    with open(path, 'wb') as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` and flush it to the disk."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: object) -> None:
    """Write ``value`` as JSON to ``path`` and flush it to the disk.

    Raises:
        ValueError: ``value`` holds a number that JSON cannot represent faithfully (NaN or infinity are allowed and
            written the way Python reads them back).
        TypeError: ``value`` holds an object that is not plain data.
    """
    write_text(path, json.dumps(value, indent=1))


def fsync_directory(path: Path) -> None:
    """Flush the entries of a directory (names, not contents) to the disk."""
    if os.name == 'nt':  # Windows cannot open directories; renames are durable there without this
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path, chunk_bytes: int = 1 << 22) -> str:
    """SHA-256 of a file's contents, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, 'rb') as stream:
        while chunk := stream.read(chunk_bytes):
            digest.update(chunk)
    return digest.hexdigest()


def temporary_directory(final: Path) -> Path:
    """Create and return an empty directory beside ``final``, to be handed to :func:`publish_directory`."""
    final.parent.mkdir(parents=True, exist_ok=True)
    path = final.parent / f'.{final.name}{TEMPORARY_MARK}{os.getpid()}-{uuid.uuid4().hex[:8]}'
    path.mkdir()
    return path


def publish_directory(temporary: Path, final: Path) -> None:
    """Flush ``temporary`` to the disk and give it its final name, replacing what stood there.

    Args:
        temporary: A directory made by :func:`temporary_directory`, whose files are already flushed.
        final: The name under which readers look for it.
    """
    for folder, _, _ in os.walk(temporary, topdown=False):
        fsync_directory(Path(folder))
    replaced = None
    if final.exists():
        # A directory cannot be renamed onto one that is not empty, so the old one steps aside first.
        replaced = final.parent / f'.{final.name}{TEMPORARY_MARK}replaced-{uuid.uuid4().hex[:8]}'
        os.rename(final, replaced)
    try:
        os.rename(temporary, final)
    except OSError:
        if replaced is not None:
            os.rename(replaced, final)
        raise
    fsync_directory(final.parent)
    if replaced is not None:
        shutil.rmtree(replaced)


def remove_directory(path: Path) -> None:
    """Remove a published directory so that a crash half way leaves no part of it under its final name."""
    doomed = path.parent / f'.{path.name}{TEMPORARY_MARK}removed-{uuid.uuid4().hex[:8]}'
    os.rename(path, doomed)
    shutil.rmtree(doomed)


def stale_replaced(parent: Path) -> dict[str, Path]:
    """Directories that stepped aside for a newer one which never got their name, by that name.

    Args:
        parent: Where they were published.

    Returns:
        Final name, missing in ``parent`` -> the directory; of several the one that stepped aside last.
    """
    found: dict[str, Path] = {}
    if parent.is_dir():
        for path in sorted(parent.iterdir(), key=lambda path: path.lstat().st_ctime_ns):
            match = REPLACED_NAME.fullmatch(path.name)
            if match and path.is_dir() and not (parent / match[1]).exists():
                found[match[1]] = path
    return found


def restore_replaced(parent: Path) -> list[str]:
    """Give directories of :func:`stale_replaced` their names back; only for the holder of :func:`directory_lock`.

    Returns:
        The names.
    """
    stale = stale_replaced(parent)
    for name, path in stale.items():
        os.rename(path, parent / name)
    if stale:
        fsync_directory(parent)
    return list(stale)


def remove_stale_temporaries(parent: Path) -> list[str]:
    """Remove what interrupted writers left in ``parent``; only for the holder of its :func:`directory_lock`.

    What stepped aside for a directory that was never published is restored, not removed.

    Returns:
        The names of what was removed.
    """
    restore_replaced(parent)
    removed = []
    if parent.is_dir():
        for path in sorted(parent.iterdir()):
            if path.name.startswith('.') and TEMPORARY_MARK in path.name:
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()
                removed.append(path.name)
    return removed


def require_writable(path: Path, setting: str) -> None:
    """Make a directory if needed, and try to write to it.

    Args:
        path: The directory.
        setting: What names it in the config, for the message.

    Raises:
        OSError: It cannot be made or written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise OSError(
            f'cannot write to {path} ({error.strerror}): free space, fix its permissions, or choose another directory '
            f'with {setting}'
        ) from error


def require_shared(path: Path) -> None:
    """Make sure that this process sees a directory that another one holds with :func:`directory_lock`.

    Args:
        path: The directory.

    Raises:
        OSError: It is not there, so every node has a file system of its own there.
    """
    if not (path / LOCK_FILE).exists():
        raise OSError(
            f'{path} is not seen by {socket.gethostname()} as the main process made it: checkpoint_config.out_dir must '
            'be on a file system that all nodes share'
        )


@contextlib.contextmanager
def directory_lock(path: Path, wait_seconds: float = 10.0) -> Iterator[None]:
    """Keep other processes from writing to a directory at the same time.

    The lock is the kernel's: it ends with the process, however that dies, and child processes do not inherit it.

    Args:
        path: The directory, made if it does not exist.
        wait_seconds: How long to wait for a holder that is about to finish.

    Raises:
        DirectoryInUseError: Another process holds the lock.
    """
    path.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # not a POSIX system: two writers are not detected there
        (path / LOCK_FILE).touch()
        yield
        return
    with open(path / LOCK_FILE, 'a+', encoding='utf-8') as stream:
        deadline = time.monotonic() + wait_seconds
        while True:
            try:
                fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except (BlockingIOError, PermissionError) as error:
                if time.monotonic() > deadline:
                    stream.seek(0)
                    holder = stream.read().strip() or 'unknown'
                    raise DirectoryInUseError(
                        f'{path} is in use by another run (process {holder}). Wait until it has ended, stop it, or '
                        'give this run another name (work_dir, checkpoint_config.out_dir).'
                    ) from error
                time.sleep(0.1)
        stream.truncate(0)
        stream.write(f'{os.getpid()} on {socket.gethostname()}')
        stream.flush()
        yield
