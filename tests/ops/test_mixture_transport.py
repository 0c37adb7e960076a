"""The Knothe-Rosenblatt map against the recorded vectors, its own inverse, and scipy."""

import itertools

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lakonlab.ops.isotropic_mixture import GaussianMixture, sample_mixture
from lakonlab.ops.mixture_transport import from_normal, mixture_quantile, principal_axes, to_normal
from lakonlab.ops.random_source import SeededSource
from tests import golden
from tests.ops.test_isotropic_mixture import mixture_of, random_mixture

CASES = golden.load('gm_ops')


@pytest.mark.parametrize('name', [name for name in CASES if name.endswith('kr_forward')])
def test_recorded_map_to_noise(name):
    case = CASES[name]
    noise = to_normal(case['in']['samples'], mixture_of(case['in'], 'gm.'))
    # recorded in single precision whatever the input, which the inverse of erf amplifies in the tails
    golden.assert_close(noise.abs(), case['out']['y_abs'], 5e-3)


@pytest.mark.parametrize('name', [name for name in CASES if name.endswith('kr_inverse')])
def test_recorded_map_from_noise(name):
    """The recorded noise is in axes whose signs are not known: one of the combinations of each batch entry fits."""
    case = CASES[name]
    noise, mixture, expected = case['in']['z'], mixture_of(case['in'], 'gm.'), case['out']['y']
    tolerance = max(2e-6 if noise.dtype == torch.float64 else 5e-3, 5 * float(case['out']['roundtrip_err']))
    num_channels = noise.shape[-3]
    best = torch.full((len(noise),), torch.inf, dtype=torch.float64)
    for signs in itertools.product([1.0, -1.0], repeat=num_channels):
        flipped = noise * torch.tensor(signs).to(noise).reshape(-1, 1, 1)
        error = (from_normal(flipped, mixture) - expected).abs().flatten(1).amax(dim=1).double()
        best = torch.minimum(best, error / expected.abs().max())
    assert (best < tolerance).all(), best


@pytest.mark.parametrize('batch', [(2,), (1, 2)])
def test_there_and_back(batch):
    mixture = random_mixture(batch, 5, 3, (4, 3))
    samples = sample_mixture(mixture, 3, SeededSource(0))
    noise = to_normal(samples, mixture)
    inner = (noise.abs() < 3.5).all(dim=-3, keepdim=True)
    torch.testing.assert_close(torch.where(inner, from_normal(noise, mixture), samples), samples, rtol=0, atol=1e-9)
    assert inner.float().mean() > 0.9


def test_samples_become_standard_normal_noise():
    mixture = random_mixture((1,), 4, 3, (1, 2))
    count = 20000
    noise = to_normal(sample_mixture(mixture, count, SeededSource(1)), mixture)[0].movedim(0, -1).flatten(1, 2)
    error = count**-0.5
    assert (noise.mean(dim=-1).abs() < 5 * error).all()
    covariance = torch.einsum('ips,jps->pij', noise, noise) / count
    assert ((covariance - torch.eye(3, dtype=torch.float64)).abs() < 5 * 1.5 * error).all()
    statistic = scipy.stats.kstest(noise[:, 0].flatten()[:5000].numpy(), 'norm')
    assert statistic.pvalue > 1e-4


def test_one_component_is_whitened():
    mixture = random_mixture((2,), 1, 3, (2, 2))
    samples = torch.randn(2, 1, 3, 2, 2, dtype=torch.float64)
    white = (samples - mixture.means) / mixture.logstds.exp()
    expected = torch.einsum('bji,bsjhw->bsihw', principal_axes(mixture), white)
    torch.testing.assert_close(to_normal(samples, mixture), expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize('std', [0.05, 0.5, 3.0])
def test_quantile_is_that_of_scipy(std):
    means, weights = np.array([-2.0, 0.1, 4.0]), np.array([0.2, 0.5, 0.3])
    for z in (-8.0, -3.0, -0.84162, 0.0, 0.3, 2.5, 8.0):

        def excess(x, z=z):
            if z > 0:
                return scipy.stats.norm.sf(z) - weights @ scipy.stats.norm.sf(x, means, std)
            return weights @ scipy.stats.norm.cdf(x, means, std) - scipy.stats.norm.cdf(z)

        expected = scipy.optimize.brentq(excess, -2 + std * z - 1, 4 + std * z + 1, xtol=1e-14, rtol=1e-14)
        ours = mixture_quantile(
            torch.tensor(z, dtype=torch.float64),
            torch.tensor(means),
            torch.tensor(weights).log(),
            torch.tensor([std], dtype=torch.float64),
        )
        slope = weights @ scipy.stats.norm.pdf(expected, means, std)
        rounding = 1e-13 * min(scipy.stats.norm.cdf(z), scipy.stats.norm.sf(z)) / slope
        assert abs(float(ours) - expected) < 1e-9 + 100 * rounding


def test_gradcheck():
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(3, 4, dtype=torch.float64, generator=generator)
    leaves = (torch.tensor([-1.5, 0.2, 2.0], dtype=torch.float64), means, torch.randn_like(means))
    leaves = tuple(leaf.requires_grad_() for leaf in (*leaves, torch.full((3, 1), 0.4, dtype=torch.float64)))
    assert torch.autograd.gradcheck(mixture_quantile, leaves)

    mixture = random_mixture((1,), 2, 1, (1, 2))  # one channel, whose axis nothing can turn
    samples = torch.randn(1, 2, 1, 1, 2, dtype=torch.float64)
    leaves = tuple(tensor.clone().requires_grad_() for tensor in mixture)
    assert torch.autograd.gradcheck(lambda *x: to_normal(samples, GaussianMixture(*x)), leaves)
    assert torch.autograd.gradcheck(lambda *x: from_normal(samples, GaussianMixture(*x)), leaves)


@given(
    sizes=st.tuples(st.integers(1, 6), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3)),
    batch=st.sampled_from([(1,), (2,), (2, 1)]),
    spread=st.sampled_from([0.01, 1.0, 30.0]),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=20)
def test_single_precision_follows_double(sizes, batch, spread, seed):
    """The images of the same noise, up to the width of the gaps between components, over which a quantile jumps."""
    components, channels, *size = sizes
    mixture = random_mixture(batch, components, channels, size, seed)
    mixture = mixture._replace(means=spread * mixture.means)
    noise = torch.randn(*batch, 2, channels, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    wide = from_normal(noise, mixture)
    again = to_normal(wide, mixture)
    torch.testing.assert_close(again, noise, rtol=0, atol=1e-7)
    single = GaussianMixture(*(tensor.float().mT.contiguous().mT for tensor in mixture))
    narrow = from_normal(noise.float(), single)
    assert narrow.dtype == torch.float32
    assert narrow.isfinite().all()
