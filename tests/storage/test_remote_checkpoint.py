"""Checkpoints in an object store: what a plain client of the store sees, damage, and saves that die at any request."""

import hashlib
import json

import pytest
import torch

from lakonlab.models.architecture.loading import PretrainedError, read_weights
from lakonlab.storage import files
from lakonlab.storage.checkpoint import (
    CheckpointError,
    content_digest,
    find_checkpoint,
    list_checkpoints,
    load_model_state,
    read_manifest,
    read_pieces,
    read_state,
    read_tensors,
    require_checkpoint,
    write_checkpoint,
)
from lakonlab.storage.inference_weights import add_inference_weights
from lakonlab.storage.pieces import Pieces
from lakonlab.storage.publisher import publisher_of
from lakonlab.storage.remote_path import as_path
from lakonlab.storage.retention import prune
from tests.request_faults import DiedError, RequestFault, failing
from tests.storage.test_checkpoint import MODEL, OPTIMIZER, STATE, assert_equal, write

BEST = 'best_loss'


@pytest.fixture
def store(s3_server, bucket):
    return Store(s3_server.client(), bucket.removeprefix('s3://'))


class Store:
    """The server, seen by a plain client."""

    def __init__(self, client, bucket):
        self.client, self.bucket = client, bucket
        self.run = as_path(f's3://{bucket}/some/run')

    def keys(self):
        """What lies below the run's directory."""
        answer = self.client.list_objects_v2(Bucket=self.bucket, Prefix='some/run/')
        return [entry['Key'].removeprefix('some/run/') for entry in answer.get('Contents', ())]

    def get(self, key):
        return self.client.get_object(Bucket=self.bucket, Key=f'some/run/{key}')['Body'].read()

    def objects(self):
        """Key -> content."""
        return {key: self.get(key) for key in self.keys()}

    def put(self, key, content):
        self.client.put_object(Bucket=self.bucket, Key=f'some/run/{key}', Body=content)

    def delete(self, key):
        self.client.delete_object(Bucket=self.bucket, Key=f'some/run/{key}')

    def uploads(self):
        try:
            return self.client.list_multipart_uploads(Bucket=self.bucket).get('Uploads') or []
        except self.client.exceptions.NoSuchUpload:  # what rclone says when there are none
            return []

    def set(self, objects):
        """Make the run consist of these objects; the keys of others than manifests are never used again."""
        keys = set(self.keys())
        for key in keys - set(objects):
            self.delete(key)
        for key, content in objects.items():
            if key not in keys or key.endswith('manifest.json'):
                self.put(key, content)


def whole(objects):
    """Name -> checksums of the files, of each checkpoint whose files all are as its manifest says."""
    found = {}
    for key in (key for key in objects if key.endswith('/manifest.json')):
        name, manifest = key.split('/')[0], json.loads(objects[key])
        contents = {file: objects.get(f'{name}/{manifest["data"]}/{file}', b'') for file in manifest['files']}
        digests = {file: hashlib.sha256(content).hexdigest() for file, content in contents.items()}
        if digests == {file: entry['sha256'] for file, entry in manifest['files'].items()}:
            found[name] = digests
    return found


def superfluous(objects):
    """Keys that are no manifest and that no manifest names."""
    named = {key for key in objects if key.endswith('/manifest.json')}
    for key in list(named):
        name, manifest = key.split('/')[0], json.loads(objects[key])
        named.update(f'{name}/{manifest["data"]}/{file}' for file in manifest['files'])
    return set(objects) - named


def test_round_trip(store):
    path = write(store.run)
    assert str(path) == f's3://{store.bucket}/some/run/iter_4'
    assert_equal(load_model_state(str(path)), MODEL)
    assert_equal(read_tensors(path, 'optimizer'), OPTIMIZER)
    assert read_state(path)['iteration'] == 4
    manifest = json.loads(store.objects()['iter_4/manifest.json'])
    assert {f'iter_4/{manifest["data"]}/{name}' for name in manifest['files']} | {'iter_4/manifest.json'} == set(
        store.objects()
    )


