"""The momentum policy against numerical integration, and trained by imitation."""

import math

import numpy as np
import pytest
import torch

from lakonlab.models.diffusions.imitation import imitate_segment
from lakonlab.models.diffusions.piflow_policies import MomentumPolicy
from lakonlab.ops.random_source import TorchSource
from lakonlab.ops.rollout_schedule import rollout_schedule
from lakonlab.ops.shapes import expand_like

SIGMA_SRC = (0.9, 0.6)


def random_policy(decays=(0.0, 1e-9, -3.0, 7.0), requires_grad=False, **kwargs):
    generator = torch.Generator().manual_seed(5)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    output = {
        'velocities': normal(2, len(decays), 2, 3, 1),
        'logweights': normal(2, len(decays), 1, 3, 1),
        'decays': torch.tensor(decays, dtype=torch.float64).repeat(2, 1).reshape(2, -1, 1, 1, 1),
    }
    output = {name: tensor.requires_grad_(requires_grad) for name, tensor in output.items()}
    return MomentumPolicy(output, normal(2, 2, 3, 1), torch.tensor(SIGMA_SRC, dtype=torch.float64), **kwargs), output


def velocity_by_hand(output, sample, sigma_t):
    weights = np.exp(output['logweights'][sample].numpy())
    decay = np.exp(-output['decays'][sample].numpy() * (SIGMA_SRC[sample] - sigma_t))
    return (weights * decay * output['velocities'][sample].numpy()).sum(0) / weights.sum(0)


@pytest.mark.parametrize('sigma_t', [0.6, 0.31, 0.0])
def test_velocity_is_a_weighted_sum_of_decaying_modes(sigma_t):
    policy, output = random_policy()
    u = policy.pi(torch.full((2, 2, 3, 1), 17.0), torch.tensor([sigma_t, sigma_t], dtype=torch.float64))
    for sample in range(2):
        np.testing.assert_allclose(u[sample].numpy(), velocity_by_hand(output, sample, sigma_t), rtol=1e-12, atol=1e-12)


def test_exact_rollout_equals_gaussian_quadrature():
    policy, output = random_policy(exact=True)
    schedule = rollout_schedule(torch.tensor([0.7, 0.5]), torch.tensor([0.0, 0.2]), 4, 1.7)
    x_end = policy.rollout(policy.x_t_src, schedule)
    nodes, weights = np.polynomial.legendre.leggauss(40)
    for sample in range(2):
        start, end = float(schedule.sigmas[sample, 0]), float(schedule.sigmas[sample, -1])
        half = (end - start) / 2
        times = (start + end) / 2 + half * nodes
        displacement = sum(half * w * velocity_by_hand(output, sample, t) for w, t in zip(weights, times))
        expected = policy.x_t_src[sample].numpy() + displacement
        np.testing.assert_allclose(x_end[sample].numpy(), expected, rtol=1e-12, atol=1e-12)


def test_substeps_approach_the_exact_rollout_at_first_order():
    start, end = torch.tensor([0.9, 0.6]), torch.tensor([0.1, 0.0])
    exact = random_policy(exact=True)[0]
    euler = random_policy()[0]
    limit = exact.rollout(exact.x_t_src, rollout_schedule(start, end, 1, 3.2))
    errors = [
        float((euler.rollout(euler.x_t_src, rollout_schedule(start, end, 2**n, 3.2)) - limit).abs().max())
        for n in (8, 9, 10)
    ]
    assert 1.9 < errors[0] / errors[1] < 2.1
    assert 1.9 < errors[1] / errors[2] < 2.1


@pytest.mark.parametrize('decay', [0.0, 1e-12, -1e-12, 1e-3, 0.0124, 0.0126, 1.0, 300.0])
def test_exact_displacement_has_the_right_value_and_slope_for_every_rate(decay):
    """One mode over one unit: (1 - exp(-decay)) / decay, whose limit at 0 is 1 with slope -1/2."""
    rate = torch.full((1, 1, 1, 1, 1), decay, dtype=torch.float64, requires_grad=True)
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    output = {'velocities': one[None], 'logweights': one[None], 'decays': rate}
    policy = MomentumPolicy(output, one, torch.ones(1), exact=True)
    x_end = policy.rollout(0 * one, rollout_schedule(torch.ones(1), torch.zeros(1), 8, 1.0))
    x_end.sum().backward()
    if abs(decay) < 1e-6:
        value, slope = 1 - decay / 2, -1 / 2 + decay / 3
    else:
        value = -math.expm1(-decay) / decay
        slope = (math.exp(-decay) - value) / decay
    assert -x_end.item() == pytest.approx(value, rel=1e-13)
    assert -rate.grad.item() == pytest.approx(slope, rel=1e-9)


