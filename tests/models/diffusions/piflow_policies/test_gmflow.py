"""The GMFlow policy against arithmetic that shares nothing with it: Bayes' rule on a grid, and many-digit numbers."""

import itertools

import mpmath
import pytest
import torch

from lakonlab.models.diffusions.piflow_policies import GMFlowPolicy, euler_rollout
from lakonlab.ops.rollout_schedule import rollout_schedule


def random_policy(
    batch=2, components=4, channels=2, size=(3, 2), sigma_src=(0.9, 0.6), dtype=torch.float64, logstd=-0.7, **kwargs
):
    generator = torch.Generator().manual_seed(7)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    output = {
        'means': normal(batch, components, channels, *size).requires_grad_(),
        'logweights': normal(batch, components, 1, *size).log_softmax(1).requires_grad_(),
        'logstds': (logstd + 0.3 * normal(batch, 1, 1, *[1] * len(size))).requires_grad_(),
    }
    x_src = normal(batch, channels, *size)
    return GMFlowPolicy(output, x_src, torch.tensor(sigma_src[:batch], dtype=dtype), **kwargs), output


@pytest.mark.parametrize('sigma_t', [0.55, 0.3, 0.05])
def test_velocity_is_the_bayes_posterior_mean(sigma_t):
    """p(x_0 | x_t) is the prediction at the source times the ratio of the likelihoods of x_t and x_src."""
    policy, output = random_policy(batch=1, channels=1, sigma_src=(0.6,))
    sigma_src = 0.6
    x_src = policy.x_t_src
    x_t = x_src - 0.4 * (sigma_src - sigma_t)
    x_0 = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    for row in range(3):
        for column in range(2):
            means = x_src[0, 0, row, column] - sigma_src * output['means'][0, :, 0, row, column].detach()
            std = sigma_src * output['logstds'].detach().exp().reshape(())
            components = output['logweights'][0, :, 0, row, column].detach()[:, None]
            log_prior = torch.logsumexp(components - 0.5 * ((x_0 - means[:, None]) / std).square(), dim=0)
            log_likelihood = -0.5 * ((x_t[0, 0, row, column] - (1 - sigma_t) * x_0) / sigma_t).square()
            log_source = -0.5 * ((x_src[0, 0, row, column] - (1 - sigma_src) * x_0) / sigma_src).square()
            weights = (log_prior + log_likelihood - log_source).softmax(dim=0)
            expected = (x_t[0, 0, row, column] - (weights * x_0).sum()) / sigma_t
            u = policy.pi(x_t, torch.tensor([sigma_t]))[0, 0, row, column]
            torch.testing.assert_close(u, expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize('sigma_t', [0.3, 1e-3, 1e-6])
def test_gradients_equal_many_digit_arithmetic(sigma_t):
    """d mean(u^2) / d logstd for one component, differentiated with 50 digits from the x_0-space formula."""
    policy, output = random_policy(batch=1, components=1, channels=1, sigma_src=(0.8,), eps=1e-6)
    x_t = policy.x_t_src + 0.3
    policy.pi(x_t, torch.tensor([sigma_t], dtype=torch.float64)).square().mean().backward()

    with mpmath.workdps(50):
        s, big_s = mpmath.mpf(sigma_t), mpmath.mpf(float(policy.sigma_t_src))
        a, big_a = (1 - s) / s, (1 - big_s) / big_s

        def mean_square(logstd):
            variance, zeta, total = mpmath.exp(2 * logstd) * big_s**2, a**2 - big_a**2, mpmath.mpf(0)
            triples = zip(x_t.flatten().tolist(), policy.x_t_src.flatten().tolist(), output['means'].flatten().tolist())
            for x, x_src, mean in (map(mpmath.mpf, triple) for triple in triples):
                nu = a * x / s - big_a * x_src / big_s
                total += ((x - (variance * nu + x_src - big_s * mean) / (variance * zeta + 1)) / s) ** 2
            return total / x_t.numel()

        expected = float(mpmath.diff(mean_square, mpmath.mpf(output['logstds'].item())))
    assert output['logstds'].grad.item() == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize('sigma_t', [0.5, 1e-3])
def test_single_precision_stays_exact_at_low_noise(sigma_t):
    single, _ = random_policy(dtype=torch.float32)
    double, _ = random_policy(dtype=torch.float64)
    time = torch.full((2,), sigma_t, dtype=torch.float64)
    offset = torch.linspace(-0.5, 0.5, 24).reshape(2, 2, 3, 2)
    # the double-precision state must be the single-precision one, or its rounding would be measured instead
    double.x_t_src, double.means = single.x_t_src.double(), single.means.double()
    double.logweights, double.variance = single.logweights.double(), single.variance.double()
    double.sigma_t_src = single.sigma_t_src.double()
    double.squared_norms = double.means.square().sum(2, keepdim=True)
    x_t = single.x_t_src + offset
    expected = double.pi(x_t.double(), time)
    error = (single.pi(x_t, time).double() - expected).abs().max() / expected.abs().max()
    assert error < 1e-6


def test_gradcheck():
    policy, output = random_policy(batch=1, components=3, channels=2, size=(2, 1), sigma_src=(0.9,))
    raw_start, raw_end = torch.tensor([0.9]), torch.tensor([0.2])

    def average(means, logweights, logstds):
        rebuilt = GMFlowPolicy(
            {'means': means, 'logweights': logweights, 'logstds': logstds}, policy.x_t_src, policy.sigma_t_src
        )
        return rebuilt.average_velocity(policy.x_t_src, raw_start, raw_end, total_substeps=8, shift=1.0)

    assert torch.autograd.gradcheck(average, tuple(output.values()), atol=1e-7)


def test_recomputing_substeps_changes_nothing():
    schedule = rollout_schedule(torch.tensor([0.9, 0.6]), torch.tensor([0.1, 0.2]), 16, 1.0)
    results = []
    for checkpointing in (False, True):
        policy, output = random_policy(checkpointing=checkpointing)
        x_end = policy.rollout(policy.x_t_src, schedule)
        x_end.square().sum().backward()
        results.append([x_end.detach(), *(tensor.grad for tensor in output.values())])
    for kept, recomputed in zip(*results):
        assert torch.equal(kept, recomputed)


def test_rollout_converges_at_first_order():
    policy, _ = random_policy()
    start, end = torch.tensor([0.9, 0.6]), torch.tensor([0.1, 0.2])
    ends = [policy.rollout(policy.x_t_src, rollout_schedule(start, end, 2**n, 1.0)).detach() for n in range(6, 11)]
    limit = 2 * ends[-1] - ends[-2]  # Richardson extrapolation of a first-order method
    errors = [(x - limit).abs().max() for x in ends[:-1]]
    ratios = [float(coarse / fine) for coarse, fine in itertools.pairwise(errors)]
    assert all(1.9 < ratio < 2.1 for ratio in ratios), ratios


def test_detach_cuts_every_gradient_and_leaves_the_original_alone():
    policy, _ = random_policy()
    detached = policy.detach()
    time = torch.tensor([0.5, 0.4])
    assert not detached.pi(policy.x_t_src, time).requires_grad
    assert policy.pi(policy.x_t_src, time).requires_grad
    assert torch.equal(detached.pi(policy.x_t_src, time), policy.pi(policy.x_t_src, time).detach())


def test_wrong_shapes_are_refused():
    policy, output = random_policy()
    with pytest.raises(ValueError, match='means have shape'):
        GMFlowPolicy(output, policy.x_t_src[:, :1], policy.sigma_t_src)
    with pytest.raises(ValueError, match='logstds'):
        GMFlowPolicy({key: output[key] for key in ('means', 'logweights')}, policy.x_t_src, policy.sigma_t_src)


@pytest.mark.parametrize('grad', [True, False])
@pytest.mark.parametrize('starts', [[0.9, 0.6], [0.3, 0.6], [0.12, 0.2]])
def test_plain_loop_and_own_rollout_agree(grad, starts):
    """Also where samples need different numbers of substeps, in either order, down to none."""
    policy, _ = random_policy()
    schedule = rollout_schedule(torch.tensor(starts), torch.tensor([0.1, 0.2]), 32, 3.2)
    expected = euler_rollout(policy, policy.x_t_src, schedule)
    with torch.set_grad_enabled(grad):
        x_end = policy.rollout(policy.x_t_src, schedule)
    torch.testing.assert_close(x_end, expected.detach() if not grad else expected, rtol=1e-12, atol=1e-12)