def test_a_copy_on_a_disk_is_the_same_checkpoint(store, tmp_path):
    path = write(store.run)
    for key, content in store.objects().items():
        target = tmp_path / key
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    copy = require_checkpoint(tmp_path / 'latest')
    assert_equal(load_model_state(copy), MODEL)
    assert content_digest(copy) == content_digest(path)
    local = write(tmp_path / 'own')
    assert 'data' not in read_manifest(local)
    assert content_digest(local, 'model') == content_digest(path, 'model')


def test_parts_of_tensors(store, monkeypatch):
    monkeypatch.setattr('lakonlab.storage.ranged_safetensors.REQUEST_BYTES', 200)
    monkeypatch.setattr('lakonlab.storage.ranged_safetensors.GAP_BYTES', 16)
    monkeypatch.setattr('lakonlab.storage.ranged_safetensors.HEAD_BYTES', 20)
    tensor, cube = torch.randn(9, 5), torch.randn(3, 4, 5).bfloat16()
    path = write(store.run, model={'a': tensor, 'cube': cube, 'scalar': torch.tensor(2.5)})
    rows, stretch = torch.zeros(4, 5), torch.zeros(31, dtype=torch.bfloat16)
    pieces = Pieces((9, 5), torch.float32, (((3, 0), (4, 5)),), (rows,))
    read_pieces(path, 'model', {'a': pieces, 'cube': Pieces.stretch((3, 4, 5), 13, stretch)})
    assert torch.equal(rows, tensor[3:7])
    assert torch.equal(stretch, cube.flatten()[13:44])


@pytest.mark.parametrize('name', ['', '/', '/latest', '/latest.pth', '/latest.txt', '/iter_14', '/iter_14.pth'])
def test_names_of_the_newest(store, name):
    for step in (2, 14, 6):
        write(store.run, step, model={})
    assert find_checkpoint(f'{store.run}{name}') == store.run / 'iter_14'
    assert [path.name for path in list_checkpoints(store.run)] == ['iter_14', 'iter_6', 'iter_2']


def test_nothing_there(store):
    assert find_checkpoint(str(store.run)) is None
    assert find_checkpoint(f'{store.run}/latest') is None
    write(store.run, 2, model={})
    with pytest.raises(CheckpointError, match=r"iter_7' does not exist \(checkpoints in s3://.*/some/run: iter_2\)"):
        require_checkpoint(f'{store.run}/iter_7')


def test_published_files_are_explained(store):
    store.put('iter_3.pth', b'')
    with pytest.raises(CheckpointError, match='is a file, but a checkpoint is a directory'):
        find_checkpoint(f'{store.run}/iter_3.pth')
    with pytest.raises(CheckpointError, match='in the published layout only'):
        find_checkpoint(str(store.run))


def shard_of(store, directory):
    return next(key for key in store.objects() if key.startswith(directory) and '/model/' in key)


def change(key_of, content_of):
    def damage(store, directory):
        key = key_of(store, directory)
        content = content_of(store.objects()[key])
        store.delete(key) if content is None else store.put(key, content)

    return damage


def manifest_of(store, directory):
    return f'{directory}/manifest.json'


def with_value(**values):
    return lambda content: json.dumps({**json.loads(content), **values}).encode()


