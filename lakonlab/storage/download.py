"""Downloads, kept by their content: verified, resumable, one at a time among the processes that need the same.

In ``$LAKONLAB_CACHE_DIR/downloads``:

``blobs/<SHA-256>``
    contents;
``files/<path and version>/<name>``
    links to them under the names that files have where they come from, each with a record of what was downloaded, and
    the part of an unfinished download, which the next attempt continues;
``trees/<listing>/<name>``
    directories of such links;
``paths/<path>.json``
    which of them was the last for a path, for work without a network.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from lakonlab.cache import cache_directory
from lakonlab.storage.backend import Backend, FileInfo
from lakonlab.storage.errors import MissingFileError, RestartError, StorageError, TransientError
from lakonlab.storage.local import (
    DirectoryInUseError,
    directory_lock,
    publish_directory,
    temporary_directory,
)
from lakonlab.storage.local_files import LocalFiles
from lakonlab.storage.paths import name_of
from lakonlab.storage.retry import Patience
from lakonlab.storage.scratch import CACHE_VARIABLE, require_space

logger = logging.getLogger(__name__)

OFFLINE_VARIABLE = 'LAKONLAB_OFFLINE'
#: Whoever waits for another process gives up when that has not written anything for so long.
STALLED_SECONDS = 600.0
#: Parts of downloads that nobody has continued for so long are removed.
ABANDONED_SECONDS = 7 * 24 * 3600.0
PARALLEL_FILES = 4
PART, RECORD = '.part', '.record.json'

_thread_locks: dict[str, threading.Lock] = {}
"""One lock for each directory: the kernel's locks keep processes apart, but not the threads of one."""
if hasattr(os, 'register_at_fork'):
    os.register_at_fork(after_in_child=_thread_locks.clear)


def cached_file(backend: Backend, path: str, digest: str | None = None, bar: tqdm | None = None) -> Path:
    """A local copy of a remote file, downloaded unless it is there.

    Args:
        backend: Serves the path.
        path: The file.
        digest: SHA-256 that it must have; None for whatever is there.
        bar: Shows progress; None to show one of its own.

    Raises:
        MissingFileError: There is no such file.
        StorageError: It cannot be had, or is not what it should be.
    """
    root = _root()
    if digest is not None and (root / 'blobs' / digest).is_file():
        return _link(root / 'files' / _short(digest, path), name_of(path), digest)
    if is_offline():
        return _last_of(path)
    try:
        info = backend.require_stat(path)
    except TransientError as error:
        raise StorageError(f'{error}{_offline_advice(path)}') from error
    if digest is not None and info.sha256 not in (None, digest):
        raise StorageError(f'{path!r} has the SHA-256 {info.sha256}, expected {digest}')
    digest = digest or info.sha256
    folder = root / 'files' / _short(path, info.version or info.md5 or '', str(info.size), digest or '')
    target = folder / (name_of(path) or 'download')
    is_known = any((info.version, info.md5, digest))
    if not is_known and info.size >= 0 and _is_complete(folder, target):
        logger.warning(
            '%s: the server tells neither a checksum nor when it was changed, only that it has %d bytes, as many as '
            'the copy of %s; that is used. Delete %s to download it again, or add #sha256= to the path.',
            path,
            info.size,
            time.strftime('%Y-%m-%d %H:%M', time.localtime((folder / RECORD).stat().st_mtime)),
            folder,
        )
    oldest = None if is_known or info.size >= 0 else time.time()  # nothing tells whether an older one is the same
    if not _is_complete(folder, target, oldest):
        with exclusive(folder, path, lambda: _mark(folder / PART)):
            if not _is_complete(folder, target, oldest):
                _remove_abandoned(root)
                _download(backend, path, info, digest, folder, target, bar)
    _remember(path, target)
    return target


def cached_tree(backend: Backend, path: str, only: Collection[str] | None = None) -> Path:
    """A local copy of a remote directory, of which every file is downloaded unless it is there.

    Args:
        backend: Serves the path.
        path: The directory.
        only: Subdirectories to copy beside the files directly in it; None for all.

    Raises:
        MissingFileError: There is no such directory.
        StorageError: A file cannot be had.
    """
    remembered = path if only is None else f'{path}/({", ".join(sorted(only))})'
    if is_offline():
        return _last_of(remembered)
    listing = [
        info
        for info in backend.list_files(path)
        if only is None or '/' not in info.name or info.name.partition('/')[0] in only
    ]
    if not listing:
        raise MissingFileError(f'{path!r} does not exist: there is no such file, and nothing in such a directory')
    version = _short(path, *(f'{info.name} {info.size} {info.version}' for info in listing))
    target = _root() / 'trees' / version / (name_of(path) or 'download')
    if not target.is_dir():
        with exclusive(target.parent, path, _all_progress):
            if not target.is_dir():
                _download_tree(backend, path, listing, target)
    _remember(remembered, target)
    return target


