"""Processes of one run that do not do the same, or of which one does nothing any more."""

import time

import pytest
import torch

from lakonlab.mmengine_parts import Hook
from lakonlab.registry import HOOKS
from lakonlab.runner.watchdog import HUNG_EXIT_CODE
from tests import processes
from tests.processes import ProcessFailedError, run_processes, workers  # noqa: F401
from tests.runner import small_run


@HOOKS.register_module()
class Disturbance(Hook):
    """Lets the second process drift or fall asleep in the third iteration."""

    def __init__(self, what):
        self.what = what

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.rank == 0 or runner.iter != 2:
            return
        if self.what == 'learning rate':
            runner.optimizers['diffusion'].param_groups[0]['initial_lr'] *= 2
        elif self.what == 'seed':
            runner.seed += 1
        elif self.what == 'data set':
            runner.dataset = torch.utils.data.Subset(runner.dataset, range(5))
        elif self.what == 'sleep':
            fall_asleep()


def fall_asleep():
    time.sleep(600)


def attempt(ranks, folder, own=None, **changes):
    """Train; the second process with changes of its own. Returns the error."""
    try:
        small_run.train(ranks, folder, **changes, **((own or {}) if ranks.rank else {}))
    except Exception as error:
        return f'{type(error).__name__}: {error}'


@pytest.mark.parametrize(
    ('key', 'value', 'difference'),
    [
        ('optimizer__diffusion__lr', 2e-3, 'optimizer.diffusion.lr is 0.001 on rank 0, 0.002 on rank 1'),
        ('data__train_dataloader__samples_per_gpu', 1, 'samples_per_gpu is 2 on rank 0, 1 on rank 1'),
        ('module_wrapper', 'ddp', "module_wrapper is 'fsdp2' on rank 0, 'ddp' on rank 1"),
        ('model__diffusion__denoising__num_layers', 1, 'denoising.num_layers is 2 on rank 0, 1 on rank 1'),
        ('checkpoint_config__interval', 3, 'checkpoint_config.interval is 2 on rank 0, 3 on rank 1'),
        ('seed', 7, 'seed is 2021 on rank 0, 7 on rank 1'),
    ],
)
def test_different_configs(workers, tmp_path, key, value, difference):  # noqa: F811
    """Found before anything is built in which processes would wait for each other."""
    for error in workers.run(attempt, tmp_path, {key: value}, timeout=30):
        assert error.startswith('DisagreementError: the processes of this run differ at launch: ')
        assert difference in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ('what', 'difference'),
    [
        ('learning rate', 'learning rates is [0.000775'),
        ('seed', "data is {'seed': 2021"),
        ('data set', "'dataset_size': 5"),
    ],
)
def test_drift_is_found_at_the_next_checkpoint(workers, tmp_path, what, difference):  # noqa: F811
    hooks = [dict(type='Disturbance', what=what)]
    for error in workers.run(attempt, tmp_path, custom_hooks=hooks, timeout=30):
        assert error.startswith('DisagreementError: the processes of this run differ at the checkpoint of iteration 4')
        assert difference in error
    assert small_run.steps(tmp_path) == [2]


@pytest.mark.parametrize('strategy', ['fsdp2', pytest.param('ddp', marks=pytest.mark.slow)])
def test_a_process_that_falls_asleep(tmp_path, monkeypatch, strategy):
    monkeypatch.setattr(processes, 'GRACE_SECONDS', 30.0)
    hooks = [dict(type='Disturbance', what='sleep')]
    with pytest.raises(ProcessFailedError) as ended:
        run_processes(attempt, 2, tmp_path, strategy=strategy, custom_hooks=hooks, runner__watchdog_seconds=1)
    assert str(ended.value).count(f'exit code {HUNG_EXIT_CODE}') == 2
    (log,) = (tmp_path / 'work_dirs' / 'small').glob('*.log')
    report = log.read_text()
    assert report.count('the run hangs') == 1
    assert "without progress in phase 'student' of iteration 3" in report
    assert 'rank 1: ' in report
    stacks = [(tmp_path / 'work_dirs' / 'small' / f'stacks_rank{rank}.txt').read_text() for rank in range(2)]
    assert 'in train_step' in stacks[0]
    assert 'in fall_asleep' in stacks[1]
    assert small_run.steps(tmp_path) == [2]


EVALUATED = dict(
    data__val=dict(type='SmallImages', size=5, key='noise'),
    data__val_dataloader=dict(samples_per_gpu=2),
    evaluation=[dict(type='GenerativeEvalHook', interval=2, viz_dir='viz', metrics=[])],
)


def test_uneven_evaluation(workers, tmp_path):  # noqa: F811
    """Five samples in batches of two: one process has two batches, the other one, and the networks are divided."""
    folders = [tmp_path / name for name in ('evaluated', 'not_evaluated')]
    for folder, changes in zip(folders, (EVALUATED, {})):
        folder.mkdir()
        assert workers.run(small_run.train, folder, timeout=60, **changes) == [0, 0]
    for iteration in (2, 4, 6, 8):
        assert len(list((folders[0] / 'viz' / str(iteration)).glob('*.png'))) >= 5
    small_run.assert_same_run(*folders)
