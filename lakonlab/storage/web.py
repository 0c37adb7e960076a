"""Files on web servers."""

from __future__ import annotations

import base64
import binascii
import http.client
import io
import re
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from functools import partial
from typing import BinaryIO

from lakonlab.storage.backend import Backend, FileInfo
from lakonlab.storage.errors import MissingFileError, RestartError, StorageError, TransientError
from lakonlab.storage.paths import name_of
from lakonlab.storage.ranges import Answer, chunks_of, open_ranges
from lakonlab.storage.retry import Patience, persistently

TIMEOUT_SECONDS = 60
TRANSIENT = (408, 425, 429, 500, 502, 503, 504)
ABSENT = (404, 410)


class WebFiles(Backend):
    """Files on web servers; stretches of them where the server sends such."""

    def stat(self, path: str) -> FileInfo | None:
        """See the base class."""
        return persistently(partial(_stat, path), f'looking at {path}')

    def chunks(self, path: str, start: int = 0, stop: int | None = None, version: str | None = None) -> Iterator[bytes]:
        """See the base class."""
        return chunks_of(partial(_open_at, path), path, start, stop, version)

    def open_read(self, path: str) -> BinaryIO:
        """See the base class."""
        info = self.require_stat(path)
        if info.size < 0:  # without a length there are no stretches
            return io.BytesIO(self.read_bytes(path))
        return open_ranges(lambda start, stop: self.chunks(path, start, stop, info.version), info.size)

    def read_bytes(self, path: str, start: int = 0, length: int | None = None) -> bytes:
        """See the base class."""
        patience = Patience(f'reading {path}')
        while True:
            try:
                return b''.join(self.chunks(path, start, None if length is None else start + length))
            except RestartError as error:
                patience.wait_after(error)


def _stat(path: str) -> FileInfo | None:
    try:
        answer = _ask(path, method='HEAD')
    except MissingFileError:
        return None
    except TransientError:
        raise
    except StorageError:  # some servers refuse to be asked for a file without sending it
        try:
            answer = _ask(path, headers={'Range': 'bytes=0-0'})
        except MissingFileError:
            return None
    with answer:
        headers = answer.headers
        _, total = _range_of(headers)
        return FileInfo(
            name_of(path), -1 if total is None else total, _version(headers), _sha256_in(headers), _md5_in(headers)
        )


def _open_at(path: str, start: int, stop: int | None, version: str | None) -> Answer | None:
    headers = {}
    if start or stop is not None:
        headers['Range'] = f'bytes={start}-{"" if stop is None else stop - 1}'
        if version is not None and not version.startswith('W/'):
            headers['If-Range'] = version
    try:
        answer = _ask(path, headers=headers)
    except StorageError as error:
        if getattr(error.__cause__, 'code', None) == 416:
            return None
        raise
    first, total = _range_of(answer.headers)
    return Answer(first, total, _version(answer.headers), partial(_read, path, answer), answer.close)


def _read(path: str, answer: http.client.HTTPResponse, count: int) -> bytes:
    try:
        return answer.read(count)
    except (OSError, http.client.HTTPException) as error:
        raise TransientError(f'{path!r}: {type(error).__name__}: {error}') from error


def _ask(path: str, method: str = 'GET', headers: Mapping[str, str] | None = None) -> http.client.HTTPResponse:
    """Send a request once.

    Raises:
        TransientError: Another attempt may succeed.
        MissingFileError: There is no such file.
        StorageError: Anything else.
    """
    headers = {'Accept-Encoding': 'identity', 'User-Agent': 'lakonlab', **(headers or {})}
    try:
        request = urllib.request.Request(path, headers=headers, method=method)
        return urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        said = f'status {error.code} {error.reason}'
        if error.code in TRANSIENT:
            raise TransientError(f'{path!r}: {said}') from error
        if error.code in ABSENT:
            raise MissingFileError(f'{path!r} does not exist: {said}; check the URL') from error
        raise StorageError(f'{path!r}: {said}; check the URL, and whether it needs a login') from error
    except urllib.error.URLError as error:
        text = f'{path!r}: {error.reason}; check the URL and the network'
        if isinstance(error.reason, ssl.SSLCertVerificationError):
            raise StorageError(text) from error
        raise TransientError(text) from error
    except http.client.InvalidURL as error:
        raise StorageError(f'{path!r}: {error}; check the URL') from error
    except (OSError, http.client.HTTPException) as error:
        raise TransientError(f'{path!r}: {type(error).__name__}: {error}; check the URL and the network') from error
    except ValueError as error:
        raise StorageError(f'{path!r}: {error}; check the URL') from error


def _range_of(headers: Mapping[str, str]) -> tuple[int, int | None]:
    """First byte that an answer sends, and bytes of the whole file; None if it does not say."""
    match = re.fullmatch(r'bytes (\d+)-\d+/(\d+|\*)', headers.get('Content-Range') or '')
    if match:
        return int(match[1]), None if match[2] == '*' else int(match[2])
    length = headers.get('Content-Length')
    return 0, int(length) if length is not None and length.isdigit() else None


def _version(headers: Mapping[str, str]) -> str | None:
    return headers.get('ETag') or headers.get('Last-Modified')


def _sha256_in(headers: Mapping[str, str]) -> str | None:
    """The checksum of the whole file, where the server states it in one of the usual fields."""
    for field in ('Repr-Digest', 'Digest'):
        match = re.search(r'sha-256=:?([A-Za-z0-9+/]{43}=)', headers.get(field) or '', re.IGNORECASE)
        if match:
            return _hexadecimal(match[1])
    return _hexadecimal(headers.get('x-amz-checksum-sha256') or '')


def _md5_in(headers: Mapping[str, str]) -> str | None:
    return None if 'Content-Range' in headers else _hexadecimal(headers.get('Content-MD5') or '')


def _hexadecimal(text: str) -> str | None:
    try:
        return base64.b64decode(text, validate=True).hex() or None
    except binascii.Error:
        return None
