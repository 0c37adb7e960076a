"""The commands as a user meets them: help at once, a dry run that writes nothing, errors without a traceback."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest

from lakonlab.config.errors import ConfigError
from lakonlab.config.load import load_config
from lakonlab.runner import launch
from lakonlab.runner.dry_run import build_on_meta, count_parameters

ROOT = Path(__file__).parents[2]
TEACHER = ROOT / 'configs' / 'digits' / 'dit_digits_teacher.py'
STUDENT = ROOT / 'configs' / 'digits' / 'gmdit_k8_digits_piid_1step.py'
SMALL = [
    'total_iters=2',
    'data.train_dataloader.samples_per_gpu=4',
    'data.val.num_test_images=12',
    'log_config.interval=1',
]


def arguments(config, **values) -> Namespace:
    """What the parsers of both tools give, with defaults."""
    defaults = {
        'work_dir': None,
        'resume_from': None,
        'no_validate': True,
        'seed': None,
        'diff_seed': False,
        'deterministic': False,
        'cfg_options': SMALL,
        'launcher': 'none',
        'dry_run': False,
        'ckpt': None,
        'data': None,
        'skip_existing': False,
        'reuse_viz': False,
        'timer': False,
    }
    return Namespace(config=str(config), **{**defaults, **values})


@pytest.fixture
def in_tmp(tmp_path, monkeypatch):
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize('tool', ['train', 'test'])
def test_help_is_instant(tool):
    command = [sys.executable, str(ROOT / 'tools' / f'{tool}.py'), '--help']
    times = []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        times.append(time.perf_counter() - start)
    assert '--cfg-options' in done.stdout
    assert min(times) < 1


def test_help_imports_nothing_heavy():
    code = (
        "import runpy, sys; sys.argv = ['train.py', '--help']\n"
        f"try: runpy.run_path({str(ROOT / 'tools' / 'train.py')!r}, run_name='__main__')\n"
        'except SystemExit: pass\n'
        "sys.exit(any(name in sys.modules for name in ('torch', 'mmengine', 'numpy')))"
    )
    assert subprocess.run([sys.executable, '-c', code], capture_output=True).returncode == 0


def test_dry_run_writes_nothing(in_tmp, capsys):
    assert launch.run_command(launch.train, arguments(TEACHER, dry_run=True, seed=5)) == 0
    output = capsys.readouterr().out
    assert list(in_tmp.iterdir()) == []
    for text in (
        'diffusion.denoising',
        'micro-batches',
        'work_dirs/dit_digits_teacher',
        'seed 5',
        'optimizer',
        'epochs',
    ):
        assert text in output


def test_dry_run_says_what_is_missing(in_tmp, capsys):
    assert launch.run_command(launch.train, arguments(STUDENT, dry_run=True)) == 0
    output = capsys.readouterr().out
    assert 'cannot start yet' in output
    assert 'model.teacher.denoising.pretrained' in output
    assert 'diffusion_ema.denoising' in output
    assert list(in_tmp.iterdir()) == []


def test_dry_run_says_which_references_are_missing(in_tmp, capsys):
    (in_tmp / 'here.npz').touch()
    metrics = [{'type': 'InceptionMetrics', 'reference': name} for name in ('here.npz', 'gone.npz', 's3://b/far.pkl')]
    options = [f'evaluation.0.metrics={metrics}', 'model.inference_only=True']
    planned = arguments(TEACHER, dry_run=True, ckpt=None, data=['val'], reuse_viz=False, cfg_options=options)
    assert launch.run_command(launch.test, planned) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert [line for line in lines if line.startswith('reference  ')] == [
        'reference     here.npz',
        'reference     gone.npz, MISSING',
        'reference     s3://b/far.pkl',
    ]
    assert lines[-1] == 'This evaluation cannot start yet: there is no gone.npz.'


def test_missing_weights_stop_a_run_before_it_writes(in_tmp, capsys):
    assert launch.run_command(launch.train, arguments(STUDENT)) == 1
    assert 'checkpoints/dit_digits_teacher' in capsys.readouterr().err
    assert list(in_tmp.iterdir()) == []


@pytest.mark.parametrize(
    ('values', 'message'),
    [
        ({'cfg_options': ['train_cfg.prob_clas=0.5']}, 'train_cfg.prob_clas'),
        ({'cfg_options': ['total_iters']}, 'key=value'),
        ({'resume_from': 'checkpoints/absent/iter_3'}, 'checkpoints/absent/iter_3'),
        ({'config': 'absent.py'}, 'absent.py'),
        ({'work_dir': 'https://host/run'}, "work_dir_mirror: 'https://host/run': https:// cannot be written"),
        ({'cfg_options': ['checkpoint_config.out_dir=gs://bucket']}, "checkpoint_config.out_dir: 'gs://bucket': gs://"),
        ({'cfg_options': ['evaluation.0.viz_dir=http://host/x']}, 'http:// cannot be written'),
        ({'resume_from': 'https://host/run/latest'}, "--resume-from: 'https://host/run/latest': https:// cannot be li"),
        ({'cfg_options': ['model.diffusion.denoising.patch_size=3']}, 'patch_size'),
    ],
)
def test_errors_of_training_are_plain(in_tmp, capsys, values, message):
    args = arguments(TEACHER)
    vars(args).update(values)
    assert launch.run_command(launch.train, args) == 1
    error = capsys.readouterr().err
    assert message in error
    assert 'Traceback' not in error
    assert not (in_tmp / 's3:').exists()


@pytest.mark.parametrize(
    ('values', 'message'),
    [
        ({'ckpt': 'checkpoints/absent/latest'}, 'checkpoints/absent/latest'),
        ({'ckpt': 'gs://bucket/run'}, "--ckpt: 'gs://bucket/run': gs:// cannot be read or listed"),
        ({'data': ['vla']}, "did you mean 'val'"),
        ({'reuse_viz': True, 'timer': True}, '--reuse-viz with --timer'),
        ({}, 'checkpoints/dit_digits_teacher holds none'),
        ({'cfg_options': ['evaluation=[]']}, 'evaluation=[]: nothing to evaluate'),
        (
            {'cfg_options': [*SMALL, 'model.inference_only=True', 'evaluation.0.reference_kwargs=None']},
            'evaluation.0: ReferenceRMSE compares with reference samples, but reference_kwargs is not set',
        ),
    ],
)
def test_errors_of_testing_are_plain(in_tmp, capsys, values, message):
    assert launch.run_command(launch.test, arguments(TEACHER, **values)) == 1
    error = capsys.readouterr().err
    assert message in error
    assert 'Traceback' not in error
    assert not list(in_tmp.rglob('results.json'))


def test_a_work_dir_without_permission(in_tmp, capsys):
    (in_tmp / 'file').write_text('in the way')
    assert launch.run_command(launch.train, arguments(TEACHER, work_dir='file/run')) == 1
    assert 'file' in capsys.readouterr().err


@pytest.mark.parametrize(
    ('given', 'configured', 'expected'), [(None, None, 2021), (None, 7, 7), (3, 7, 3), (None, 0, 0), (0, 7, 0)]
)
def test_seed(in_tmp, capsys, given, configured, expected):
    options = [*SMALL, f'seed={configured}']
    launch.train(arguments(TEACHER, dry_run=True, seed=given, cfg_options=options))
    assert f'seed {expected}\n' in capsys.readouterr().out


def test_train_then_test(in_tmp, capsys):
    assert launch.run_command(launch.train, arguments(TEACHER, work_dir='work_dirs/here')) == 0
    dumped = in_tmp / 'work_dirs' / 'here' / TEACHER.name
    again = load_config(dumped)
    assert (again.total_iters, again.work_dir, again.seed) == (2, 'work_dirs/here', 2021)

    args = arguments(TEACHER, work_dir='work_dirs/here', data=['val'], timer=True)
    assert launch.run_command(launch.test, args) == 0
    path = in_tmp / 'work_dirs' / 'here' / 'results.json'
    results = json.loads(path.read_text())
    assert results['checkpoint'] == 'checkpoints/here/iter_2'
    assert (results['iteration'], results['seed'], results['name']) == (2, 2021, 'dit_digits_teacher')
    by_prefix = {entry['prefix']: entry for entry in results['evaluations']}
    assert {prefix: entry['nfe'] for prefix, entry in by_prefix.items()} == {
        f'euler{steps}': steps for steps in (1, 2, 4, 8, 32)
    }
    assert all(entry['metrics']['samples_per_second'] > 0 for entry in by_prefix.values())
    assert by_prefix['euler1']['num_samples'] == 12
    assert by_prefix['euler1']['images'] == 'viz/here/val_euler1/iter_2'
    assert {'torch', 'mmengine', 'lakonlab'} <= set(by_prefix['euler1']['made']['versions'])
    assert list((in_tmp / 'work_dirs' / 'here').glob('*_test.log'))

    capsys.readouterr()
    args.skip_existing = True
    assert launch.run_command(launch.test, args) == 0
    assert '5 of 5 evaluations are finished' in capsys.readouterr().out
    assert json.loads(path.read_text())['evaluations'] == results['evaluations']

    args.data = ['val2']
    assert launch.run_command(launch.test, args) == 0
    both = json.loads(path.read_text())['evaluations']
    assert both[:5] == results['evaluations']
    assert [entry['data'] for entry in both[5:]] == ['val2']

    shutil.rmtree(in_tmp / 'checkpoints' / 'here')
    assert launch.run_command(launch.train, arguments(TEACHER, work_dir='work_dirs/here', seed=3)) == 0
    capsys.readouterr()
    assert launch.run_command(launch.test, args) == 0
    assert 'are finished' not in capsys.readouterr().out, 'other weights of the same name'
    again = json.loads(path.read_text())
    assert again['checkpoint'] == results['checkpoint']
    assert again['model_sha256'] != results['model_sha256']
    assert [entry['data'] for entry in again['evaluations']] == ['val2']


def test_dry_run_counts():
    cfg = load_config(TEACHER)
    model = build_on_meta(cfg)
    assert all(parameter.is_meta for parameter in model.parameters())
    rows = {path: (total, trained) for path, total, trained, _ in count_parameters(model, cfg.optimizer)}
    number = sum(parameter.numel() for parameter in model.diffusion.parameters())
    assert rows['diffusion.denoising'] == (number, number)
    assert rows['diffusion_ema.denoising'] == (number, 0)
    assert rows['total'] == (2 * number, number)


def test_teacher_and_student_of_different_shape(in_tmp, capsys):
    assert launch.run_command(launch.train, arguments(TEACHER)) == 0
    capsys.readouterr()
    wider = [*SMALL, 'model.diffusion.denoising.attention_head_dim=8']
    assert launch.run_command(launch.train, arguments(STUDENT, cfg_options=wider)) == 1
    message = capsys.readouterr().err
    assert 'checkpoints/dit_digits_teacher' in message
    assert 'pos_embed.proj.weight' in message
    assert not (in_tmp / 'checkpoints' / STUDENT.stem).exists()


def test_loss_that_is_not_finite_ends_the_run(in_tmp, capsys, monkeypatch):
    monkeypatch.setattr('lakonlab.models.losses.diffusion_mse.DiffusionMSELoss.per_sample', _nan)
    options = [*SMALL, 'total_iters=30', 'runner.max_skipped_iters=3', 'checkpoint_config.interval=1']
    assert launch.run_command(launch.train, arguments(TEACHER, cfg_options=options)) == 1
    message = capsys.readouterr().err
    assert 'loss_diffusion' in message
    assert 'max_skipped_iters' in message
    saved = sorted(path.name for path in (in_tmp / 'checkpoints' / TEACHER.stem).glob('iter_*'))
    assert saved, 'what was saved before stays'


def _nan(self, pred, target):
    return pred.flatten(1).mean(dim=1) * float('nan')


def test_training_and_testing_import_neither_diffusers_models_nor_transformers(tmp_path):
    """They cost ten seconds per process; the whole digits path does without."""
    small = ' '.join([*SMALL, 'data.val_dataloader.samples_per_gpu=12'])
    lines = [
        'import runpy, sys',
        'def run(tool, config, *more):',
        f"    options = ['--cfg-options', *{small!r}.split()]",
        f"    sys.argv = [tool, f'{ROOT}/configs/digits/{{config}}.py', *more, *options]",
        f"    try: runpy.run_path(f'{ROOT}/tools/{{tool}}.py', run_name='__main__')",
        '    except SystemExit as stop: assert not stop.code, (tool, config)',
        f"run('train', '{TEACHER.stem}', '--no-validate')",
        f"run('train', '{STUDENT.stem}', '--no-validate')",
        f"run('test', '{STUDENT.stem}')",
        "heavy = ('transformers', 'peft', 'diffusers.models', 'diffusers.pipelines')",
        "print('HEAVY', [name for name in sys.modules if name.startswith(heavy)])",
    ]
    environment = {**os.environ, 'OMP_NUM_THREADS': '1'}
    done = subprocess.run(
        [sys.executable, '-c', '\n'.join(lines)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert 'HEAVY []' in done.stdout


def test_values_refused_in_use_are_plain(in_tmp, capsys, monkeypatch):
    def refuse(self, *args, **kwargs):
        raise ValueError('train_cfg.some_key=3: expected 4')

    monkeypatch.setattr('lakonlab.models.losses.diffusion_mse.DiffusionMSELoss.per_sample', refuse)
    assert launch.run_command(launch.train, arguments(TEACHER)) == 1
    assert capsys.readouterr().err.endswith('error: train_cfg.some_key=3: expected 4\n')


def test_errors_after_the_first_iteration_keep_their_traceback(in_tmp, monkeypatch):
    def refuse(self, runner, batch_idx, **kwargs):
        if batch_idx == 1:
            raise ValueError('a defect')

    monkeypatch.setattr('lakonlab.runner.log.ThroughputHook.after_train_iter', refuse)
    with pytest.raises(ValueError, match='a defect') as error:
        launch.run_command(launch.train, arguments(TEACHER))
    assert not isinstance(error.value, ConfigError)


@pytest.mark.parametrize(
    'options', [['model.inference_only=True'], ['model.diffusion.denoising.pretrained=checkpoints/dit_digits_teacher']]
)
def test_weights_without_a_checkpoint_of_the_run(in_tmp, capsys, options):
    if 'pretrained' in options[0]:
        assert launch.run_command(launch.train, arguments(TEACHER)) == 0
    args = arguments(TEACHER, work_dir='work_dirs/other', data=['val2'], cfg_options=[*SMALL, *options])
    capsys.readouterr()
    assert launch.run_command(launch.test, args) == 0
    output = capsys.readouterr().out
    assert 'no checkpoint is loaded' in output
    assert options[0].split('=')[0] in output
    results = json.loads((in_tmp / 'work_dirs' / 'other' / 'results.json').read_text())
    assert len(results['pretrained']) == ('pretrained' in options[0])
    assert all(results['pretrained'].values())
