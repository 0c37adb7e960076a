"""Whatever goes wrong while something is written to S3, and at whichever request: a reader sees the old or the new.

A server that fails once is in ``test_s3_faults.py``, a process that dies in ``test_interrupted_remote_save.py``.

Which fault is tested where (of ``test_s3_faults.py``, unless another file is named), beside the tests below:

* connection resets, before and after the server acts; 500; 503 slow-down: ``test_transient_failures_are_tried_again``,
  ``test_retries_are_bounded``, ``test_upload_in_parts_survives_failures``
* bodies that are truncated: ``test_bodies_that_end_early``, ``test_a_truncated_listing``,
  ``test_a_body_that_arrives_damaged_is_not_taken``; that arrive damaged: ``test_a_damaged_request_is_refused_...``
* expired credentials: ``test_permanent_failures_are_errors_at_once``; in ``test_s3_client.py``,
  ``test_expired_credentials_are_read_again_once``
* a missing bucket, a wrong key, a wrong clock: ``test_permanent_failures_are_errors_at_once``, and with the answers of
  the server itself ``test_missing_bucket``, ``test_wrong_key``, ``test_clock_skew``
"""

import pytest
import torch

from lakonlab.storage import files, s3_upload
from lakonlab.storage.checkpoint import CheckpointError, find_checkpoint, write_checkpoint
from lakonlab.storage.errors import StorageError
from lakonlab.storage.publisher import publisher_of
from lakonlab.storage.retention import prune
from tests.faulty_proxy import Fault
from tests.object_store import Store, superfluous, whole
from tests.storage.test_s3_faults import CONTENT, LARGE, again, faulty, running_proxy  # noqa: F401

FAULTS = {
    'reset': Fault('reset'),
    'lost': Fault('lost'),
    '500': Fault('status', status=500, code='InternalError'),
    'slow down': Fault('status', status=503, code='SlowDown'),
    'damaged body': Fault('garble'),
    'expired credentials': Fault('status', status=400, code='ExpiredToken'),
    'missing bucket': Fault('status', status=404, code='NoSuchBucket'),
    'wrong key': Fault('status', status=403, code='SignatureDoesNotMatch'),
    'clock skew': Fault('status', status=403, code='RequestTimeTooSkewed'),
}
OLD = b'what was there before'


@pytest.fixture
def failing(faulty, monkeypatch):  # noqa: F811
    """Lets every request that changes something fail, from the n-th on; nobody has much patience."""
    monkeypatch.setenv('LAKONLAB_RETRY_SECONDS', '0.05')

    def start(name, number, methods):
        fault = again(FAULTS[name], method=methods, times=-1, skip=number)
        faulty.faults = [fault]
        return fault

    return start


def happened(fault):
    return fault.times < -1


def cases(few, *values, without=()):
    """A case for each fault; slow ones of all but a few."""
    return [
        pytest.param(name, *values, marks=() if name in few else pytest.mark.slow)
        for name in FAULTS
        if name not in without
    ]


CONTENTS = {'one request': CONTENT, 'parts': LARGE}


@pytest.mark.parametrize(('name', 'how'), [*cases(FAULTS, 'one request'), *cases(('lost', 'slow down'), 'parts')])
def test_files(faulty, failing, name, how):  # noqa: F811
    content = CONTENTS[how]
    bucket = faulty.bucket.removeprefix('s3://')
    store = Store(faulty.server.client(), bucket)
    number = 0
    while True:
        store.client.put_object(Bucket=bucket, Key='file', Body=OLD)
        fault = failing(name, number, 'PUT|POST')
        error = None
        try:
            files.write_bytes(f'{faulty.bucket}/file', content)
        except StorageError as caught:
            error = caught
        found = store.client.get_object(Bucket=bucket, Key='file')['Body'].read()
        if error is None:
            assert found == content
            assert not happened(fault)
            break
        assert found in ((OLD, content) if name == 'lost' else (OLD,)), f'{name} at request {number}'
        assert f'{faulty.bucket}/file' in str(error)
        keys = [entry['Key'] for entry in store.client.list_objects_v2(Bucket=bucket)['Contents']]
        assert keys == ['a.bin', 'file']
        # the identifier of an upload that was begun got lost with the answer
        unfinished = {entry['Key'] for entry in store.uploads()}
        assert unfinished == ({'file'} if (name, how, number) == ('lost', 'parts', 0) else set())
        faulty.faults = []
        s3_upload.clean_uploads(faulty.bucket, -60)
        number += 1
    assert number == {'one request': 1, 'parts': 5}[how]


@pytest.mark.parametrize('name', cases(('reset',), without=('lost',)))
def test_checkpoints(faulty, failing, name):  # noqa: F811
    store = Store(faulty.server.client(), faulty.bucket.removeprefix('s3://'))

    def save(step):
        write_checkpoint(store.run, step, {'model': {'w': torch.zeros(6) + step}}, {'iteration': step}, 'x = 1')
        prune(store.run, step, 2, None)

    for step in (4, 6):
        save(step)
    before = store.objects()
    old = whole(before)
    number = 0
    while True:
        fault = failing(name, number, 'PUT|POST|DELETE')
        try:
            save(8)
            published = True
        except CheckpointError:
            published = False
        faulty.faults = []
        found = whole(store.objects())
        if not happened(fault):
            break
        assert published == (number > 2), f'{name} at request {number}'
        assert find_checkpoint(store.run).name == ('iter_8' if published else 'iter_6')
        assert {key: found[key] for key in old if key in found} == {key: old[key] for key in old if key in found}
        assert 'iter_6' in found
        store.set(before)
        publisher_of(store.run).clean(store.run)
        assert store.objects() == before
        number += 1
    assert number >= 3
    assert set(found) == {'iter_6', 'iter_8'}
    assert not superfluous(store.objects())
