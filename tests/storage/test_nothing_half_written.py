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

from lakonlab.storage import files
from lakonlab.storage.checkpoint import CheckpointError, find_checkpoint, write_checkpoint
from lakonlab.storage.errors import StorageError
from lakonlab.storage.publisher import publisher_of
from lakonlab.storage.retention import prune
from tests.faulty_proxy import Fault
from tests.storage.test_remote_checkpoint import Store, superfluous, whole
from tests.storage.test_s3_faults import CONTENT, LARGE, again, faulty, running_proxy, unfinished  # noqa: F401

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
    """Lets every request that changes something fail, from the n-th on; nobody has patience."""
    monkeypatch.setenv('LAKONLAB_RETRY_SECONDS', '0')

    def start(name, number, methods):
        fault = again(FAULTS[name], method=methods, times=-1, skip=number)
        faulty.faults = [fault]
        return fault

    return start


def happened(fault):
    return fault.times < -1


CASES = [pytest.param(name, CONTENT, id=f'one request-{name}') for name in FAULTS]
CASES += [
    pytest.param(name, LARGE, id=f'parts-{name}', marks=() if name in ('lost', 'wrong key') else pytest.mark.slow)
    for name in FAULTS
]


@pytest.mark.parametrize(('name', 'content'), CASES)
def test_files(faulty, failing, name, content):  # noqa: F811
    path = f'{faulty.bucket}/file'
    number = 0
    while True:
        files.write_bytes(path, OLD)
        fault = failing(name, number, 'PUT|POST')
        error = None
        try:
            files.write_bytes(path, content)
        except StorageError as caught:
            error = caught
        faulty.faults = []
        found = files.read_bytes(path)
        if error is None:
            assert found == content
            assert not happened(fault)
            break
        assert found in ((OLD, content) if name == 'lost' else (OLD,)), f'{name} at request {number}'
        assert 'file' in str(error)
        assert files.list_names(faulty.bucket) == ['a.bin', 'file']
        if name != 'lost':  # a server that began an upload and could not say so has it, until it is cleaned
            assert unfinished(faulty) == []
        number += 1
    assert number == (1 if content is CONTENT else 5)


@pytest.mark.parametrize('name', [name for name in FAULTS if name != 'lost'])
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
