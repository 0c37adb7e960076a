"""A lock on a directory of an object store, where no kernel knows who is alive.

The holder writes ``.lock`` with the condition that it does not exist, and renews it while it runs. A lock is stale, and
taken over, at once if its process ran on this machine and is gone; otherwise when it has not been renewed for
``STALE_SECONDS`` by this machine's clock, as clocks of machines differ. A store that ignores the condition lets two
runs begin at the same moment; the one whose lock was overwritten then learns of it before it publishes anything.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lakonlab.storage import files
from lakonlab.storage.local import LOCK_FILE, DirectoryInUseError
from lakonlab.storage.remote_path import RemotePath

RENEW_SECONDS = 20.0
STALE_SECONDS = 120.0
WAIT_SECONDS = 10.0
"""How long to wait for a holder that is about to finish."""
SETTLE_SECONDS = 2.0
"""How long another run that takes over the same stale lock may take to write it."""
POLL_SECONDS = 0.5

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def lease(directory: RemotePath) -> Iterator[str]:
    """Keep other runs from writing to a directory while open.

    Args:
        directory: The directory.

    Yields:
        What tells this holder from others, for :func:`confirm_lease`.

    Raises:
        DirectoryInUseError: Another run holds it.
    """
    holder = uuid.uuid4().hex
    path = directory / LOCK_FILE
    _acquire(directory, path, holder)
    ended = threading.Event()
    thread = threading.Thread(target=_renew, args=(path, holder, ended), daemon=True, name='lease')
    thread.start()
    try:
        yield holder
    finally:
        ended.set()
        thread.join()
        try:
            if _token(_read(path)) == holder:
                files.remove_file(str(path))
        except OSError as error:  # the next run finds it stale
            logger.warning('%s could not be removed (%s)', path, error)


def confirm_lease(directory: RemotePath, holder: str) -> None:
    """Make sure that a directory is still held.

    Args:
        directory: The directory.
        holder: What :func:`lease` gave.

    Raises:
        DirectoryInUseError: It is not.
    """
    found = _read(directory / LOCK_FILE)
    if found is None:
        raise DirectoryInUseError(f'{directory / LOCK_FILE}, the lock of this run, was removed; nothing more is saved')
    if _token(found) != holder:
        raise DirectoryInUseError(
            f'{directory} is held by another run now ({_describe(found)}), which found no sign of life of this one for '
            f'{STALE_SECONDS:.0f} s or began at the same moment; nothing more is saved here'
        )


def _acquire(directory: RemotePath, path: RemotePath, holder: str) -> None:
    began = since = absent = time.monotonic()
    known: dict[str, Any] | None = None
    is_renewed = False
    while True:
        found = _read(path)
        if found is None:
            if files.create(str(path), _content(holder)):
                return
            if time.monotonic() - absent > WAIT_SECONDS:
                raise files.StorageError(
                    f'{path} cannot be created: the store says that it exists, and does not show it. Check that the '
                    'run may read it, or name another directory with checkpoint_config.out_dir'
                )
            time.sleep(POLL_SECONDS)
            continue
        absent = time.monotonic()
        if _token(found) == holder:  # the answer to an attempt to write it was lost
            return
        now = time.monotonic()
        if found != known:
            is_renewed = is_renewed or (known is not None and _token(known) == _token(found))
            if known is None and not _is_of_this_machine(found):
                logger.info(
                    '%s is held by %s; waiting up to %.0f s for a sign of life',
                    directory,
                    _describe(found),
                    STALE_SECONDS,
                )
            known, since = found, now
        is_here = _is_of_this_machine(found)
        if (is_here and not _is_running(found)) or (not is_here and now - since > STALE_SECONDS):
            logger.warning('%s was left by a run that is gone (%s); taking it over', path, _describe(found))
            files.write_bytes(str(path), _content(holder))
            time.sleep(SETTLE_SECONDS)
            if _token(_read(path)) == holder:
                return
            continue
        if now - began > WAIT_SECONDS and (is_here or is_renewed):
            raise DirectoryInUseError(
                f'{directory} is in use by another run ({_describe(found)}). Wait until it has ended, stop it, or give '
                f'this run another name (work_dir, checkpoint_config.out_dir). If it is gone, remove {path}.'
            )
        time.sleep(POLL_SECONDS)


def _renew(path: RemotePath, holder: str, ended: threading.Event) -> None:
    while not ended.wait(RENEW_SECONDS):
        try:
            if _token(_read(path)) != holder:
                return  # lost; whoever saves next is told so
            files.write_bytes(str(path), _content(holder))
        except OSError as error:
            logger.warning('%s could not be renewed (%s); trying again in %.0f s', path, error, RENEW_SECONDS)


def _content(holder: str) -> bytes:
    value = {
        'holder': holder,
        'process': os.getpid(),
        'host': socket.gethostname(),
        'started': _start_of(os.getpid()),
        'machine': _machine(),
        'renewed': time.strftime('%Y-%m-%dT%H:%M:%S%z'),
        'nonce': uuid.uuid4().hex[:8],
    }
    return json.dumps(value, indent=1).encode()


def _read(path: RemotePath) -> dict[str, Any] | None:
    """What a lock says; None if there is none."""
    try:
        text = path.read_text()
    except FileNotFoundError:
        return None
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    return value if isinstance(value, dict) else {'unreadable': text}


def _token(found: dict[str, Any] | None) -> str | None:
    return None if found is None else found.get('holder')


def _describe(found: dict[str, Any]) -> str:
    return f'process {found.get("process")} on {found.get("host")}, last sign of life {found.get("renewed")}'


def _machine() -> str | None:
    """What is the same for all processes that see each other's numbers, and for no others; None if unknown."""
    try:
        boot = Path('/proc/sys/kernel/random/boot_id').read_text().strip()
        return f'{boot} {os.readlink("/proc/self/ns/pid")}'
    except OSError:
        return None


def _start_of(pid: int) -> str | None:
    """When a process began, in the kernel's own unit; None if there is no such process, or it has ended."""
    try:
        fields = Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()
        return None if fields[0] in 'ZX' else fields[19]
    except (OSError, IndexError):
        return None


def _is_of_this_machine(found: dict[str, Any]) -> bool:
    return found.get('machine') is not None and found['machine'] == _machine()


def _is_running(found: dict[str, Any]) -> bool:
    start = _start_of(int(found['process']))
    return start is not None and start == found.get('started')
