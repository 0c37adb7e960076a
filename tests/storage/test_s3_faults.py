"""S3 through a proxy that lets requests fail: bounded retries or an error at once, and nothing half-written."""

import datetime
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lakonlab.storage import files, retry, s3_client, s3_upload
from lakonlab.storage.errors import MissingFileError, StorageError, TransientError
from lakonlab.storage.fetch import FetchError, fetch
from tests.faulty_proxy import Fault, StillClock, run_proxy, wait_until
from tests.s3_server import SERVERS, SMALLEST_PART, use

CONTENT = random.Random(0).randbytes(300_000)
LARGE = random.Random(1).randbytes(2 * SMALLEST_PART + 12_345)
TRANSIENT = [
    Fault('reset'),
    Fault('lost'),
    Fault('status', status=500, code='InternalError'),
    Fault('status', status=503, code='SlowDown'),
    Fault('status', status=400, code='RequestTimeout'),
]
PERMANENT = [
    (400, 'ExpiredToken', 'have expired'),
    (403, 'InvalidAccessKeyId', 'does not accept the credentials'),
    (403, 'SignatureDoesNotMatch', 'does not accept the credentials'),
    (403, 'AccessDenied', 'access denied'),
    (404, 'NoSuchBucket', 'there is no bucket'),
    (403, 'RequestTimeTooSkewed', 'the clock of this machine shows'),
]
RARE = [(301, 'PermanentRedirect', 'AWS_REGION'), (400, 'InvalidRequest', 'InvalidRequest')]


def again(fault, **changes):
    """A fresh copy of a fault."""
    return Fault(**{**vars(fault), **changes})


@pytest.fixture(params=SERVERS, scope='module')
def running_proxy(request):
    """A proxy before a server, and a bucket behind it."""
    with pytest.MonkeyPatch.context() as patch:
        server = request.getfixturevalue(request.param)
        bucket = use(server, patch)
        with run_proxy(server.port) as proxy:
            patch.setenv('AWS_ENDPOINT_URL', proxy.url)
            proxy.server, proxy.bucket, proxy.path = server, bucket, f'{bucket}/a.bin'
            yield proxy


@pytest.fixture
def faulty(running_proxy, monkeypatch, tmp_path):
    """The proxy, one file in the bucket, and little patience."""
    monkeypatch.setenv('LAKONLAB_RETRY_SECONDS', '20')
    monkeypatch.setenv('LAKONLAB_CACHE_DIR', str(tmp_path / 'cache'))
    monkeypatch.setattr(retry, 'FIRST_DELAY', 0.02)
    monkeypatch.setattr(s3_upload, 'SMALLEST_PART', SMALLEST_PART)
    running_proxy.faults = []
    for info in files.list_files(running_proxy.bucket):
        files.remove_file(f'{running_proxy.bucket}/{info.name}')
    files.write_bytes(running_proxy.path, CONTENT)
    running_proxy.requests = []
    return running_proxy


def unfinished(proxy):
    """Uploads that were begun and neither completed nor aborted."""
    answer = proxy.server.client().list_multipart_uploads(Bucket=proxy.bucket.removeprefix('s3://'))
    return [entry['Key'] for entry in answer.get('Uploads') or ()]


OPERATIONS = {
    'read': lambda proxy: files.read_bytes(proxy.path) == CONTENT,
    'range': lambda proxy: files.read_bytes(proxy.path, 7, 1000) == CONTENT[7:1007],
    'size': lambda proxy: files.size_of(proxy.path) == len(CONTENT),
    'list': lambda proxy: files.list_names(proxy.bucket) == ['a.bin'],
    'write': lambda proxy: files.write_bytes(f'{proxy.bucket}/new', CONTENT) is None,
    'remove': lambda proxy: files.remove_file(proxy.path) is None,
    'fetch': lambda proxy: fetch(proxy.path).read_bytes() == CONTENT,
}


@pytest.mark.parametrize('fault', TRANSIENT, ids=lambda fault: f'{fault.how}-{fault.code}')
@pytest.mark.parametrize('operation', OPERATIONS)
def test_transient_failures_are_tried_again(operation, fault, faulty, caplog):
    # botocore asks the bucket for its region after a refused question without a body
    faulty.faults = [again(fault, times=3 if fault.status == 400 else 2)]
    assert OPERATIONS[operation](faulty)
    assert len(faulty.requests) >= 3
    assert f'{faulty.bucket}' in caplog.text
    assert 'attempt 1 failed' in caplog.text


