"""Damaged checkpoints and unusable directories under two processes: the right error once, and nothing is lost."""

import json
import logging
import os
import re
import shutil

import pytest

from lakonlab.ranks import is_reported_by_main
from tests.processes import workers  # noqa: F401
from tests.runner import small_run
from tests.storage.test_interrupted_save import is_complete


def attempt(ranks, folder, elsewhere=False, **changes):
    """Train as one process.

    Args:
        ranks: The processes.
        folder: Working directory.
        elsewhere: Whether the second process has one of its own, in it.
        **changes: Of the config.

    Returns:
        First iteration, or the error; whether it is for the main process to report; warnings.
    """
    if elsewhere and not ranks.is_main:
        folder = folder / 'other'
        folder.mkdir(exist_ok=True)
    warnings = []
    handler = logging.Handler('WARNING')
    handler.emit = lambda record: warnings.append(record.getMessage())
    logging.getLogger('lakonlab').addHandler(handler)
    try:
        return small_run.train(ranks, folder, **changes), None, warnings
    except Exception as error:
        return f'{type(error).__name__}: {error}', is_reported_by_main(error), warnings
    finally:
        logging.getLogger('lakonlab').removeHandler(handler)


def content(folder):
    """Every file below a folder, byte for byte."""
    files = (path for path in folder.rglob('*') if path.is_file() and path.name != '.lock')
    return {path.relative_to(folder): path.read_bytes() for path in files}


@pytest.fixture(scope='module')
def runs(workers, tmp_path_factory):  # noqa: F811
    """A run after iteration 6, with checkpoints 4 and 6, and the same run at its end."""
    start, whole = tmp_path_factory.mktemp('start'), tmp_path_factory.mktemp('whole')
    workers.run(small_run.train, start, total_iters=6)
    workers.run(small_run.train, whole)
    return start, whole


@pytest.fixture
def folder(runs, tmp_path):
    """A copy of the run after iteration 6."""
    shutil.copytree(runs[0], tmp_path / 'run')
    return tmp_path / 'run'


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def wrong_checksum(path):
    manifest = json.loads(path.read_text())
    manifest['files']['optimizer/rank_00001_00001.safetensors']['sha256'] = '0' * 64
    path.write_text(json.dumps(manifest))


DAMAGES = {
    'shard of a process changed': ('model/rank_00001_00001.safetensors', flip, 'is damaged: its checksum'),
    'shard missing': ('optimizer/rank_00001_00001.safetensors', os.unlink, 'is missing'),
    'shard cut': ('model/rank_00000_00001.safetensors', lambda path: os.truncate(path, 100), 'has 100 bytes'),
    'manifest cut': ('manifest.json', lambda path: os.truncate(path, 500), 'manifest.json is damaged'),
    'manifest missing': ('manifest.json', os.unlink, 'has no manifest.json'),
    'wrong checksum': ('manifest.json', wrong_checksum, 'optimizer/rank_00001_00001.safetensors is damaged'),
}


@pytest.mark.parametrize('damage', DAMAGES)
def test_damaged_checkpoint(workers, runs, folder, damage):  # noqa: F811
    name, spoil, message = DAMAGES[damage]
    newest, older = (small_run.checkpoints(folder) / f'iter_{step}' for step in (6, 4))
    spoil(newest / name)
    spoilt = content(newest)

    # named by the user, it is no choice of ours to take another one
    for first, _, warnings in workers.run(attempt, folder, resume_from=str(newest.relative_to(folder))):
        assert first.startswith('CheckpointError: '), first
        assert message in first
        assert 'iter_6' in first
        assert not warnings
    assert content(newest) == spoilt
    assert is_complete(older)

    main, other = workers.run(attempt, folder)
    assert (main[0], other[0]) == (4, 4)
    fallback = [line for line in main[2] if 'falling back to' in line]
    assert len(fallback) == 1
    assert message in fallback[0]
    assert 'iter_6' in fallback[0]
    assert fallback[0].endswith('falling back to checkpoints/small/iter_4')
    assert any('was set aside as damaged_iter_6.0' in line for line in main[2])
    assert not other[2]
    assert content(small_run.checkpoints(folder) / 'damaged_iter_6.0') == spoilt
    small_run.assert_same_run(folder, runs[1])


