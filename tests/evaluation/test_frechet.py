import pytest
import torch

from lakonlab.evaluation.frechet import Moments, frechet_distance


def moments_of(features, parts=1):
    moments = Moments()
    for part in features.chunk(parts):
        moments.update(part)
    return moments


def random_covariance(dimension, rank, generator):
    factor = torch.randn(dimension, rank, generator=generator, dtype=torch.float64)
    return factor @ factor.T


def test_closed_form_of_commuting_gaussians():
    deviations_1 = torch.tensor([1.0, 2.0, 0.0, 3.0], dtype=torch.float64)
    deviations_2 = torch.tensor([2.0, 2.0, 1.0, 0.5], dtype=torch.float64)
    mean_1 = torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float64)
    mean_2 = torch.tensor([1.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    rotation, _ = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))

    def rotated(deviations):
        return rotation @ torch.diag(deviations**2) @ rotation.T

    expected = (mean_1 - mean_2).square().sum() + (deviations_1 - deviations_2).square().sum()
    distance = frechet_distance(mean_1, rotated(deviations_1), mean_2, rotated(deviations_2))
    assert distance == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize('seed', range(5))
def test_equals_the_matrix_square_root(seed):
    from scipy.linalg import sqrtm

    generator = torch.Generator().manual_seed(seed)
    covariance_1, covariance_2 = (random_covariance(24, 40, generator) for _ in range(2))
    mean_1, mean_2 = torch.randn(2, 24, generator=generator, dtype=torch.float64)
    root = sqrtm((covariance_1 @ covariance_2).numpy())
    expected = (mean_1 - mean_2).square().sum() + (covariance_1 + covariance_2).trace() - 2 * root.trace().real
    assert frechet_distance(mean_1, covariance_1, mean_2, covariance_2) == pytest.approx(expected.item(), rel=1e-9)


@pytest.mark.parametrize('rank', [1, 3, 16])
def test_singular_covariances_and_symmetry(rank):
    generator = torch.Generator().manual_seed(rank)
    factors = torch.randn(2, 16, rank, generator=generator, dtype=torch.float64)
    covariance_1, covariance_2 = factors @ factors.mT
    mean = torch.zeros(16)
    root_trace = torch.linalg.matrix_norm(factors[0].T @ factors[1], ord='nuc')
    expected = factors.square().sum() - 2 * root_trace
    forward = frechet_distance(mean, covariance_1, mean, covariance_2)
    assert forward == pytest.approx(expected.item(), rel=1e-12)
    assert forward == pytest.approx(frechet_distance(mean, covariance_2, mean, covariance_1), rel=1e-12)
    assert frechet_distance(mean, covariance_1, mean, covariance_1) == pytest.approx(0, abs=1e-11)


@pytest.mark.parametrize('decades', [3, 6, 9, 13])
@pytest.mark.parametrize('apart', [1e-4, 1e-2, 1.0])
def test_spectra_that_fall_far(decades, apart):
    """Against singular values of the roots themselves, of covariances in bases that are little or far turned."""
    size, generator = 96, torch.Generator().manual_seed(decades)
    basis, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    turn = torch.randn(size, size, generator=generator, dtype=torch.float64)
    deviations = torch.logspace(0.5, (1 - decades) / 2, size, dtype=torch.float64)
    root_1 = basis * deviations
    root_2 = torch.linalg.matrix_exp(apart * (turn - turn.T) / size**0.5) @ basis * (deviations * (1 + apart))
    # the distance is that of the best rotation of one root onto the other
    left, _, right = torch.linalg.svd(root_2.T @ root_1)
    expected = (root_1 - root_2 @ left @ right).square().sum().item()
    mean = torch.zeros(size)
    assert frechet_distance(mean, root_1 @ root_1.T, mean, root_2 @ root_2.T) == pytest.approx(expected, rel=1e-6)


def test_covariances_of_no_spread():
    mean, covariance = torch.ones(4), torch.zeros(4, 4)
    assert frechet_distance(mean, covariance, 2 * mean, covariance) == 4
    assert frechet_distance(mean, covariance, mean, torch.eye(4)) == 4


@pytest.mark.parametrize('parts', [1, 7, 50])
def test_moments_do_not_depend_on_the_batches(parts):
    features = torch.randn(100, 6, generator=torch.Generator().manual_seed(0)) + 1e4
    moments = moments_of(features, parts)
    assert moments.count == 100
    torch.testing.assert_close(moments.mean(), features.double().mean(dim=0), rtol=1e-13, atol=0)
    torch.testing.assert_close(moments.covariance(), torch.cov(features.double().T), rtol=1e-10, atol=1e-12)


def test_bad_features():
    with pytest.raises(ValueError, match='not finite'):
        moments_of(torch.tensor([[1.0, float('nan')]]))
    with pytest.raises(ValueError, match='at least 2'):
        moments_of(torch.ones(1, 3)).covariance()
