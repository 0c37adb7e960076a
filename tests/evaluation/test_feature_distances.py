"""Metrics of given features, against torch-fidelity, closed forms and sets whose answer is known."""

import numpy as np
import pytest
import torch

from lakonlab.evaluation.frechet import Moments, frechet_distance
from lakonlab.evaluation.inception_score import inception_score
from lakonlab.evaluation.kernel_distance import kernel_distance, unbiased_discrepancy
from lakonlab.evaluation.manifold import precision_recall


def features(count, size=24, shift=0.0, scale=1.0, seed=0):
    """Like pool features: not negative, correlated, of unequal spread."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(size, size, generator=torch.Generator().manual_seed(99)) / size**0.5
    return torch.relu(torch.randn(count, size, generator=generator) @ mixing * scale + 0.4 + shift)


@pytest.mark.parametrize('sizes', [(400, 300), (60, 500)])
def test_frechet_distance_is_that_of_torch_fidelity(sizes):
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    generated, real = features(sizes[0], shift=0.1), features(sizes[1], seed=1)
    statistics = [fid_features_to_statistics(part.double()) for part in (generated, real)]
    expected = fid_statistics_to_metric(*statistics, verbose=False)['frechet_inception_distance']
    moments = []
    for part in (generated, real):
        moments.append(Moments())
        for chunk in part.split(37):
            moments[-1].update(chunk)
    found = frechet_distance(*(value for m in moments for value in (m.mean(), m.covariance())))
    assert found == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_of_gaussian_samples_approaches_the_closed_form():
    generator = torch.Generator().manual_seed(0)
    deviations = torch.tensor([[1.0, 0.5, 2.0], [1.5, 0.5, 1.0]], dtype=torch.float64)
    means = torch.tensor([[0.0, 1.0, 0.0], [1.0, 1.0, -1.0]], dtype=torch.float64)
    moments = []
    for mean, deviation in zip(means, deviations):
        moments.append(Moments())
        for _ in range(10):
            sample = torch.randn(20000, 3, generator=generator, dtype=torch.float64)
            moments[-1].update(mean + deviation * sample)
    found = frechet_distance(*(value for m in moments for value in (m.mean(), m.covariance())))
    expected = (means[0] - means[1]).square().sum() + (deviations[0] - deviations[1]).square().sum()
    assert found == pytest.approx(expected.item(), rel=0.02)


@pytest.mark.parametrize('ratio', [1e-3, 1e-9, 1e-14, 0.0])
def test_nearly_singular_covariances(ratio):
    """Of covariances that commute, so that the distance is known, with one direction that hardly spreads."""
    rotation, _ = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))
    deviations = torch.tensor([[3.0, 2, 1, 1, 0.5, ratio], [2.0, 2, 0.5, 1, 1.5, 2 * ratio]], dtype=torch.float64)
    covariances = [rotation @ torch.diag(part**2) @ rotation.T for part in deviations]
    mean = torch.zeros(6, dtype=torch.float64)
    expected = (deviations[0] - deviations[1]).square().sum().item()
    found = frechet_distance(mean, covariances[0], mean, covariances[1])
    assert found == pytest.approx(expected, abs=1e-12 + ratio * 1e-6)


def test_moments_of_other_extractors_are_refused():
    with pytest.raises(ValueError, match='moments of 3 and 4 features'):
        frechet_distance(torch.zeros(3), torch.eye(3), torch.zeros(4), torch.eye(4))


@pytest.mark.parametrize(('subsets', 'size'), [(10, 50), (3, 200)])
def test_kernel_distance_is_that_of_torch_fidelity(subsets, size):
    from torch_fidelity.metric_kid import kid_features_to_metric

    generated, real = features(250, shift=0.3), features(300, seed=1)
    expected = kid_features_to_metric(
        generated, real, kid_subsets=subsets, kid_subset_size=size, rng_seed=2020, verbose=False
    )
    found = kernel_distance(generated, real, subsets, size)
    assert found.mean == pytest.approx(expected['kernel_inception_distance_mean'], rel=1e-5)
    assert found.std == pytest.approx(expected['kernel_inception_distance_std'], rel=1e-4)


def test_kernel_distance_is_unbiased():
    """Two samples of one distribution have, on average, no distance; a biased estimate would be far above zero."""
    values = [
        unbiased_discrepancy(features(40, seed=2 * seed).double(), features(50, seed=2 * seed + 1).double())
        for seed in range(300)
    ]
    error = np.std(values) / len(values) ** 0.5
    assert abs(np.mean(values)) < 4 * error
    assert min(values) < 0
    biased = []
    for seed in range(20):
        left, right = features(40, seed=2 * seed).double(), features(50, seed=2 * seed + 1).double()
        pairs = [((a @ b.T / 24 + 1) ** 3).mean().item() for a, b in ((left, left), (right, right), (left, right))]
        biased.append(pairs[0] + pairs[1] - 2 * pairs[2])
    assert np.mean(biased) > 20 * error


def test_kernel_distance_in_blocks(monkeypatch):
    left, right = features(70).double(), features(90, seed=1).double()
    whole = unbiased_discrepancy(left, right)
    monkeypatch.setattr('lakonlab.evaluation.kernel_distance.KERNEL_ROWS', 16)
    assert unbiased_discrepancy(left, right) == pytest.approx(whole, rel=1e-12)
    with pytest.raises(ValueError, match='subsets of 80 cannot be drawn of 70'):
        kernel_distance(left, right, 2, 80)


@pytest.mark.parametrize('neighbours', [1, 3, 5])
@pytest.mark.parametrize('blocks', [(2048, 8192), (32, 50)])
def test_precision_and_recall_are_those_of_torch_fidelity(neighbours, blocks, monkeypatch):
    from torch_fidelity.metric_prc import calculate_precision_recall_full

    monkeypatch.setattr('lakonlab.evaluation.manifold.BLOCK_ROWS', blocks[0])
    monkeypatch.setattr('lakonlab.evaluation.manifold.BLOCK_COLUMNS', blocks[1])
    generated, real = features(220, shift=0.1, scale=0.7), features(300, seed=1)
    expected = calculate_precision_recall_full(generated, real, neighbours)
    found = precision_recall(generated, real, neighbours)
    assert found == pytest.approx(expected, abs=1e-6)
    assert 0.05 < found.recall < found.precision <= 1


def test_precision_and_recall_of_constructed_sets():
    """Two clusters of real images: what covers one of them, with a third of strangers, is half recalled."""
    line = torch.arange(10.0)[:, None]
    real = torch.cat([torch.cat([line, line * 0], 1), torch.cat([line + 1000, line * 0], 1)])
    near = torch.cat([line + 0.25, line * 0], 1)
    strangers = torch.cat([line[:5] * 1e-3 + 500, line[:5] * 0 + 500], 1)
    assert precision_recall(torch.cat([near, strangers]), real, 1) == pytest.approx((10 / 15, 0.5))
    assert precision_recall(real, real, 3) == (1, 1)
    assert precision_recall(strangers, real, 1) == (0, 0)
    with pytest.raises(ValueError, match='5 nearest neighbours cannot be found among 5'):
        precision_recall(strangers, real, 5)


@pytest.mark.parametrize('shuffle', [False, True])
@pytest.mark.parametrize(('count', 'splits'), [(103, 10), (50, 1), (12, 12)])
def test_inception_score_is_that_of_torch_fidelity(count, splits, shuffle):
    from torch_fidelity.metric_isc import isc_features_to_metric

    logits = 3 * torch.randn(count, 20, generator=torch.Generator().manual_seed(0))
    expected = isc_features_to_metric(logits, splits, shuffle, 2020)
    found = inception_score(logits, splits, shuffle)
    assert found.mean == pytest.approx(expected['inception_score_mean'], rel=1e-10)
    assert found.std == pytest.approx(expected['inception_score_std'], rel=1e-8, abs=1e-12)


def test_inception_score_of_certain_classes():
    logits = 1e4 * torch.eye(8).repeat(6, 1)
    assert inception_score(logits, 3).mean == pytest.approx(8)
    assert inception_score(torch.zeros(10, 8), 2) == pytest.approx((1, 0))
    with pytest.raises(ValueError, match='cannot be divided into 11 parts'):
        inception_score(torch.zeros(10, 8), 11)
