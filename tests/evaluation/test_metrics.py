import pytest
import torch
from torch import nn

from lakonlab.config.errors import ConfigError
from lakonlab.datasets.digits import load_split
from lakonlab.evaluation.diversity import FeatureDiversity
from lakonlab.evaluation.extractor import ExtractorPool, FeatureExtractor, Features
from lakonlab.evaluation.preparation import Preparation
from lakonlab.evaluation.samples import SampleBatch, real_images
from lakonlab.registry import FEATURE_EXTRACTORS, METRICS


class Pixels(FeatureExtractor):
    """The pixels themselves; the brightest one is the class."""

    def __init__(self):
        super().__init__()
        self.calls = 0
        self.unused = nn.Parameter(torch.zeros(()))

    def forward(self, images):
        self.calls += 1
        return Features(images.flatten(1), images.flatten(1))

    def protocol(self):
        return dict(name='Pixels')


@pytest.fixture
def pixels(monkeypatch):
    monkeypatch.setitem(FEATURE_EXTRACTORS._module_dict, 'Pixels', Pixels)
    return dict(type='Pixels')


def bound(config, pool=None):
    metric = METRICS.build(config)
    metric.bind(pool or ExtractorPool())
    return metric


def one_hot(classes):
    return nn.functional.one_hot(torch.tensor(classes), 4).float().reshape(-1, 1, 2, 2)


def test_class_accuracy(pixels):
    metric = bound(dict(type='ClassAccuracy', extractor=pixels))
    metric.feed(SampleBatch(one_hot([0, 1, 2]), [0, 1, 2], torch.tensor([0, 1, 3])))
    metric.feed(SampleBatch(one_hot([3]), [3], torch.tensor([3])))
    assert metric.compute() == dict(class_accuracy=0.75)
    as_they_are = dict(size=None, center_crop=False, mode='bicubic')
    assert metric.protocol() == dict(num_images=4, extractor=dict(name='Pixels'), preparation=as_they_are)
    metric.reset()
    metric.feed(SampleBatch(one_hot([3]), [3], torch.tensor([2])))
    assert metric.compute() == dict(class_accuracy=0.0)


def test_class_accuracy_needs_labels(pixels):
    with pytest.raises(ValueError, match='labels'):
        bound(dict(type='ClassAccuracy', extractor=pixels)).feed(SampleBatch(one_hot([0]), [0]))


def test_diversity_is_within_classes(pixels):
    metric = bound(dict(type='FeatureDiversity', extractor=pixels))
    images = torch.zeros(5, 1, 2, 2)
    images[1, 0, 0, 0] = 3.0  # class 0: distances 3, 4, 5
    images[2, 0, 1, 1] = 4.0
    images[3] = 100.0  # class 1: far from class 0, distance 2 between its two
    images[4] = 101.0
    labels = torch.tensor([0, 0, 0, 1, 1])
    for part in (slice(0, 2), slice(2, 5)):
        metric.feed(SampleBatch(images[part], list(range(5))[part], labels[part]))
    assert metric.compute()['feature_diversity'] == pytest.approx((4 + 2) / 2)


def test_diversity_counts_the_first_samples_of_a_class(pixels):
    metric = FeatureDiversity(pixels, max_per_class=2)
    metric.bind(ExtractorPool())
    images = torch.arange(4.0).reshape(4, 1, 1, 1)
    metric.feed(SampleBatch(images, [0, 1, 2, 3], torch.zeros(4, dtype=torch.long)))
    assert metric.compute() == dict(feature_diversity=1.0, feature_diversity_std=0.0)
    assert metric.num_images == 2


def test_diversity_of_single_samples_is_an_error_of_the_config(pixels):
    metric = bound(dict(type='FeatureDiversity', extractor=pixels))
    metric.feed(SampleBatch(one_hot([0, 1]), [0, 1], torch.tensor([0, 1])))
    with pytest.raises(ConfigError, match='at least two samples of a prompt or a class'):
        metric.compute()


def test_reference_rmse():
    metric = METRICS.build(dict(type='ReferenceRMSE'))
    metric.feed(SampleBatch(torch.full((2, 1, 2, 2), 0.5), [0, 1], reference=torch.full((2, 1, 2, 2), 0.6)))
    metric.feed(SampleBatch(torch.full((1, 1, 2, 2), 0.5), [2], reference=torch.full((1, 1, 2, 2), 0.9)))
    expected = 2 * ((2 * 0.1**2 + 0.4**2) / 3) ** 0.5
    assert metric.compute()['reference_rmse'] == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ValueError, match='reference_kwargs'):
        metric.feed(SampleBatch(torch.zeros(1, 1, 2, 2), [0]))


