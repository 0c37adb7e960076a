"""Runs of two processes whose checkpoints, images and logs go to an S3 server equal those that write to a disk."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from lakonlab.mmengine_parts import Hook
from lakonlab.runner.hooks.checkpoint import CheckpointHook
from lakonlab.storage import files, lease
from lakonlab.storage.checkpoint import (
    CheckpointError,
    find_checkpoint,
    list_checkpoints,
    load_model_state,
    read_state,
    require_checkpoint,
    step_of,
)
from lakonlab.storage.local import DirectoryInUseError
from lakonlab.storage.remote_path import as_path
from tests.processes import workers  # noqa: F401
from tests.runner import small_run
from tests.runner.tiny import make_runner

EVALUATION = dict(
    type='GenerativeEvalHook',
    data='val',
    interval=4,
    metrics=[],
    viz_num=3,
    sample_kwargs=dict(role='student', test_cfg_override={}),
)


@pytest.fixture
def there(s3_server, bucket):
    """Where a run writes on the server, and how processes find that."""
    return f'{bucket}/runs', s3_server.environment()


def remote(where):
    return dict(
        checkpoint_config__out_dir=f'{where}/checkpoints',
        work_dir_mirror=f'{where}/logs',
        evaluation=[{**EVALUATION, 'viz_dir': f'{where}/viz'}],
        data__val=dict(type='SmallImages', size=5, key='noise'),
        data__val_dataloader=dict(samples_per_gpu=2),
    )


def local():
    return {**remote('x'), 'checkpoint_config__out_dir': None, 'work_dir_mirror': None, 'evaluation': [EVALUATION]}


def steps(path):
    return sorted(step_of(found) for found in list_checkpoints(as_path(path)))


def test_a_run_that_is_continued(workers, there, tmp_path):  # noqa: F811
    where, environment = there
    folders = [tmp_path / name for name in ('disk', 'first', 'second')]
    for folder in folders:
        folder.mkdir()
    disk, first, second = folders
    workers.run(small_run.train, disk, strategy='fsdp2', **local())
    run_dir = f'{where}/checkpoints/{small_run.NAME}'

    # the second half runs on another machine, with nothing on its disk
    assert workers.run(small_run.train, first, environment, strategy='fsdp2', total_iters=5, **remote(where)) == [0, 0]
    assert steps(run_dir) == [4, 5]
    assert workers.run(small_run.train, second, environment, strategy='fsdp2', **remote(where)) == [5, 5]
    assert steps(run_dir) == [6, 8]
    assert small_run.result(second, as_path(run_dir)) == small_run.result(disk)
    assert not (second / 'checkpoints').exists()
    assert not (second / 'viz').exists()
    names = {info.name.split('/')[0] for info in files.list_files(run_dir)}
    assert names == {'iter_6', 'iter_8'}  # no lock, nothing unfinished
    evaluated = json.loads(files.read_text(f'{where}/logs/evaluations.json'))['evaluations']
    assert [entry['iteration'] for entry in evaluated] == [4, 8]  # one by each machine

    images = sorted(path.relative_to(disk).as_posix() for path in (disk / 'viz').rglob('*.png'))
    assert len(images) == 2 * 4  # three samples and a grid at iterations 4 and 8
    for name in images:
        content = files.read_bytes(f'{where}/viz/{"/".join(name.split("/")[-2:])}')
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(content))), np.asarray(Image.open(disk / name))), name

    logs = second / 'work_dirs' / small_run.NAME
    for info in files.list_files(logs):
        assert files.read_bytes(f'{where}/logs/{info.name}') == (logs / info.name).read_bytes()
    assert sum(info.name.endswith('.log') for info in files.list_files(f'{where}/logs')) == 2
    logged = [json.loads(line)['step'] for line in files.read_text(f'{where}/logs/scalars.json').splitlines()]
    assert logged == sorted(logged)
    assert set(logged) == {*small_run.logged(disk), 5}  # the first run ended there


@pytest.mark.parametrize('strategy', ['ddp', pytest.param('fsdp', marks=pytest.mark.slow)])
def test_checkpoints_of_two_processes_are_read_by_one(workers, there, tmp_path, monkeypatch, strategy):  # noqa: F811
    where, environment = there
    place = dict(checkpoint_config__out_dir=where)
    workers.run(small_run.train, tmp_path, environment, strategy='fsdp2', total_iters=4, **place)
    run_dir = f'{where}/{small_run.NAME}'
    workers.run(small_run.train, tmp_path, strategy='fsdp2', total_iters=4)
    assert small_run.result(tmp_path, as_path(run_dir)) == small_run.result(tmp_path)
    assert workers.run(small_run.train, tmp_path, environment, strategy=strategy, total_iters=6, **place) == [4, 4]
    assert workers.run(small_run.train, tmp_path, strategy=strategy, total_iters=6) == [4, 4]
    assert small_run.result(tmp_path, as_path(run_dir)) == small_run.result(tmp_path)


def attempt(ranks, folder, environment, **changes):
    """Train to the end; the error if that fails."""
    try:
        return small_run.train(ranks, folder, environment, **changes)
    except Exception as error:
        return f'{type(error).__name__}: {error}'


def test_damage_is_passed_over_and_set_aside(workers, there, tmp_path):  # noqa: F811
    where, environment = there
    place = dict(checkpoint_config__out_dir=where)
    run_dir = f'{where}/{small_run.NAME}'
    workers.run(small_run.train, tmp_path, environment, total_iters=6, **place)
    newest = require_checkpoint(f'{run_dir}/iter_6')
    shard = next(info.name for info in files.list_files(str(newest)) if '/model/rank_00001' in info.name)
    content = bytearray(files.read_bytes(f'{newest}/{shard}'))
    content[-2] ^= 4
    files.write_bytes(f'{newest}/{shard}', bytes(content))

    for error in workers.run(attempt, tmp_path, environment, resume_from=str(newest), **place):
        assert 'its checksum is not the one in the manifest' in error
    assert workers.run(attempt, tmp_path, environment, **place) == [4, 4]
    names = {info.name for info in files.list_files(run_dir)}
    assert 'iter_6/damaged.0.json' in names
    assert f'iter_6/{shard}' in names
    assert steps(run_dir) == [6, 8]
    (tmp_path / 'disk').mkdir()
    workers.run(small_run.train, tmp_path / 'disk')
    assert small_run.result(tmp_path, as_path(run_dir)) == small_run.result(tmp_path / 'disk')


def test_export_and_weights_of_another_run(workers, there, tmp_path):  # noqa: F811
    where, environment = there
    run_dir = f'{where}/{small_run.NAME}'
    options = dict(checkpoint_config__out_dir=where, checkpoint_config__must_save_interval=3)
    workers.run(small_run.train, tmp_path, environment, checkpoint_config__export='ema', **options)
    assert steps(run_dir) == [3, 6, 8]
    names = [info.name for info in files.list_files(find_checkpoint(run_dir).url)]
    assert any(name.endswith('/export/diffusion_pytorch_model.safetensors') for name in names)

    (tmp_path / 'other').mkdir()
    weights = dict(load_from=f'{run_dir}/latest', total_iters=0, checkpoint_config__out_dir=f'{where}/other')
    assert workers.run(small_run.train, tmp_path / 'other', environment, **weights) == [0, 0]
    found = workers.run(attempt, tmp_path / 'other', environment, resume_from=f'{run_dir}/iter_5', total_iters=9)
    assert all("iter_5' does not exist (checkpoints in s3://" in error for error in found)


def tiny(folder, where, **changes):
    hook = CheckpointHook(5, out_dir=where, max_keep_ckpts=2, asynchronous=False)
    return make_runner(folder, checkpoint=hook, **changes)


def test_best_checkpoint(bucket, tmp_path):
    def save():
        runner.checkpoint_hook.save_best(runner.iter, 'val_loss', 1.0)

    runner = tiny(tmp_path, bucket, hooks=[Interfere(7, save), Interfere(10, save)])
    runner.train()
    best = load_model_state(f'{bucket}/tiny/best_val_loss')
    assert best.keys() == load_model_state(runner.checkpoint_dir).keys()
    assert read_state(as_path(f'{bucket}/tiny/best_val_loss'))['iteration'] == 10
    assert steps(runner.checkpoint_dir) == [15, 20]
    names = {info.name for info in files.list_files(f'{bucket}/tiny/best_val_loss')}
    assert len({name.split('/')[0] for name in names}) == 2  # the manifest, and one folder


class Interfere(Hook):
    """Does something before an iteration."""

    def __init__(self, iteration, action):
        self.iteration, self.action = iteration, action

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if batch_idx == self.iteration:
            self.action()


def test_a_directory_has_one_writer(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(lease, 'WAIT_SECONDS', 0.2)
    errors = []

    def second_run():
        with pytest.raises(DirectoryInUseError, match='is in use by another run') as error:
            tiny(tmp_path / 'second', bucket).train()
        errors.append(error)

    tiny(tmp_path / 'first', bucket, hooks=[Interfere(7, second_run)]).train()
    assert len(errors) == 1
    assert steps(f'{bucket}/tiny') == [15, 20]


def test_a_run_that_was_taken_for_dead_publishes_nothing_more(bucket, tmp_path):
    def take_over():
        files.write_json(f'{bucket}/tiny/.lock', {'holder': 'another', 'process': 1, 'host': 'elsewhere'})

    runner = tiny(tmp_path, bucket, hooks=[Interfere(7, take_over)])
    with pytest.raises(CheckpointError, match=r'iter_10 failed: DirectoryInUseError: .* held by another run now'):
        runner.train()
    assert steps(f'{bucket}/tiny') == [5]


def test_what_a_killed_save_left_is_removed_at_the_start(bucket, tmp_path, caplog):
    caplog.set_level('INFO', 'lakonlab')
    tiny(tmp_path, bucket, max_iters=10).train()
    files.write_text(f'{bucket}/tiny/iter_15/data-{"0" * 16}/model/x.safetensors', 'half')
    files.write_text(f'{bucket}/tiny/notes.txt', 'mine')
    tiny(tmp_path, bucket).train()
    assert f'removed from an interrupted save: iter_15/data-{"0" * 16}' in caplog.text
    assert {info.name.split('/')[0] for info in files.list_files(f'{bucket}/tiny')} == {
        'iter_15',
        'iter_20',
        'notes.txt',
    }
