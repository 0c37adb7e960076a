"""Checkpoints: round trip, damage, interrupted writes."""

import json
import os

import pytest
import torch

from lakonlab.storage import local
from lakonlab.storage.checkpoint import (
    CheckpointError,
    find_checkpoint,
    load_model_state,
    read_manifest,
    read_pieces,
    read_state,
    read_tensors,
    require_checkpoint,
    tensor_info,
    write_checkpoint,
)
from lakonlab.storage.pieces import Pieces

MODEL = {
    'a.weight': torch.randn(3, 4),
    'a.scalar': torch.tensor(3.5),
    'a.half': torch.randn(5).bfloat16(),
    'a.empty': torch.zeros(0, 3),
    'b.count': torch.tensor(2**40 + 1),
    'b.mask': torch.tensor([True, False]),
    'b.double': torch.tensor([torch.pi, float('nan'), float('inf')], dtype=torch.float64),
    'b.bytes': torch.arange(4, dtype=torch.uint8),
}
OPTIMIZER = {'diffusion/exp_avg/a.weight': torch.randn(3, 4), 'diffusion/step/a.weight': torch.tensor(7.0)}
STATE = {'iteration': 4, 'window': [1 / 3, float('nan')], 'none': None}


def write(run, step=4, **tensors):
    return write_checkpoint(run, step, tensors or {'model': MODEL, 'optimizer': OPTIMIZER}, STATE, 'x = 1')


def bits(tensor):
    return tensor.contiguous().view(torch.uint8) if tensor.dim() else tensor.reshape(1).view(torch.uint8)


def assert_equal(read, written):
    assert set(read) == set(written)
    for name, tensor in written.items():
        assert read[name].dtype == tensor.dtype
        assert read[name].shape == tensor.shape
        assert torch.equal(bits(read[name]), bits(tensor)), name


def test_round_trip(tmp_path):
    path = write(tmp_path)
    assert path == tmp_path / 'iter_4'
    assert_equal(load_model_state(path), MODEL)
    assert_equal(read_tensors(path, 'optimizer'), OPTIMIZER)
    state = read_state(path)
    assert state['iteration'] == 4
    assert state['window'][0] == 1 / 3
    manifest = read_manifest(path)
    assert manifest['step'] == 4
    assert manifest['config'] == 'x = 1'
    assert manifest['versions']['torch'] == torch.__version__


def test_round_trip_in_several_files(tmp_path, monkeypatch):
    monkeypatch.setattr('lakonlab.storage.safetensors_storage.MAX_FILE_BYTES', 40)
    path = write(tmp_path)
    assert len(list((path / 'model').iterdir())) > 2
    assert_equal(load_model_state(path), MODEL)


def test_empty_state(tmp_path):
    path = write(tmp_path, model={}, optimizer={})
    assert load_model_state(path) == {}
    assert tensor_info(path, 'optimizer') == {}


def test_reads_into_given_tensors(tmp_path):
    path = write(tmp_path)
    target = torch.zeros(3, 4)
    read_pieces(path, 'model', {'a.weight': Pieces.whole(target)})
    assert torch.equal(target, MODEL['a.weight'])


def test_wrong_shape_is_an_error(tmp_path):
    path = write(tmp_path)
    with pytest.raises(CheckpointError, match='iter_4'):
        read_pieces(path, 'model', {'a.weight': Pieces.whole(torch.zeros(3, 5))})


@pytest.mark.parametrize('name', ['', 'latest', 'latest.pth', 'latest.txt', 'iter_4', 'iter_4.pth'])
def test_names_of_the_newest(tmp_path, name):
    write(tmp_path, 2)
    write(tmp_path, 4)
    assert find_checkpoint(tmp_path / name) == tmp_path / 'iter_4'


def test_newest_is_by_number(tmp_path):
    for step in (100, 20, 3):
        write(tmp_path, step)
    assert find_checkpoint(tmp_path).name == 'iter_100'


def test_nothing_there(tmp_path):
    assert find_checkpoint(tmp_path / 'nowhere') is None
    assert find_checkpoint(tmp_path / 'nowhere' / 'latest.pth') is None
    assert find_checkpoint(tmp_path) is None
    write(tmp_path, 2)
    with pytest.raises(CheckpointError, match=r"iter_7' does not exist \(checkpoints in .*: iter_2\)"):
        require_checkpoint(tmp_path / 'iter_7')


def test_file_and_remote_path_are_explained(tmp_path):
    (tmp_path / 'iter_1.pth').touch()
    with pytest.raises(CheckpointError, match='is a file'):
        find_checkpoint(tmp_path / 'iter_1.pth')
    with pytest.raises(CheckpointError, match='https:// cannot be listed'):
        find_checkpoint('https://example.org/run/latest.pth')


def shard_of(path):
    return next((path / 'model').iterdir())


def flip_a_bit(path):
    data = bytearray(shard_of(path).read_bytes())
    data[-3] ^= 1
    shard_of(path).write_bytes(data)


def truncate_shard(path):
    shard_of(path).write_bytes(shard_of(path).read_bytes()[:-1])


def remove_shard(path):
    shard_of(path).unlink()


def remove_state(path):
    (path / 'state.json').unlink()


