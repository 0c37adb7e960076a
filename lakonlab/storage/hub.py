"""Files of repositories on the Hugging Face hub, through its library and its cache."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from lakonlab.cache import cache_directory
from lakonlab.storage.backend import Backend, FileInfo
from lakonlab.storage.errors import MissingFileError, StorageError, TransientError
from lakonlab.storage.local import sha256_of
from lakonlab.storage.retry import persistently


@dataclass(frozen=True)
class HubPath:
    """A path on the hub.

    Args:
        repository: ``organisation/repository``.
        revision: Branch, tag or commit; None for the default branch.
        inner: Path in the repository; empty for its root.
    """

    repository: str
    revision: str | None
    inner: str

    @classmethod
    def of(cls, path: str) -> HubPath:
        """Take a URL apart.

        Raises:
            StorageError: It names no repository.
        """
        parts = path.partition('://')[2].rstrip('/').split('/')
        repository, _, revision = '/'.join(parts[:2]).partition('@')
        if len(parts) < 2 or not all(parts) or not all(repository.split('/')):
            raise StorageError(f'{path!r}: expected huggingface://organisation/repository[@revision]/path')
        return cls(repository, revision or None, '/'.join(parts[2:]))

    @property
    def options(self) -> dict[str, Any]:
        """Repository and revision as arguments of the hub's library."""
        return {'repo_id': self.repository, 'revision': self.revision}


class HubFiles(Backend):
    """Files on the hub. What is read is downloaded whole, into the cache of the hub's library."""

    def stat(self, path: str) -> FileInfo | None:
        """See the base class; without a network, what is in the cache."""
        where = HubPath.of(path)
        from huggingface_hub import constants, try_to_load_from_cache

        if constants.HF_HUB_OFFLINE:
            found = try_to_load_from_cache(where.repository, where.inner, revision=where.revision)
            return FileInfo(Path(found).name, Path(found).stat().st_size) if isinstance(found, str) else None
        entry = self._entry(path)
        return _info(entry, Path(entry.path).name) if hasattr(entry, 'size') else None

    def is_directory(self, path: str) -> bool:
        """See the base class."""
        if not HubPath.of(path).inner:
            return any(True for _ in self._tree(path, recursive=False))
        entry = self._entry(path)
        return entry is not None and not hasattr(entry, 'size')

    def open_read(self, path: str) -> BinaryIO:
        """See the base class."""
        return open(download_file(path), 'rb')

    def list_names(self, path: str) -> list[str]:
        """See the base class."""
        return sorted(entry.path.rpartition('/')[2] for entry in self._tree(path, recursive=False))

    def list_files(self, path: str) -> Iterator[FileInfo]:
        """See the base class."""
        inner = HubPath.of(path).inner
        files = [entry for entry in self._tree(path, recursive=True) if hasattr(entry, 'size')]
        for entry in sorted(files, key=lambda entry: entry.path):
            yield _info(entry, entry.path[len(inner) + 1 if inner else 0 :])

    def _entry(self, path: str) -> Any:
        from huggingface_hub import HfApi

        where = HubPath.of(path)

        def look() -> Any:
            with _explained(path):
                found = HfApi().get_paths_info(paths=[where.inner], **where.options)
                return found[0] if found else None

        return persistently(look, f'looking at {path}')

    def _tree(self, path: str, recursive: bool) -> list[Any]:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import EntryNotFoundError

        where = HubPath.of(path)

        def look() -> list[Any]:
            with _explained(path):
                try:
                    return list(HfApi().list_repo_tree(path_in_repo=where.inner, recursive=recursive, **where.options))
                except EntryNotFoundError:
                    return []

        return persistently(look, f'listing {path}')


def fetch_from_hub(path: str) -> Path:
    """The local copy of a file, whose name ends in a suffix, or of a folder.

    Raises:
        StorageError: It cannot be had.
    """
    inner = HubPath.of(path).inner
    # a version, like v0.1, is no suffix
    is_one_file = re.fullmatch(r'.*\.[A-Za-z][A-Za-z0-9]*', inner) is not None
    return download_file(path) if is_one_file else download_folder(path)