@pytest.mark.parametrize(('status', 'code', 'message'), PERMANENT, ids=lambda value: str(value))
@pytest.mark.parametrize('operation', ['read', 'size', 'list', 'write'])
def test_permanent_failures_are_errors_at_once(operation, status, code, message, faulty):
    faulty.faults = [Fault('status', status=status, code=code, times=-1)]
    with pytest.raises(StorageError, match=rf'{faulty.bucket}.*{message}') as caught:
        OPERATIONS[operation](faulty)
    assert not isinstance(caught.value, TransientError)
    # a refused question for facts is asked once more in a way that says why, expired credentials are read again
    assert len(faulty.requests) <= 4


@pytest.mark.parametrize(('status', 'code', 'message'), RARE, ids=lambda value: str(value))
def test_other_permanent_failures(status, code, message, faulty):
    faulty.faults = [Fault('status', status=status, code=code, times=-1)]
    with pytest.raises(StorageError, match=rf'{faulty.bucket}.*{message}') as caught:
        files.read_bytes(faulty.path)
    assert not isinstance(caught.value, TransientError)


def test_retries_are_bounded(faulty, monkeypatch):
    monkeypatch.setenv('LAKONLAB_RETRY_SECONDS', '0.5')
    clock = StillClock()
    monkeypatch.setattr(retry, 'time', clock)
    faulty.faults = [Fault('status', status=503, code='SlowDown', times=-1)]
    with pytest.raises(StorageError, match=r'SlowDown.*gave up reading s3://.*/a\.bin after \d+ attempts'):
        files.read_bytes(faulty.path)
    assert clock.now <= 0.5
    assert 5 <= len(faulty.requests) <= 6  # each waits longer than the one before, and boto3 adds none


@pytest.mark.parametrize('how', ['truncate', 'reset_body'])
def test_bodies_that_end_early(how, faulty):
    faulty.faults = [Fault(how, 'GET', 'a.bin', times=3, bytes_sent=100_000)]
    assert files.read_bytes(faulty.path) == CONTENT
    faulty.faults = [Fault(how, 'GET', 'a.bin', times=2, bytes_sent=100_000)]
    with files.open_read(faulty.path) as stream:
        stream.seek(1000)
        assert stream.read() == CONTENT[1000:]
    faulty.faults = [Fault(how, 'GET', 'a.bin', times=2, bytes_sent=100_000)]
    assert fetch(faulty.path).read_bytes() == CONTENT


def test_a_truncated_listing(faulty):
    faulty.faults = [Fault('truncate', 'GET', r'\?.*list-type', bytes_sent=60)]
    assert files.list_names(faulty.bucket) == ['a.bin']


def test_a_server_that_says_nothing(faulty, monkeypatch):
    monkeypatch.setattr(s3_client, 'READ_SECONDS', 0.5)
    monkeypatch.setenv('LAKONLAB_RETRY_SECONDS', '300')  # a machine that is busy may need several attempts
    s3_client._connection.cache_clear()
    faulty.faults = [Fault('stall')]
    try:
        assert files.read_bytes(faulty.path) == CONTENT
    finally:
        s3_client._connection.cache_clear()
    assert len(faulty.requests) >= 2


def test_a_file_that_is_replaced_while_it_is_read(faulty):
    """Never the beginning of one and the end of the other."""
    chunks = files.backend_of(faulty.path).chunks(faulty.path)
    faulty.faults = [Fault('truncate', 'GET', 'a.bin', bytes_sent=100_000)]
    head = next(chunks)
    client = faulty.server.client()
    client.put_object(Bucket=faulty.bucket.removeprefix('s3://'), Key='a.bin', Body=CONTENT[::-1])
    with pytest.raises(StorageError, match='was replaced while it was read'):
        b''.join(chunks)
    assert CONTENT.startswith(head)


def test_a_damaged_request_is_refused_and_sent_again(faulty):
    faulty.faults = [Fault('garble', 'PUT', 'new')]
    files.write_bytes(f'{faulty.bucket}/new', CONTENT)
    assert faulty.count('PUT .*/new') == 2
    assert files.read_bytes(f'{faulty.bucket}/new') == CONTENT