def test_gradcheck_of_the_exact_rollout():
    policy, output = random_policy(decays=(0.0, 0.01, 2.0), requires_grad=True)
    schedule = rollout_schedule(torch.tensor([0.7, 0.5]), torch.tensor([0.1, 0.2]), 4, 1.7)

    def end(*tensors):
        rebuilt = MomentumPolicy(dict(zip(output, tensors)), policy.x_t_src, policy.sigma_t_src, exact=True)
        return rebuilt.rollout(policy.x_t_src, schedule)

    assert torch.autograd.gradcheck(end, tuple(output.values()))


def test_low_temperature_leaves_the_heaviest_mode():
    policy, output = random_policy()
    time = policy.sigma_t_src
    heaviest = output['logweights'].argmax(dim=1, keepdim=True).expand(-1, -1, 2, -1, -1)
    expected = output['velocities'].gather(1, heaviest)[:, 0]
    torch.testing.assert_close(policy.temperature(1e-3).pi(policy.x_t_src, time), expected)
    assert policy.temperature(1.0) is policy


def test_dropped_modes_have_no_part_in_the_velocity():
    policy, output = random_policy()
    dropped = policy.dropout(0.5, TorchSource(torch.Generator().manual_seed(0)))
    kept = dropped.logweights.isfinite()
    assert not kept.all()
    assert kept.any(dim=1).all()
    weights = torch.where(kept, output['logweights'].exp(), 0)
    expected = (weights * output['velocities']).sum(1) / weights.sum(1)
    torch.testing.assert_close(dropped.pi(policy.x_t_src, policy.sigma_t_src), expected)


def test_wrong_outputs_are_refused():
    policy, output = random_policy()
    with pytest.raises(ValueError, match='decays'):
        MomentumPolicy({name: output[name] for name in ('velocities', 'logweights')}, policy.x_t_src, torch.ones(2))
    with pytest.raises(ValueError, match=r'velocities have shape .* expected'):
        MomentumPolicy(output, policy.x_t_src[:, :1], torch.ones(2))


def test_imitation_fits_a_known_velocity():
    """A static policy, trained by pi-ID alone, learns a teacher that is a mixture of two decaying modes."""
    generator = torch.Generator().manual_seed(11)
    noise = torch.randn(4, 2, 1, 1, generator=generator)
    fast, slow = torch.randn(2, 4, 2, 1, 1, generator=generator)

    def teacher(x_t, sigma_t):
        tau = expand_like(1 - sigma_t, x_t)
        copies = (len(x_t) // 4, 1, 1, 1)
        return (-4 * tau).exp() * fast.repeat(copies) + (-0.5 * tau).exp() * slow.repeat(copies)

    shapes = MomentumPolicy.output_shapes(tuple(noise.shape), 3)
    parameters = {name: torch.zeros(shape) for name, shape in shapes.items()}
    parameters['velocities'] += torch.randn(shapes['velocities'], generator=generator) * 0.1
    parameters['decays'] += torch.tensor([0.0, 1.0, 2.0]).reshape(1, 3, 1, 1, 1)
    parameters = {name: tensor.requires_grad_() for name, tensor in parameters.items()}
    optimizer = torch.optim.Adam(parameters.values(), lr=0.05)
    source = TorchSource(generator)
    for iteration in range(200):
        optimizer.param_groups[0]['lr'] = 0.08 * (1 - iteration / 200)
        policy = MomentumPolicy(parameters, noise, torch.ones(4))
        pairs = imitate_segment(
            policy,
            policy.detach(),
            teacher,
            noise,
            torch.ones(4),
            torch.ones(4),
            num_intermediate_states=4,
            total_substeps=32,
            shift=1.0,
            source=source,
        )
        loss = (pairs.u_pred - pairs.u_teacher).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    end = MomentumPolicy(parameters, noise, torch.ones(4), exact=True).rollout(
        noise, rollout_schedule(torch.ones(4), torch.zeros(4), 1, 1.0)
    )
    expected = noise + fast * math.expm1(-4) / 4 + slow * math.expm1(-0.5) / 0.5
    assert (end.detach() - expected).square().mean().sqrt() < 0.02