DAMAGES = {
    'flipped bit': (change(shard_of, lambda data: data[:-3] + bytes([data[-3] ^ 1]) + data[-2:]), 'checksum'),
    'truncated shard': (change(shard_of, lambda data: data[:-1]), 'bytes, the manifest states'),
    'missing shard': (change(shard_of, lambda data: None), 'is missing'),
    'truncated manifest': (change(manifest_of, lambda data: data[: len(data) // 2]), 'damaged'),
    'manifest of something else': (change(manifest_of, lambda data: b'["else"]'), 'damaged'),
    'manifest from the future': (change(manifest_of, with_value(version=99)), 'update LakonLab'),
    'folder outside': (change(manifest_of, with_value(data='../iter_2')), 'outside'),
}


@pytest.mark.parametrize('kind', DAMAGES)
def test_damaged(store, caplog, kind):
    write(store.run, 2)
    newest = write(store.run, 4)
    damage, message = DAMAGES[kind]
    damage(store, 'iter_4')
    with pytest.raises(CheckpointError, match=message):
        load_model_state(newest)
    assert find_checkpoint(store.run) == store.run / 'iter_2'
    assert 'falling back to' in caplog.text
    before = store.objects()

    # what is damaged is set aside, stays as it is, and is in nobody's way
    publisher = publisher_of(store.run)
    assert publisher.set_aside(newest) == 'iter_4/damaged.0.json'
    assert [path.name for path in list_checkpoints(store.run)] == ['iter_2']
    assert publisher.clean(store.run) == []
    write(store.run, 4, model={'a': torch.ones(2)})
    assert torch.equal(load_model_state(newest)['a'], torch.ones(2))
    after = store.objects()
    assert {key for key in before if '/data-' in key} < set(after)
    assert json.loads(after['iter_4/damaged.0.json'])['manifest.json'].encode() == before['iter_4/manifest.json']
    publisher.remove(newest)
    assert set(store.objects()) == set(before) - {'iter_4/manifest.json'} | {'iter_4/damaged.0.json'}


def test_missing_manifest_is_no_checkpoint(store):
    write(store.run, 2)
    write(store.run, 4)
    store.delete('iter_4/manifest.json')
    assert find_checkpoint(store.run).name == 'iter_2'
    with pytest.raises(CheckpointError, match='no complete checkpoint'):
        require_checkpoint(f'{store.run}/iter_4')
    (folder,) = publisher_of(store.run).clean(store.run)
    assert folder.startswith('iter_4/data-')
    assert {key.split('/')[0] for key in store.objects()} == {'iter_2'}


def test_weights_for_inference(store, tmp_path, monkeypatch):
    monkeypatch.setenv('LAKONLAB_CACHE_DIR', str(tmp_path))
    state = {f'diffusion_ema.denoising.{name}': tensor for name, tensor in MODEL.items()}
    path = write_checkpoint(
        store.run, 4, {'model': state}, {}, extra=lambda folder: add_inference_weights(folder, 'diffusion_ema')
    )
    from safetensors.torch import load

    manifest = json.loads(store.objects()['iter_4/manifest.json'])
    name = 'export/diffusion_pytorch_model.safetensors'
    content = store.objects()[f'iter_4/{manifest["data"]}/{name}']
    assert_equal(load(content), MODEL)
    assert manifest['files'][name]['size'] == len(content)
    assert find_checkpoint(path) == path

    # as named in a config: where it would be on a disk
    assert_equal(read_weights(f'{path}/{name}'), MODEL)
    with pytest.raises(FileNotFoundError, match='does not exist'):
        read_weights(f'{path}/export/other.safetensors')
    store.put(f'iter_4/{manifest["data"]}/{name}', content[:-1] + b'x')
    assert_equal(read_weights(f'{path}/{name}'), MODEL)  # a copy of what it should be is at hand
    monkeypatch.setenv('LAKONLAB_CACHE_DIR', str(tmp_path / 'other'))
    with pytest.raises(PretrainedError, match=name):
        read_weights(f'{path}/{name}')


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


def test_a_save_needs_the_directory_to_be_held_still(store, before):
    def taken():
        raise files.StorageError('held by another run')

    with pytest.raises(CheckpointError, match='iter_8 failed: StorageError: held by another run'):
        write_checkpoint(store.run, 8, {'model': MODEL}, STATE, confirm=taken)
    assert store.objects() == before
