"""Samples that are not finite: they are counted and warned of, and no number looks as if they were images."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from lakonlab.evaluation.digit_classifier import DigitClassifier
from lakonlab.evaluation.estimate import Estimate
from lakonlab.evaluation.extractor import ExtractorPool, FeatureExtractor, Features
from lakonlab.evaluation.frechet import Moments
from lakonlab.evaluation.preparation import to_bytes
from lakonlab.evaluation.prompt_scorer import PromptMetric, PromptScorer
from lakonlab.evaluation.results import run_evaluations, write_results
from lakonlab.evaluation.samples import SampleBatch
from lakonlab.evaluation.statistics import ReferenceStatistics
from lakonlab.registry import FEATURE_EXTRACTORS, PROMPT_SCORERS

COUNT = 30


@pytest.mark.parametrize(
    ('values', 'mean'),
    [
        ([1.0, math.nan], math.nan),
        ([math.inf, 1.0], math.inf),
        ([math.inf, -math.inf], math.nan),
    ],
)
def test_estimate(values, mean):
    found = Estimate.of(values)
    assert found.mean == pytest.approx(mean, nan_ok=True)
    assert math.isnan(found.std)


class Bytes(FeatureExtractor):
    """Pixels as 8 bits, in which nothing is left of what was not finite."""

    input_size = 8

    def forward(self, images):
        values = to_bytes(images).flatten(1).float() / 255
        return Features(values, values)

    def protocol(self):
        return dict(name='Bytes')


class Model(nn.Module):
    """Samples that are noise, some of them with a pixel that is no number or without bounds."""

    def __init__(self, broken):
        super().__init__()
        self.broken = broken

    def val_step(self, data, source=None):
        images = data['noise'].sigmoid()
        for row, number in enumerate(data['ids']):
            images[row, 0, 0, 0] = self.broken.get(number, images[row, 0, 0, 0])
        return dict(pred_imgs=images)


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setitem(FEATURE_EXTRACTORS._module_dict, 'Bytes', Bytes)
    values = torch.rand(COUNT, 64, generator=torch.Generator().manual_seed(0))
    moments = Moments()
    moments.update(values)
    path = str(tmp_path / 'r.safetensors')
    ReferenceStatistics(moments.mean(), moments.covariance(), COUNT, values).save(path)
    extractor, digits = dict(type='Bytes'), dict(type='DigitClassifier')
    common = dict(type='InceptionMetrics', extractor=extractor, reference=path, use_kid=True)
    metrics = [
        dict(common, is_splits=2),
        dict(common, num_images=3, use_kid=False, use_pr=False, use_is=False, prefix='first'),
        dict(type='FrechetDistance', extractor=digits, reference=dict(type='Digits', split='val')),
        dict(type='ClassAccuracy', extractor=digits),
        dict(type='VendiScore', extractor=extractor),
        dict(type='CosineDiversity', extractor=extractor),
        dict(type='FeatureDiversity', extractor=extractor),
        dict(type='ColorStats'),
        dict(type='ReferenceRMSE'),
    ]
    entry = dict(type='GenerativeEvalHook', metrics=metrics, viz_dir=str(tmp_path / 'viz'), reference_kwargs={})
    val = dict(type='Digits', split='val', test_mode=True, num_test_images=COUNT)
    data = dict(workers_per_gpu=0, val=val, val_dataloader=dict(samples_per_gpu=COUNT))
    return dict(name='run', data=data, evaluation=[entry])


@pytest.mark.parametrize('quantize', ['float', 'uint8'])
def test_every_number_of_them_is_nan(config, tmp_path, caplog, quantize):
    config['evaluation'][0]['quantize'] = quantize
    (whole,) = run_evaluations(Model({}), config)
    assert all(map(math.isfinite, whole['metrics'].values()))
    assert whole['num_not_finite'] == 0
    assert not caplog.records

    (found,) = run_evaluations(Model({4: math.nan, 7: math.inf, 9: -math.inf}), config)
    finite = {name for name, value in found['metrics'].items() if math.isfinite(value)}
    assert finite == {'first_fid', 'class_accuracy'}  # of other samples; of those that are recognised
    assert list(found['metrics']) == list(whole['metrics'])
    assert found['metrics']['first_fid'] == pytest.approx(whole['metrics']['first_fid'])
    assert found['num_not_finite'] == 3
    assert 'val: 3 of 30 samples have pixels that are not finite (4, 7, 9)' in caplog.text
    names = {path.name for path in Path(found['images']).glob('0*.png')}
    assert names == {f'{number:09d}.png' for number in range(COUNT) if number not in (4, 7, 9)}
    written = write_results(tmp_path / 'results.json', [found])
    assert written['evaluations'][0]['metrics']['fid'] == 'nan'


def test_features_far_out_of_range(config):
    """Of finite pixels too: a model that diverges must not end a run."""
    config['evaluation'][0]['metrics'] = config['evaluation'][0]['metrics'][2:3]
    (found,) = run_evaluations(Model({4: 1e38}), config)
    assert math.isnan(found['metrics']['frechet_distance'])
    assert found['num_not_finite'] == 0


def test_images_that_are_never_finite(config):
    (found,) = run_evaluations(Model(dict.fromkeys(range(COUNT), math.nan)), config)
    assert not list(Path(found['images']).glob('*.png'))
    assert found['metrics'].pop('class_accuracy') == 0
    assert all(map(math.isnan, found['metrics'].values()))


class Brightness(PromptScorer):
    """The mean of 8 bits."""

    def forward(self, images, prompts):
        return to_bytes(images).float().mean(dim=(1, 2, 3)) / 255

    def protocol(self):
        return dict(name='Brightness')


class BrightnessOf(PromptMetric):
    number = 'brightness'


def test_scores_of_prompts(monkeypatch):
    monkeypatch.setitem(PROMPT_SCORERS._module_dict, 'Brightness', Brightness)
    metric = BrightnessOf(dict(type='Brightness'))
    metric.bind(ExtractorPool())
    images = torch.ones(4, 3, 2, 2)
    metric.feed(SampleBatch(images, [0, 1, 2, 3], prompts=[''] * 4))
    assert metric.compute() == dict(brightness=1, brightness_std=0)
    images[2, 0, 0, 0] = torch.nan
    metric.feed(SampleBatch(images, [4, 5, 6, 7], prompts=[''] * 4))
    assert all(map(math.isnan, metric.compute().values()))


def test_real_images_that_are_not_finite_are_refused():
    from lakonlab.evaluation.preparation import Preparation
    from lakonlab.evaluation.reference_making import make_reference

    images = torch.rand(4, 1, 8, 8)
    images[1] = torch.nan
    with pytest.raises(ValueError, match='not finite'):
        make_reference([images], DigitClassifier().eval(), Preparation(8), {})
