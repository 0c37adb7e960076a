"""``evaluations.json`` holds what every evaluation of a run found, once, whatever the run went through."""

import json
import shutil
from pathlib import Path

import pytest

from lakonlab.evaluation.training_record import RECORD_FILE, forget_later, record
from lakonlab.evaluation.viewer import read_page
from lakonlab.ranks import ALONE
from tests.runner import small_run

EVALUATION = dict(
    type='GenerativeEvalHook', data='val', interval=2, metrics=[dict(type='ColorStats')], viz_num=0, prefix='p',
    sample_kwargs=dict(role='student', test_cfg_override={}),
)  # fmt: skip
CHANGES = dict(
    evaluation=[EVALUATION, dict(EVALUATION, prefix='shown', interval=6, viz_num=2)],
    data__val=dict(type='SmallImages', size=3, key='noise'),
    data__val_dataloader=dict(samples_per_gpu=2),
    checkpoint_config__max_keep_ckpts=-1,
)


def result(name='val', **numbers):
    return dict(name=name, metrics=numbers, protocol={'ColorStats': dict(num_images=3)})


def entries(folder):
    return json.loads((Path(folder) / RECORD_FILE).read_text())['evaluations']


def numbers(folder):
    return [(entry['iteration'], entry['name'], entry['metrics']) for entry in entries(folder)]


def test_each_evaluation_is_there_once(tmp_path):
    record(tmp_path, 2, result(brightness=1.0))
    record(tmp_path, 2, result('val2', brightness=2.0))
    record(tmp_path, 4, result(brightness=float('nan')))
    record(tmp_path, 4, result(brightness=4.0))
    assert numbers(tmp_path) == [
        (2, 'val', dict(brightness=1.0)), (2, 'val2', dict(brightness=2.0)), (4, 'val', dict(brightness=4.0)),
    ]  # fmt: skip
    assert entries(tmp_path)[0]['protocol'] == {'ColorStats': dict(num_images=3)}
    assert 'finished' in entries(tmp_path)[0]['made']
    record(tmp_path, 2, result('val2', brightness=float('nan')))  # of a run that went on from there
    assert numbers(tmp_path) == [(2, 'val', dict(brightness=1.0)), (2, 'val2', dict(brightness='nan'))]


def test_later_ones_are_forgotten(tmp_path):
    forget_later(tmp_path, 0)
    assert not (tmp_path / RECORD_FILE).exists()
    for iteration in (2, 4, 6):
        record(tmp_path, iteration, result(brightness=1.0))
    before = (tmp_path / RECORD_FILE).read_bytes()
    forget_later(tmp_path, 6)
    assert (tmp_path / RECORD_FILE).read_bytes() == before
    forget_later(tmp_path, 4)
    assert [iteration for iteration, *_ in numbers(tmp_path)] == [2, 4]


@pytest.mark.parametrize('content', ['{"evaluations": [{}]}', '[]', '{', '{"evaluations": [{"iteration": "1"}]}'])
def test_a_damaged_file_is_replaced(tmp_path, content, caplog):
    (tmp_path / RECORD_FILE).write_text(content)
    record(tmp_path, 2, result(brightness=1.0))
    assert 'is not readable' in caplog.text
    assert numbers(tmp_path) == [(2, 'val', dict(brightness=1.0))]


def test_a_run_that_goes_on_from_an_older_checkpoint(tmp_path):
    small_run.train(ALONE, tmp_path, strategy='ddp', **CHANGES)
    folder = tmp_path / 'work_dirs' / small_run.NAME
    first = entries(folder)
    assert [(entry['iteration'], entry['name']) for entry in first] == [
        (2, 'val_p'), (4, 'val_p'), (6, 'val_p'), (6, 'val_shown'), (8, 'val_p'),
    ]  # fmt: skip
    assert first[0]['protocol']['ColorStats']['num_images'] == 3
    page = read_page(tmp_path / 'viz' / small_run.NAME / 'val_shown' / '6.html')
    assert page.columns[0].facts['iteration'] == 6

    for name in ('iter_6', 'iter_8'):
        shutil.rmtree(small_run.checkpoints(tmp_path) / name)
    assert small_run.train(ALONE, tmp_path, strategy='ddp', **CHANGES, total_iters=6) == 4
    again = entries(folder)
    assert [(entry['iteration'], entry['name']) for entry in again] == [
        (2, 'val_p'), (4, 'val_p'), (6, 'val_p'), (6, 'val_shown'),
    ]  # fmt: skip
    assert again[:2] == first[:2]
    for found, expected in zip(again[2:], first[2:4], strict=True):
        assert found['metrics'] == expected['metrics']
        assert found['seconds'] != expected['seconds']  # it was made again
