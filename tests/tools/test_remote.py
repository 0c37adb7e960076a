"""The real commands with an S3 server for everything that is read and written equal those with a disk, bit for bit.

Kills at random moments of a run that saves there are in ``test_crash.py``.
"""

import json
import shutil

from lakonlab.datasets.digits import load_split
from lakonlab.datasets.latent_making import make_latent_cache
from lakonlab.storage import files
from lakonlab.storage.checkpoint import content_digest, list_checkpoints
from tests.datasets.latent_files import GivenLatents
from tests.tools.training import DATA_BASED, TEACHER, assert_same_run

OPTIONS = {
    'total_iters': 18,
    'checkpoint_config.interval': 6,
    'checkpoint_config.must_save_interval': 9,
    'checkpoint_config.export': 'ema',
    'evaluation.0.interval': 9,
    'evaluation.0.viz_num': 4,
    'evaluation.0.metrics': '[]',
    'data.val2.num_test_images': 12,
}


def pictures(folder):
    """Name -> content of the image files below a folder of any scheme."""
    names = [info.name for info in files.list_files(folder) if info.name.endswith('.png')]
    return {name: files.read_bytes(files.join(folder, name)) for name in names}


def cached_digits(place):
    """The recipe's data, from a cache of latents in a place."""
    return dict(
        type='ImageNet',
        data_root=f'{place}/digits',
        label2name_path=f'{place}/names.txt',
        random_flip=False,
        negative_label=10,
    )


def write_digits(folder):
    """A cache that holds the pixels of the digits as latents, in shards, and names of their labels."""
    latents, labels = load_split('train')
    digits = GivenLatents(latents)
    digits.images.labels = labels.numpy()
    make_latent_cache(digits, str(folder / 'digits'), flip='none', batch_size=256, rows_per_shard=400, plan={})
    (folder / 'names.txt').write_text(''.join(f"{label}: 'the digit {label}',\n" for label in range(10)))


def test_everything_on_a_server(new_training, bucket, monkeypatch, tmp_path):
    monkeypatch.setenv('LAKONLAB_CACHE_DIR', str(tmp_path / 'cache'))
    where = f'{bucket}/lab'
    write_digits(tmp_path / 'data')
    disk = new_training('disk', DATA_BASED, **OPTIONS, **{'data.train': cached_digits(tmp_path / 'data')})
    disk.validate = True
    disk.run()
    files.upload(tmp_path / 'data', f'{where}/data')
    shutil.rmtree(tmp_path / 'data')

    remote = new_training('remote', DATA_BASED, **OPTIONS, **{'data.train': cached_digits(f'{where}/data')})
    remote.validate, remote.place = True, f'{where}/checkpoints'
    remote.options['data.workers_per_gpu'] = 1  # which is forked after the process has used its own connections
    teacher = remote.folder / 'checkpoints'
    files.upload(teacher, f'{where}/teachers')
    weights = f'{where}/teachers/{TEACHER}/latest.pth'
    remote.options = {
        **remote.options,
        'model.teacher.denoising.pretrained': weights,
        'model.diffusion.denoising.pretrained': weights,
        'work_dir': f'{where}/logs/{DATA_BASED}',
        'evaluation.0.viz_dir': f'{where}/viz',
    }
    teacher.rename(remote.folder / 'not_here')
    process = remote.start()
    remote.wait_for(process, lambda: remote.newest_step >= 9)
    process.kill()
    process.wait()
    assert remote.newest_step >= 9, remote.output
    remote.run()
    assert 'resuming after iteration' in remote.output
    assert_same_run(remote, disk)
    assert sorted(path.name for path in list_checkpoints(remote.checkpoints)) == sorted(
        path.name for path in list_checkpoints(disk.checkpoints)
    )
    expected = pictures(disk.folder / 'viz' / DATA_BASED / 'val2_preview')
    assert len(expected) == 2 * 5  # four samples and a grid at iterations 9 and 18
    assert pictures(f'{where}/viz') == expected
    assert {path.name for path in remote.folder.iterdir()} == {'not_here', 'work_dirs', 'output.txt'}

    # what was killed could not copy its last lines, the next run has
    logs = remote.folder / 'work_dirs' / DATA_BASED
    assert {info.name for info in files.list_files(f'{where}/logs/{DATA_BASED}')} >= {
        'scalars.json',
        f'{DATA_BASED}.py',
    }
    for info in files.list_files(logs):
        assert files.read_bytes(f'{where}/logs/{DATA_BASED}/{info.name}') == (logs / info.name).read_bytes(), info.name

    # evaluation of the newest checkpoint, which is found there
    remote.run(remote.command_of('test', '--data', 'val2'))
    results = json.loads(files.read_text(f'{where}/logs/{DATA_BASED}/results.json'))
    assert results['checkpoint'] == f'{where}/checkpoints/{DATA_BASED}/iter_18'
    assert results['model_sha256'] == content_digest(disk.checkpoints / 'iter_18', 'model')
    last = {name.rpartition('/')[2]: content for name, content in expected.items() if '18' in name.split('/')[0]}
    assert pictures(results['evaluations'][0]['images']) == last