def is_offline() -> bool:
    """Whether ``$LAKONLAB_OFFLINE`` says that what was downloaded before is to be used, without asking the server."""
    return os.environ.get(OFFLINE_VARIABLE, '') not in ('', '0')


@contextlib.contextmanager
def exclusive(folder: Path, path: str, progress: Callable[[], object]) -> Iterator[None]:
    """Keep other threads and processes away from a directory, waiting for one that makes progress.

    Args:
        folder: The directory.
        path: What is downloaded, for messages.
        progress: Its value changes while the holder works.

    Raises:
        StorageError: The holder has stopped working.
    """
    with _thread_locks.setdefault(str(folder), threading.Lock()):
        last, since = progress(), time.monotonic()
        while True:
            lock = directory_lock(folder, wait_seconds=min(10.0, STALLED_SECONDS))
            try:
                lock.__enter__()
                break
            except DirectoryInUseError as error:
                now = progress()
                if now != last:
                    last, since = now, time.monotonic()
                elif time.monotonic() - since > STALLED_SECONDS:
                    raise StorageError(
                        f'{path!r}: another process has been downloading it to {folder}, without progress for '
                        f'{STALLED_SECONDS:.0f} s; stop that one, or download it yourself and name the local path'
                    ) from error
        try:
            yield
        finally:
            lock.__exit__(None, None, None)


def _download(
    backend: Backend, path: str, info: FileInfo, digest: str | None, folder: Path, target: Path, bar: tqdm | None
) -> None:
    part = folder / PART
    if info.version is None:  # what is left of an earlier attempt may be of another content
        part.unlink(missing_ok=True)
    patience = Patience(f'downloading {path}')
    earlier = None
    for number in range(3):  # a part that some other writer has damaged must not fail for ever
        while True:
            try:
                size, sha256, md5 = _receive(backend, path, info, part, bar)
                break
            except RestartError as error:
                part.unlink()
                patience.wait_after(error)
            except BaseException:
                if info.version is None:
                    part.unlink(missing_ok=True)
                raise
        problem = _problem(info, digest, size, sha256, md5)
        if problem is None:
            break
        if (
            info.is_md5_guessed
            and sha256 == earlier
            and _problem(replace(info, md5=None), digest, size, sha256, md5) is None
        ):
            logger.warning('%s: %s, but two downloads agree: what the server states is no MD5', path, problem)
            break
        earlier = sha256
        part.unlink()
        if number == (2 if info.is_md5_guessed else 1):
            raise StorageError(f'{path!r} arrived damaged each time: {problem}; run again')
    blob = _root() / 'blobs' / sha256
    blob.parent.mkdir(parents=True, exist_ok=True)
    os.replace(part, blob)
    _link(folder, target.name, sha256)
    _write_json(folder / RECORD, {'path': path, 'version': info.version, 'size': size, 'sha256': sha256})


def _receive(backend: Backend, path: str, info: FileInfo, part: Path, bar: tqdm | None) -> tuple[int, str, str]:
    """Continue a download. Returns bytes, SHA-256 and MD5 of all that is there."""
    sha256, md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
    total = None if info.size < 0 else info.size
    with open(part, 'a+b') as stream, contextlib.ExitStack() as stack:
        stream.seek(0)
        while chunk := stream.read(1 << 22):
            sha256.update(chunk)
            md5.update(chunk)
        position = stream.tell()
        if total is not None:
            require_space(part.parent, total - position, CACHE_VARIABLE, f'downloading {path}')
        if bar is None:
            options = {'unit': 'B', 'unit_scale': True, 'unit_divisor': 1024}
            bar = stack.enter_context(tqdm(total=total, initial=position, desc=name_of(path), **options))
        else:
            bar.update(position)
        if total is None or position < total:
            for chunk in backend.chunks(path, position, total, info.version):
                stream.write(chunk)
                sha256.update(chunk)
                md5.update(chunk)
                bar.update(len(chunk))
        stream.flush()
        os.fsync(stream.fileno())
        return stream.tell(), sha256.hexdigest(), md5.hexdigest()


