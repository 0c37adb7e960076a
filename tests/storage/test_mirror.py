"""Copies of directories of logs."""

import pytest

from lakonlab.storage import files
from lakonlab.storage.mirror import Mirror


@pytest.fixture
def mirror(tmp_path, bucket):
    return Mirror(tmp_path, f'{bucket}/logs/run')


def remote(mirror):
    return {info.name: files.read_text(f'{mirror.remote}/{info.name}') for info in files.list_files(mirror.remote)}


def test_only_what_has_changed_is_copied(mirror, tmp_path):
    (tmp_path / 'tf_logs').mkdir()
    (tmp_path / 'a.log').write_text('one\n')
    (tmp_path / 'tf_logs' / 'events').write_text('x')
    (tmp_path / '.results.json.tmp-1').write_text('half')
    assert mirror.update() == ['a.log', 'tf_logs/events']
    assert remote(mirror) == {'a.log': 'one\n', 'tf_logs/events': 'x'}
    assert mirror.update() == []
    with open(tmp_path / 'a.log', 'a') as log:
        log.write('two\n')
    assert mirror.update() == ['a.log']
    assert remote(mirror)['a.log'] == 'one\ntwo\n'


def test_checkpoints_are_not_copied(mirror, tmp_path):
    for name in ('iter_4/manifest.json', 'iter_4/model/a.safetensors', 'runs/best_loss/manifest.json', 'iter_4.log'):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('x')
    (tmp_path / 'runs' / 'scalars.json').write_text('1')
    assert mirror.update() == ['iter_4.log', 'runs/scalars.json']
    assert set(remote(mirror)) == {'iter_4.log', 'runs/scalars.json'}


def test_what_grows_while_it_is_copied_is_copied_again(mirror, tmp_path, monkeypatch):
    log = tmp_path / 'a.log'
    log.write_text('one\n')
    opened = files.open_write

    def growing(path, size=None):
        with open(log, 'a') as stream:
            stream.write('two\n')
        return opened(path, size)

    monkeypatch.setattr(files, 'open_write', growing)
    mirror.update()
    assert remote(mirror) == {'a.log': 'one\n'}
    monkeypatch.setattr(files, 'open_write', opened)
    assert mirror.update() == ['a.log']
    assert remote(mirror) == {'a.log': 'one\ntwo\n'}


def test_another_machine_goes_on_where_the_copy_ends(mirror, tmp_path):
    files.write_text(f'{mirror.remote}/scalars.json', '1\n2\n')
    files.write_text(f'{mirror.remote}/other.json', 'x')
    files.write_text(f'{mirror.remote}/old.log', 'x')
    files.write_text(f'{mirror.remote}/iter_3/manifest.json', 'x')
    (tmp_path / 'scalars.json').write_text('1\n')
    (tmp_path / 'other.json').write_text('longer')
    assert mirror.fetch() == ['scalars.json']
    assert (tmp_path / 'scalars.json').read_text() == '1\n2\n'
    assert (tmp_path / 'other.json').read_text() == 'longer'
    assert sorted(path.name for path in tmp_path.iterdir()) == ['other.json', 'scalars.json']


def test_a_failed_copy_is_tried_again(mirror, tmp_path, monkeypatch):
    (tmp_path / 'a.log').write_text('one\n')
    with monkeypatch.context() as patched:
        patched.setenv('AWS_SECRET_ACCESS_KEY', 'wrong')
        with pytest.raises(files.StorageError):
            mirror.update()
    assert mirror.update() == ['a.log']