def test_all_checkpoints_damaged(workers, folder):  # noqa: F811
    for step in (4, 6):
        flip(small_run.checkpoints(folder) / f'iter_{step}' / 'model' / 'rank_00001_00001.safetensors')
    before = content(small_run.checkpoints(folder))
    errors = workers.run(attempt, folder)
    assert [reported for _, reported, _ in errors] == [False, True]
    for error, _, _ in errors:
        assert error.startswith('CheckpointError: none of the 2 checkpoints in checkpoints/small is valid')
        assert 'iter_4/model/rank_00001_00001.safetensors' in error
        assert 'iter_6/model/rank_00001_00001.safetensors' in error
    assert content(small_run.checkpoints(folder)) == before


def test_directory_that_other_nodes_do_not_see(workers, folder):  # noqa: F811
    before = content(small_run.checkpoints(folder))
    errors = workers.run(attempt, folder, elsewhere=True)
    assert [reported for _, reported, _ in errors] == [False, True]
    for error, _, _ in errors:
        assert 'checkpoints/small is not seen by' in error
        assert 'checkpoint_config.out_dir must be on a file system that all nodes share' in error
    assert content(small_run.checkpoints(folder)) == before


@pytest.mark.parametrize('there', ['nothing', 'another one'])
@pytest.mark.parametrize('key', ['resume_from', 'load_from'])
def test_checkpoint_that_other_nodes_do_not_see(workers, folder, key, there):  # noqa: F811
    """The directory of the run is shared, but not the one of the checkpoint that it starts from."""
    shutil.move(small_run.checkpoints(folder) / 'iter_6', folder / 'source')
    if there == 'another one':
        shutil.copytree(small_run.checkpoints(folder) / 'iter_4', folder / 'other' / 'source')
    shared = str(folder / 'fresh')
    errors = workers.run(
        attempt,
        folder,
        elsewhere=True,
        work_dir=f'{shared}/small',
        checkpoint_config__out_dir=f'{shared}/checkpoints',
        **{key: 'source'},
    )
    assert [reported for _, reported, _ in errors] == [False, True]
    for error, _, _ in errors:
        assert error.startswith('CheckpointError: ')
        assert 'does not see the checkpoint source as the main process does' in error
        assert ('it is another one' if there == 'another one' else 'manifest.json') in error


@pytest.mark.parametrize(
    ('place', 'message'),
    [
        ('checkpoints', r'cannot write to checkpoints/small .*checkpoint_config\.out_dir'),
        ('work_dirs', r'cannot write to work_dirs/small .*work_dir'),
    ],
)
def test_unwritable_directory(workers, tmp_path, place, message):  # noqa: F811
    """A file stands where the directory should be: not even root can write below it."""
    (tmp_path / place).touch()
    errors = workers.run(attempt, tmp_path)
    assert [reported for _, reported, _ in errors] == [False, True]
    for error, _, _ in errors:
        assert re.search(message, error)


def be_late(ranks, folder, appearing):
    """A run that has chosen to start anew, when the end of an earlier one publishes a checkpoint; returns the error."""
    with small_run.small_runner(ranks, folder) as runner:
        if ranks.is_main:
            runner.checkpoint_dir.mkdir(parents=True)
            shutil.copytree(appearing, runner.checkpoint_dir / appearing.name)
        try:
            runner.train()
        except Exception as error:
            return str(error)


def test_checkpoint_that_appears_after_the_choice(workers, runs, tmp_path):  # noqa: F811
    appearing = small_run.checkpoints(runs[0]) / 'iter_6'
    for error in workers.run(be_late, tmp_path, appearing):
        assert error == 'checkpoints/small/iter_6 was saved by another process meanwhile; run the same command again'
    assert workers.run(small_run.train, tmp_path) == [6, 6]
    assert small_run.result(tmp_path) == small_run.result(runs[1])
