"""What takes long says that it goes on, so that no watchdog takes it for a hang, and shows how far it is."""

import pytest
import torch

from lakonlab.evaluation.extractor import ExtractorPool
from lakonlab.evaluation.kernel_distance import kernel_distance
from lakonlab.evaluation.manifold import precision_recall
from lakonlab.evaluation.results import run_evaluations
from lakonlab.phases import PhaseClock
from lakonlab.registry import METRICS
from tests.evaluation.test_evaluate import Model, config
from tests.evaluation.test_feature_distances import features

DIGITS = dict(type='DigitClassifier')


def beats_of(function):
    clock = PhaseClock(torch.device('cpu'))
    with clock.active():
        function()
    return clock.beats


def metric_of(**arguments):
    metric = METRICS.build(arguments)
    metric.bind(ExtractorPool())
    return metric


def test_features_of_real_images(monkeypatch):
    shown = []
    monkeypatch.setattr('lakonlab.evaluation.metrics.tqdm', recorder_of(shown))
    metric = metric_of(type='FrechetDistance', extractor=DIGITS, reference=dict(type='Digits', split='val'))
    assert beats_of(lambda: metric.reference) == 2  # of 355 images in two batches
    assert shown == [355, 256, 99]


def recorder_of(shown):
    """Stands in for a progress bar; what there is to do, and what was done."""

    class Recorder:
        def __init__(self, total, **_):
            shown.append(total)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def update(self, count):
            shown.append(count)

    return Recorder


@pytest.mark.parametrize(('count', 'real_count'), [(70, 90), (32, 33), (5, 100)])
def test_precision_and_recall(monkeypatch, count, real_count):
    shown = []
    monkeypatch.setattr('lakonlab.evaluation.manifold.tqdm', recorder_of(shown))
    monkeypatch.setattr('lakonlab.evaluation.manifold.BLOCK_ROWS', 16)
    monkeypatch.setattr('lakonlab.evaluation.manifold.BLOCK_COLUMNS', 32)
    sets = features(count), features(real_count, seed=1)
    assert beats_of(lambda: precision_recall(*sets)) == len(shown) - 1 > 10
    assert shown[0] == sum(shown[1:])


def test_kernel_distance():
    assert beats_of(lambda: kernel_distance(features(60), features(60, seed=1), 7, 50)) == 7


def test_numbers():
    """Beside that of each batch, one of each metric."""
    found = {}
    for metrics in ([], [dict(type='ColorStats'), dict(type='VendiScore', extractor=DIGITS)]):
        found[len(metrics)] = beats_of(lambda metrics=metrics: run_evaluations(Model(), config(metrics=metrics)))
    assert found == {0: 3, 2: 5}
