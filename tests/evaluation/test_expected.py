"""What does not fit the samples to come is found before the first of them is made, and before anything is trained."""

import numpy as np
import pytest

from lakonlab.config.errors import ConfigError
from lakonlab.evaluation.expected import Expected
from lakonlab.evaluation.exports import GenEvalExport
from lakonlab.evaluation.extractor import FeatureExtractor, Features
from lakonlab.evaluation.prompt_scorer import PromptMetric
from lakonlab.evaluation.results import run_evaluations
from lakonlab.registry import FEATURE_EXTRACTORS
from tests.evaluation.test_evaluate import Model, config, hook_and_runner

DIGITS = dict(type='DigitClassifier')
VAL = dict(type='Digits', split='val')


class Unknown(FeatureExtractor):
    """Says nothing of its features before it has seen an image."""

    def forward(self, images):
        return Features(images.flatten(1))

    def protocol(self):
        return dict(name='Unknown')


class Blind(Unknown):
    classifies = False


class Liking(PromptMetric):
    number = 'liking'

    def __init__(self):
        super().__init__(dict(type='Nobody'))


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    monkeypatch.setitem(FEATURE_EXTRACTORS._module_dict, 'Unknown', Unknown)
    monkeypatch.setitem(FEATURE_EXTRACTORS._module_dict, 'Blind', Blind)


def reference(folder, size=64, count=50):
    """An ``.npz`` as other tools write it, which does not say of what extractor it is."""
    values = np.random.default_rng(0).random((count, size))
    path = folder / f'{size}.npz'
    np.savez(path, mu=values.mean(0), sigma=np.cov(values.T), pool_3=values)
    return str(path)


def of_inception(folder, size=64, **arguments):
    return dict(dict(type='InceptionMetrics', extractor=DIGITS, reference=reference(folder, size)), **arguments)


CASES = {
    'dimension': (
        lambda folder: dict(metrics=of_inception(folder, 32)),
        r"InceptionMetrics\.reference='.*/32\.npz' is of features of 32 numbers, but DigitClassifier has 64",
    ),
    'split': (
        lambda _: dict(metrics=dict(type='FrechetDistance', extractor=DIGITS, reference=dict(VAL, split='vall'))),
        r"FrechetDistance\.reference=\{.*'vall'.*expected one of",
    ),
    'no images': (
        lambda _: dict(metrics=dict(type='FrechetDistance', extractor=DIGITS, reference=dict(VAL, test_mode=True))),
        r'FrechetDistance\.reference=.*not test_mode=True',
    ),
    'parts': (
        lambda folder: dict(metrics=of_inception(folder, is_splits=26)),
        'data=.val., 25 samples: .*is_splits=26',
    ),
    'first images': (lambda folder: dict(metrics=of_inception(folder, num_images=9)), 'is_splits=10.* the 9 samples'),
    'neighbours': (lambda folder: dict(metrics=of_inception(folder, pr_k=25)), 'pr_k=25: .* the 25 samples'),
    'classes of all': (
        lambda _: dict(metrics=dict(type='ClassAccuracy', extractor=dict(type='Blind'))),
        'not classify',
    ),
    'classes': (
        lambda folder: dict(metrics=of_inception(folder, extractor=dict(type='Blind'))),
        'Blind does not classify; set use_is=False',
    ),
    'speed': (lambda _: dict(metrics=dict(type='SamplingSpeed'), data='train', generate=False), 'generated now'),
    'cost': (lambda _: dict(metrics=dict(type='SamplingCost'), data='train', generate=False), 'generated now'),
    'real images': (lambda _: dict(metrics=[], generate=False), "evaluation val_p: data='val': .*not test_mode=True"),
}


@pytest.mark.parametrize('case', CASES)
def test_found_before_anything_is_sampled(tmp_path, case):
    entry, message = CASES[case]
    cfg = config(prefix='first', metrics=[])  # an entry that is in order comes before
    cfg['evaluation'] += config(**entry(tmp_path))['evaluation']
    model = Model()
    with pytest.raises(ValueError, match=message):
        run_evaluations(model, cfg)
    assert not model.calls


@pytest.mark.parametrize('case', ['dimension', 'no images', 'parts'])
def test_found_before_anything_is_trained(tmp_path, case):
    entry, message = CASES[case]
    with pytest.raises(ValueError, match=message):
        hook_and_runner(**entry(tmp_path))
    hook_and_runner(**entry(tmp_path), interval=None)  # is not evaluated while training


def test_prompts(tmp_path):
    for metric in (Liking(), GenEvalExport(str(tmp_path / 'out'))):
        metric.expect(Expected(4))
        with pytest.raises(ValueError, match=f'{type(metric).__name__} needs samples with prompts'):
            metric.expect(Expected(4, has_prompts=False))


def test_empty_split(monkeypatch):
    monkeypatch.setattr('lakonlab.datasets.digits.Digits.__len__', lambda _: 0)
    with pytest.raises(ConfigError, match="evaluation val_p: data='val': it has no samples"):
        run_evaluations(Model(), config(metrics=[]))


def test_fewer_samples_than_wanted(tmp_path, caplog):
    """A warning before them, and after them."""
    model = Model()
    metric = of_inception(tmp_path, num_images=26, use_is=False, use_pr=False)
    sample, warnings = model.val_step, []
    model.val_step = lambda *args, **kwargs: warnings.append(len(caplog.records)) or sample(*args, **kwargs)
    (results,) = run_evaluations(model, config(metrics=metric))
    assert warnings == [1, 1, 1]
    assert 'num_images=26, but there will be only 25 samples' in caplog.text
    assert results['protocol']['InceptionMetrics']['num_images'] == 25


def test_dimension_that_shows_only_in_features(tmp_path):
    model = Model()
    metric = of_inception(tmp_path, 32, extractor=dict(type='Unknown'), use_is=False)
    with pytest.raises(ValueError, match=r'32\.npz. is of features of 32 numbers, but Unknown has 64'):
        run_evaluations(model, config(metrics=metric))
    assert len(model.calls) == 1  # of three batches


def test_real_images_that_cannot_be_read_show_at_the_first_batch(monkeypatch):
    """What the first real image does not tell."""

    def broken(*_):
        raise RuntimeError('an image of another size')

    metric = dict(type='FrechetDistance', extractor=DIGITS, reference=VAL)
    monkeypatch.setattr('lakonlab.evaluation.metrics.extract', broken)
    model = Model()
    with pytest.raises(RuntimeError, match='another size'):
        run_evaluations(model, config(metrics=metric))
    assert len(model.calls) == 1
