"""The copy of a run's logs while it trains."""

import logging

import pytest
from mmengine.config import Config

from lakonlab.ranks import Ranks
from lakonlab.runner.guard import SkipGuard, TrainingDivergedError
from lakonlab.runner.hooks.mirror import mirroring
from lakonlab.storage import files
from lakonlab.storage.errors import StorageError
from lakonlab.storage.local import DirectoryInUseError
from lakonlab.storage.mirror import Mirror
from tests.runner.tiny import make_runner


@pytest.fixture
def where(bucket):
    return f'{bucket}/logs'


def runner_of(folder, where, max_iters=10, **changes):
    return make_runner(folder, max_iters=max_iters, cfg=Config(dict(work_dir_mirror=where)), **changes)


def assert_same(folder, where):
    local = {info.name: info.size for info in files.list_files(folder / 'work_dirs' / 'tiny')}
    assert {info.name: info.size for info in files.list_files(where)} == local
    for name in local:
        assert files.read_bytes(f'{where}/{name}') == (folder / 'work_dirs' / 'tiny' / name).read_bytes()


class Failing:
    """In place of ``Mirror.update``: fails at some of its calls."""

    def __init__(self, at):
        self.at, self.calls, self.update = at, 0, Mirror.update

    def __call__(self, mirror):
        self.calls += 1
        if self.at(self.calls):
            raise StorageError('the server is on fire')
        return self.update(mirror)


def failing(monkeypatch, at):
    failing = Failing(at)
    monkeypatch.setattr(Mirror, 'update', lambda mirror: failing(mirror))
    return failing


def test_it_is_complete_at_the_end(tmp_path, where):
    runner_of(tmp_path, where).train()
    assert_same(tmp_path, where)


def test_a_failure_is_reported_and_made_up_for(tmp_path, where, monkeypatch, caplog):
    calls = failing(monkeypatch, lambda number: number == 1)
    runner_of(tmp_path, where).train()
    errors = [record.message for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 1
    assert 'the server is on fire' in errors[0]
    assert f'{where} is not up to date' in errors[0]
    assert calls.calls >= 2
    assert_same(tmp_path, where)


def test_a_failure_at_the_end_fails_the_run_which_is_saved(tmp_path, where, monkeypatch):
    failing(monkeypatch, lambda number: True)
    with pytest.raises(StorageError, match='on fire'):
        runner_of(tmp_path, where).train()
    assert (tmp_path / 'checkpoints' / 'tiny' / 'iter_10' / 'manifest.json').exists()


def test_it_hides_no_other_failure(tmp_path, where, monkeypatch, caplog):
    failing(monkeypatch, lambda number: True)
    with pytest.raises(TrainingDivergedError):
        runner_of(tmp_path, where, nan_at=range(3, 10), guard=SkipGuard(2)).train()
    assert f'{where} is not complete: the server is on fire' in caplog.text


def test_a_mirror_that_cannot_be_reached_ends_a_run_before_it_begins(tmp_path):
    with pytest.raises(OSError, match='https:// cannot be listed'):
        runner_of(tmp_path, 'https://host/logs').train()
    assert not (tmp_path / 'checkpoints' / 'tiny' / 'iter_5').exists()


class Second(Ranks):
    """What the second process of two is told of what the main one did."""

    def on_main(self, function):
        raise StorageError('the server of the main process is on fire')


def test_all_processes_learn_that_it_cannot_be_begun():
    with pytest.raises(StorageError, match='of the main process'), mirroring(None, Second(1, 2)):
        pass


def test_a_run_that_is_refused_leaves_the_copy_of_the_other_alone(tmp_path, where):
    """Both copy to the same place, and only one of them holds the directory of the checkpoints."""
    runner = runner_of(tmp_path, where, max_iters=5)
    runner.train()
    before = {info.name: files.read_bytes(f'{where}/{info.name}') for info in files.list_files(where)}
    (tmp_path / 'work_dirs' / 'tiny' / 'scalars.json').write_text('of another run')

    def refuse(stack):
        raise DirectoryInUseError('in use by another run')

    second = runner_of(tmp_path, where)
    second._hold_checkpoint_dir = refuse
    with pytest.raises(DirectoryInUseError):
        second.train()
    assert {info.name: files.read_bytes(f'{where}/{info.name}') for info in files.list_files(where)} == before