STEPS = {
    'begin': Fault('', 'POST', r'\?uploads'),
    'part': Fault('', 'PUT', 'partNumber=2'),
    'complete': Fault('', 'POST', 'uploadId'),
}


@pytest.mark.parametrize(
    ('step', 'fault'),
    [
        ('begin', TRANSIENT[0]),
        ('part', TRANSIENT[0]),
        ('part', TRANSIENT[3]),
        ('complete', TRANSIENT[1]),
        ('complete', TRANSIENT[2]),
    ],
    ids=lambda value: value if isinstance(value, str) else f'{value.how}-{value.code}',
)
def test_upload_in_parts_survives_failures(step, fault, faulty):
    if faulty.server.kind == 'rclone' and (step, fault.how) == ('complete', 'lost'):
        pytest.skip('rclone serve s3 does not keep what tells by which upload a file was made')
    where = STEPS[step]
    faulty.faults = [again(fault, method=where.method, path=where.path, times=1)]
    files.write_bytes(f'{faulty.bucket}/large.bin', LARGE)
    assert faulty.count(rf'{where.method} .*{where.path}') >= 2
    faulty.faults = []
    assert files.read_bytes(f'{faulty.bucket}/large.bin') == LARGE


@pytest.mark.parametrize('step', ['part', 'complete'])
def test_an_upload_that_fails_leaves_nothing(step, faulty):
    where = STEPS[step]
    faulty.faults = [again(where, how='status', status=403, code='AccessDenied', times=-1)]
    with pytest.raises(StorageError, match='access denied'):
        files.write_bytes(f'{faulty.bucket}/large.bin', LARGE)
    assert files.list_names(faulty.bucket) == ['a.bin']
    assert unfinished(faulty) == []


def test_an_interrupted_upload_does_not_go_on_trying(faulty, monkeypatch):
    monkeypatch.setenv('LAKONLAB_RETRY_SECONDS', '100')
    monkeypatch.setattr(retry, 'FIRST_DELAY', 1.0)
    faulty.faults = [Fault('status', 'PUT', 'partNumber', status=503, code='SlowDown', times=-1)]

    def interrupt():
        with files.open_write(f'{faulty.bucket}/large.bin') as stream:
            stream.write(LARGE)
            wait_until(lambda: faulty.count('PUT .*partNumber') >= 2)
            raise KeyboardInterrupt

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        interrupt()
    assert time.monotonic() - began < 20
    assert unfinished(faulty) == []


UPLOAD = """
import os, sys
from lakonlab.storage import files, s3_upload
s3_upload.SMALLEST_PART = 5 << 20
with files.open_write(sys.argv[1]) as stream:
    stream.write(os.urandom(16 << 20))
    print('sent', flush=True)
    sys.stdin.read()
"""


