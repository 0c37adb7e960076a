import pytest
import torch
from torch import nn

from lakonlab.evaluation.evaluate import build_evaluation_loader, evaluate
from lakonlab.evaluation.extractor import ExtractorPool, FeatureExtractor, Features
from lakonlab.evaluation.frechet import Moments
from lakonlab.evaluation.inception_metrics import InceptionMetrics
from lakonlab.evaluation.preparation import Preparation
from lakonlab.evaluation.samples import SampleBatch
from lakonlab.evaluation.statistics import ReferenceStatistics
from lakonlab.ranks import ALONE
from lakonlab.registry import FEATURE_EXTRACTORS, METRICS
from tests.evaluation.test_feature_distances import features
from tests.evaluation.thread_ranks import run_threads
from tests.processes import ProcessPool

SIDE = 2
DIGITS = dict(type='Digits', split='val', test_mode=True)


class FourPixels(FeatureExtractor):
    """The pixels of images of 2 x 2, as features and as scores of classes."""

    input_size = SIDE

    def forward(self, images):
        return Features(images.flatten(1).float(), 5 * images.flatten(1).float())

    def protocol(self):
        return dict(name='FourPixels')


@pytest.fixture(autouse=True)
def _extractor(monkeypatch):
    monkeypatch.setitem(FEATURE_EXTRACTORS._module_dict, 'FourPixels', FourPixels)


def images(count, seed=0, shift=0.0):
    return features(count, 12, shift, seed=seed).reshape(count, 3, SIDE, SIDE).clamp(max=3) / 3


def reference(path, count=300, with_features=True, **provenance):
    values = images(count, seed=1).flatten(1)
    moments = Moments()
    moments.update(values)
    kept = values if with_features else None
    ReferenceStatistics(moments.mean(), moments.covariance(), count, kept, provenance).save(path)
    return str(path)


def built(path, **arguments):
    arguments = dict(dict(extractor=dict(type='FourPixels'), use_kid=True, kid_max_subset_size=100), **arguments)
    metric = METRICS.build(dict(type='InceptionMetrics', reference=path, **arguments))
    metric.bind(ExtractorPool())
    return metric


def fed(metric, samples, size):
    metric.reset()
    ids = list(range(len(samples)))
    for start in range(0, len(samples), size):
        part = slice(start, start + size)
        metric.feed(SampleBatch(samples[part], ids[part]))
    return metric.compute()


def test_all_numbers_are_those_of_torch_fidelity(tmp_path):
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    metric, samples = built(reference(tmp_path / 'r.safetensors')), images(200, shift=0.2)
    found = fed(metric, samples, 64)
    generated, real = samples.flatten(1), images(300, seed=1).flatten(1)
    statistics = [fid_features_to_statistics(part.double()) for part in (generated, real)]
    fid = fid_statistics_to_metric(*statistics, verbose=False)
    kid = kid_features_to_metric(generated, real, kid_subset_size=100, verbose=False)
    covered = prc_features_to_metric(generated, real, verbose=False)
    score = isc_features_to_metric(5 * generated, 10, shuffle=False)
    expected = {
        'fid': fid['frechet_inception_distance'],
        'kid': 1000 * kid['kernel_inception_distance_mean'],
        'kid_std': 1000 * kid['kernel_inception_distance_std'],
        'precision': covered['precision'],
        'recall': covered['recall'],
        'is': score['inception_score_mean'],
        'is_std': score['inception_score_std'],
    }
    assert list(found) == list(expected)
    assert found == pytest.approx(expected, rel=1e-4)


def test_numbers_do_not_depend_on_batches(tmp_path):
    metric, samples = built(reference(tmp_path / 'r.safetensors')), images(150)
    expected = fed(metric, samples, 150)
    for size in (1, 7, 64):
        assert fed(metric, samples, size) == pytest.approx(expected, rel=1e-10, abs=1e-12)
    # of the order, only what draws or divides by it depends
    shuffled = fed(metric, samples[torch.randperm(150, generator=torch.Generator().manual_seed(0))], 64)
    for name in ('fid', 'precision', 'recall'):
        assert shuffled[name] == pytest.approx(expected[name], rel=1e-9)


def test_only_the_first_images_count(tmp_path, caplog):
    path = reference(tmp_path / 'r.safetensors')
    samples = images(150)
    expected = fed(built(path), samples[:100], 100)
    metric = built(path, num_images=100)
    assert fed(metric, samples, 64) == pytest.approx(expected, rel=1e-10)
    assert metric.protocol()['num_images'] == 100
    assert not caplog.records
    fed(metric, samples[:50], 64)
    assert 'there were only 50 samples' in caplog.text
    assert (metric.protocol()['num_images'], metric.protocol()['wanted_images']) == (50, 100)


