"""Lets a process fail at a chosen one of its file operations; the code under test knows nothing of it.

Python announces what it does to files to audit hooks, which may refuse it or end the process. Writing and flushing are
not announced, so ``open`` and ``os.fsync`` are replaced too. Only the standard library is used: a process that was
started by another one installs a fault before anything else is imported, see :func:`environment`.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import io
import json
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

VARIABLE = 'TEST_FAULT'
NEEDS_SPACE = ('mkdir', 'open', 'write', 'fsync')
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@dataclass
class Fault:
    """What goes wrong, and when.

    Args:
        mark: Operations are counted from the first one whose path contains it.
        number: The operation that fails, from 0; a negative number lets all of them pass.
        how: ``'kill'`` ends the process just before the operation, and in the middle of it if it writes. ``'full'``
            refuses the operation and from then on everything that needs space on the disk.
        trace: File to which a line is added for each operation before it is done; outside of what is counted.
    """

    mark: str
    number: int
    how: str
    trace: str

    def begin(self) -> None:
        """Count from now on."""
        self.count = 0
        self.is_armed = self.is_full = False
        self.log = os.open(self.trace, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def before(self, operation: str, path: str, written: io.FileIO | None = None, content: bytes = b'') -> None:
        """An operation is about to be done."""
        self.is_armed = self.is_armed or self.mark in path
        if not self.is_armed:
            return
        number, self.count = self.count, self.count + 1
        os.write(self.log, f'{operation} {path}\n'.encode())
        is_due = number == self.number
        self.is_full = self.is_full or (is_due and self.how == 'full')
        if is_due and written is not None:
            io.FileIO.write(written, content[: len(content) // 2])
        if is_due and self.how == 'kill':
            os.kill(os.getpid(), signal.SIGKILL)
        if is_due or (self.is_full and operation in NEEDS_SPACE):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)


_active: Fault | None = None
_is_hooked = False
_open, _fsync = builtins.open, os.fsync


@contextlib.contextmanager
def active(fault: Fault | None) -> Iterator[None]:
    """Let the fault happen in this process while open; None for no fault."""
    global _active, _is_hooked
    if fault is None:
        yield
        return
    if not _is_hooked:
        sys.addaudithook(_hear)
        _is_hooked = True
    fault.begin()
    _active = fault
    builtins.open, os.fsync = _counted_open, _counted_fsync
    try:
        yield
    finally:
        builtins.open, os.fsync = _open, _fsync
        _active = None
        os.close(fault.log)


def environment(fault: Fault, folder: Path) -> Mapping[str, str]:
    """Variables with which a Python process suffers the fault from its start.

    Args:
        fault: The fault.
        folder: Where a start-up file may be written.
    """
    code = [
        'import json, os',
        'from tests.faults import Fault, active',
        f'fault = active(Fault(**json.loads(os.environ[{VARIABLE!r}])))  # would end if nobody kept it',
        'fault.__enter__()',
    ]
    (folder / 'sitecustomize.py').write_text('\n'.join(code))
    root = str(Path(__file__).parents[1])
    paths = filter(None, (str(folder), root, os.environ.get('PYTHONPATH')))
    return {VARIABLE: json.dumps(asdict(fault)), 'PYTHONPATH': os.pathsep.join(paths)}


def _hear(event: str, args: tuple) -> None:
    if _active is None:
        return
    if event == 'open':
        path, _, flags = args
        if isinstance(path, (str, bytes, os.PathLike)) and isinstance(flags, int) and flags & _WRITES:
            _active.before('open', _absolute(path))
    elif event == 'os.mkdir':
        _active.before('mkdir', _absolute(args[0], args[2]))
    elif event == 'os.rename':
        _active.before('rename', f'{_absolute(args[0], args[2])} -> {_absolute(args[1], args[3])}')
    elif event in ('os.remove', 'os.rmdir'):
        _active.before(event.removeprefix('os.'), _absolute(args[0], args[1]))


def _absolute(path, folder: int = -1) -> str:
    path = os.fsdecode(path)
    return os.path.join(os.readlink(f'/proc/self/fd/{folder}') if folder >= 0 else os.getcwd(), path)


class _CountedFile(io.FileIO):
    def write(self, content) -> int:
        _active.before('write', _absolute(self.name), self, bytes(content))
        return super().write(content)


def _counted_open(file, mode='r', *args, **kwargs):
    if mode == 'wb' and _active is not None and isinstance(file, (str, os.PathLike)):
        return io.BufferedWriter(_CountedFile(file, mode))
    return _open(file, mode, *args, **kwargs)


def _counted_fsync(descriptor: int) -> None:
    _active.before('fsync', os.readlink(f'/proc/self/fd/{descriptor}'))
    _fsync(descriptor)