def test_a_killed_upload_is_invisible_and_can_be_cleaned(faulty):
    path = f'{faulty.bucket}/run/iter_1/model.bin'
    process = subprocess.Popen([sys.executable, '-c', UPLOAD, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b'sent\n'
    wait_until(lambda: faulty.count('PUT .*partNumber') >= 2)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not files.exists(path)
    assert files.list_files(f'{faulty.bucket}/run') == []
    assert unfinished(faulty) == ['run/iter_1/model.bin']
    assert s3_upload.clean_uploads(f'{faulty.bucket}/other', 0) == []
    assert s3_upload.clean_uploads(f'{faulty.bucket}/run', 3600) == []
    assert s3_upload.clean_uploads(f'{faulty.bucket}/run', 0, dry_run=True) == [path]
    assert unfinished(faulty) == ['run/iter_1/model.bin']
    tool = [sys.executable, str(Path(__file__).parents[2] / 'tools' / 'clean_uploads.py')]
    done = subprocess.run([*tool, f'{faulty.bucket}/run', '--older-than', '0'], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert path in done.stdout
    assert unfinished(faulty) == []


def test_a_killed_download_is_continued(faulty, tmp_path):
    """The first process gets no further than a third of the file."""
    faulty.faults = [Fault('truncate', 'GET', 'a.bin', times=1, bytes_sent=100_000), Fault('stall', 'GET', 'a.bin')]
    code = 'import sys; from lakonlab.storage import files; print(files.fetch(sys.argv[1]))'
    process = subprocess.Popen([sys.executable, '-c', code, faulty.path], stdout=subprocess.PIPE)
    wait_until(lambda: faulty.count('GET .*a.bin') == 2)
    process.kill()
    process.communicate()
    (part,) = (tmp_path / 'cache').rglob('.part')
    assert 0 < part.stat().st_size < len(CONTENT)
    assert not list((tmp_path / 'cache').rglob('a.bin'))
    faulty.faults, before = [], len(faulty.requests)
    assert fetch(faulty.path).read_bytes() == CONTENT
    assert [line.partition(' ')[0] for line in faulty.requests[before:]] == ['HEAD', 'GET']


def test_a_body_that_arrives_damaged_is_not_taken(faulty, monkeypatch, tmp_path):
    """What the server says its MD5 is decides, as in the case of a part that another writer has damaged."""
    faulty.faults = [Fault('truncate', 'GET', 'a.bin', times=-1, bytes_sent=100_000)]
    monkeypatch.setenv('LAKONLAB_RETRY_SECONDS', '0')
    with pytest.raises(FetchError, match='100000 read, but total bytes expected is 300000'):
        fetch(faulty.path)
    (part,) = (tmp_path / 'cache').rglob('.part')
    part.write_bytes(bytes(100_000))
    faulty.faults = []
    assert fetch(faulty.path).read_bytes() == CONTENT


def test_missing_bucket(faulty):
    for operation in (files.read_bytes, files.exists, files.is_file, files.size_of, files.list_names, fetch):
        with pytest.raises(StorageError, match="there is no bucket 'absent-bucket'"):
            operation('s3://absent-bucket/a')
    with pytest.raises(StorageError, match="there is no bucket 'absent-bucket'"):
        files.write_bytes('s3://absent-bucket/a', b'x')
    assert all(faulty.count(rf'{method} /absent-bucket') <= 8 for method in ('GET', 'HEAD', 'PUT'))


def test_wrong_key(faulty, monkeypatch):
    monkeypatch.setenv('AWS_SECRET_ACCESS_KEY', 'wrong')
    for operation in (files.read_bytes, files.exists, files.list_names, fetch):
        with pytest.raises(StorageError, match=r'does not accept the credentials from AWS_ACCESS_KEY_ID'):
            operation(faulty.path)
    with pytest.raises(StorageError, match=r'does not accept the credentials from AWS_ACCESS_KEY_ID'):
        files.write_bytes(faulty.path, b'x')


def test_clock_skew(faulty, monkeypatch):
    """The server itself compares the times; this process believes that it is two hours later."""
    if faulty.server.kind == 'rclone':
        pytest.skip('rclone serve s3 does not tell a wrong time from a wrong key')
    from botocore import auth

    def later(*args, **kwargs):
        now = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(hours=2)
        return now.replace(tzinfo=None)

    assert hasattr(auth, 'get_current_datetime')
    monkeypatch.setattr(auth, 'get_current_datetime', later)
    for operation in (files.read_bytes, files.exists, files.list_names):
        with pytest.raises(StorageError, match=r'the clock of this machine shows .* GMT, the one of the server .* GMT'):
            operation(faulty.path)
    assert len(faulty.requests) <= 6


def test_missing_file(faulty):
    with pytest.raises(MissingFileError, match=r'absent'):
        files.read_bytes(f'{faulty.bucket}/absent')
    assert len(faulty.requests) == 1
    assert not files.exists(f'{faulty.bucket}/absent')


def test_random_numbers_of_a_run_are_not_touched(faulty):
    random.seed(3)
    expected = random.random()
    random.seed(3)
    faulty.faults = [Fault('reset', times=2)]
    files.read_bytes(faulty.path)
    assert random.random() == expected


def test_patience_waits_longer_and_differently(monkeypatch):
    waited, longest = [], [0.5, 1, 2, 4, 8, 16, 20, 20]
    monkeypatch.setattr(time, 'sleep', waited.append)
    patience = retry.Patience('reading a')
    for _ in range(8):
        patience.wait_after(TransientError('x'))
    assert all(0.5 * expected <= seconds <= expected for seconds, expected in zip(waited, longest))
    assert [0.5 * expected for expected in longest] != waited != longest


def test_patience_that_is_misspelt(monkeypatch):
    monkeypatch.setenv('LAKONLAB_RETRY_SECONDS', 'long')
    with pytest.raises(StorageError, match="LAKONLAB_RETRY_SECONDS='long': expected a number of seconds"):
        retry.retry_seconds()
