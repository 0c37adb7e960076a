"""Files of anywhere as local files: one table of URL schemes.

A path may be local, ``huggingface://organisation/repository[@revision]/path`` or ``http(s)://``. What is remote is
downloaded once, into the cache of the hub's library or into ``$LAKONLAB_CACHE_DIR`` (by default ``~/.cache/lakonlab``),
and is only visible there when all of it has arrived.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import re
import shutil
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from lakonlab.cache import cache_directory
from lakonlab.storage.errors import StorageError
from lakonlab.storage.local import DirectoryInUseError, directory_lock
from lakonlab.storage.paths import STAGED, is_remote

CHUNK_BYTES = 1 << 20
TIMEOUT_SECONDS = 60
LOCK_SECONDS = 3600.0
#: What a killed download left is removed when nothing was written to it for so long.
STALE_SECONDS = 3600.0
PARTIAL_MARK = '.part-'


class FetchError(StorageError):
    """A remote file that cannot be had."""


def fetch(uri: str | Path) -> Path:
    """A local path with the content of a file, or of a folder of the hub.

    Args:
        uri: Local path or URL. What ends in a suffix is a file on the hub, anything else or with a slash at its end
            is a folder.

    Returns:
        The path; of a local one, itself, whether it exists or not.

    Raises:
        FetchError: The scheme is unknown, there is no such file, or it cannot be downloaded.
    """
    text = str(uri).removeprefix(STAGED)
    if not is_remote(text):
        return Path(text).expanduser()
    return _handler(text)(text)


def require_known_scheme(uri: str) -> None:
    """Refuse a URL that :func:`fetch` could not read, without a network.

    Raises:
        FetchError: The scheme is unknown.
    """
    text = uri.removeprefix(STAGED)
    if is_remote(text):
        _handler(text)


def _handler(uri: str) -> Callable[[str], Path]:
    scheme = uri.partition(':')[0].lower()
    if scheme not in SCHEMES:
        raise FetchError(
            f'{uri!r}: {scheme}:// cannot be read; known are local paths and {", ".join(f"{s}://" for s in SCHEMES)}. '
            'Download it and name its path.'
        )
    return SCHEMES[scheme]


def _from_hub(uri: str) -> Path:
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    parts = uri.partition('://')[2].split('/')
    if len(parts) < 3 or not all(parts[:2]):
        raise FetchError(f'{uri!r}: expected huggingface://organisation/repository/path')
    repository, _, revision = '/'.join(parts[:2]).partition('@')
    path = '/'.join(parts[2:])
    is_file = re.fullmatch(r'.*\.[A-Za-z][A-Za-z0-9]*', path) is not None  # a version, like v0.1, is no suffix
    path = path.rstrip('/')
    try:
        if is_file:
            return Path(hf_hub_download(repository, path, revision=revision or None))
        folder = Path(snapshot_download(repository, revision=revision or None, allow_patterns=[f'{path}/*'])) / path
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, ValueError) as error:
        raise FetchError(
            f'{uri!r} cannot be downloaded: {type(error).__name__}: {str(error).splitlines()[0]}. Check the name; for '
            'a gated repository accept its licence and log in (hf auth login); without a network, download it '
            'elsewhere and name the local path.'
        ) from error
    if not folder.exists():
        raise FetchError(f'{uri!r}: {repository} has no folder {path!r}')
    return folder


def _from_web(uri: str) -> Path:
    name = PurePosixPath(urllib.parse.urlsplit(uri).path).name or 'download'
    folder = cache_directory() / 'downloads' / hashlib.sha256(uri.encode()).hexdigest()[:24]
    path = folder / name
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with directory_lock(folder, LOCK_SECONDS):  # processes that need the same file wait for one download
            if not path.exists():
                _remove_stale(folder)
                _download(uri, path)
    except DirectoryInUseError as error:
        raise FetchError(
            f'{uri!r}: another process has been downloading it for more than {LOCK_SECONDS:.0f} s; stop that one, or '
            'download the file yourself and name its path'
        ) from error
    return path


def _remove_stale(folder: Path) -> None:
    for path in folder.glob(f'.*{PARTIAL_MARK}*'):
        with contextlib.suppress(FileNotFoundError):  # another thread of this process has just finished it
            if time.time() - path.stat().st_mtime > STALE_SECONDS:
                path.unlink()


def _download(uri: str, path: Path) -> None:
    temporary = path.with_name(f'.{path.name}{PARTIAL_MARK}{uuid.uuid4().hex}')
    try:
        with (
            urllib.request.urlopen(uri, timeout=TIMEOUT_SECONDS) as response,
            open(temporary, 'wb') as stream,
            tqdm.wrapattr(
                response, 'read', total=int(response.headers.get('Content-Length') or 0) or None, desc=path.name
            ) as reader,
        ):
            expected = response.headers.get('Content-Length')
            shutil.copyfileobj(reader, stream, CHUNK_BYTES)
            stream.flush()
            os.fsync(stream.fileno())
        size = temporary.stat().st_size
        if expected is not None and size != int(expected):
            raise FetchError(f'{uri!r}: the connection ended after {size} of {expected} bytes; run again')
        os.replace(temporary, path)
    except urllib.error.HTTPError as error:
        raise FetchError(f'{uri!r} cannot be downloaded: status {error.code} {error.reason}; check the URL') from error
    except (urllib.error.URLError, TimeoutError, ConnectionError, http.client.HTTPException) as error:
        reason = getattr(error, 'reason', None) or str(error) or type(error).__name__
        raise FetchError(f'{uri!r} cannot be downloaded: {reason}; check the URL and the network') from error
    finally:
        temporary.unlink(missing_ok=True)


#: Scheme -> what makes a local path of a URL.
SCHEMES: dict[str, Callable[[str], Path]] = {'huggingface': _from_hub, 'http': _from_web, 'https': _from_web}
