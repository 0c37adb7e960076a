"""Mixture algebra against the recorded vectors, torch.distributions, and numerical integration."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lakonlab.ops import isotropic_mixture as im
from lakonlab.ops.isotropic_mixture import GaussianMixture, IsotropicGaussian
from lakonlab.ops.random_source import RecordedSource, SeededSource, TorchSource
from tests import golden

CASES = golden.load('gm_ops')
RECORDED = [name for name, case in CASES.items() if 'kr_' not in name]


def mixture_of(inputs, prefix=''):
    return GaussianMixture(*(inputs[f'{prefix}{key}'] for key in ('means', 'logweights', 'logstds')))


def gaussian_of(inputs, prefix):
    return IsotropicGaussian(inputs[f'{prefix}mean'], inputs[f'{prefix}var'])


def outputs(case):
    """The results of our functions under the names of the recorded ones."""
    params, x = case['params'], case['in']
    op = params['op']
    if op == 'gm_to_mean':
        return {'y': im.mixture_mean(mixture_of(x), params['power'])}
    if op == 'gm_to_iso_gaussian':
        mean, variance = im.isotropic_gaussian(mixture_of(x))
        return {'mean': mean, 'var': variance}
    if op.startswith('gm_to_gaussian'):
        mean, covariance = im.full_gaussian(mixture_of(x))
        return {'mean': mean, 'cov': covariance}
    if op == 'gm_mul_iso_gaussian':
        powers = params['gm_power'], params['gaussian_power']
        product = im.multiply_by_gaussian(mixture_of(x, 'gm.'), gaussian_of(x, 'g.'), *powers, params['eps'])
        return product._asdict()
    if op == 'iso_gaussian_mul_iso_gaussian':
        powers = params['power1'], params['power2']
        mean, variance = im.multiply_gaussians(gaussian_of(x, 'g1.'), gaussian_of(x, 'g2.'), *powers, params['eps'])
        return {'mean': mean, 'var': variance}
    if op == 'gm_mul_gm':
        return im.multiply_mixtures(mixture_of(x, 'gm1.'), mixture_of(x, 'gm2.'))._asdict()
    if op == 'gm_logprob':
        total, component = im.log_probability(x['samples'], mixture_of(x, 'gm.'))
        return {'logprob': total, 'comp_logprob': component}
    if op == 'iso_gaussian_logprob':
        return {'logprob': im.gaussian_log_probability(x['samples'], gaussian_of(x, 'g.'))}
    if op == 'gm_temperature':
        return im.temper(mixture_of(x), params['temperature'], params['eps'])._asdict()
    if op == 'gm_to_sample':
        source = RecordedSource(golden.draws(case, 'component', 'component_noise'))
        return {'y': im.sample_mixture(mixture_of(x), params['n_samples'], source)}
    assert op.startswith('d/d(gm)'), op
    leaves = {key: tensor.clone().requires_grad_() for key, tensor in x.items() if key != 'samples'}
    mixture = mixture_of(leaves, 'gm.')
    loss = im.log_probability(x['samples'], mixture)[0].mean() + im.mixture_mean(mixture).square().mean()
    gradients = torch.autograd.grad(loss, mixture)
    names = ('grad_means', 'grad_logweights', 'grad_logstds')
    return {'loss': loss.detach(), **dict(zip(names, gradients))}


@pytest.mark.parametrize('name', RECORDED)
def test_recorded(name):
    case = CASES[name]
    results = outputs(case)
    assert set(results) == set(case['out'])
    for key, value in results.items():
        expected = case['out'][key]
        tolerance = 1e-9 if expected.dtype == torch.float64 else 2e-5
        golden.assert_close(value.expand_as(expected), expected, tolerance)


def random_mixture(batch=(2,), components=4, channels=3, size=(3, 2), seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return GaussianMixture(
        normal(*batch, components, channels, *size),
        normal(*batch, components, 1, *size).log_softmax(dim=-4),
        0.3 * normal(*batch, 1, 1, 1, 1) - 0.5,
    )


def test_log_probability_is_that_of_torch_distributions():
    mixture = random_mixture()
    samples = torch.randn(2, 5, 3, 3, 2, dtype=torch.float64)
    weights = torch.distributions.Categorical(logits=mixture.logweights.squeeze(-3).movedim(-3, -1))
    means = mixture.means.movedim((-4, -3), (-2, -1))
    stds = mixture.logstds.exp().movedim((-4, -3), (-2, -1)).expand_as(means)
    components = torch.distributions.Independent(torch.distributions.Normal(means, stds), 1)
    reference = torch.distributions.MixtureSameFamily(weights, components)
    expected = torch.stack([reference.log_prob(samples[:, s].movedim(-3, -1)) for s in range(5)], dim=1)
    torch.testing.assert_close(im.log_probability(samples, mixture)[0], expected)


@pytest.mark.parametrize('mixture_power', [1.0, 2.0])
@pytest.mark.parametrize('gaussian_power', [1.0, 0.5, -0.3])
def test_product_with_a_gaussian_by_integration(mixture_power, gaussian_power):
    mixture = random_mixture((), 3, 1, (1, 1))._replace(logstds=torch.full((1, 1, 1, 1), -0.7).double())
    gaussian = IsotropicGaussian(torch.full((1, 1, 1), 0.3).double(), torch.full((1, 1, 1), 2.0).double())
    grid = torch.linspace(-30, 30, 60001, dtype=torch.float64).reshape(-1, 1, 1, 1)
    density = im.log_probability(grid, mixture)[0]
    # a power of a mixture is not a mixture: the formula is for p = 1, or what is returned is itself raised to p
    product = im.multiply_by_gaussian(mixture, gaussian, mixture_power, gaussian_power)
    ours = mixture_power * im.log_probability(grid, product)[0]
    theirs = mixture_power * density + gaussian_power * im.gaussian_log_probability(grid, gaussian)
    difference = (ours - theirs)[20000:40000]
    torch.testing.assert_close(difference, difference[:1].expand_as(difference), rtol=0, atol=1e-9)


def test_product_of_mixtures_by_integration():
    first, second = (random_mixture((), k, 1, (1, 1), seed=k) for k in (2, 3))
    grid = torch.linspace(-8, 8, 2001, dtype=torch.float64).reshape(-1, 1, 1, 1)
    ours = im.log_probability(grid, im.multiply_mixtures(first, second))[0]
    theirs = im.log_probability(grid, first)[0] + im.log_probability(grid, second)[0]
    torch.testing.assert_close(ours - theirs, (ours - theirs)[:1].expand_as(ours), rtol=0, atol=1e-9)


@pytest.mark.parametrize('logstd', [-0.5, -5.0, -7.0])
def test_reshaping_equals_the_quotient_of_gaussians(logstd):
    """In double precision with no floor, where the quotient is exact."""
    mixture = random_mixture()
    scale = torch.tensor(logstd).exp().double()
    mixture = mixture._replace(means=mixture.means * scale, logstds=torch.full_like(mixture.logstds, logstd))
    mean, variance = im.isotropic_gaussian(mixture)
    gaussian = IsotropicGaussian(mean, variance.mean(dim=(-2, -1), keepdim=True))
    shift = 0.3 * scale * torch.randn(mean.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    shrinkage = torch.full_like(gaussian.variance, 0.2)
    replaced = IsotropicGaussian(mean + shift, gaussian.variance * 0.8)
    quotient = im.multiply_gaussians(replaced, gaussian, 1, -1, eps=0)
    expected = im.multiply_by_gaussian(mixture, quotient, eps=0)
    for actual, wanted in zip(im.reshape_gaussian(mixture, gaussian, shift, shrinkage), expected):
        torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize('logstd', [-0.5, -5.76, -6.9, -12.0])
def test_reshaping_by_nothing_changes_nothing(logstd):
    """The published quotient is wrong by 35 % at a variance of 1e-6."""
    mixture = random_mixture(dtype=torch.float32)
    mixture = mixture._replace(
        means=mixture.means * torch.tensor(logstd).exp(), logstds=torch.full_like(mixture.logstds, logstd)
    )
    gaussian = im.isotropic_gaussian(mixture)
    nothing = torch.zeros_like(gaussian.variance)
    same = im.reshape_gaussian(mixture, gaussian, torch.zeros_like(gaussian.mean), nothing)
    for actual, wanted in zip(same, mixture):
        scale = float(wanted.abs().max())
        torch.testing.assert_close(actual, wanted.expand_as(actual), rtol=2e-6, atol=2e-6 * scale)


def test_samples_have_the_moments_of_the_mixture():
    mixture = random_mixture((2,), 3, 2, (1, 2))
    count = 40000
    samples = im.sample_mixture(mixture, count, SeededSource(0))
    mean, covariance = im.full_gaussian(mixture)
    samples = samples.movedim((1, 2), (-2, -1))
    deviation = covariance.diagonal(dim1=-2, dim2=-1).sqrt()
    assert ((samples.mean(dim=-2) - mean).abs() < 5 * deviation / count**0.5).all()
    centred = samples - mean.unsqueeze(-2)
    measured = centred.mT @ centred / count
    scale = deviation.unsqueeze(-1) * deviation.unsqueeze(-2)
    assert ((measured - covariance).abs() < 5 * 1.5 * scale / count**0.5).all()


def test_component_frequencies_are_the_weights():
    probabilities = torch.tensor([[0.1, 0.0, 0.6, 0.3]], dtype=torch.float64)
    count = 100000
    for source in (SeededSource(1), TorchSource(torch.Generator().manual_seed(0))):
        index = source.categorical('component', probabilities, count)
        frequency = torch.bincount(index[0], minlength=4) / count
        assert ((frequency - probabilities[0]).abs() <= 5 * (probabilities[0] / count).sqrt()).all()


@given(
    batch=st.sampled_from([(), (1,), (2, 3)]),
    sizes=st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3)),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
@settings(deadline=None, max_examples=20)
def test_any_shape(batch, sizes, dtype):
    components, channels, *size = sizes
    mixture = random_mixture(batch, components, channels, size, dtype=dtype)
    strided = GaussianMixture(*(tensor.mT.contiguous().mT for tensor in mixture))
    mean, variance = im.isotropic_gaussian(strided)
    assert mean.shape == (*batch, channels, *size)
    assert variance.shape == (*batch, 1, *size)
    assert (variance > 0).all()
    assert im.multiply_mixtures(strided, strided).means.shape == (*batch, components**2, channels, *size)
    if components == 1:
        torch.testing.assert_close(mean, mixture.means.squeeze(-4))


def test_gradcheck_of_what_losses_use():
    mixture = random_mixture((1,), 2, 2, (1, 2))
    samples = torch.randn(1, 2, 2, 1, 2, dtype=torch.float64)
    leaves = tuple(tensor.clone().requires_grad_() for tensor in mixture)
    assert torch.autograd.gradcheck(lambda *x: im.log_probability(samples, GaussianMixture(*x))[0], leaves)
    assert torch.autograd.gradcheck(lambda *x: tuple(im.isotropic_gaussian(GaussianMixture(*x))), leaves)
