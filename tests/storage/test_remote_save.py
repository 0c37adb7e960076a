"""Saves to an object store that fail at any of their requests, and what is removed before, after and beside them."""

import json

import pytest
import torch

from lakonlab.storage import files, retry
from lakonlab.storage.checkpoint import CheckpointError, find_checkpoint, load_model_state, write_checkpoint
from lakonlab.storage.publisher import publisher_of
from lakonlab.storage.remote_path import RemotePath
from lakonlab.storage.retention import prune
from tests.object_store import BEST, superfluous, whole
from tests.request_faults import DiedError, RequestFault, failing
from tests.storage.test_checkpoint import MODEL, STATE


@pytest.fixture
def before(store):
    """A run with two checkpoints and a best one."""
    for step, name in ((4, BEST), (4, None), (6, None)):
        write_checkpoint(store.run, step, {'model': {'w': torch.zeros(6) + step}}, STATE, 'x = 1', name)
    return store.objects()


def attempt(run, fault, name=None, **tensors):
    """A save as a run makes it, with what comes after it; returns its requests."""
    with failing(fault):
        write_checkpoint(run, 8, {'model': tensors or {'w': torch.arange(6.0)}}, {'iteration': 8}, 'x = 1', name)
        prune(run, 8, 2, None)
    return fault.seen


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ('how', 'name'),
    [('die', None), ('cut', None), ('deny', None), slow('die', BEST), slow('cut', BEST), slow('deny', BEST)],
)
def test_save_that_fails_at_any_request(store, before, how, name):
    final = name or 'iter_8'
    old = whole(before)
    requests = attempt(store.run, RequestFault(-1, how), name)
    undisturbed = whole(store.objects())
    assert requests[1].endswith('/state.json')
    assert requests[2].endswith(f'/{final}/manifest.json')
    assert len(requests) == (5 if name is None else 4)  # then what is not needed any more is removed
    for number, line in enumerate(requests):
        if how == 'cut' and not line.startswith('PUT'):
            continue
        store.set(before)
        where, is_published = f'{how} at {line}', number > 2
        if how != 'deny':
            with pytest.raises(DiedError):
                attempt(store.run, RequestFault(number, how), name)
        elif not is_published:
            with pytest.raises(CheckpointError, match=f'{final} failed: .*access denied'):
                attempt(store.run, RequestFault(number, how), name)
        else:
            attempt(store.run, RequestFault(number, how), name)
        newest = 'iter_8' if is_published and name is None else 'iter_6'
        assert find_checkpoint(store.run).name == newest, where
        expected = {**old, **({final: undisturbed[final]} if is_published else {})}
        present = whole(store.objects())
        assert {'iter_6', BEST, newest} <= set(present) <= set(expected), where
        assert all(present[key] == expected[key] for key in present), where

        # the next run cleans, goes on, and ends with the same
        publisher_of(store.run).clean(store.run)
        attempt(store.run, RequestFault(-1, how), name)
        objects = store.objects()
        assert whole(objects) == undisturbed, where
        assert not superfluous(objects), where


@pytest.mark.parametrize(
    ('how', 'patience', 'name'),
    [
        ('lost', 0, None),
        ('severed', 0, BEST),
        slow('lost', 20, None),
        slow('lost', 0, BEST),
        slow('severed', 0, None),
    ],
)
def test_save_whose_requests_are_done_but_not_answered(store, before, monkeypatch, how, patience, name):
    """What a manifest names is never removed, and what is known to be published is no failure."""
    monkeypatch.setattr(retry, 'FIRST_DELAY', 0.01)
    monkeypatch.setenv('LAKONLAB_RETRY_SECONDS', str(patience))
    final = name or 'iter_8'
    old = whole(before)
    requests = attempt(store.run, RequestFault(-1, how), name)
    undisturbed = whole(store.objects())
    for number, line in enumerate(requests):
        store.set(before)
        where = f'{how} at {line}'
        is_failure = not patience and number < (3 if how == 'severed' else 2)
        if is_failure:
            with pytest.raises(CheckpointError, match=f'{final} failed: '):
                attempt(store.run, RequestFault(number, how), name)
        else:
            attempt(store.run, RequestFault(number, how), name)
        objects = store.objects()
        present = whole(objects)
        assert set(present) == {key.split('/')[0] for key in objects if key.endswith('/manifest.json')}, where
        assert {'iter_6', BEST} <= set(present), where
        is_there = number >= 2 or not is_failure
        assert (present.get(final) == undisturbed[final]) == is_there, where
        assert is_there or present == old, where
        publisher_of(store.run).clean(store.run)
        attempt(store.run, RequestFault(-1, how), name)
        objects = store.objects()
        assert whole(objects) == undisturbed, where
        assert not superfluous(objects), where


def test_a_draft_that_the_visible_manifest_names_is_kept(store, before, monkeypatch, caplog):
    publisher, path = publisher_of(store.run), store.run / 'iter_6'
    folder = json.loads(before['iter_6/manifest.json'])['data']
    publisher.discard(path / folder)
    assert store.objects() == before
    monkeypatch.setattr(files, 'read_bytes', lambda *_: (_ for _ in ()).throw(files.StorageError('no answer')))
    publisher.discard(path / 'data-0123456789abcdef')
    assert 'stays: the manifest beside it names it, or cannot be read' in caplog.text


