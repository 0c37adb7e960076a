"""Connections to S3, and what its errors mean.

A client belongs to one process: after a fork or a spawn the new process makes its own. It is made anew when a variable
``AWS_*`` or one of the files of credentials has changed, so that rotated credentials are used from the next operation
on. Credentials are those that boto3 finds. ``AWS_PROFILE`` wins over keys in the environment, and those win, as
everywhere with AWS, over files of credentials and over the role of the machine.
"""

from __future__ import annotations

import functools
import logging
import mimetypes
import os
import re
import threading
from dataclasses import dataclass
from email.utils import formatdate
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lakonlab.storage.errors import MissingFileError, StorageError, TransientError

ANONYMOUS_VARIABLE = 'LAKONLAB_S3_ANONYMOUS'
CONNECT_SECONDS = 10
READ_SECONDS = 60
MISSING = ('NoSuchKey', '404', 'NotFound')
EXPIRED = ('ExpiredToken', 'ExpiredTokenException', 'TokenRefreshRequired', 'InvalidToken')
REJECTED = ('InvalidAccessKeyId', 'SignatureDoesNotMatch')
DENIED = ('AccessDenied', 'AllAccessDisabled', 'Forbidden', '403')
MOVED = ('PermanentRedirect', '301', 'AuthorizationHeaderMalformed', 'IllegalLocationConstraintException')
#: Errors with a status below 500 that the next attempt may not meet.
TRANSIENT = (
    'SlowDown',
    'Throttling',
    'ThrottlingException',
    'RequestLimitExceeded',
    'BandwidthLimitExceeded',
    'RequestTimeout',
    'RequestTimeoutException',
    'IncompleteBody',
    'BadDigest',
    'XAmzContentSHA256Mismatch',
    'OperationAborted',
    'InternalError',
    'ServiceUnavailable',
)

#: What botocore calls the services that give a machine or a container its credentials.
CREDENTIAL_SERVICES = ('iam-role', 'container-role')

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """What a client depends on.

    Args:
        process: Number of the process that it belongs to.
        anonymous: Whether requests are not signed.
        environment: Variables ``AWS_*`` with their values.
        files: Files of settings and credentials, each with what changes when it is replaced.
    """

    process: int
    anonymous: bool
    environment: tuple[tuple[str, str], ...]
    files: tuple[tuple, ...]

    @classmethod
    def now(cls, bucket: str) -> Settings:
        """Those of this moment."""
        environment = {name: value for name, value in os.environ.items() if name.startswith('AWS_')}
        files = (
            environment.get('AWS_SHARED_CREDENTIALS_FILE') or '~/.aws/credentials',
            environment.get('AWS_CONFIG_FILE') or '~/.aws/config',
        )
        return cls(os.getpid(), is_anonymous(bucket), tuple(sorted(environment.items())), tuple(map(_mark, files)))


@dataclass(frozen=True)
class Connection:
    """A client and the credentials that it uses; None if there are none."""

    client: Any
    credentials: Any

    @property
    def keys(self) -> tuple | None:
        """What requests are signed with."""
        return None if self.credentials is None else tuple(self.credentials.get_frozen_credentials())

    @property
    def origin(self) -> str:
        """Where the credentials come from, for messages."""
        method = getattr(self.credentials, 'method', None)
        names = {
            'env': 'AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment',
            'shared-credentials-file': f'{os.environ.get("AWS_SHARED_CREDENTIALS_FILE") or "~/.aws/credentials"}, '
            f'profile {os.environ.get("AWS_PROFILE") or "default"}',
            'config-file': f'{os.environ.get("AWS_CONFIG_FILE") or "~/.aws/config"}, '
            f'profile {os.environ.get("AWS_PROFILE") or "default"}',
            'iam-role': 'the role of this machine',
            None: 'nowhere',
        }
        return names.get(method, str(method))


def is_anonymous(bucket: str) -> bool:
    """Whether requests for a bucket are to be sent unsigned: ``$LAKONLAB_S3_ANONYMOUS`` is 1, or lists it."""
    value = os.environ.get(ANONYMOUS_VARIABLE, '')
    return value == '1' or bucket in (name.strip() for name in value.split(','))


def connection(bucket: str) -> Connection:
    """The connection of this process for a bucket, with the settings of this moment."""
    return _connection_for(Settings.now(bucket))


_making = threading.Lock()
"""Held while a client is made, which takes long, so that threads which begin together share one."""


def _forget_lock() -> None:
    """In a forked process: nobody holds the lock there, whoever held it where the process is from."""
    global _making
    _making = threading.Lock()


if hasattr(os, 'register_at_fork'):
    os.register_at_fork(after_in_child=_forget_lock)