def truncate_manifest(path):
    text = (path / 'manifest.json').read_text()
    (path / 'manifest.json').write_text(text[: len(text) // 2])


def remove_manifest(path):
    (path / 'manifest.json').unlink()


def manifest_of_another_program(path):
    (path / 'manifest.json').write_text('["something else"]')


def manifest_from_the_future(path):
    manifest = json.loads((path / 'manifest.json').read_text())
    (path / 'manifest.json').write_text(json.dumps({**manifest, 'version': 99}))


def manifest_that_leaves_the_directory(path):
    manifest = json.loads((path / 'manifest.json').read_text())
    manifest['files']['../outside'] = {'size': 0, 'sha256': ''}
    (path / 'manifest.json').write_text(json.dumps(manifest))


DAMAGES = {
    flip_a_bit: 'checksum',
    truncate_shard: 'bytes, the manifest states',
    remove_shard: 'is missing',
    remove_state: r'state\.json is missing',
    truncate_manifest: 'damaged',
    remove_manifest: 'no complete checkpoint',
    manifest_of_another_program: 'damaged',
    manifest_from_the_future: 'update LakonLab',
    manifest_that_leaves_the_directory: 'outside',
}


@pytest.mark.parametrize('damage', DAMAGES, ids=lambda damage: damage.__name__)
def test_damaged(tmp_path, caplog, damage):
    write(tmp_path, 2)
    newest = write(tmp_path, 4)
    damage(newest)
    with pytest.raises(CheckpointError, match=DAMAGES[damage]):
        load_model_state(newest)
    assert find_checkpoint(tmp_path) == tmp_path / 'iter_2'
    assert 'falling back to' in caplog.text
    assert 'iter_4' in caplog.text
    damage(tmp_path / 'iter_2')
    with pytest.raises(CheckpointError, match='none of the 2 checkpoints'):
        find_checkpoint(tmp_path)


class FullDisk:
    """Lets so many calls of a function pass and then fails like a full disk."""

    def __init__(self, function, calls):
        self.function, self.calls = function, calls

    def __call__(self, *args, **kwargs):
        self.calls -= 1
        if self.calls < 0:
            raise OSError(28, 'No space left on device')
        return self.function(*args, **kwargs)


@pytest.mark.parametrize('function', ['fsync', 'rename', 'mkdir'])
@pytest.mark.parametrize('calls', range(12))
def test_disk_full_at_every_step_of_a_save(tmp_path, monkeypatch, function, calls):
    write(tmp_path, 2)
    with monkeypatch.context() as patched:
        patched.setattr(os, function, disk := FullDisk(getattr(os, function), calls))
        failed = None
        try:
            write(tmp_path, 4)
        except CheckpointError as error:
            failed = str(error)
    if function != 'mkdir':  # which is called for directories that exist, too, and then may fail
        assert (failed is not None) == (disk.calls < 0)
    assert failed is None or 'No space left on device' in failed
    published = (tmp_path / 'iter_4').exists()
    assert failed or published
    assert find_checkpoint(tmp_path) == tmp_path / ('iter_4' if published else 'iter_2')
    assert_equal(load_model_state(tmp_path / 'iter_2'), MODEL)
    assert not list(tmp_path.glob('.*'))


@pytest.mark.parametrize('part', ['model', 'optimizer'])
def test_disk_full_while_tensors_are_written(tmp_path, monkeypatch, part):
    import safetensors.torch

    write(tmp_path, 2)
    monkeypatch.setattr(safetensors.torch, 'save', FullDisk(safetensors.torch.save, 0 if part == 'model' else 1))
    with pytest.raises(CheckpointError, match=r'iter_4 failed: OSError: .*No space left on device'):
        write(tmp_path, 4)
    assert [path.name for path in tmp_path.iterdir()] == ['iter_2']


@pytest.mark.skipif(os.name == 'nt' or os.geteuid() == 0, reason='permissions do not bind the superuser')
def test_no_permission(tmp_path):
    write(tmp_path, 2)
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(CheckpointError, match='Permission'):
            write(tmp_path, 4)
    finally:
        tmp_path.chmod(0o700)
    assert find_checkpoint(tmp_path).name == 'iter_2'


def test_file_where_the_directory_should_be(tmp_path):
    (tmp_path / 'run').write_text('in the way')
    with pytest.raises(CheckpointError, match=r'saving .* failed'):
        write(tmp_path / 'run')
    assert (tmp_path / 'run').read_text() == 'in the way'


def test_value_that_is_no_plain_data(tmp_path):
    with pytest.raises(CheckpointError, match='not JSON serializable'):
        write_checkpoint(tmp_path, 1, {'model': MODEL}, {'hook': object()})
    assert not list(tmp_path.iterdir())


def test_saving_the_same_step_again_replaces_it(tmp_path):
    write(tmp_path, 4)
    flip_a_bit(tmp_path / 'iter_4')
    write(tmp_path, 4)
    assert_equal(load_model_state(tmp_path / 'iter_4'), MODEL)
    assert [path.name for path in tmp_path.iterdir()] == ['iter_4']


def test_leftovers_are_removed_and_nothing_else(tmp_path):
    write(tmp_path, 4)
    local.temporary_directory(tmp_path / 'iter_6')
    (tmp_path / '.notes').mkdir()
    assert len(local.remove_stale_temporaries(tmp_path)) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ['.notes', 'iter_4']
    assert local.remove_stale_temporaries(tmp_path / 'nowhere') == []


def test_nothing_is_unpickled(tmp_path, monkeypatch):
    path = write(tmp_path)

    def refuse(*args, **kwargs):
        raise AssertionError('unpickling')

    monkeypatch.setattr('pickle.load', refuse)
    monkeypatch.setattr('pickle.loads', refuse)
    monkeypatch.setattr('pickle.Unpickler', refuse)
    monkeypatch.setattr('torch.load', refuse)
    assert_equal(load_model_state(path), MODEL)