def test_publishing_keeps_the_new_data_whatever_manifest_it_reads(store, before, monkeypatch):
    """A store that still shows the manifest of before."""
    read = RemotePath.read_text
    stale = before['iter_6/manifest.json'].decode()
    with monkeypatch.context() as patch:
        patch.setattr(RemotePath, 'read_text', lambda path: stale if path.name == 'manifest.json' else read(path))
        write_checkpoint(store.run, 6, {'model': {'w': torch.ones(3)}}, STATE)
    assert torch.equal(load_model_state(store.run / 'iter_6')['w'], torch.ones(3))


def test_what_is_left_of_pruned_checkpoints_is_removed_after_the_next_save(store, before, caplog):
    (state,) = (key for key in before if key.startswith('iter_4/') and key.endswith('state.json'))
    store.delete('iter_4/manifest.json')
    publisher_of(store.run).set_aside(write_checkpoint(store.run, 2, {'model': {}}, STATE))
    kept = {key: content for key, content in store.objects().items() if key.startswith('iter_2/')}
    store.put('iter_9/data-0123456789abcdef/state.json', b'later than what was saved')
    attempt(store.run, RequestFault(-1, 'die'))
    objects = store.objects()
    assert state not in objects
    assert not any(key.startswith('iter_4/') for key in objects)
    assert kept.items() <= objects.items()
    assert 'iter_9/data-0123456789abcdef/state.json' in objects


def test_only_uploads_of_this_run_are_ended(store, monkeypatch, caplog):
    """Another run may write below the same directory, and the copy of a ``work_dir`` into it."""
    others = ['tf_logs/events', 'other/iter_8/data-0123456789abcdef/model/a', 'iter_8/model/a', 'a.log']
    own = ['iter_8/data-0123456789abcdef/model/a', 'best_loss/data-0123456789abcdef/state.json']
    for key in (*others, *own):
        store.client.create_multipart_upload(Bucket=store.bucket, Key=f'some/run/{key}')
    store.put('.writable', b'of a killed process')
    removed = publisher_of(store.run).clean(store.run)
    assert sorted(removed) == sorted(f'{store.run}/{key} (unfinished)' for key in own)
    assert sorted(entry['Key'] for entry in store.uploads()) == sorted(f'some/run/{key}' for key in others)
    assert store.objects() == {}


def test_a_run_that_may_not_list_uploads_goes_on(store, before, monkeypatch, caplog):
    from lakonlab.storage import s3_upload

    def refuse(path, operation, **arguments):
        assert operation == 'list_multipart_uploads'
        raise files.StorageError(f'{path}: access denied')

    monkeypatch.setattr(s3_upload, 'request', refuse)
    store.put('iter_4/data-0123456789abcdef/a', b'')
    assert publisher_of(store.run).clean(store.run) == ['iter_4/data-0123456789abcdef']
    assert 'unfinished uploads below' in caplog.text
    assert 'access denied' in caplog.text


def test_upload_in_parts_that_dies(store, before, monkeypatch):
    monkeypatch.setattr('lakonlab.storage.s3_upload.part_size', lambda number, size=None: 5 << 20)
    large = torch.zeros(6 << 20, dtype=torch.uint8)
    for number in range(4):  # before it begins, before and between its parts, before it is completed
        with pytest.raises(DiedError):
            attempt(store.run, RequestFault(number, 'die'), large=large)
        assert len(store.uploads()) == min(number, 1)
        assert store.objects() == before
        removed = publisher_of(store.run).clean(store.run)
        assert [name.endswith('(unfinished)') for name in removed] == [True] * min(number, 1)
        assert not store.uploads()
    attempt(store.run, RequestFault(-1, 'die'), large=large)
    assert load_model_state(store.run / 'iter_8')['large'].numel() == 6 << 20
    assert not superfluous(store.objects())


def test_upload_in_parts_whose_requests_are_done_but_not_answered(store, before, s3_server, monkeypatch):
    if s3_server.kind == 'rclone':
        pytest.skip('rclone serve s3 does not keep what tells by which upload a file was made')
    monkeypatch.setattr('lakonlab.storage.s3_upload.part_size', lambda number, size=None: 5 << 20)
    monkeypatch.setattr(retry, 'FIRST_DELAY', 0.01)
    large = torch.arange(6 << 20, dtype=torch.int32).to(torch.uint8)
    for number in range(4):  # what begins it, its parts, what completes it
        store.set(before)
        requests = attempt(store.run, RequestFault(number, 'lost'), large=large)
        assert len([line for line in requests if line.startswith(('POST', 'PUT'))]) >= 7
        assert torch.equal(load_model_state(store.run / 'iter_8')['large'], large)
        assert len(store.uploads()) == (1 if number == 0 else 0)  # begun twice
        publisher_of(store.run).clean(store.run)
        assert not store.uploads()
        assert not superfluous(store.objects())


def test_a_save_needs_the_directory_to_be_held_still(store, before):
    def taken():
        raise files.StorageError('held by another run')

    with pytest.raises(CheckpointError, match='iter_8 failed: StorageError: held by another run'):
        write_checkpoint(store.run, 8, {'model': MODEL}, STATE, confirm=taken)
    assert store.objects() == before