def _connection_for(settings: Settings) -> Connection:
    with _making:
        return _connection(settings)


@functools.lru_cache(maxsize=8)
def _connection(settings: Settings) -> Connection:
    import boto3
    from botocore import UNSIGNED
    from botocore.config import Config

    options = dict(
        signature_version=UNSIGNED if settings.anonymous else 's3v4',
        retries={'total_max_attempts': 1},  # ours are the only ones, so that the time is bounded
        connect_timeout=CONNECT_SECONDS,
        read_timeout=READ_SECONDS,
        max_pool_connections=32,
        # Checksums of parts go in Content-MD5, which every server knows; those of botocore need trailers.
        request_checksum_calculation='when_required',
        response_checksum_validation='when_required',
        user_agent_extra='lakonlab',
    )
    environment = dict(settings.environment)
    session = boto3.session.Session(
        profile_name=environment.get('AWS_PROFILE') or None, region_name=environment.get('AWS_REGION') or None
    )
    credentials = None if settings.anonymous else session.get_credentials()
    try:
        client = session.client('s3', config=Config(**options))
        if not _is_of_amazon(client.meta.endpoint_url) and not client.meta.config.s3:
            # names of buckets are no host names of other servers, unless the settings of AWS say so
            client = session.client('s3', config=Config(**options, s3={'addressing_style': 'path'}))
    except ValueError as error:
        raise StorageError(f'S3 cannot be used: {error}. {_place_advice()}') from error
    made = Connection(client, credentials)
    logger.info('S3 at %s, credentials from %s', client.meta.endpoint_url, made.origin)
    hidden = environment.get('AWS_SHARED_CREDENTIALS_FILE')
    if getattr(credentials, 'method', None) == 'env' and hidden and Path(hidden).is_file():
        logger.warning(
            'AWS_ACCESS_KEY_ID wins over AWS_SHARED_CREDENTIALS_FILE=%s: credentials that are rotated there are not '
            'used. Unset the keys, or set AWS_PROFILE, which wins over them.',
            hidden,
        )
    return made


def request(path: str, operation: str, **arguments: Any) -> dict[str, Any]:
    """Ask S3 once.

    Credentials that have expired are read again, and if that gave others, the request is sent once more.

    Args:
        path: What it is about, for messages.
        operation: Method of boto3's client.
        **arguments: Its arguments, with ``Bucket``.

    Raises:
        TransientError: Another attempt may succeed.
        MissingFileError: There is no such file.
        StorageError: Anything else; the message says what to do.
    """
    from botocore.exceptions import BotoCoreError, ClientError
    from botocore.parsers import ResponseParserError

    settings = Settings.now(arguments['Bucket'])
    link = None
    try:
        link = _connection_for(settings)
        try:
            return getattr(link.client, operation)(**arguments)
        except ClientError as error:
            if code_of(error) not in EXPIRED + REJECTED[:1]:
                raise
            used = link.keys
            _connection.cache_clear()
            link = _connection_for(settings)
            if link.keys == used:
                raise
            logger.info('%s: %s; credentials were read again from %s', path, code_of(error), link.origin)
            return getattr(link.client, operation)(**arguments)
    except ClientError as error:
        raise _of_server(error, path, link) from error
    except (BotoCoreError, ResponseParserError, RecursionError) as error:
        raise of_connection(error, path) from error


def code_of(error: BaseException | None) -> str:
    """The name that S3 gives an error; empty for errors that did not come from there."""
    response = getattr(error, 'response', None) or {}
    return str(response.get('Error', {}).get('Code', ''))


def _of_server(error: Exception, path: str, link: Connection | None) -> StorageError:
    """What an answer of the server means."""
    code = code_of(error)
    metadata = error.response.get('ResponseMetadata', {})
    status = int(metadata.get('HTTPStatusCode') or 0)
    said = f'{code}: {error.response.get("Error", {}).get("Message") or "no message"}'
    origin = 'nowhere' if link is None else link.origin
    where = '' if link is None else link.client.meta.endpoint_url
    if code in TRANSIENT or (status >= 500 and status != 501) or status == 429:
        return TransientError(f'{path!r}: {where} answered {status} {said}')
    if code in MISSING:
        return MissingFileError(f'{path!r} does not exist')
    if code == 'NoSuchBucket':
        bucket = urlsplit(path).netloc
        return StorageError(f'{path!r}: there is no bucket {bucket!r} at {where}; check its name and AWS_ENDPOINT_URL')
    if code in EXPIRED:
        return StorageError(f'{path!r}: the credentials from {origin} have expired ({said}); renew them')
    if code in REJECTED:
        return StorageError(f'{path!r}: {where} does not accept the credentials from {origin} ({said}); correct them')
    if code == 'RequestTimeTooSkewed':
        server = metadata.get('HTTPHeaders', {}).get('date', 'another time')
        return StorageError(
            f'{path!r}: the clock of this machine shows {formatdate(usegmt=True)}, the one of the server {server}; '
            f'set it ({said})'
        )
    if code in DENIED:
        return StorageError(
            f'{path!r}: access denied with credentials from {origin} ({said}). They need the right to read or write '
            f'this path and to list its bucket; for a public bucket without credentials set {ANONYMOUS_VARIABLE}=1'
        )
    if code in MOVED:
        return StorageError(f'{path!r}: the bucket is in another region ({said}); set AWS_REGION')
    if status == 412:
        return StorageError(f'{path!r} was replaced while it was read; run again')
    return StorageError(f'{path!r}: {where} answered {status} {said}')


