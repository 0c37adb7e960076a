"""The closed-form flow that other tests rely on agrees with torch's distributions."""

import pytest
import torch
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from tests.exact_mixture import ExactMixture

MEANS = torch.tensor([[1.0, 0.5], [-0.8, 0.3], [0.2, -1.1]], dtype=torch.float64)
WEIGHTS = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)


def marginal(sigma: float, std: float) -> MixtureSameFamily:
    scale = ((1 - sigma) ** 2 * std**2 + sigma**2) ** 0.5 * torch.ones_like(MEANS)
    return MixtureSameFamily(Categorical(WEIGHTS), Independent(Normal((1 - sigma) * MEANS, scale), 1))


@pytest.mark.parametrize('sigma', [0.05, 0.5, 0.97])
def test_velocity_follows_from_the_score(sigma):
    std = 0.3
    x = torch.randn(6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    (score,) = torch.autograd.grad(marginal(sigma, std).log_prob(x).sum(), x)
    noise = -sigma * score  # Tweedie: E[noise | x_t] = -sigma * score
    expected = noise - (x - sigma * noise) / (1 - sigma)
    actual = ExactMixture(MEANS, WEIGHTS, std).velocity(x.detach(), torch.full((6,), sigma, dtype=x.dtype))
    torch.testing.assert_close(actual, expected.detach(), rtol=1e-10, atol=1e-10)


def test_velocity_is_the_mean_of_the_mixture_and_has_limits():
    mixture = ExactMixture(MEANS, WEIGHTS, 0.3)
    x = torch.randn(4, 2, 3, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    sigma = torch.tensor([1.0, 0.6, 0.2, 0.0], dtype=torch.float64)
    output = mixture.mixture_output(x, sigma)
    assert [output[key].shape for key in ('means', 'logweights', 'logstds')] == [
        (4, 3, 2, 3, 5),
        (4, 3, 1, 3, 5),
        (4, 1, 1, 1, 1),
    ]
    u = mixture.velocity(x, sigma)
    torch.testing.assert_close((output['logweights'].exp() * output['means']).sum(1), u)
    torch.testing.assert_close(u[0], x[0] - (WEIGHTS @ MEANS)[:, None, None])  # pure noise says nothing about x_0
    torch.testing.assert_close(u[3], -x[3])  # clean data say nothing about the noise
    torch.testing.assert_close(u, torch.stack([mixture.velocity(x[i : i + 1], float(sigma[i]))[0] for i in range(4)]))


def test_posterior_as_a_mixture_is_bayes_rule():
    sigma, std = 0.4, 0.3
    x_t = torch.tensor([[0.7, -0.2]], dtype=torch.float64)
    output = ExactMixture(MEANS, WEIGHTS, std).mixture_output(x_t, sigma)
    scale = sigma * output['logstds'].exp().reshape(1, 1).expand(3, 2)
    component = Independent(Normal(x_t - sigma * output['means'][0], scale), 1)
    posterior = MixtureSameFamily(Categorical(logits=output['logweights'][0, :, 0]), component)
    x_0 = torch.randn(5, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    likelihood = Independent(Normal((1 - sigma) * x_0, torch.tensor(sigma, dtype=torch.float64)), 1).log_prob(x_t)
    bayes = marginal(0.0, std).log_prob(x_0) + likelihood - marginal(sigma, std).log_prob(x_t)
    torch.testing.assert_close(posterior.log_prob(x_0), bayes)


def test_moments_are_those_of_samples():
    mixture = ExactMixture(MEANS, WEIGHTS, 0.3)
    generator = torch.Generator().manual_seed(3)
    x_0 = mixture.sample(200_000, generator)
    x_t = 0.6 * x_0 + 0.4 * torch.randn(x_0.shape, generator=generator, dtype=x_0.dtype)
    assert x_t.shape == (200_000, 2, 1, 1)
    mean, covariance = mixture.moments(0.4)
    torch.testing.assert_close(x_t.flatten(1).mean(0), mean, atol=5e-3, rtol=0)
    torch.testing.assert_close(x_t.flatten(1).T.cov(), covariance, atol=5e-3, rtol=0)
