"""Files on S3 and servers that speak its protocol."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, BinaryIO

from lakonlab.storage.backend import Backend, FileInfo
from lakonlab.storage.errors import MissingFileError, StorageError, TransientError
from lakonlab.storage.paths import scheme_of
from lakonlab.storage.ranges import Answer, chunks_of, open_ranges
from lakonlab.storage.retry import Patience, persistently
from lakonlab.storage.s3_client import code_of, content_type, of_connection, request

logger = logging.getLogger(__name__)

#: Files that one request removes; the protocol allows no more.
REMOVED_AT_ONCE = 1000
#: What servers answer when a file must not exist and does, or is being written by another request.
EXISTS = ('PreconditionFailed', 'ConditionalRequestConflict', '412', '409')


def split(path: str) -> tuple[str, str]:
    """Bucket and key of a path; what follows the bucket is taken literally.

    Raises:
        StorageError: It names no bucket, or a part of the key is empty, ``.`` or ``..``.
    """
    bucket, _, key = path.partition('://')[2].partition('/')
    if scheme_of(path) != 's3' or not bucket or any(part in ('', '.', '..') for part in key.split('/') if key):
        raise StorageError(f'{path!r}: expected s3://bucket/key, with a name between any two slashes')
    return bucket, key


def split_file(path: str) -> tuple[str, str]:
    """Like :func:`split`, of a file.

    Raises:
        StorageError: It names a bucket alone.
    """
    bucket, key = split(path)
    if not key:
        raise StorageError(f'{path!r} names a bucket; expected s3://bucket/key')
    return bucket, key


class S3Files(Backend):
    """Files on S3. A directory is a common beginning of keys."""

    def stat(self, path: str) -> FileInfo | None:
        """See the base class."""
        bucket, key = split(path)
        return None if not key else persistently(partial(_stat, path, bucket, key), f'looking at {path}')

    def is_directory(self, path: str) -> bool:
        """See the base class."""
        bucket, key = split(path)
        answer = self._list(path, Bucket=bucket, Prefix=f'{key}/' if key else '', MaxKeys=1)
        return bool(answer.get('Contents')) or not key

    def chunks(self, path: str, start: int = 0, stop: int | None = None, version: str | None = None) -> Iterator[bytes]:
        """See :func:`~lakonlab.storage.ranges.chunks_of`."""
        return chunks_of(partial(_open_at, path, *split_file(path)), path, start, stop, version)

    def open_read(self, path: str) -> BinaryIO:
        """See the base class."""
        info = self.require_stat(path)
        return open_ranges(lambda start, stop: self.chunks(path, start, stop, info.version), info.size)

    def read_bytes(self, path: str, start: int = 0, length: int | None = None) -> bytes:
        """See the base class; of a whole file the checksum is verified where the server states one."""
        bucket, key = split_file(path)
        if start or length is not None:
            return b''.join(self.chunks(path, start, None if length is None else start + length))

        patience = Patience(f'reading {path}')
        earlier: list[str] = []
        while True:  # what is lost on the way is taken up again by chunks_of; this is for what arrives damaged
            facts: dict[str, Any] = {}
            opener = partial(_open_at, path, bucket, key, facts=facts)
            content = b''.join(chunks_of(opener, path))
            expected, found = md5_in(facts), hashlib.md5(content, usedforsecurity=False).hexdigest()
            if expected in (None, found):
                return content
            if found in earlier:
                warn_of_etags(path.partition('://')[2].partition('/')[0])
                return content
            if earlier:
                patience.wait_after(TransientError(f'{path!r} arrived damaged: its MD5 is not {expected}'))
            earlier.append(found)

    def open_write(self, path: str, size: int | None = None) -> AbstractContextManager[BinaryIO]:
        """See the base class; in parts, if it is large."""
        from lakonlab.storage.s3_upload import open_upload

        return open_upload(path, *split_file(path), size)

    def create(self, path: str, content: bytes) -> bool:
        """See the base class; a request with a condition, or without one where the server does not know it."""
        bucket, key = split_file(path)
        put = partial(request, path, 'put_object', Bucket=bucket, Key=key, Body=content, **content_type(key))
        try:
            persistently(partial(put, IfNoneMatch='*'), f'creating {path}')
        except StorageError as error:
            code = code_of(error.__cause__)
            if code == 'NotImplemented':
                persistently(put, f'creating {path}')
                return True
            if code in EXISTS:  # it may be ours, if the answer to an earlier attempt was lost
                with contextlib.suppress(MissingFileError):  # it has gone since
                    return self.read_bytes(path) == content
                return False
            raise
        return True

    def clean_uploads(self, path: str, names: re.Pattern[str] | None = None) -> list[str]:
        """See the base class."""
        from lakonlab.storage.s3_upload import clean_uploads

        return clean_uploads(path, older_than=float('-inf'), names=names)  # whatever the clock of the server says

    def list_names(self, path: str) -> list[str]:
        """See the base class."""
        bucket, key = split(path)
        prefix = f'{key}/' if key else ''
        names = set()
        for answer in self._pages(path, Bucket=bucket, Prefix=prefix, Delimiter='/'):
            names.update(entry['Prefix'][len(prefix) : -1] for entry in answer.get('CommonPrefixes') or ())
            names.update(entry['Key'][len(prefix) :] for entry in answer.get('Contents') or ())
        return sorted(names - {''})

    def list_files(self, path: str) -> Iterator[FileInfo]:
        """See the base class."""
        bucket, key = split(path)
        prefix = f'{key}/' if key else ''
        for answer in self._pages(path, Bucket=bucket, Prefix=prefix):
            for entry in answer.get('Contents') or ():
                if not entry['Key'].endswith('/'):  # what some programs make to show an empty directory
                    yield FileInfo(entry['Key'][len(prefix) :], entry['Size'], _unquoted(entry['ETag']))

    def remove_file(self, path: str) -> None:
        """See the base class."""
        bucket, key = split_file(path)
        persistently(partial(request, path, 'delete_object', Bucket=bucket, Key=key), f'removing {path}')

    def remove_directory(self, path: str, seal: str | None = None) -> None:
        """See the base class; the seal first, then file by file."""
        bucket, key = split_file(path)
        if seal is not None:
            self.remove_file(f'{path}/{seal}')
        keys = [f'{key}/{info.name}' for info in self.list_files(path)]
        for first in range(0, len(keys), REMOVED_AT_ONCE):
            doomed = {'Objects': [{'Key': name} for name in keys[first : first + REMOVED_AT_ONCE]], 'Quiet': True}
            call = partial(request, path, 'delete_objects', Bucket=bucket, Delete=doomed)
            answer = persistently(call, f'removing {path}')
            if answer.get('Errors'):
                problem = answer['Errors'][0]
                raise StorageError(f'{path!r}: {problem["Key"]} cannot be removed: {problem["Code"]}')

    def _list(self, path: str, **arguments: Any) -> Mapping[str, Any]:
        return persistently(partial(request, path, 'list_objects_v2', **arguments), f'listing {path}')

    def _pages(self, path: str, **arguments: Any) -> Iterator[Mapping[str, Any]]:
        while True:
            answer = self._list(path, **arguments)
            yield answer
            if not answer.get('IsTruncated'):
                return
            arguments['ContinuationToken'] = answer['NextContinuationToken']


def _stat(path: str, bucket: str, key: str) -> FileInfo | None:
    try:
        answer = request(path, 'head_object', Bucket=bucket, Key=key)
    except TransientError:
        raise
    except StorageError:
        # An answer without a body cannot tell a missing key from a missing bucket, nor expired from wrong credentials.
        try:
            answer = request(path, 'get_object', Bucket=bucket, Key=key)
        except MissingFileError:
            return None
        answer['Body'].close()
    version = _unquoted(answer.get('ETag'))
    return FileInfo(key.rpartition('/')[2], answer['ContentLength'], version, md5=md5_in(answer), is_md5_guessed=True)


def _open_at(
    path: str, bucket: str, key: str, start: int, stop: int | None, version: str | None, facts: dict | None = None
) -> Answer | None:
    """Ask for a stretch of a file; what the server says about it goes into ``facts``."""
    arguments: dict[str, Any] = {'Bucket': bucket, 'Key': key}
    if start or stop is not None:
        arguments['Range'] = f'bytes={start}-{"" if stop is None else stop - 1}'
    if version is not None:
        arguments['IfMatch'] = f'"{version}"'
    try:
        answer = request(path, 'get_object', **arguments)
    except StorageError as error:
        if code_of(error.__cause__) in ('InvalidRange', '416'):
            return None
        raise
    if facts is not None:
        facts.update({name: value for name, value in answer.items() if name != 'Body'})
    body = answer['Body']
    match = re.fullmatch(r'bytes (\d+)-\d+/(\d+)', answer.get('ContentRange') or '')
    first, total = (int(match[1]), int(match[2])) if match else (0, answer['ContentLength'])
    return Answer(first, total, _unquoted(answer.get('ETag')), partial(_read, path, body), body.close)


def _read(path: str, body: Any, count: int) -> bytes:
    from botocore.exceptions import BotoCoreError

    try:
        return body.read(count)
    except BotoCoreError as error:
        raise of_connection(error, path) from error
    except io.UnsupportedOperation:
        raise
    except OSError as error:  # a socket that botocore did not expect to fail there
        raise TransientError(f'{path!r}: {type(error).__name__}: {error}') from error


def _unquoted(etag: str | None) -> str | None:
    return None if etag is None else etag.strip('"')  # some servers list it without quotes


@functools.lru_cache
def warn_of_etags(bucket: str) -> None:
    """Say once for each bucket that what arrives there is compared with itself."""
    logger.warning(
        's3://%s: the ETags look like MD5 and are not those of the files, of which two readings agree; files are read '
        'twice and taken if they agree. Checksums of checkpoints and caches are verified all the same.',
        bucket,
    )


def md5_in(facts: Mapping[str, Any]) -> str | None:
    """The MD5 of the content, where an answer of the server states it: an ETag is one unless the file was uploaded in
    parts or is encrypted with keys of its own."""
    etag = str(facts.get('ETag', '')).strip('"')
    encrypted = str(facts.get('ServerSideEncryption', '')).startswith('aws:kms') or 'SSECustomerAlgorithm' in facts
    return etag if re.fullmatch('[0-9a-f]{32}', etag) and not encrypted else None