def of_connection(error: Exception, path: str) -> StorageError:
    """What an error of botocore on this side means."""
    from botocore import exceptions as known

    lost = (known.HTTPClientError, known.ConnectionError, known.IncompleteReadError, known.ChecksumError)
    text = f'{path!r}: {type(error).__name__}: {error}'
    if isinstance(error, (known.NoCredentialsError, known.PartialCredentialsError)):
        return StorageError(
            f'{text}. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or write ~/.aws/credentials; '
            f'for a public bucket set {ANONYMOUS_VARIABLE}=1'
        )
    if isinstance(error, known.SSLError) and 'CERTIFICATE_VERIFY_FAILED' in str(error):
        return StorageError(f'{text}. Set AWS_CA_BUNDLE to the certificates that the server is signed with')
    if isinstance(error, known.EndpointProviderError):
        return StorageError(f'{text}. {_place_advice()}')
    if _is_hiccup_of_credentials(error):
        return TransientError(text)
    inner = getattr(error, 'kwargs', {}).get('error')
    if isinstance(error, RecursionError) or isinstance(inner, RecursionError):
        # botocore looks for the region of a bucket wherever it is sent to
        return StorageError(f'{path!r}: the server sends requests to itself; check AWS_REGION and AWS_ENDPOINT_URL')
    if isinstance(inner, (RuntimeError, TypeError, ValueError, AttributeError)):
        return StorageError(text)
    if isinstance(error, lost) or not isinstance(error, known.BotoCoreError):  # the latter: an answer cut off
        return TransientError(text)
    return StorageError(text)


def _place_advice() -> str:
    """Which settings say where S3 is, what they are, and what they should be."""
    names = ('AWS_ENDPOINT_URL_S3', 'AWS_ENDPOINT_URL', 'AWS_REGION', 'AWS_DEFAULT_REGION')
    found = [f'{name}={os.environ[name]!r}' for name in names if os.environ.get(name)]
    return (
        f'Where it is, is said by {", ".join(found) or "none of AWS_ENDPOINT_URL and AWS_REGION"}, and by '
        f'{os.environ.get("AWS_CONFIG_FILE") or "~/.aws/config"}: expected AWS_ENDPOINT_URL=https://host or '
        'http://host:port, or none for Amazon, and a region such as AWS_REGION=us-east-1; correct them'
    )


def _is_hiccup_of_credentials(error: Exception) -> bool:
    """Whether the machine's own service of credentials failed in a way that it may not fail again."""
    from botocore import exceptions as known

    if re.search(r'non 200 response 4(?!29|08)\d\d', str(error)):
        return False  # it refuses
    provider = getattr(error, 'kwargs', {}).get('provider')
    return isinstance(error, known.MetadataRetrievalError) or (
        isinstance(error, known.CredentialRetrievalError) and provider in CREDENTIAL_SERVICES
    )


def content_type(key: str) -> dict[str, str]:
    """What a new file is, for browsers, which download what they are not told the type of.

    Args:
        key: Its key, whose ending decides.

    Returns:
        An argument of requests that make files; none if the ending says nothing.
    """
    kind, encoding = mimetypes.guess_type(f'/{key.rpartition("/")[2]}', strict=False)
    if kind is None or encoding is not None:
        return {}
    return {'ContentType': f'{kind}; charset=utf-8' if kind.startswith('text/') else kind}


def _is_of_amazon(url: str) -> bool:
    host = urlsplit(url).hostname or ''
    return host.endswith(('.amazonaws.com', '.amazonaws.com.cn', '.api.aws'))


def _mark(file: str) -> tuple:
    path = Path(file).expanduser()
    try:
        entry = path.stat()
    except OSError:
        return (str(path),)
    return (str(path), entry.st_ino, entry.st_size, entry.st_mtime_ns)
