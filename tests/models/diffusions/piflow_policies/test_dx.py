"""The DX policy against interpolation by hand and against the plain substep loop."""

import numpy as np
import pytest
import torch

from lakonlab.models.diffusions.piflow_policies import DXPolicy, euler_rollout
from lakonlab.ops.random_source import TorchSource
from lakonlab.ops.rollout_schedule import rollout_schedule
from lakonlab.ops.time_shift import unwarp

KINDS = {
    'grid': {'segment_size': 0.4, 'shift': 3.2},
    'one point': {'segment_size': 0.4},
    'polynomial': {'mode': 'polynomial', 'shift': 3.2},
}


def random_policy(kind):
    generator = torch.Generator().manual_seed(3)
    num_points = 1 if kind == 'one point' else 5
    output = torch.randn(2, num_points, 2, 3, 2, generator=generator, dtype=torch.float64).requires_grad_()
    x_src = torch.randn(2, 2, 3, 2, generator=generator, dtype=torch.float64)
    return DXPolicy(output, x_src, torch.tensor([0.9, 0.6], dtype=torch.float64), **KINDS[kind]), output


def x_0_by_hand(policy, output, sample, sigma_t):
    values = (policy.x_t_src[sample] - policy.sigma_t_src[sample] * output[sample]).detach().numpy()
    raw_src = float(unwarp(policy.sigma_t_src[sample], policy.shift))
    raw_t = float(unwarp(torch.tensor(sigma_t, dtype=torch.float64), policy.shift))
    if policy.mode == 'polynomial':
        return sum(value * (raw_src - raw_t) ** power for power, value in enumerate(values))
    times = np.linspace(max(raw_src - policy.segment_size, 0), raw_src, len(values))
    flat = values.reshape(len(values), -1)
    columns = [np.interp(raw_t, times, flat[:, column]) for column in range(flat.shape[1])]
    return np.array(columns).reshape(values.shape[1:])


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('sigma_t', [0.59, 0.5, 0.35])
def test_velocity_points_to_the_interpolated_x_0(kind, sigma_t):
    policy, output = random_policy(kind)
    x_t = policy.x_t_src + 0.1
    u = policy.pi(x_t, torch.full((2,), sigma_t, dtype=torch.float64)).detach()
    for sample in range(2):
        expected = (x_t[sample].numpy() - x_0_by_hand(policy, output, sample, sigma_t)) / sigma_t
        np.testing.assert_allclose(u[sample].numpy(), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('kind', KINDS)
def test_one_contraction_equals_the_substep_loop(kind):
    raw_src = torch.tensor([0.74, 0.32])
    schedule = rollout_schedule(raw_src, (raw_src - 0.4).clamp(min=0), 64, 3.2)
    results = []
    for rollout in (euler_rollout, DXPolicy.rollout):
        policy, output = random_policy(kind)
        x_end = rollout(policy, policy.x_t_src + 0.2, schedule)
        x_end.square().sum().backward()
        results.append((x_end.detach(), output.grad))
    for loop, contraction in zip(*results):
        torch.testing.assert_close(contraction, loop, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize('kind', KINDS)
def test_gradcheck(kind):
    policy, output = random_policy(kind)
    raw_start, raw_end = torch.tensor([0.7, 0.3]), torch.tensor([0.4, 0.1])

    def average(output):
        rebuilt = DXPolicy(output, policy.x_t_src, policy.sigma_t_src, **KINDS[kind])
        return rebuilt.average_velocity(policy.x_t_src, raw_start, raw_end, total_substeps=16, shift=3.2)

    assert torch.autograd.gradcheck(average, (output,))


def test_what_it_cannot_do_is_said():
    policy, _ = random_policy('grid')
    with pytest.raises(TypeError, match='policy_dropout'):
        policy.dropout(0.1, TorchSource())
    with pytest.raises(TypeError, match='temperature'):
        policy.temperature(0.3)
    with pytest.raises(ValueError, match='polynomial'):
        DXPolicy(policy.output, policy.x_t_src, policy.sigma_t_src, mode='spline')
    with pytest.raises(ValueError, match='DX policy needs a tensor'):
        DXPolicy(policy.output[:, :, :1], policy.x_t_src, policy.sigma_t_src)