def download_file(path: str) -> Path:
    """The local copy of a file.

    Raises:
        StorageError: It cannot be had, or is damaged.
    """
    from huggingface_hub import hf_hub_download

    where = HubPath.of(path)
    if not where.inner:
        raise StorageError(f'{path!r}: expected huggingface://organisation/repository[@revision]/path')

    def download() -> Path:
        with _explained(path):
            return Path(hf_hub_download(filename=where.inner, **where.options))

    return _verified(persistently(download, f'downloading {path}'), path)


def download_folder(path: str) -> Path:
    """The local copy of a folder.

    Raises:
        StorageError: It cannot be had, or a file in it is damaged.
    """
    from huggingface_hub import snapshot_download

    where = HubPath.of(path)
    if not where.inner:
        raise StorageError(f'{path!r}: expected huggingface://organisation/repository[@revision]/path')

    def download() -> Path:
        with _explained(path):
            return Path(snapshot_download(allow_patterns=[f'{where.inner}/*'], **where.options)) / where.inner

    folder = persistently(download, f'downloading {path}')
    if not folder.exists():
        raise MissingFileError(f'{path!r}: {where.repository} has no folder {where.inner!r}')
    for file in folder.rglob('*'):
        if file.is_file():
            _verified(file, path)
    return folder


def _verified(file: Path, path: str) -> Path:
    """Compare a large file with its checksum, under which the hub's library keeps it; once for each download."""
    content = file.resolve()
    if not re.fullmatch('[0-9a-f]{64}', content.name):
        return file  # small files of a repository have no such name
    entry = content.stat()
    facts = f'{entry.st_size} {entry.st_mtime_ns} {content}'
    mark = cache_directory() / 'downloads' / 'verified' / content.name
    if mark.is_file() and mark.read_text(encoding='utf-8') == facts:
        return file
    found = sha256_of(content)
    if found != content.name:
        raise StorageError(
            f'{path!r}: the download {content} is damaged (its SHA-256 is {found}); delete that file and run again'
        )
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.write_text(facts, encoding='utf-8')
    return file


def _info(entry: Any, name: str) -> FileInfo:
    return FileInfo(name, entry.size, entry.blob_id, entry.lfs.sha256 if entry.lfs else None)


@contextlib.contextmanager
def _explained(path: str) -> Iterator[None]:
    """Errors of the hub's library as ours."""
    from huggingface_hub.errors import (
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RemoteEntryNotFoundError,
    )

    try:
        yield
    except StorageError:
        raise
    except RemoteEntryNotFoundError as error:
        where = HubPath.of(path)
        raise MissingFileError(
            f'{path!r} does not exist: {where.repository} has no such file'
            f'{f" at {where.revision}" if where.revision else ""} (EntryNotFoundError). Check the name'
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, ValueError, OSError) as error:
        text = (
            f'{path!r} cannot be downloaded: {type(error).__name__}: {(str(error).splitlines() or [""])[0]}. Check the '
            'name; for a gated repository accept its licence and log in (hf auth login); without a network, download '
            'it elsewhere and name the local path.'
        )
        raise (TransientError if _is_transient(error) else StorageError)(text) from error
    except Exception as error:
        if not _is_transient(error):
            raise
        raise TransientError(f'{path!r} cannot be downloaded: {type(error).__name__}: {error}') from error


def _is_transient(error: BaseException | None) -> bool:
    while error is not None:
        response = getattr(error, 'response', None)
        status = getattr(response, 'status_code', 0)
        if status == 429 or status >= 500:
            return True
        if any(kind.__name__ == 'TransportError' for kind in type(error).__mro__):  # of whichever HTTP library it uses
            return True
        error = error.__cause__
    return False
