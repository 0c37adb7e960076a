"""Runs of two processes whose checkpoints, images and logs go to an S3 server equal those that write to a disk."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from lakonlab.storage import files
from lakonlab.storage.checkpoint import find_checkpoint, list_checkpoints, require_checkpoint, step_of
from lakonlab.storage.remote_path import as_path
from tests.processes import workers  # noqa: F401
from tests.runner import small_run

EVALUATION = dict(
    type='GenerativeEvalHook',
    data='val',
    interval=4,
    metrics=[],
    viz_num=3,
    sample_kwargs=dict(role='student', test_cfg_override={}),
)


@pytest.fixture
def there(swift, swift_bucket):
    """Where a run writes on the server, and how processes find that."""
    return f'{swift_bucket}/runs', swift.environment()


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


def test_damage_is_passed_over_and_set_aside(workers, there, swift, tmp_path):  # noqa: F811
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


def test_export_best_and_weights_of_another_run(workers, there, tmp_path):  # noqa: F811
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
