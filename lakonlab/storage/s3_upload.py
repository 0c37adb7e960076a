"""Uploads to S3: in one request if small, else in parts, streamed, and visible when all of them are there."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import logging
import re
import uuid
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import datetime, timezone
from functools import partial
from typing import Any, BinaryIO

from lakonlab.storage.errors import MissingFileError, StorageError, TransientError
from lakonlab.storage.retry import Patience, persistently
from lakonlab.storage.s3_client import code_of, content_type, request

logger = logging.getLogger(__name__)

SMALLEST_PART, LARGEST_PART = 64 << 20, 256 << 20
MOST_PARTS = 10_000
#: Parts of the smallest size in a stream of unknown length; the rest are as large as can be.
SMALL_PARTS = 5_000
#: Field of an object that tells by which upload it was made.
MARK = 'lakonlab-upload'
#: Parts of one file that are on their way; one more is being filled.
PARTS_IN_FLIGHT = 2


def part_size(number: int, size: int | None = None) -> int:
    """Bytes of a part, so that the most parts that S3 allows are enough.

    Args:
        number: Number of the part, from 1.
        size: Bytes of the file; None if not known.

    Raises:
        StorageError: The file is larger than can be uploaded.
    """
    if number > MOST_PARTS or (size is not None and size > MOST_PARTS * LARGEST_PART):
        most = MOST_PARTS * LARGEST_PART
        unknown = SMALL_PARTS * SMALLEST_PART + (MOST_PARTS - SMALL_PARTS) * LARGEST_PART
        raise StorageError(f'a file of more than {most:,} bytes, or {unknown:,} if written as a stream, is too large')
    if size is None:
        return SMALLEST_PART if number <= SMALL_PARTS else LARGEST_PART
    mebibytes = -(-size // (MOST_PARTS << 20))
    return max(SMALLEST_PART, mebibytes << 20)


@contextlib.contextmanager
def open_upload(path: str, bucket: str, key: str, size: int | None = None) -> Iterator[BinaryIO]:
    """A stream that becomes a file when the block ends well; otherwise nothing of it stays.

    Args:
        path: Of the file, for messages.
        bucket: Its bucket.
        key: Its key.
        size: Bytes that will be written, if known.
    """
    upload = _Upload(path, bucket, key, size)
    try:
        yield upload
        upload.finish()
    except BaseException:
        upload.abort()
        raise
    finally:
        upload.end_threads()


class _Upload(io.RawIOBase):
    """Collects a part in memory, sends full ones in the background."""

    def __init__(self, path: str, bucket: str, key: str, size: int | None):
        self.path, self._size = path, size
        self._where = {'Bucket': bucket, 'Key': key}
        self._type = content_type(key)
        self._buffer = io.BytesIO()
        self._written = 0
        self._id: str | None = None
        self._threads: ThreadPoolExecutor | None = None
        self._waiting: deque[Future] = deque()
        self._parts: list[dict[str, Any]] = []
        self._sent = 0
        self._is_aborted = False
        self._limit = part_size(1, size)
        self._mark = uuid.uuid4().hex

    def writable(self) -> bool:
        """See the base class."""
        return True

    def tell(self) -> int:
        """See the base class."""
        return self._written

    def write(self, content) -> int:
        """See the base class; all of it is taken."""
        view = memoryview(content).cast('B')
        start = 0
        while start < len(view):
            count = min(self._limit - self._buffer.tell(), len(view) - start)
            self._buffer.write(view[start : start + count])
            start += count
            if self._buffer.tell() == self._limit:
                self._send()
        self._written += len(view)
        return len(view)

    def _send(self) -> None:
        if self._id is None:
            facts = dict(self._type, Metadata={MARK: self._mark})
            call = partial(request, self.path, 'create_multipart_upload', **self._where, **facts)
            self._id = persistently(call, f'beginning the upload of {self.path}')['UploadId']
            self._threads = ThreadPoolExecutor(PARTS_IN_FLIGHT, thread_name_prefix='upload-part')
        if len(self._waiting) == PARTS_IN_FLIGHT:
            self._waiting.popleft().result()
        content, self._buffer = self._buffer.getvalue(), io.BytesIO()
        self._sent += 1
        self._waiting.append(self._threads.submit(self._send_part, self._sent, content))
        self._limit = part_size(self._sent + 1, self._size)

    def _send_part(self, number: int, content: bytes) -> None:
        where = {**self._where, 'UploadId': self._id, 'PartNumber': number}
        checksum = _checksum(content)

        def send() -> dict[str, Any]:
            if self._is_aborted:  # trying on would hold up whoever was interrupted
                raise StorageError(f'the upload of {self.path!r} was aborted')
            return request(self.path, 'upload_part', **where, Body=content, ContentMD5=checksum)

        answer = persistently(send, f'uploading part {number} of {self.path}')
        self._parts.append({'PartNumber': number, 'ETag': answer['ETag']})

    def finish(self) -> None:
        """Send what is left, and make the file visible."""
        if self._id is None:
            content = self._buffer.getvalue()
            facts = dict(self._type, Body=content, ContentMD5=_checksum(content))
            call = partial(request, self.path, 'put_object', **self._where, **facts)
            persistently(call, f'writing {self.path}')
            return
        if self._buffer.tell():
            self._send()
        while self._waiting:
            self._waiting.popleft().result()
        patience = Patience(f'completing the upload of {self.path}')
        while True:
            try:
                self._complete(patience.attempts > 0)
                return
            except TransientError as error:
                patience.wait_after(error)

    def _complete(self, again: bool) -> None:
        parts = sorted(self._parts, key=lambda part: part['PartNumber'])
        try:
            request(
                self.path,
                'complete_multipart_upload',
                **self._where,
                UploadId=self._id,
                MultipartUpload={'Parts': parts},
            )
        except TransientError:
            raise
        except StorageError as error:
            # The answer to an earlier attempt may have been lost: then the file is there and the upload is gone.
            if not (again and code_of(error.__cause__) == 'NoSuchUpload' and self._is_there()):
                raise

    def _is_there(self) -> bool:
        try:
            facts = request(self.path, 'head_object', **self._where)
        except MissingFileError:
            return False
        return facts['ContentLength'] == self._written and facts['Metadata'].get(MARK) == self._mark

    def abort(self) -> None:
        """Have the server forget the parts; that this fails is only logged, for something else has failed before."""
        self._is_aborted = True
        if self._threads is not None:
            self._threads.shutdown(wait=True, cancel_futures=True)
        if self._id is not None:
            try:
                abort_upload(self.path, **self._where, upload_id=self._id)
            except StorageError as error:
                logger.warning('%s: parts of a failed upload stay on the server: %s', self.path, error)
        self._id = None

    def end_threads(self) -> None:
        """Wait for the threads that send parts."""
        if self._threads is not None:
            self._threads.shutdown(wait=True)


def _checksum(content: bytes) -> str:
    return base64.b64encode(hashlib.md5(content, usedforsecurity=False).digest()).decode()


def abort_upload(path: str, Bucket: str, Key: str, upload_id: str) -> None:
    """Have the server forget an unfinished upload; fine if it has."""
    call = partial(request, path, 'abort_multipart_upload', Bucket=Bucket, Key=Key, UploadId=upload_id)
    try:
        persistently(call, f'aborting an upload of {path}')
    except StorageError as error:
        if code_of(error.__cause__) not in ('NoSuchUpload', 'NoSuchKey'):
            raise


def stale_uploads(path: str, bucket: str, prefix: str, older_than: float) -> Iterator[tuple[str, str, datetime]]:
    """Unfinished uploads, which killed processes leave: invisible, but they take space.

    Args:
        path: Where to look, for messages.
        bucket: The bucket.
        prefix: Beginning of the keys.
        older_than: Only those that began so many seconds ago, by the clocks of the server and of this machine; 0 or
            less for all, whatever the clocks say.

    Yields:
        Key, identifier, and when it began.
    """
    arguments = {'Bucket': bucket, 'Prefix': prefix}
    while True:
        call = partial(request, path, 'list_multipart_uploads', **arguments)
        try:
            answer = persistently(call, f'listing unfinished uploads below {path}')
        except StorageError as error:
            if code_of(error.__cause__) == 'NoSuchUpload':  # what rclone says when there are none
                return
            if code_of(error.__cause__) in ('NotImplemented', 'MethodNotAllowed'):
                logger.warning('%s: the server does not tell which uploads are unfinished', path)
                return
            raise
        for entry in answer.get('Uploads') or ():
            age = datetime.now(timezone.utc) - entry['Initiated']
            if older_than <= 0 or age.total_seconds() >= older_than:
                yield entry['Key'], entry['UploadId'], entry['Initiated']
        if not answer.get('IsTruncated'):
            return
        arguments.update(KeyMarker=answer['NextKeyMarker'], UploadIdMarker=answer['NextUploadIdMarker'])


def clean_uploads(
    path: str, older_than: float, dry_run: bool = False, names: re.Pattern[str] | None = None
) -> list[str]:
    """Remove unfinished uploads below a path.

    Args:
        path: ``s3://bucket`` or ``s3://bucket/directory``.
        older_than: Only those that began so many seconds ago, as younger ones may still be running.
        dry_run: Only say which.
        names: Only of files whose whole name, relative to the path, matches; None for all.

    Returns:
        Paths of the files that they would have become.
    """
    from lakonlab.storage.paths import normal
    from lakonlab.storage.s3 import split

    path = normal(path)
    bucket, key = split(path)
    prefix = f'{key}/' if key else ''
    found = [
        upload
        for upload in stale_uploads(path, bucket, prefix, older_than)
        if names is None or names.fullmatch(upload[0][len(prefix) :])
    ]
    for name, identifier, began in found:
        if not dry_run:
            abort_upload(f's3://{bucket}/{name}', Bucket=bucket, Key=name, upload_id=identifier)
        logger.info(
            '%s an upload of s3://%s/%s that began at %s', 'found' if dry_run else 'removed', bucket, name, began
        )
    return [f's3://{bucket}/{name}' for name, _, _ in found]
