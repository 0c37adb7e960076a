"""GMFlow against a data distribution whose flow is known: exact in one step; and its refusals."""

import itertools

import pytest
import torch
from torch import nn

from lakonlab.models.diffusions.gmflow import GMFlow
from lakonlab.models.diffusions.gmflow_steps import (
    ReverseTransition,
    correct_second_order,
    guide,
    posterior_mixture,
    x_0_mixture,
)
from lakonlab.models.losses.gmflow_nll import GMFlowNLLLoss
from lakonlab.ops.isotropic_mixture import GaussianMixture, isotropic_gaussian, log_probability, mixture_mean
from lakonlab.ops.random_source import SeededSource
from lakonlab.ops.shapes import expand_like
from tests.exact_mixture import ExactMixture
from tests.toy_nets import ToyGM

DATA = ExactMixture(
    torch.tensor([[1.5, 0.0], [-1.0, 1.0], [0.0, -1.5]], dtype=torch.float64),
    torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64),
    0.2,
)


class PerfectNetwork(nn.Module):
    """What a mixture network would predict had it learnt the distribution exactly."""

    dtype = torch.float64

    def forward(self, x_t, t):
        return DATA.mixture_output(x_t, t)


def perfect_flow(**kwargs):
    return GMFlow(PerfectNetwork(), num_timesteps=1, **kwargs)


