from pathlib import Path

import pytest

from lakonlab.ui.digits_demo import DemoState, environment, main, plan_jobs, plan_seed
from lakonlab.ui.digits_report import DATA_FREE, DX_ONE_STEP, ONE_STEP, TEACHER, TWO_STEP

CONFIGS = (ONE_STEP, TWO_STEP)


@pytest.fixture(autouse=True)
def _in_empty_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def finish(state, run, evaluated=True):
    state.begin(run)
    folder = Path('checkpoints', run.name, f'iter_{run.total_iters}')
    folder.mkdir(parents=True)
    folder.joinpath('manifest.json').touch()
    state.record(run, 'train', True, 10.0)
    if evaluated:
        Path('work_dirs', run.name).mkdir(parents=True)
        Path('work_dirs', run.name, 'results.json').touch()
        state.record(run, 'test', True, 1.0)


def begun(runs, path='state.json'):
    state = DemoState(Path(path))
    for run in runs:
        state.begin(run)
    return state


def test_commands_are_what_a_user_would_type():
    teacher, student, _ = plan_seed(2021, CONFIGS)
    assert teacher.name == TEACHER
    assert teacher.train[0] == 'python'
    assert teacher.train[1].endswith('tools/train.py')
    assert teacher.train[2].endswith('configs/digits/dit_digits_teacher.py')
    assert teacher.train[3:] == ('--seed', '2021')
    assert student.test[3:] == ('--ckpt', f'checkpoints/{ONE_STEP}/latest', '--seed', '2021')


def test_other_seeds_have_their_own_names_and_teacher():
    teacher, student, _ = plan_seed(2022, CONFIGS)
    assert teacher.name == f'{TEACHER}_seed2022'
    assert f'name={ONE_STEP}_seed2022' in student.options
    assert f'model.teacher.denoising.pretrained=checkpoints/{TEACHER}_seed2022/latest' in student.options
    assert f'model.diffusion.denoising.pretrained=checkpoints/{TEACHER}_seed2022/latest' in student.options


def test_fingerprint_covers_config_seed_and_teacher():
    plain = plan_seed(2021, CONFIGS)
    assert plain == plan_seed(2021, CONFIGS)
    assert len({run.fingerprint for run in plain}) == 3
    for changed in (plan_seed(2022, CONFIGS), plan_seed(2021, CONFIGS, ['optimizer.diffusion.lr=0.001'])):
        assert all(a.fingerprint != b.fingerprint for a, b in zip(plain, changed, strict=True))


def test_jobs_wait_for_what_they_need():
    runs = plan_seed(2021, (ONE_STEP, TWO_STEP, DX_ONE_STEP, DATA_FREE))
    jobs, meaning = plan_jobs(runs, begun(runs))
    after = {job.name: job.after for job in jobs}
    assert jobs[0].name == 'teacher train'
    assert after['1-step train'] == after['data-free train'] == ('teacher train',)
    assert after['1-step test'] == ('1-step train',)
    assert len(jobs) == len(meaning) == 10
    names = [job.name for job in jobs]
    assert all(names.index(other) < names.index(name) for name, others in after.items() for other in others)


def test_finished_runs_are_reused():
    runs = plan_seed(2021, CONFIGS)
    state = DemoState(Path('state.json'))
    finish(state, runs[0])
    finish(state, runs[1], evaluated=False)
    state = DemoState(Path('state.json'))  # as a later run of the demo reads it
    assert state.begin(runs[0]) == 'finished: reused'
    assert state.begin(runs[1]) == 'trained: reused; to be evaluated'
    assert state.begin(runs[2]) == 'to be trained'
    jobs, _ = plan_jobs(runs, state)
    assert [(job.name, job.after) for job in jobs] == [
        ('2-step train', ()),
        ('2-step test', ('2-step train',)),
        ('1-step test', ()),
    ]


def test_interrupted_runs_are_continued_and_times_add_up():
    runs = plan_seed(2021, CONFIGS)
    state = begun(runs)
    state.record(runs[0], 'train', False, 5.0)
    Path('checkpoints', runs[0].name).mkdir(parents=True)
    state = DemoState(Path('state.json'))
    assert state.begin(runs[0]) == 'begun: to be continued'
    state.record(runs[0], 'train', True, 7.0)
    assert state.runs[runs[0].name]['seconds'] == {'train': 12.0}


def test_results_of_other_settings_are_set_aside_not_deleted():
    old = plan_seed(2021, CONFIGS, ['total_iters=10'])[0]
    state = DemoState(Path('state.json'))
    finish(state, old)
    new = plan_seed(2021, CONFIGS)[0]
    assert 'moved to' in state.begin(new)
    assert not Path('checkpoints', TEACHER).exists()
    (kept,) = Path('checkpoints').iterdir()
    assert (kept / 'iter_10' / 'manifest.json').is_file()
    assert not state.is_trained(new)


def test_results_that_the_demo_did_not_make_are_set_aside():
    run = plan_seed(2021, CONFIGS)[0]
    Path('work_dirs', run.name).mkdir(parents=True)
    assert 'moved to' in DemoState(Path('state.json')).begin(run)


def test_threads_can_be_chosen(monkeypatch):
    monkeypatch.delenv('OMP_NUM_THREADS', raising=False)
    monkeypatch.delenv('MKL_NUM_THREADS', raising=False)
    assert environment()['OMP_NUM_THREADS'] == '1'
    monkeypatch.setenv('OMP_NUM_THREADS', '4')
    assert environment()['OMP_NUM_THREADS'] == environment()['MKL_NUM_THREADS'] == '4'


def test_number_of_seeds_is_checked(capsys):
    with pytest.raises(SystemExit):
        main(['--seeds', '0'])
    assert '--seeds must be at least 1' in capsys.readouterr().err
