"""Checkpoints in an object store: what a plain client of the store sees, and damage."""

import json
import shutil
from functools import partial

import pytest
import torch

from lakonlab.models.architecture.loading import PretrainedError, read_weights
from lakonlab.storage import files, s3
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
from tests.request_faults import RequestFault, failing
from tests.storage.test_checkpoint import MODEL, OPTIMIZER, assert_equal, write


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
    'manifest that is no text': (change(manifest_of, lambda data: b'\xff\xfe' + data), 'damaged'),
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
    kept = json.loads(after['iter_4/damaged.0.json'])['manifest.json']
    assert kept.encode('utf-8', 'surrogateescape') == before['iter_4/manifest.json']
    store.put('iter_4/damaged.1.json', b'\xff')  # what it refers to cannot be known, so nothing is removed
    assert publisher.tidy(newest) == []
    store.delete('iter_4/damaged.1.json')
    publisher.remove(newest)
    assert set(store.objects()) == set(before) - {'iter_4/manifest.json'} | {'iter_4/damaged.0.json'}


@pytest.mark.parametrize('status', [503, 403])
def test_a_server_that_refuses_is_no_damage(store, monkeypatch, status):
    """An older checkpoint is not taken instead of one of which nothing is known."""
    write(store.run, 2)
    write(store.run, 4)
    monkeypatch.setenv('LAKONLAB_RETRY_SECONDS', '0')
    fault = RequestFault(-1, 'deny', refused=r'GET .*/iter_4/.*/model/', status=status)
    with failing(fault), pytest.raises(files.StorageError, match='injected'):
        find_checkpoint(store.run)
    assert find_checkpoint(store.run).name == 'iter_4'


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


def test_weights_for_inference_are_made_of_what_is_needed(store, monkeypatch):
    """Other networks are not read, and what was written is not read again for its checksum."""
    monkeypatch.setattr('lakonlab.storage.ranged_safetensors.HEAD_BYTES', 1000)
    state = {f'diffusion_ema.denoising.{name}': tensor for name, tensor in MODEL.items()}
    state['diffusion.denoising.large'] = torch.zeros(1 << 20)
    received = []
    read = s3._read

    def counted(path, body, count):
        content = read(path, body, count)
        received.append(len(content))
        return content

    monkeypatch.setattr(s3, '_read', counted)
    with failing(RequestFault(-1, 'deny', refused='GET .*/export/')):
        path = write_checkpoint(
            store.run, 4, {'model': state}, {}, extra=lambda *places: add_inference_weights(*places, 'diffusion_ema')
        )
    assert 0 < sum(received) < 1 << 20
    find_checkpoint(path)  # which compares all checksums


def test_large_weights_for_inference_are_staged_on_a_disk(store, tmp_path, monkeypatch):
    monkeypatch.setenv('LAKONLAB_TMPDIR', str(tmp_path / 'scratch'))
    state = {f'diffusion_ema.denoising.{name}': tensor for name, tensor in MODEL.items()}

    def save(step):
        extra = partial(add_inference_weights, role='diffusion_ema')
        return read_manifest(write_checkpoint(store.run, step, {'model': state}, {}, extra=extra))['files']

    in_memory = save(2)
    assert not (tmp_path / 'scratch').exists()
    monkeypatch.setattr('lakonlab.storage.inference_weights.STAGED_BYTES', 0)
    assert save(4) == in_memory
    find_checkpoint(store.run / 'iter_4')
    assert list((tmp_path / 'scratch').iterdir()) == []
    monkeypatch.setattr('shutil.disk_usage', lambda path: shutil._ntuple_diskusage(100, 95, 5))
    with pytest.raises(CheckpointError, match=r'needs \d+ bytes in .*, where 5 are free: .* with LAKONLAB_TMPDIR'):
        save(6)
    assert find_checkpoint(store.run).name == 'iter_4'


def test_weights_for_inference(store, tmp_path, monkeypatch):
    monkeypatch.setenv('LAKONLAB_CACHE_DIR', str(tmp_path))
    state = {f'diffusion_ema.denoising.{name}': tensor for name, tensor in MODEL.items()}
    path = write_checkpoint(
        store.run,
        4,
        {'model': state},
        {},
        extra=partial(add_inference_weights, role='diffusion_ema', card=('README.md', str)),
    )
    from safetensors.torch import load

    manifest = json.loads(store.objects()['iter_4/manifest.json'])
    name = 'export/diffusion_pytorch_model.safetensors'
    content = store.objects()[f'iter_4/{manifest["data"]}/{name}']
    assert_equal(load(content), MODEL)
    folder = f'iter_4/{manifest["data"]}/export'
    assert store.objects()[f'{folder}/README.md'].decode() == f'{store.run}/{folder}'  # its files are there
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
