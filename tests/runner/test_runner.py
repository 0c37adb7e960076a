"""The loop: exact resume, stopping, failures."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from mmengine.config import Config

from lakonlab.mmengine_parts import Hook
from lakonlab.ranks import ALONE
from lakonlab.registry import HOOKS
from lakonlab.runner.description import describe
from lakonlab.runner.guard import SkipGuard, TrainingDivergedError
from lakonlab.runner.hooks.checkpoint import CheckpointHook
from lakonlab.runner.restore import restore
from lakonlab.storage import local
from lakonlab.storage.checkpoint import CheckpointError, find_checkpoint, read_state, read_tensors
from tests.runner import small_run
from tests.runner.tiny import TinyData, make_runner


class At(Hook):
    """Calls a function after an iteration."""

    priority = 'LOWEST'

    def __init__(self, iteration, action):
        self.iteration, self.action = iteration, action

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter + 1 == self.iteration:
            self.action()


def tensors(folder):
    checkpoint = find_checkpoint(folder / 'checkpoints' / 'tiny')
    return {part: read_tensors(checkpoint, part) for part in ('model', 'optimizer')}, checkpoint


def logged(folder):
    """Iteration -> what was logged, without figures that depend on time; of two entries for one the later counts."""
    lines = (folder / 'work_dirs' / 'tiny' / 'scalars.json').read_text().splitlines()
    keep = ('loss_diffusion', 'lr')
    return {entry['step']: {key: entry[key] for key in keep} for entry in map(json.loads, lines)}


def assert_same(a, b):
    (first, checkpoint), (second, other) = tensors(a), tensors(b)
    assert checkpoint.name == other.name
    for part, expected in first.items():
        assert set(expected) == set(second[part])
        for name, tensor in expected.items():
            assert torch.equal(tensor, second[part][name]), name
    assert logged(a) == logged(b)


@pytest.mark.parametrize('stop_at', [1, 5, 7, 13])
def test_interrupted_run_is_the_same_run(tmp_path, stop_at):
    make_runner(tmp_path / 'a').train()
    stop = At(stop_at, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as stopped:
        make_runner(tmp_path / 'b', hooks=[stop]).train()
    assert stopped.value.code == 143
    resumed = make_runner(tmp_path / 'b')
    assert read_state(resumed.starting_point.checkpoint)['iteration'] == stop_at
    resumed.train()
    assert_same(tmp_path / 'a', tmp_path / 'b')


class Notes(Hook):
    """Keeps which items were read, and in which epoch."""

    def __init__(self):
        self.read = []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.read.append((runner.epoch, list(data_batch['ids'])))


BUCKETS = [0] * 9 + [1] * 11 + [2] * 3


def test_interrupted_run_over_buckets_is_the_same_run(tmp_path):
    def run(folder, *hooks):
        notes = Notes()
        make_runner(folder, hooks=[notes, *hooks], data=TinyData(bucket_ids=BUCKETS)).train()
        return notes.read

    whole = run(tmp_path / 'a')
    with pytest.raises(SystemExit):
        run(tmp_path / 'b', At(7, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    assert run(tmp_path / 'b') == whole[7:]
    assert_same(tmp_path / 'a', tmp_path / 'b')
    assert all(len({BUCKETS[item] for item in items}) == 1 for _, items in whole)
    # batches of 4: 3 + 3 + 1, then 2 + 3 + 1, for the first epoch has read 3, 1 and 1 items ahead; then 2 + 3 + 1
    assert [epoch for epoch, _ in whole] == [0] * 7 + [1] * 6 + [2] * 6 + [3]
    assert {item for epoch, items in whole if epoch == 0 for item in items} == set(range(23))


def test_facts_tell_where_in_the_data_a_run_is(tmp_path):
    runner = make_runner(tmp_path, data=TinyData(bucket_ids=BUCKETS))
    assert [runner.facts(step)['data']['epoch'] for step in (6, 7, 13)] == [0, 1, 2]
    assert runner.facts(7)['data']['position'] == 28
    assert '23 samples in 3 buckets of 3 to 11, global batch 4' in describe(runner)
    other = make_runner(tmp_path, data=TinyData(bucket_ids=BUCKETS[::-1]))
    assert other.facts(7)['data'] != runner.facts(7)['data']


def test_other_buckets_are_another_run(tmp_path):
    make_runner(tmp_path, max_iters=5, data=TinyData(bucket_ids=BUCKETS)).train()
    with pytest.raises(CheckpointError, match=r'buckets is one, it was .* --resume-from'):
        make_runner(tmp_path).train()


def test_crash_loses_only_what_was_not_saved(tmp_path):
    def crash():
        raise RuntimeError('power failure')

    make_runner(tmp_path / 'a').train()
    with pytest.raises(RuntimeError, match='power failure'):
        make_runner(tmp_path / 'b', hooks=[At(13, crash)]).train()
    resumed = make_runner(tmp_path / 'b')
    resumed.train()
    assert resumed.starting_point.checkpoint.name == 'iter_10'
    assert_same(tmp_path / 'a', tmp_path / 'b')


def test_ctrl_c_exits_with_130(tmp_path):
    with pytest.raises(SystemExit) as stopped:
        make_runner(tmp_path, hooks=[At(3, lambda: os.kill(os.getpid(), signal.SIGINT))]).train()
    assert stopped.value.code == 130
    assert find_checkpoint(tmp_path / 'checkpoints' / 'tiny').name == 'iter_3'
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_finished_run_says_so(tmp_path, caplog):
    make_runner(tmp_path).train()
    before = tensors(tmp_path)[1].stat().st_mtime
    with caplog.at_level('INFO'):
        make_runner(tmp_path).train()
    assert 'nothing to train' in caplog.text
    assert tensors(tmp_path)[1].stat().st_mtime == before


def test_saved_state_is_the_training_state(tmp_path):
    make_runner(tmp_path).train()
    saved, checkpoint = tensors(tmp_path)
    roots = {name.split('.')[0] for name in saved['model']}
    assert roots == {'diffusion', 'diffusion_ema'}
    assert saved['model']['diffusion.steps'] == 20
    assert 'diffusion/exp_avg/diffusion.linear.weight' in saved['optimizer']
    assert all(not tensor.is_floating_point() or tensor.dtype == torch.float32 for tensor in saved['model'].values())
    assert [path.name for path in sorted(checkpoint.parent.glob('iter_*'))] == ['iter_15', 'iter_20']


def test_weights_only(tmp_path):
    make_runner(tmp_path / 'a').train()
    source = tmp_path / 'a' / 'checkpoints' / 'tiny' / 'iter_20'
    runner = make_runner(tmp_path / 'b', load_from=str(source))
    restore(runner)
    assert runner.iter == 0
    assert not runner.optimizers['diffusion'].state
    assert torch.equal(runner.model.diffusion.linear.weight, read_tensors(source, 'model')['diffusion.linear.weight'])


def test_checkpoint_of_another_model_is_refused(tmp_path):
    make_runner(tmp_path).train()
    runner = make_runner(tmp_path)
    runner.model.diffusion.extra = torch.nn.Linear(2, 2)
    runner.model.diffusion.linear = torch.nn.Linear(4, 5)
    del runner.model.diffusion._buffers['steps']
    with pytest.raises(CheckpointError) as error:
        runner.train()
    message = str(error.value)
    assert '2 missing from the checkpoint: diffusion.extra.bias, diffusion.extra.weight' in message
    assert '1 in the checkpoint but not in the model: diffusion.steps' in message
    assert 'diffusion.linear.weight (4, 4) in the checkpoint, (5, 4) in the model' in message


def test_failed_save_ends_the_run_and_keeps_what_is_there(tmp_path, monkeypatch):
    make_runner(tmp_path, max_iters=5).train()
    good = find_checkpoint(tmp_path / 'checkpoints' / 'tiny')

    def disk_full(path, text):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(local, 'write_text', disk_full)
    runner = make_runner(tmp_path)
    with pytest.raises(CheckpointError, match='No space left on device'):
        runner.train()
    assert runner.iter == 9
    assert find_checkpoint(good.parent) == good
    assert not list(good.parent.glob('.*tmp*'))


def test_save_that_fails_in_the_background_ends_the_run(tmp_path):
    checkpoint = CheckpointHook(interval=5, out_dir=str(tmp_path / 'checkpoints'))
    folder = tmp_path / 'checkpoints' / 'tiny'

    def break_directory():
        checkpoint._writer.wait()
        folder.rename(tmp_path / 'elsewhere')
        folder.touch()

    def wait_for_failure():
        while not checkpoint._writer.has_failed():
            time.sleep(0.01)

    runner = make_runner(tmp_path, checkpoint=checkpoint, hooks=[At(8, break_directory), At(12, wait_for_failure)])
    with pytest.raises(CheckpointError, match=r'saving .*iter_10 failed: '):
        runner.train()
    assert 10 <= runner.iter <= 12
    assert find_checkpoint(tmp_path / 'elsewhere').name == 'iter_5'


def test_two_runs_in_one_directory(tmp_path):
    runner = make_runner(tmp_path)
    child = os.fork()
    if child == 0:
        with local.directory_lock(runner.checkpoint_dir):
            (tmp_path / 'locked').touch()
            signal.pause()
    try:
        while not (tmp_path / 'locked').exists():
            pass
        with (
            pytest.raises(local.DirectoryInUseError, match=f'in use by another run.*{child}'),
            local.directory_lock(runner.checkpoint_dir, wait_seconds=0.1),
        ):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    runner.train()


def test_the_config_in_the_work_dir_is_that_of_the_run_that_has_it(tmp_path):
    def run(value):
        return make_runner(tmp_path, cfg=Config({'seed': value}, cfg_text='seed = 0', filename='configs/small.py'))

    first = run(1)
    first.train()
    copy = Path(first.work_dir, 'small.py')
    assert copy.read_text() == 'seed = 1\n'

    def refuse(stack):
        raise local.DirectoryInUseError('in use by another run')

    second = run(2)
    second._hold_checkpoint_dir = refuse
    with pytest.raises(local.DirectoryInUseError):
        second.train()
    assert copy.read_text() == 'seed = 1\n'


def test_skipped_iterations(tmp_path, caplog):
    guard = SkipGuard(max_skipped_iters=3)
    with caplog.at_level('WARNING'):
        make_runner(tmp_path / 'a', nan_at=(4, 5, 9), guard=guard).train()
    assert (guard.in_a_row, guard.total) == (0, 3)
    assert 'iteration 10: no step for diffusion (not finite: loss_diffusion=nan' in caplog.text


def test_divergence_is_fatal_and_keeps_checkpoints(tmp_path):
    with pytest.raises(TrainingDivergedError) as error:
        make_runner(tmp_path, nan_at=range(12, 20), guard=SkipGuard(3)).train()
    assert 'iteration 15 with lr' in str(error.value)
    assert 'loss_diffusion=nan' in str(error.value)
    assert find_checkpoint(tmp_path / 'checkpoints' / 'tiny').name == 'iter_10'


def test_count_of_skipped_iterations_survives_resuming(tmp_path):
    options = {'nan_at': (3, 4, 5), 'guard': SkipGuard(3)}
    with pytest.raises(SystemExit):
        make_runner(tmp_path, hooks=[At(5, lambda: os.kill(os.getpid(), signal.SIGTERM))], **options).train()
    with pytest.raises(TrainingDivergedError, match='iteration 6 '):
        make_runner(tmp_path, nan_at=(5,), guard=SkipGuard(3)).train()


def test_without_checkpoints(tmp_path):
    runner = make_runner(tmp_path, checkpoint=False)
    runner.train()
    assert runner.checkpoint_hook is None
    assert not (tmp_path / 'checkpoints').exists()


def test_hooks_run_in_the_order_of_their_priority(tmp_path):
    names = [type(hook).__name__ for hook in make_runner(tmp_path).hooks]
    assert names == [
        'RuntimeInfoHook',
        'ExponentialMovingAverageHook',
        'IterTimerHook',
        'ThroughputHook',
        'LoggerHook',
        'CheckpointHook',
    ]


def test_directories_that_cannot_be_made(tmp_path):
    (tmp_path / 'file').write_text('in the way')
    hook = CheckpointHook(interval=5, out_dir=str(tmp_path / 'file'))
    with pytest.raises(OSError, match=r'cannot write to .*file.* choose another directory with checkpoint_config'):
        make_runner(tmp_path, checkpoint=hook).train()
    with pytest.raises(OSError, match=r'cannot write to .*file.* choose another directory with work_dir'):
        make_runner(tmp_path / 'file').train()


class Counter(Hook):
    """A hook with state."""

    def __init__(self):
        self.count = 0

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.count += 1

    def state_dict(self):
        return {'count': self.count}

    def load_state_dict(self, state):
        self.count = state['count']


def test_state_of_hooks_survives(tmp_path):
    with pytest.raises(SystemExit):
        make_runner(tmp_path, hooks=[Counter(), At(7, lambda: os.kill(os.getpid(), signal.SIGINT))]).train()
    counters = [Counter(), Counter()]
    make_runner(tmp_path, hooks=[counters[0], At(99, None), counters[1]]).train()
    assert [counter.count for counter in counters] == [20, 13]


def test_profiler_of_mmengine_runs_unchanged(tmp_path):
    trace = tmp_path / 'trace.json'
    hook = HOOKS.build({'type': 'ProfilerHook', 'by_epoch': False, 'profile_times': 3, 'json_trace_path': str(trace)})
    make_runner(tmp_path, max_iters=4, hooks=[hook]).train()
    assert trace.exists()


def test_another_seed_is_another_run(tmp_path, caplog):
    make_runner(tmp_path, max_iters=10).train()
    with pytest.raises(CheckpointError, match=r'seed is 2, it was 1 .*another name .*--resume-from'):
        make_runner(tmp_path, seed=2).train()
    named = str(tmp_path / 'checkpoints' / 'tiny' / 'iter_10')
    make_runner(tmp_path, seed=2, resume_from=named, max_iters=15).train()
    assert 'seed is 2, it was 1' in caplog.text
    again = make_runner(tmp_path, seed=2, resume_from=named)  # the same command, after an interruption
    assert again.starting_point.checkpoint.name == 'iter_15'
    again.train()
    assert read_state(find_checkpoint(tmp_path / 'checkpoints' / 'tiny'))['started_from'] == again.started_from
    assert [Path(entry['path']).name for entry in again.started_from] == ['iter_10']


def test_state_of_another_optimizer_is_refused(tmp_path):
    make_runner(tmp_path, max_iters=5).train()
    for start in ({}, {'resume_from': str(tmp_path / 'checkpoints' / 'tiny' / 'iter_5')}):
        with pytest.raises(CheckpointError, match=r"type='SGD', but .*iter_5 holds the state of 'AdamW'"):
            make_runner(tmp_path, optimizer='SGD', **start).train()


def test_changes_of_the_config_are_logged(tmp_path, caplog):
    make_runner(tmp_path, max_iters=5, cfg=Config({'train_cfg': {'nfe': 1}})).train()
    with caplog.at_level('INFO'):
        make_runner(tmp_path, max_iters=6, cfg=Config({'train_cfg': {'nfe': 2}})).train()
    assert 'config changed since' in caplog.text
    assert 'train_cfg.nfe: 1 -> 2' in caplog.text


def test_training_mode_is_set_before_the_loop(tmp_path):
    modes = []
    runner = make_runner(tmp_path, max_iters=1)
    runner.model.train = lambda mode=True: modes.append(mode)
    runner.train()
    assert modes


@pytest.mark.parametrize('before', [True, False])
def test_attention_of_cudnn_can_be_left_out(tmp_path, before):
    """And is left as it is, whoever has set it, where the config does not ask for that."""
    set_by_others = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(before)
    try:
        with small_run.small_runner(ALONE, tmp_path):
            assert torch.backends.cuda.cudnn_sdp_enabled() is before
        with small_run.small_runner(ALONE, tmp_path, cudnn_attention=False):
            assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(set_by_others)
