"""Solvers equal those of diffusers where they coincide, and the adapter equals its base solver driven by hand."""

import diffusers
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler

from lakonlab.models.diffusions.schedulers import FlowAdapterScheduler, FlowEulerODEScheduler, FlowHeunODEScheduler
from lakonlab.models.diffusions.schedulers.flow_adapter import BASE_SOLVERS
from tests import golden

pytestmark = pytest.mark.filterwarnings('ignore::DeprecationWarning')  # numpy warns about diffusers' solvers


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def velocity(x, sigma):
    return torch.sin(1.3 * x + 0.7 * sigma) * (0.5 + sigma)


def follow(scheduler, x, **kwargs):
    for t in scheduler.timesteps:
        x = scheduler.step(velocity(x, float(t) / 1000), t, x, return_dict=False, **kwargs)[0]
    return x


@pytest.mark.parametrize(
    ('ours', 'theirs', 'mu', 'seq_len'),
    [
        ({'shift': 3.0}, {'shift': 3.0}, None, None),
        ({'shift': 3.0, 'terminal_sigma': 0.02}, {'shift': 3.0, 'shift_terminal': 0.02}, None, None),
        ({'use_dynamic_shifting': True}, {'use_dynamic_shifting': True}, 0.9, None),
        ({'use_dynamic_shifting': True}, {'use_dynamic_shifting': True}, 0.5 + 0.65 * 768 / 3840, 1024),
    ],
)
def test_euler(ours, theirs, mu, seq_len):
    raw = np.linspace(1.0, 0.2, 5)
    scheduler, published = FlowEulerODEScheduler(**ours), FlowMatchEulerDiscreteScheduler(**theirs)
    scheduler.set_timesteps(sigmas=raw, mu=None if seq_len else mu, seq_len=seq_len)
    published.set_timesteps(sigmas=raw, mu=mu)
    golden.assert_close(scheduler.sigmas, published.sigmas, 2e-6)
    golden.assert_close(scheduler.timesteps, published.timesteps, 2e-6)
    golden.assert_close(follow(scheduler, noise(2, 4, 8)), follow(published, noise(2, 4, 8)), 2e-5)
    published.set_timesteps(sigmas=raw, mu=mu)
    scheduler.set_timesteps(5, mu=None if seq_len else mu, seq_len=seq_len)  # the uniform grid is the same
    golden.assert_close(scheduler.sigmas, published.sigmas, 2e-6)
    x_0, epsilon = noise(1, 4, 8), noise(1, 4, 8, seed=1)
    ours, theirs = (one.scale_noise(x_0, one.timesteps[2:3], epsilon) for one in (scheduler, published))
    golden.assert_close(ours, theirs, 2e-6)


def test_heun():
    """diffusers' Heun ends its grid at 1 / 1000, so it is compared on its own grid of schedule times."""
    published = FlowMatchHeunDiscreteScheduler(shift=1.0)
    published.set_timesteps(5)
    levels = list(dict.fromkeys(published.sigmas.tolist()))
    scheduler = FlowHeunODEScheduler()
    scheduler.set_timesteps(sigmas=levels[:-1])
    golden.assert_close(scheduler.sigmas, published.sigmas, 2e-6)
    golden.assert_close(scheduler.timesteps, published.timesteps, 2e-6)
    golden.assert_close(follow(scheduler, noise(2, 4, 8)), follow(published, noise(2, 4, 8)), 2e-5)


BASES = [(name, {}) for name in BASE_SOLVERS] + [
    ('UniPCMultistep', {'solver_order': 3}),
    ('DPMSolverMultistep', {'algorithm_type': 'sde-dpmsolver++'}),
    ('DPMSolverSinglestep', {'algorithm_type': 'sde-dpmsolver++'}),
]


@pytest.mark.parametrize(('name', 'options'), BASES)
@pytest.mark.parametrize('steps', [1, 2, 7])
def test_adapter_equals_the_base_driven_by_hand(name, options, steps):
    adapter = FlowAdapterScheduler(base_scheduler=name, base_scheduler_kwargs=options, shift=2.0, max_raw_t=0.95)
    adapter.set_timesteps(steps)
    x = noise(2, 4, 8)
    actual = follow(adapter, x, generator=torch.Generator().manual_seed(5))

    raw = torch.linspace(0.95, 0, steps + 1, dtype=torch.float64)
    sigmas = 2 * raw / (1 + raw)
    if name in ('DEISMultistep', 'SASolver'):
        sigmas[-1] = 1e-4  # they take the logarithm of the last one
    generator = torch.Generator().manual_seed(5)
    kind = getattr(diffusers, f'{name}Scheduler')
    if name.startswith('Euler'):
        base = kind(prediction_type='epsilon')
        base.set_timesteps(steps)
        base.sigmas = (sigmas / (1 - sigmas)).float()
        scale = 1 - sigmas
    else:
        base = kind(prediction_type='flow_prediction', use_flow_sigmas=True, lower_order_final=True, **options)
        base.set_timesteps(steps)
        base.sigmas = sigmas.float()
        scale = torch.ones(steps + 1)
    base.timesteps = (1000 * sigmas[:-1]).float()
    base.set_begin_index(0)
    base.is_scale_input_called = True
    is_random = name in ('SASolver', 'EulerAncestralDiscrete') or 'algorithm_type' in options
    kwargs = {'generator': generator} if is_random else {}
    for i, t in enumerate(base.timesteps):
        u = velocity(x, float(sigmas[i]))
        output = x + (1 - float(sigmas[i])) * u if name.startswith('Euler') else u
        x = base.step(output, float(t), x / float(scale[i]), **kwargs).prev_sample * float(scale[i + 1])
    torch.testing.assert_close(actual, x, atol=2e-5, rtol=2e-5)


def test_the_state_at_pure_noise_is_moved_to_where_a_solver_can_begin():
    """The first step, of first order everywhere, is then the Euler step from pure noise; UniPC's is 1e-4 beside it."""
    for name in BASE_SOLVERS:
        if name in ('SASolver', 'EulerAncestralDiscrete'):
            continue
        adapter = FlowAdapterScheduler(base_scheduler=name, use_first_prediction=True)
        euler = FlowEulerODEScheduler()
        for scheduler in (adapter, euler):
            scheduler.set_timesteps(4)
        x = noise(2, 4, 8)
        u = velocity(x, 1.0)
        one, two = (scheduler.step(u, scheduler.timesteps[0], x).prev_sample for scheduler in (adapter, euler))
        torch.testing.assert_close(one, two, atol=1e-3 if name == 'UniPCMultistep' else 1e-4, rtol=0)


@pytest.mark.parametrize('name', ['DPMSolverMultistep', 'DEISMultistep', 'EulerDiscrete'])
def test_the_published_treatment_of_the_first_prediction(name):
    """It begins as if all data were 0, instead of on the straight line to the predicted x_0."""
    x, target = noise(2, 4, 8), noise(2, 4, 8, seed=1)
    for used in (True, False):
        scheduler = FlowAdapterScheduler(base_scheduler=name, use_first_prediction=used)
        scheduler.set_timesteps(4)
        first = scheduler.step(x - target, scheduler.timesteps[0], x).prev_sample
        torch.testing.assert_close(first, 0.75 * x + 0.25 * target * used, atol=1e-4, rtol=0)


def test_unknown_base_scheduler():
    with pytest.raises(ValueError, match="base_scheduler='DDIM': expected one of UniPCMultistep, "):
        FlowAdapterScheduler(base_scheduler='DDIM')