def noise_like_data(count, seed=0):
    return torch.randn(count, 2, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def assert_distributed_as_data(x_0):
    """Component frequencies, mean and covariance within five standard errors."""
    count = len(x_0)
    points = x_0.flatten(1)
    nearest = torch.cdist(points, DATA.means).argmin(dim=1)
    frequency = torch.bincount(nearest, minlength=3) / count
    assert ((frequency - DATA.weights).abs() < 5 * (DATA.weights / count).sqrt()).all(), frequency
    mean, covariance = DATA.moments(0.0)
    deviation = covariance.diagonal().sqrt()
    assert ((points.mean(dim=0) - mean).abs() < 5 * deviation / count**0.5).all()
    centred = points - mean
    error = (centred.T @ centred / count - covariance).abs()
    assert (error < 5 * 1.5 * deviation[:, None] * deviation / count**0.5).all()
    spread = (points - DATA.means[nearest]).std()
    assert abs(spread / 0.2 - 1) < 0.02


def sample(noise, **test_cfg):
    return perfect_flow()(noise=noise, test_cfg_override=test_cfg, source=SeededSource(5))


@pytest.mark.parametrize('num_steps', [1, 3])
@pytest.mark.parametrize('h', [1.0, 'inf'])
def test_gm_sde_draws_the_data_distribution_in_any_number_of_steps(num_steps, h):
    x_0 = sample(
        noise_like_data(20000),
        sampler='FlowSDE',
        sampler_kwargs={'h': h},
        output_mode='sample',
        num_timesteps=num_steps,
    )
    assert_distributed_as_data(x_0)


def test_gm_ode_follows_the_exact_flow_in_one_step():
    noise = noise_like_data(10000)
    x_0 = sample(noise, num_timesteps=1, num_substeps=200)
    assert_distributed_as_data(x_0)
    x_t = noise
    levels = torch.linspace(1, 0, 201, dtype=torch.float64).tolist()
    for sigma, sigma_to in itertools.pairwise(levels):
        x_t = x_t + (sigma_to - sigma) * DATA.velocity(x_t, sigma)
    torch.testing.assert_close(x_0, x_t, rtol=0, atol=1e-6)


def test_velocity_of_the_perfect_network_is_the_exact_one():
    x_t, t = noise_like_data(50), torch.linspace(0.05, 1, 50, dtype=torch.float64)
    u = perfect_flow()(return_u=True, x_t=x_t, t=t)
    torch.testing.assert_close(u, DATA.velocity(x_t, t))


class NarrowNetwork(PerfectNetwork):
    """Knows the mean and the variance of the posterior, but not its shape, so that its mixtures of two steps differ."""

    def forward(self, x_t, t):
        mean, variance = isotropic_gaussian(GaussianMixture(**DATA.mixture_output(x_t, t)))
        variance = variance.mean(dim=(1, 2, 3)).reshape(-1, 1, 1, 1, 1)
        return {
            'means': mean.unsqueeze(1),
            'logweights': torch.zeros_like(mean[:, None, :1]),
            'logstds': 0.5 * variance.log(),
        }


def test_second_order_beats_first_order_where_there_is_something_to_gain():
    """Against the exact mixture on the same solver grid; without guidance, where the published sampler fails."""
    noise = noise_like_data(300)
    exact = sample(noise, num_timesteps=1, num_substeps=512)
    errors = {}
    for num_steps in (8, 32):
        for order in (1, 2):
            settings = dict(num_timesteps=num_steps, order=order, num_substeps=512 // num_steps, gm2_coefs=[0.0, 0.0])
            x_0 = GMFlow(NarrowNetwork(), num_timesteps=1)(noise=noise, test_cfg_override=settings)
            errors[order, num_steps] = float((x_0 - exact).abs().mean())
    for num_steps in (8, 32):
        assert errors[2, num_steps] < 0.7 * errors[1, num_steps], errors
    assert errors[2, 32] < 0.5 * errors[2, 8], errors


def test_second_order_corrects_nothing_where_nothing_is_gained():
    """The perfect network gains nothing from one step to the next: its mixtures already agree on E[x_0 | x_t]."""
    noise = noise_like_data(200)
    orders = [sample(noise, num_timesteps=4, num_substeps=100, order=order) for order in (1, 2)]
    torch.testing.assert_close(orders[0], orders[1], rtol=0, atol=1e-6)


def test_posterior_of_the_exact_mixture_is_the_exact_mixture():
    x_src, x_t = noise_like_data(20), noise_like_data(20, seed=1)
    sigma_src, sigma_t = (torch.full((20, 1, 1, 1), s, dtype=torch.float64) for s in (0.9, 0.4))

    def predict(x, sigma):
        return x_0_mixture(GaussianMixture(**DATA.mixture_output(x, sigma.flatten())), x, sigma)

    posterior = posterior_mixture(predict(x_src, sigma_src), x_src, sigma_src, x_t, sigma_t)
    expected = predict(x_t, sigma_t)
    torch.testing.assert_close(posterior.means, expected.means)
    torch.testing.assert_close(posterior.logweights.exp(), expected.logweights.exp())
    torch.testing.assert_close(posterior.logstds.expand_as(expected.logstds), expected.logstds)


def test_reverse_transition_of_the_exact_mixture_is_bayes_rule():
    """``p(x_low | x_high)`` is proportional to ``p(x_low) p(x_high | x_low)``."""
    sigma_high, sigma_low = (torch.full((1, 1, 1, 1), s, dtype=torch.float64) for s in (0.8, 0.5))
    x_high = noise_like_data(1)
    mixture = x_0_mixture(GaussianMixture(**DATA.mixture_output(x_high, sigma_high.flatten())), x_high, sigma_high)
    reverse = ReverseTransition.between(sigma_high, sigma_low).of_mixture(x_high, mixture)
    x_low = noise_like_data(40, seed=2)
    ours = log_probability(x_low[None], reverse)[0].flatten()
    marginal = GaussianMixture(
        (0.5 * DATA.means)[:, :, None, None],
        DATA.weights.log()[:, None, None, None],
        torch.full((1, 1, 1, 1), (0.25 * 0.2**2 + 0.5**2) ** 0.5, dtype=torch.float64).log(),
    )
    scale = 0.2 / 0.5
    variance = 0.8**2 - (scale * 0.5) ** 2
    forward = -0.5 * (x_high - scale * x_low).square().flatten(1).sum(dim=1) / variance
    theirs = log_probability(x_low, marginal)[0].flatten() + forward
    torch.testing.assert_close(ours - ours[0], theirs - theirs[0])


def random_mixture(seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    means = scale * torch.randn(2, 3, 2, 2, 2, dtype=torch.float64, generator=generator)
    logweights = torch.randn(2, 3, 1, 2, 2, dtype=torch.float64, generator=generator).log_softmax(dim=1)
    return GaussianMixture(means, logweights, torch.full((2, 1, 1, 1, 1), scale, dtype=torch.float64).log())


@pytest.mark.parametrize('scale', [1.0, 3e-3, 1e-3, 1e-4])
def test_inactive_guidance_is_the_identity_in_single_precision(scale):
    conditional, negative = (
        GaussianMixture(*(tensor.float() for tensor in random_mixture(seed, scale))) for seed in (0, 1)
    )
    weight = torch.tensor([0.0, 0.4]).reshape(2, 1, 1, 1)
    guided = guide(conditional, negative, weight, orthogonal=1.0).mixture
    for actual, expected in zip(guided, conditional):
        tolerance = 2e-6 * float(expected.abs().max())
        torch.testing.assert_close(actual[:1], expected[:1].expand_as(actual[:1]), rtol=0, atol=tolerance)
    assert not torch.allclose(guided.means[1], conditional.means[1], rtol=1e-3, atol=0)


@pytest.mark.parametrize('scale', [1.0, 3e-2, 1e-3])
def test_guidance_does_not_depend_on_the_unit_of_length(scale):
    """The published one is wrong by 33 % at variances of 1e-6; ours scales with the data."""
    weight = torch.full((2, 1, 1, 1), 0.3, dtype=torch.float64)
    reference = guide(random_mixture(0), random_mixture(1), weight, orthogonal=0.5).mixture
    guided = guide(random_mixture(0, scale), random_mixture(1, scale), weight, orthogonal=0.5).mixture
    torch.testing.assert_close(mixture_mean(guided) / scale, mixture_mean(reference), rtol=1e-6, atol=1e-6)


def test_correction_iterations_move_the_mean_as_intended():
    conditional = random_mixture(0)
    guided = guide(conditional, random_mixture(1), torch.full((2, 1, 1, 1), 0.2, dtype=torch.float64), 1.0)
    target = mixture_mean(guided.mixture)
    extrapolated = target - 0.05 * torch.randn(
        target.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3)
    )
    errors = []
    for iterations in (0, 4):
        moved = mixture_mean(correct_second_order(guided, extrapolated, 0.1, 0.5, (0.0, 0.0), iterations))
        errors.append(float((moved - target - (target - extrapolated) * 0.1).norm()))
    assert errors[1] < 0.5 * errors[0]


def test_gradcheck_of_the_transition_loss():
    x_high, x_low = (torch.randn(2, 2, 1, 2, dtype=torch.float64) for _ in range(2))
    sigma_high, sigma_low = torch.tensor([0.9, 0.3]).double(), torch.tensor([0.4, 0.0]).double()
    transition = ReverseTransition.between(expand_like(sigma_high, x_low), expand_like(sigma_low, x_low))
    loss = GMFlowNLLLoss()

    def value(means, logits, logstds):
        mixture = GaussianMixture(means, logits.log_softmax(dim=1), logstds)
        reverse = transition.of_mixture(x_high, x_0_mixture(mixture, x_high, expand_like(sigma_high, x_high)))
        return loss({**reverse._asdict(), 'x_t_low': x_low})

    shapes = (2, 3, 2, 1, 2), (2, 3, 1, 1, 2), (2, 1, 1, 1, 1)
    leaves = tuple(torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes)
    assert torch.autograd.gradcheck(value, leaves)


def toy_flow(**kwargs):
    return GMFlow(ToyGM(3, 2, num_classes=4).randomize(0), num_timesteps=1, **kwargs)


def test_a_sample_outside_the_interval_is_not_guided():
    x_t = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([4, 4, 0, 1])
    flow = toy_flow(test_cfg={'guidance_interval': [0.0, 0.5]})
    t = torch.tensor([0.3, 0.8])
    guided = flow(return_u=True, x_t=x_t, t=t, guidance_scale=0.4, class_labels=labels)
    plain = flow(return_u=True, x_t=x_t, t=t, class_labels=labels[2:])
    torch.testing.assert_close(guided[1], plain[1], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(guided[0], plain[0], atol=1e-3)


def test_evaluations_are_counted_without_substeps():
    flow = toy_flow(test_cfg={'num_timesteps': 8, 'num_substeps': 16})
    assert flow.num_function_evaluations() == 8
    assert flow.num_solver_steps() == 128


def test_nothing_of_the_caller_is_changed():
    override = {'sampler': 'FlowSDE', 'sampler_kwargs': {'h': 1.0}, 'num_timesteps': 2, 'output_mode': 'sample'}
    before = {**override, 'sampler_kwargs': dict(override['sampler_kwargs'])}
    toy_flow()(
        noise=torch.randn(1, 2, 3, 3),
        test_cfg_override=override,
        class_labels=torch.tensor([0]),
        source=SeededSource(0),
    )
    assert override == before


@pytest.mark.parametrize(
    ('override', 'scale', 'message'),
    [
        ({'num_timesteps': 2}, 1.5, r'guidance_scale=1.5.*probabilistic'),
        ({'num_timesteps': 2}, 0.3, r'conditions for 2 samples'),
        ({'num_timesteps': 2, 'sampler': 'FlowHeunODE'}, 0.0, r"sampler='FlowHeunODE'.*order 1"),
        ({'num_timesteps': 2, 'order': 3}, 0.0, r'order'),
        ({'num_timesteps': 2, 'output_mode': 'median'}, 0.0, r'output_mode'),
        ({'sigmas': [1.0, 0.6, 0.3], 'num_substeps': 2}, 0.0, r'num_substeps=2 does not divide'),
    ],
)
def test_refusals(override, scale, message):
    with pytest.raises(ValueError, match=message):
        toy_flow()(
            noise=torch.zeros(1, 2, 2, 2),
            test_cfg_override=override,
            guidance_scale=scale,
            class_labels=torch.tensor([0]),
        )


def test_training_needs_a_loss():
    with pytest.raises(ValueError, match='flow_loss'):
        toy_flow()(torch.zeros(1, 2, 2, 2), return_loss=True, class_labels=torch.tensor([0]))
