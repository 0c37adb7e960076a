"""A config in the published (mmcv-1) schema is used as it is and trains to the same result as our own."""

import dataclasses
import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.tools.training import DATA_BASED, ROOT, assert_same_run

PUBLISHED = 'gmdit_k8_digits_piid_1step_published_style'
LENGTH = {'total_iters': 12, 'checkpoint_config.interval': 6, 'checkpoint_config.must_save_interval': 12}


@pytest.fixture(scope='module')
def trainings(new_training):
    """Our own config, and the published-style one, which also evaluates while it trains."""
    own = dataclasses.replace(new_training('own', DATA_BASED), options=LENGTH)
    published = dataclasses.replace(
        new_training('published', PUBLISHED),
        options={**LENGTH, 'evaluation.0.interval': 5, 'data.val.num_test_images': 16},
        file=ROOT / 'tests' / 'data' / 'published_style_digits.py',
        validate=True,
    )
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda training: training.run(), (own, published)))
    return own, published


def test_weights_averages_optimiser_and_logs_are_the_same(trainings):
    own, published = trainings
    assert published.newest_step == own.newest_step == 12
    assert_same_run(published, own)


def test_what_has_no_meaning_here_is_said_once(trainings):
    _, published = trainings
    reports = [line for line in published.output.splitlines() if 'without effect here' in line]
    assert len(reports) == 1
    assert 'workflow' in reports[0]
    assert 'mp_start_method' in reports[0]


def test_it_evaluates_by_its_own_section(trainings):
    _, published = trainings
    command = published.command_of('test')
    assert f'evaluating checkpoints/{PUBLISHED}/iter_12' in published.run(command)
    results = json.loads((published.folder / 'work_dirs' / PUBLISHED / 'results.json').read_text())
    assert 'val_step1' in json.dumps(results)
    places = list((published.folder / 'viz' / PUBLISHED / 'step1').iterdir())
    images = {place.name: len(list(place.glob('0*.png'))) for place in places if place.is_dir()}
    assert images == {'5': 16, '10': 16, 'iter_12': 16}
    assert {place.name for place in places if place.is_file()} == {f'{name}.html' for name in images}