def test_speed_leaves_out_the_first_batch():
    metric = METRICS.build(dict(type='SamplingSpeed'))
    images = torch.zeros(4, 1, 2, 2)
    metric.feed(SampleBatch(images, [0, 1, 2, 3], seconds=100.0, warm_up=True))
    assert metric.compute() == dict(samples_per_second=0.04, total_time=100.0)
    metric.feed(SampleBatch(images, [0, 1, 2, 3], seconds=2.0))
    metric.feed(SampleBatch(images[:2], [0, 1], seconds=1.0))
    assert metric.compute() == dict(samples_per_second=2.0, total_time=2.0)  # of batches of 4
    metric.reset()
    metric.feed(SampleBatch(images, [0, 1, 2, 3], seconds=1.0))
    assert metric.compute() == dict(samples_per_second=4.0, total_time=1.0)
    with pytest.raises(ValueError, match='generated'):
        metric.feed(SampleBatch(images, [0, 1, 2, 3]))


def test_frechet_distance_of_real_digits():
    digits = dict(extractor=dict(type='DigitClassifier'), reference=dict(type='Digits', split='val'))
    metric = bound(dict(type='FrechetDistance', **digits))
    images, _ = load_split('val')
    for part in (images[:100], images[100:]):
        metric.feed(SampleBatch(part / 2 + 0.5, list(range(len(part)))))
    assert metric.compute()['frechet_distance'] == pytest.approx(0, abs=1e-4)
    protocol = metric.protocol()
    assert len(protocol['reference'].pop('images_sha256')) == 64
    assert protocol['reference'] == dict(type='Digits', split='val', num_images=355)
    assert len(protocol['extractor']['weights_sha256']) == 64

    distances = []
    for noise in (0.0, 0.2, 0.5, 1.0):
        metric.reset()
        train, _ = load_split('train')
        noisy = train + noise * torch.randn(train.shape, generator=torch.Generator().manual_seed(0))
        metric.feed(SampleBatch(noisy.clamp(-1, 1) / 2 + 0.5, list(range(len(train)))))
        distances.append(metric.compute()['frechet_distance'])
    assert distances == sorted(distances)
    assert distances[0] < 0.2
    assert distances[-1] > 2


def test_metrics_share_features(pixels):
    pool = ExtractorPool()
    metrics = [bound(dict(type=name, extractor=pixels), pool) for name in ('ClassAccuracy', 'FeatureDiversity')]
    batch = SampleBatch(one_hot([0, 0, 1]), [0, 1, 2], torch.tensor([0, 0, 1]), feed_batch_size=2)
    for metric in metrics:
        metric.feed(batch)
    assert metrics[0].extractor is metrics[1].extractor
    assert metrics[0].extractor.calls == 2  # three images in parts of two, once


@pytest.mark.parametrize('resize', [True, False])
def test_features_are_of_the_size_that_the_extractor_looks_at(pixels, monkeypatch, resize):
    """Of samples and of real images, as the protocol says."""
    monkeypatch.setattr(Pixels, 'input_size', 4)
    seen = []
    monkeypatch.setattr(Pixels, 'forward', lambda self, images: seen.append(images) or Features(images.flatten(1)))
    images = load_split('val')[0][:20] / 2 + 0.5
    common = dict(extractor=pixels, resize=resize)
    frechet = bound(dict(type='FrechetDistance', reference=dict(type='Digits', split='val'), **common))
    diversity = bound(dict(type='FeatureDiversity', **common))
    for metric in (frechet, diversity):
        metric.feed(SampleBatch(images, list(range(20))))
        metric.compute()
        assert metric.protocol()['preparation'] == dict(size=4 if resize else None, center_crop=False, mode='bicubic')
    assert {tuple(batch.shape[1:]) for batch in seen} == {(1, 4, 4) if resize else (1, 8, 8)}
    assert len(seen) == 4  # of samples twice, of 355 real images in two batches
    torch.testing.assert_close(seen[0], Preparation(4 if resize else None)(images))


def test_class_accuracy_is_of_the_size_that_the_extractor_looks_at():
    digits, labels = load_split('val')
    larger = torch.nn.functional.interpolate(digits / 2 + 0.5, (24, 24), mode='bilinear')
    metric = bound(dict(type='ClassAccuracy', extractor=dict(type='DigitClassifier')))
    metric.feed(SampleBatch(larger, list(range(len(labels))), labels))
    assert metric.compute()['class_accuracy'] > 0.9
    assert metric.protocol()['preparation']['size'] == 8


def test_real_images():
    assert torch.equal(real_images(dict(images=torch.ones(1, 3, 2, 2))), torch.ones(1, 3, 2, 2))
    assert torch.equal(real_images(dict(latents=-torch.ones(1, 1, 2, 2))), torch.zeros(1, 1, 2, 2))
    with pytest.raises(ValueError, match='test_mode'):
        real_images(dict(noise=torch.ones(1, 1, 2, 2)))
