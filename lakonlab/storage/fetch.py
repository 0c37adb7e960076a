"""Files of anywhere as local files.

What is remote is downloaded once, into the cache of the hub's library or into ``$LAKONLAB_CACHE_DIR`` (by default
``~/.cache/lakonlab``), and is only visible there when all of it has arrived and is what it should be.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from lakonlab.storage.download import cached_file, cached_tree
from lakonlab.storage.errors import MissingFileError, StorageError
from lakonlab.storage.local import sha256_of
from lakonlab.storage.paths import as_local, is_remote, normal, split_digest
from lakonlab.storage.schemes import LIST, READ, backend_of, can, has_own_cache, require


class FetchError(StorageError):
    """A remote file that cannot be had."""


def fetch(uri: str | Path, sha256: str | None = None, only: Collection[str] | None = None) -> Path:
    """A local path with the content of a file or a directory.

    Args:
        uri: Path of any scheme. On the hub, what ends in a suffix is a file, anything else a directory. ``#sha256=``
            and 64 digits at the end state the checksum that the file must have.
        sha256: The same, if the path does not state it.
        only: Of a remote directory, download these subdirectories and the files directly in it; None for all.

    Returns:
        The path; of a local one, itself, whether it exists or not.

    Raises:
        FetchError: The scheme is unknown, there is no such file, it cannot be downloaded, or it is not what the
            checksum says.
    """
    _, stated = split_digest(uri)
    digest = stated or sha256
    try:
        if not is_remote(uri):
            path = as_local(uri)
            _check(path, digest, str(uri))
            return path
        return _download(normal(uri), digest, only)
    except FetchError:
        raise
    except StorageError as error:
        raise FetchError(str(error)) from error


def require_known_scheme(uri: str | Path) -> None:
    """Refuse a path that :func:`fetch` could not read, without a network.

    Raises:
        FetchError: The scheme is unknown.
    """
    try:
        require(uri, READ, setting='')
    except StorageError as error:
        raise FetchError(f'{error}. Download it and name its path.') from error


def _download(path: str, digest: str | None, only: Collection[str] | None) -> Path:
    require_known_scheme(path)
    if has_own_cache(path):
        from lakonlab.storage.hub import fetch_from_hub

        found = fetch_from_hub(path)
        _check(found, digest, path)
        return found
    backend = backend_of(path)
    if only is not None:
        return cached_tree(backend, path, only)
    try:
        return cached_file(backend, path, digest)
    except MissingFileError:
        if not can(path, LIST) or digest is not None:
            raise
        return cached_tree(backend, path)


def _check(path: Path, digest: str | None, uri: str) -> None:
    """Compare a local file, if it exists, with a checksum."""
    if digest is None or not path.exists():
        return
    if path.is_dir():
        raise FetchError(f'{uri!r} is a directory; only a file can have a checksum')
    found = sha256_of(path)
    if found != digest:
        raise FetchError(f'{uri!r} has the SHA-256 {found}, expected {digest}: it is damaged, or another file')
