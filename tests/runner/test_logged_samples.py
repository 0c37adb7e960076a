"""What a run leaves in files of TensorBoard and Weights & Biases, read back: numbers and grids of samples."""

import io
import json

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import IMAGES, SCALARS, EventAccumulator
from wandb.proto.wandb_internal_pb2 import Record

from lakonlab.evaluation.sample_grid import sample_grid
from lakonlab.registry import METRICS
from tests.processes import ProcessPool
from tests.runner import small_run
from tests.runner.test_saved import Scripted

NAMES = {'val_small_value', 'val_small_highest'}
VALUES = {4: 2.5, 8: 1.5}
BLOCK = 32768
"""Bytes of a block in Weights & Biases' file, which is a log of LevelDB with a head of seven bytes."""


def train(ranks, folder):
    """Train for 8 iterations, with a log line every second and an evaluation every fourth."""
    assert 'Scripted' in METRICS
    entry = dict(
        type='GenerativeEvalHook',
        data='val',
        prefix='small',
        interval=4,
        metrics=[dict(type='Scripted', values=list(VALUES.values()))],
    )
    hooks = [dict(type='TensorboardLoggerHook'), dict(type='WandbLoggerHook', init_kwargs=dict(project='small'))]
    small_run.train(
        ranks,
        folder,
        environment=dict(WANDB_MODE='offline', WANDB_SILENT='true'),
        strategy='ddp',
        data__val=dict(type='SmallImages', size=5, key='noise'),
        evaluation=[entry],
        log_config=dict(interval=2, hooks=hooks),
    )


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Working directory of a finished run of one process."""
    assert Scripted.better
    path = tmp_path_factory.mktemp('logged')
    with ProcessPool(1) as pool:
        pool.run(train, path)
    return path


def grid_in_files(folder, step):
    with Image.open(folder / 'viz' / small_run.NAME / 'val_small' / str(step) / 'grid.png') as image:
        return np.array(image)


def test_the_grid_is_made_of_the_samples_and_their_captions(folder):
    images = []
    for number in range(5):
        with Image.open(folder / 'viz' / small_run.NAME / 'val_small' / '8' / f'{number:09d}.png') as image:
            images.append(np.array(image.convert('RGB')))
    assert len({image.tobytes() for image in images}) == 5
    grid = grid_in_files(folder, 8)
    assert (grid == sample_grid(images, list('01234'))).all()
    assert (grid != sample_grid(images, list('01235'))).any()
    assert (grid != grid_in_files(folder, 4)).any()


def test_tensorboard_has_them(folder):
    events = EventAccumulator(str(folder / 'work_dirs' / small_run.NAME / 'tf_logs'), {IMAGES: 0, SCALARS: 0}).Reload()
    for name in NAMES:
        assert {event.step: event.value for event in events.Scalars(name)} == VALUES
    assert [event.step for event in events.Scalars('loss_diffusion')] == [2, 4, 6, 8]
    assert events.Tags()['images'] == ['val_small']
    images = events.Images('val_small')
    assert [image.step for image in images] == [4, 8]
    for image in images:
        with Image.open(io.BytesIO(image.encoded_image_string)) as found:
            assert (np.array(found) == grid_in_files(folder, image.step)).all()


def wandb_rows(content):
    """The rows in a file of Weights & Biases: step -> what was logged of it."""
    position, body, rows = 7, b'', {}
    while position + 7 <= len(content):
        left = BLOCK - position % BLOCK
        if left < 7:
            position += left
            continue
        size, kind = int.from_bytes(content[position + 4 : position + 6], 'little'), content[position + 6]
        part = content[position + 7 : position + 7 + size]
        body = part if kind in (1, 2) else body + part  # whole or first; middle or last
        position += 7 + size
        if kind in (1, 4):
            record = Record.FromString(body)
            if record.WhichOneof('record_type') == 'history':
                items = {
                    '.'.join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item
                }
                assert items.pop('_step') == record.history.step.num
                rows[record.history.step.num] = items
    return rows


def test_weights_and_biases_has_them(folder):
    (run,) = (folder / 'work_dirs' / small_run.NAME / 'wandb').glob('offline-run-*')
    (file,) = run.glob('*.wandb')
    rows = wandb_rows(file.read_bytes())
    assert sorted(rows) == [2, 4, 6, 8]
    for step, row in rows.items():
        assert row['loss_diffusion'] > 0
        numbers = {name: row[name] for name in NAMES & set(row)}
        assert numbers == (dict.fromkeys(NAMES, VALUES[step]) if step in VALUES else {})
        if step in VALUES:
            with Image.open(run / 'files' / row['val_small.path']) as found:
                assert (np.array(found) == grid_in_files(folder, step)).all()