def test_protocol_and_names(tmp_path):
    path = reference(tmp_path / 'r.safetensors', source='here')
    metric = built(path, prefix='patch', center_crop=True, use_pr=False, is_shuffle=True)
    numbers = fed(metric, torch.rand(60, 3, 6, 6, generator=torch.Generator().manual_seed(0)), 60)
    assert set(numbers) == {f'patch_{name}' for name in ('fid', 'kid', 'kid_std', 'is', 'is_std')}
    assert metric.better == dict(patch_fid='lower', patch_kid='lower', patch_is='higher')
    protocol = metric.protocol()
    assert protocol['preparation'] == dict(size=2, center_crop=True, mode='bicubic')
    assert protocol['kid'] == dict(num_subsets=100, subset_size=60, seed=2020, scale=1000)
    assert protocol['inception_score'] == dict(splits=10, shuffle=True, seed=2020)
    assert protocol['reference']['path'] == path
    assert protocol['reference']['provenance'] == dict(source='here')
    assert len(protocol['reference']['sha256']) == 64
    assert metric.title == 'InceptionMetrics (patch)'


def test_preparation():
    ramp = torch.linspace(0, 1, 6 * 8).reshape(1, 1, 6, 8)
    assert torch.equal(Preparation(2, center_crop=True)(ramp), ramp[..., 2:4, 3:5])
    assert Preparation(None)(ramp) is ramp
    for mode in ('bicubic', 'bilinear'):
        resized = Preparation(3, mode=mode)(ramp)
        expected = nn.functional.interpolate(ramp, (3, 3), mode=mode, antialias=mode == 'bicubic')
        torch.testing.assert_close(resized, expected, atol=1e-6, rtol=0)
    sharp = (torch.arange(64).reshape(1, 1, 8, 8) % 2).float()
    assert Preparation(12)(sharp).aminmax() == (0, 1)  # bicubic weights overshoot
    with pytest.raises(ValueError, match='cuts 9 x 9 pixels out of images of 6 x 8'):
        Preparation(9, center_crop=True)(ramp)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (dict(), 'name one file'),
        (dict(reference='a.npz', reference_pkl='b.pkl'), 'name one file'),
        (dict(reference='a.npz', num_images=1), r'num_images=1: expected at least 2'),
        (dict(reference='a.npz', pr_k=0), r'pr_k=0: expected at least 1'),
        (dict(reference='a.npz', resize_mode='area'), "resize_mode='area'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        InceptionMetrics(**arguments)


def test_references_that_do_not_fit(tmp_path):
    moments = reference(tmp_path / 'moments.safetensors', with_features=False)
    with pytest.raises(ValueError, match='holds no features'):
        built(moments)
    assert set(fed(built(moments, use_kid=False, use_pr=False), images(20), 20)) == {'fid', 'is', 'is_std'}
    other = reference(tmp_path / 'other.safetensors', extractor=dict(name='Other'))
    with pytest.raises(ValueError, match=r'made with the extractor .*Other'):
        built(other)
    cropped = reference(tmp_path / 'cropped.safetensors', preparation=Preparation(2, center_crop=True).protocol())
    with pytest.raises(ValueError, match=r"made with the preparation .*'center_crop': True"):
        built(cropped)
    assert built(cropped, center_crop=True).reference.num_images == 300


class Painter(nn.Module):
    """Digits of noise."""

    def val_step(self, data, role=None, test_cfg_override=None, source=None):
        pictures = (0.5 + 0.3 * data['noise'] + 0.02 * data['labels'].reshape(-1, 1, 1, 1)).clamp(0, 1)
        return dict(num_samples=len(pictures), pred_imgs=pictures)


def digit_reference(path):
    from lakonlab.datasets.digits import load_split
    from lakonlab.evaluation.digit_classifier import DigitClassifier

    with torch.no_grad():
        values = DigitClassifier()(load_split('val')[0] / 2 + 0.5).embedding
    moments = Moments()
    moments.update(values)
    ReferenceStatistics(moments.mean(), moments.covariance(), len(values), values).save(path)
    return str(path)


def measured(ranks, path, size, batch):
    """An evaluation of ``size`` samples; called in processes, too."""
    data = dict(workers_per_gpu=0, val=dict(**DIGITS, num_test_images=size), val_dataloader=dict(samples_per_gpu=batch))
    metric = built(path, extractor=dict(type='DigitClassifier'), kid_max_subset_size=50, kid_num_subsets=5, is_splits=2)
    loader = build_evaluation_loader(data, 'val', ranks=ranks)
    return evaluate(Painter(), loader, [metric], ranks=ranks)


@pytest.mark.parametrize('size', [61, 30])
def test_numbers_do_not_depend_on_the_number_of_processes(tmp_path, size):
    path = digit_reference(tmp_path / 'r.safetensors')
    expected = measured(ALONE, path, size, 16)
    assert expected['protocol']['InceptionMetrics']['num_images'] == size
    for batch in (5, 16):
        for world_size in (1, 2, 3):
            for results in run_threads(lambda ranks, batch=batch: measured(ranks, path, size, batch), world_size):
                assert results['metrics'] == pytest.approx(expected['metrics'], rel=1e-6)
                assert results['protocol'] == expected['protocol']


@pytest.mark.slow  # starts three processes
def test_numbers_of_real_processes(tmp_path):
    path = digit_reference(tmp_path / 'r.safetensors')
    expected = measured(ALONE, path, 61, 8)
    with ProcessPool(3) as pool:
        for results in pool.run(measured, path, 61, 8):
            assert results['metrics'] == pytest.approx(expected['metrics'], rel=1e-9)
            assert results['num_samples'] == 61
