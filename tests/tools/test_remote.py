"""The real commands with an S3 server for everything that is read and written equal those with a disk, bit for bit.

Kills at random moments of a run that saves there are in ``test_crash.py``.
"""

import io
import json

import numpy as np
from PIL import Image

from lakonlab.storage import files
from lakonlab.storage.checkpoint import content_digest, list_checkpoints
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


def images(folder):
    """Name -> pixels of the images below a folder of any scheme."""
    names = [info.name for info in files.list_files(folder) if info.name.endswith('.png')]
    return {name: np.asarray(Image.open(io.BytesIO(files.read_bytes(files.join(folder, name))))) for name in names}


def assert_same_images(folder, expected):
    found, wanted = images(folder), images(expected)
    assert len(wanted) >= 5
    assert set(found) == set(wanted)
    assert all(np.array_equal(found[name], wanted[name]) for name in wanted)


def test_everything_on_a_server(new_training, swift_bucket):
    where = f'{swift_bucket}/lab'
    disk = new_training('disk', DATA_BASED, **OPTIONS)
    disk.validate = True
    disk.run()

    remote = new_training('remote', DATA_BASED, **OPTIONS)
    remote.validate, remote.place = True, f'{where}/checkpoints'
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
    assert_same_images(f'{where}/viz', disk.folder / 'viz' / DATA_BASED / 'val2_preview')
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
    assert len(images(results['evaluations'][0]['images'])) == 5
