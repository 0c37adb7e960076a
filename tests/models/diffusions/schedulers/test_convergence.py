"""Solvers converge to the exact flow of a Gaussian mixture, at their orders; stochastic ones to its marginals."""

import math
from functools import cache
from itertools import pairwise

import pytest
import torch

from lakonlab.models.diffusions.schedulers import scheduler_class
from tests.exact_mixture import ExactMixture

pytestmark = pytest.mark.filterwarnings('ignore::DeprecationWarning')  # numpy warns about diffusers' solvers

MIXTURE = ExactMixture(
    torch.tensor([[1.2, 0.6], [-0.8, 0.9], [0.3, -1.1]], dtype=torch.float64),
    torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64),
    std=0.35,
)


def initial_noise(count, seed=0):
    return torch.randn(count, 2, 1, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def solve(name, steps, x, generator=None, **options):
    scheduler = scheduler_class(name)(num_train_timesteps=1, use_fp64=True, **options)
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        x = scheduler.step(MIXTURE.velocity(x, float(t)), t, x, generator=generator, return_dict=False)[0]
    return x


@cache
def reference():
    """End points of the flow from 100 states."""
    coarse, fine = (solve('FlowHeunODE', steps, initial_noise(100), shift=3.0) for steps in (500, 1000))
    return (4 * fine - coarse) / 3  # Richardson


def error(name, steps, **options):
    return (solve(name, steps, initial_noise(100), shift=3.0, **options) - reference()).square().mean().sqrt().item()


@pytest.mark.parametrize(('name', 'order'), [('FlowEulerODE', 1), ('FlowHeunODE', 2), ('FlowSDE', 1)])
def test_order_of_convergence(name, order):
    options = {'h': 0} if name == 'FlowSDE' else {}
    steps = [64, 128, 256]
    errors = [math.log2(error(name, n, **options)) for n in steps]
    slopes = [coarse - fine for coarse, fine in pairwise(errors)]
    assert slopes == pytest.approx([order] * 2, abs=0.12)


DETERMINISTIC = {
    'UniPCMultistep': {},
    'DPMSolverMultistep': {},
    'DPMSolverSinglestep': {},
    'DEISMultistep': {},
    'SASolver': {'tau_func': lambda t: 0},
}


@pytest.mark.parametrize('base', DETERMINISTIC)
@pytest.mark.parametrize('steps', [8, 32])
def test_adapted_multistep_solvers_beat_euler_at_equal_evaluations(base, steps):
    kwargs = {'base_scheduler': base, 'base_scheduler_kwargs': DETERMINISTIC[base]}
    assert error('FlowAdapter', steps, **kwargs) < {8: 0.95, 32: 0.6}[steps] * error('FlowEulerODE', steps)


def test_adapted_euler_is_euler():
    assert error('FlowAdapter', 32, base_scheduler='EulerDiscrete', use_first_prediction=True) == pytest.approx(
        error('FlowEulerODE', 32), rel=1e-4
    )


def moment_errors(x_0):
    """Errors of mean and covariance, and what Monte Carlo error to expect of each (standard deviation)."""
    mean, covariance = MIXTURE.moments(0.0)
    x_0 = x_0.flatten(1)
    error = torch.cat([x_0.mean(0) - mean, (x_0.T.cov() - covariance).flatten()])
    variances = covariance.diag()
    spread = torch.cat([variances, (variances[:, None] * variances + covariance.square()).flatten()])
    return error, (spread / len(x_0)).sqrt()


SDE_OPTIONS = [
    {'h': 0},
    {'h': 0.5},
    {'h': 1},
    {'h': '0.5 + sqrt(sigma)'},
    {'h': 0.5, 'solver_type': 'euler-maruyama'},
    {'h': 1.0, 'solver_type': 'euler-maruyama'},
    {'h': 'sqrt(sigma)', 'solver_type': 'euler-maruyama'},
]


@pytest.mark.parametrize('options', SDE_OPTIONS, ids=str)
def test_stochastic_solvers_converge_to_the_data(options):
    def run(steps, count):
        generator = torch.Generator().manual_seed(steps)
        return moment_errors(solve('FlowSDE', steps, initial_noise(count, seed=steps), generator=generator, **options))

    few, _ = run(6, 8000)
    more, _ = run(48, 8000)
    many, deviation = run(384, 1000)
    assert more.norm() < few.norm() / 2
    assert (many.abs() < 4 * deviation).all()


@pytest.mark.parametrize('h', [0, 0.5, 1, 'inf', '0.5 + sqrt(sigma)'])
def test_re_noised_flow_maps_have_the_exact_marginals_at_any_number_of_steps(h):
    """The segments are solved finely, so that the map is exact; then each re-noised state has the exact marginal."""
    scheduler = scheduler_class('FlowMapSDE')(num_train_timesteps=1, h=h)
    scheduler.set_timesteps(3)
    generator = torch.Generator().manual_seed(1)
    x = initial_noise(8000, seed=2)
    for i, t in enumerate(scheduler.timesteps):
        inner = scheduler_class('FlowHeunODE')(num_train_timesteps=1)
        inner._set_levels(torch.linspace(scheduler.levels[i], scheduler.destinations[i], 31, dtype=torch.float64), None)
        for s in inner.timesteps:
            x = inner.step(MIXTURE.velocity(x, float(s)), s, x).prev_sample
        x = scheduler.step(x, t, generator=generator).prev_sample
    error, deviation = moment_errors(x)
    assert (error.abs() < 4 * deviation + 2e-3).all()