def _problem(info: FileInfo, digest: str | None, size: int, sha256: str, md5: str) -> str | None:
    """What a download is not as it should be; None if it is."""
    if info.size not in (-1, size):
        return f'it has {size:,} bytes, expected {info.size:,}'
    if digest not in (None, sha256):
        return f'its SHA-256 is {sha256}, expected {digest}'
    if digest is None and info.md5 not in (None, md5):
        return f'its MD5 is {md5}, expected {info.md5}'
    return None


def _download_tree(backend: Backend, path: str, listing: list[FileInfo], target: Path) -> None:
    temporary = temporary_directory(target)
    total = sum(max(info.size, 0) for info in listing)
    options = {'unit': 'B', 'unit_scale': True, 'unit_divisor': 1024}
    with tqdm(total=total, desc=target.name, **options) as bar, ThreadPoolExecutor(PARALLEL_FILES) as threads:
        jobs = {info.name: threads.submit(cached_file, backend, f'{path}/{info.name}', bar=bar) for info in listing}
        try:
            for name, job in jobs.items():
                link = temporary / name
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(os.path.relpath(job.result().resolve(), (target / name).parent))
        except BaseException:
            threads.shutdown(cancel_futures=True)
            LocalFiles().remove_directory(str(temporary))
            raise
    publish_directory(temporary, target)


def _link(folder: Path, name: str, digest: str) -> Path:
    """A name for a content."""
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / name
    if not target.exists() or target.resolve().name != digest:
        temporary = folder / f'.{name}.{os.getpid()}-{threading.get_ident()}'
        temporary.symlink_to(os.path.relpath(_root() / 'blobs' / digest, folder))
        os.replace(temporary, target)
    return target


def _is_complete(folder: Path, target: Path, oldest: float | None = None) -> bool:
    """Whether a download is there, of the size that it had, and not older than a time."""
    with contextlib.suppress(FileNotFoundError, ValueError, KeyError):
        if oldest is not None and (folder / RECORD).stat().st_mtime < oldest:
            return False
        record = json.loads((folder / RECORD).read_text(encoding='utf-8'))
        return target.stat().st_size == record['size']
    return False


def _remember(path: str, target: Path) -> None:
    root = _root()
    pointer = root / 'paths' / f'{_short(path)}.json'
    content = {'path': path, 'copy': os.path.relpath(target, root)}
    if not pointer.is_file() or json.loads(pointer.read_text(encoding='utf-8')) != content:
        _write_json(pointer, content)


def _remembered(path: str) -> Path | None:
    pointer = _root() / 'paths' / f'{_short(path)}.json'
    if not pointer.is_file():
        return None
    copy = _root() / json.loads(pointer.read_text(encoding='utf-8'))['copy']
    return copy if copy.exists() else None


def _offline_advice(path: str) -> str:
    copy = _remembered(path)
    return '' if copy is None else f'; {OFFLINE_VARIABLE}=1 uses {copy}, which was downloaded before'


def _last_of(path: str) -> Path:
    copy = _remembered(path)
    if copy is not None:
        return copy
    raise StorageError(
        f'{path!r} was not downloaded to {_root()} before, and {OFFLINE_VARIABLE} is set: unset it, or set '
        f'{CACHE_VARIABLE} to where it was'
    )


def _write_json(path: Path, value: object) -> None:
    with LocalFiles().open_write(str(path)) as stream:
        stream.write(json.dumps(value, indent=1).encode())


def _remove_abandoned(root: Path) -> None:
    for part in (root / 'files').glob(f'*/{PART}'):
        with contextlib.suppress(FileNotFoundError):  # another process has just finished or removed it
            if time.time() - part.stat().st_mtime > ABANDONED_SECONDS:
                part.unlink()


def _mark(path: Path) -> tuple[int, int] | None:
    try:
        entry = path.stat()
    except FileNotFoundError:
        return None
    return entry.st_size, entry.st_mtime_ns


def _all_progress() -> object:
    """What changes while anything is downloaded."""
    parts = sorted((_root() / 'files').glob(f'*/{PART}'))
    return [_mark(_root() / 'blobs'), *((str(part), _mark(part)) for part in parts)]


def _root() -> Path:
    return cache_directory() / 'downloads'


def _short(*texts: str) -> str:
    return hashlib.sha256('\n'.join(texts).encode()).hexdigest()[:32]
