"""Requests to stop a run of two processes: all of them save the same iteration and leave, whoever was asked."""

import os
import signal
import time

import pytest

from lakonlab.mmengine_parts import Hook
from lakonlab.registry import HOOKS
from lakonlab.storage.checkpoint import read_state, verify
from tests import processes
from tests.processes import ProcessFailedError, run_processes, workers  # noqa: F401
from tests.runner import small_run
from tests.runner.test_crash import writers_of

WORKERS = dict(data__workers_per_gpu=2, data__persistent_workers=True)
IN_BACKGROUND = dict(checkpoint_config__asynchronous=True)


@HOOKS.register_module()
class Signals(Hook):
    """Sends signals to a process of the run.

    Args:
        number: The signal.
        rank: The process.
        at: Completed iterations, or 'start' for before the first one; noticed before the next iteration.
        times: How many signals.
        to_group: Whether the other processes that it has started get it, too.
    """

    priority = 'VERY_HIGH'

    def __init__(self, number, rank, at, times=1, to_group=False):
        self.number, self.rank, self.at, self.times, self.to_group = number, rank, at, times, to_group

    def send(self, runner):
        if runner.rank == self.rank:
            for _ in range(self.times):
                os.killpg(0, self.number) if self.to_group else os.kill(os.getpid(), self.number)
                time.sleep(0.01)

    def before_train(self, runner):
        if self.at == 'start':
            self.send(runner)

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if self.at == runner.iter:
            self.send(runner)


def train(ranks, folder, **changes):
    """Train; returns the exit status."""
    with small_run.small_runner(ranks, folder, **changes) as runner:
        try:
            runner.train()
        except SystemExit as stopped:
            assert writers_of(os.getpid()) == []
            return stopped.code
    return 0


@pytest.fixture(scope='module')
def whole(workers, tmp_path_factory):  # noqa: F811
    """The run that nobody stops."""
    folder = tmp_path_factory.mktemp('whole')
    workers.run(small_run.train, folder)
    return folder


@pytest.mark.parametrize(
    ('request_', 'statuses', 'step', 'changes'),
    [
        (dict(number=signal.SIGTERM, rank=1, at=2), [143, 143], 4, IN_BACKGROUND),
        (dict(number=signal.SIGINT, rank=0, at=1), [130, 143], 3, {}),
        (dict(number=signal.SIGINT, rank=1, at='start'), [143, 130], 1, {}),
        (dict(number=signal.SIGTERM, rank=0, at=3, to_group=True), [143, 143], 5, {**IN_BACKGROUND, **WORKERS}),
    ],
)
def test_one_is_asked_and_all_stop(workers, whole, tmp_path, request_, statuses, step, changes):  # noqa: F811
    ema = small_run.config()['custom_hooks']
    hooks = [*ema, dict(type='Signals', **request_)]
    assert workers.run(train, tmp_path, custom_hooks=hooks, timeout=60, **changes) == statuses
    assert max(small_run.steps(tmp_path)) == step
    assert workers.run(small_run.train, tmp_path) == [step, step]
    small_run.assert_same_run(tmp_path, whole)


def evaluated(rung, time=1):
    """Changes of the config: evaluations after iterations 3, 6 and 9."""
    entry = dict(
        type='GenerativeEvalHook',
        data='val',
        interval=3,
        viz_num=0,
        metrics=[dict(type='ReferenceRMSE')],
        reference_kwargs=dict(role='teacher', test_cfg_override=dict(num_timesteps=2)),
        save_best_ckpt=True,
    )
    return dict(
        total_iters=9,
        evaluation=[entry],
        data__val=dict(type='AlarmingNoise', size=11, alarming=6, time=time, rung=str(rung)),
        data__val_dataloader=dict(samples_per_gpu=2),
    )


@pytest.mark.parametrize('at', [3, 9])
def test_an_evaluation_is_given_up_and_made_up_for(workers, tmp_path, at):  # noqa: F811
    """Where it is only made when the run goes on, everything is as if the run had not been stopped."""
    stopped, whole, rung = tmp_path / 'stopped', tmp_path / 'whole', tmp_path / 'rung'
    stopped.mkdir()
    whole.mkdir()
    rung.touch()
    workers.run(small_run.train, whole, **evaluated(rung))
    rung.unlink()
    changes = evaluated(rung, at // 3)
    assert workers.run(train, stopped, timeout=60, **changes) == [143, 143]
    assert max(small_run.steps(stopped)) == at
    assert workers.run(small_run.train, stopped, **changes) == [at, at]
    small_run.assert_same_run(stopped, whole)
    best = 'best_val_reference_rmse'
    states = [read_state(small_run.checkpoints(folder) / best) for folder in (stopped, whole)]
    assert states[0]['iteration'] == states[1]['iteration']
    assert states[0]['hooks']['GenerativeEvalHook.0']['best'] == states[1]['hooks']['GenerativeEvalHook.0']['best']
    verify(small_run.checkpoints(stopped) / best)


def test_twice_is_at_once(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(processes, 'GRACE_SECONDS', 30.0)
    ema = small_run.config()['custom_hooks']
    hooks = [*ema, dict(type='Signals', number=signal.SIGTERM, rank=1, at=3, times=2)]
    with pytest.raises(ProcessFailedError, match=r'rank 1 ---\nThe process ended with exit code 143') as ended:
        run_processes(train, 2, tmp_path, custom_hooks=hooks)
    assert ended.value.rank == 1
    assert small_run.steps(tmp_path) == [2]
    run_processes(small_run.train, 2, tmp_path)
    small_run.assert_same_run(tmp_path, whole)
