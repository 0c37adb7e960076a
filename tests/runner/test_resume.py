"""Where a run starts."""

import shutil

import pytest

from lakonlab.runner.resume import config_differences, find_starting_point, set_aside_later
from lakonlab.storage.checkpoint import CheckpointError, write_checkpoint


def write(run, step):
    return write_checkpoint(run, step, {'model': {}}, {'iteration': step})


@pytest.fixture
def run(tmp_path):
    return tmp_path / 'run'


def test_fresh(run):
    assert find_starting_point(run).mode == 'fresh'


def test_own_newest_without_being_asked(run):
    write(run, 2)
    newest = write(run, 4)
    start = find_starting_point(run)
    assert (start.checkpoint, start.mode) == (newest, 'resume')


def test_own_newest_can_be_ignored(run):
    write(run, 2)
    assert find_starting_point(run, auto_resume=False).mode == 'fresh'


@pytest.mark.parametrize('name', ['latest', 'latest.pth', 'latest.txt', ''])
def test_own_latest_in_the_config_means_if_there_is_one(run, name):
    configured = str(run / name)
    assert find_starting_point(run, configured_resume_from=configured).mode == 'fresh'
    newest = write(run, 4)
    assert find_starting_point(run, configured_resume_from=configured).checkpoint == newest


@pytest.mark.parametrize('option', ['resume_from', 'configured_resume_from', 'load_from'])
def test_named_and_missing_is_an_error(run, tmp_path, option):
    with pytest.raises(CheckpointError, match=r'other.*does not exist'):
        find_starting_point(run, **{option: str(tmp_path / 'other' / 'latest.pth')})


def test_own_latest_named_on_the_command_line_must_exist(run):
    with pytest.raises(CheckpointError, match='does not exist'):
        find_starting_point(run, resume_from=str(run / 'latest.pth'))


def test_weights_only_for_a_run_that_has_no_checkpoint(run, tmp_path):
    other = write(tmp_path / 'other', 9)
    assert find_starting_point(run, load_from=str(other)).mode == 'weights'
    write(run, 2)
    assert find_starting_point(run, load_from=str(other)).mode == 'resume'


def test_command_line_comes_before_config(run, tmp_path):
    first, second = write(tmp_path / 'first', 1), write(tmp_path / 'second', 1)
    start = find_starting_point(run, resume_from=str(first), configured_resume_from=str(second))
    assert start.checkpoint == first


def test_going_back_is_not_done_silently(run):
    old = write(run, 2)
    write(run, 4)
    with pytest.raises(CheckpointError, match='already holds later ones'):
        find_starting_point(run, resume_from=str(old))


def test_checkpoint_that_appeared_meanwhile_is_not_set_aside(run):
    write(run, 2)
    start = find_starting_point(run)
    newer = write(run, 4)
    with pytest.raises(CheckpointError, match='another process'):
        set_aside_later(run, 2)
    assert start.checkpoint.name == 'iter_2'
    assert newer.exists()


def test_damaged_newest(run, caplog):
    old, newest = write(run, 2), write(run, 4)
    (newest / 'state.json').write_text('{}')
    start = find_starting_point(run)
    assert start.checkpoint == old
    assert 'falling back' in caplog.text
    set_aside_later(run, 2)
    assert sorted(path.name for path in run.iterdir()) == ['damaged_iter_4.0', 'iter_2']
    with pytest.raises(CheckpointError, match=r'is missing|does not exist'):
        find_starting_point(run, resume_from=str(newest))


def test_named_origin_survives_an_interruption(run, tmp_path):
    origin = write(tmp_path / 'other', 9)
    first = find_starting_point(run, resume_from=str(origin))
    assert (first.checkpoint, first.named) == (origin, True)
    state = {'iteration': 12, 'started_from': [first.origin()]}
    newest = write_checkpoint(run, 12, {'model': {}}, state)
    for option in ('resume_from', 'configured_resume_from'):
        again = find_starting_point(run, **{option: str(origin)})
        assert (again.checkpoint, again.mode, again.named) == (newest, 'resume', False)
        assert 'descends from' in again.reason
    stranger = write(tmp_path / 'another', 3)
    with pytest.raises(CheckpointError, match='already holds later ones'):
        find_starting_point(run, resume_from=str(stranger))


def test_named_origin_that_is_gone(run, tmp_path):
    origin = write(tmp_path / 'other', 9)
    state = {'iteration': 12, 'started_from': [find_starting_point(run, resume_from=str(origin)).origin()]}
    newest = write_checkpoint(run, 12, {'model': {}}, state)
    shutil.rmtree(origin)
    assert find_starting_point(run, resume_from=f'{origin}.pth').checkpoint == newest


def test_config_differences():
    before = "work_dir = 'a'\nlr = dict(warmup=10, policy='poly')\nhooks = [dict(type='A', x=(1, 2))]\n"
    now = "work_dir = 'b'\nlr = dict(warmup=20, policy='poly')\nhooks = [dict(type='A', x=(1, 3))]\nnew = {'a.b': 1}\n"
    assert config_differences(before, now) == [
        'hooks.0.x: (1, 2) -> (1, 3)',
        'lr.warmup: 10 -> 20',
        'new.a.b: (absent) -> 1',
    ]
    assert config_differences(before, before) == []
    assert 'cannot be compared' in config_differences('a = <object>', now)[0]
    assert len(config_differences('', ''.join(f'a{number} = 1\n' for number in range(30)))) == 21
