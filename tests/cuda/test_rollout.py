"""Policies on a GPU, where kernels of their own follow them, against double precision on a CPU."""

import pytest
import torch

from lakonlab.models.diffusions.piflow_policies import GMFlowPolicy
from lakonlab.ops.mixture_rollout import backend_module
from lakonlab.ops.random_source import SeededSource
from lakonlab.ops.rollout_schedule import rollout_schedule
from tests.cuda.device import DEVICE, tf32
from tests.ops.mixture_rollout import test_triton_backend as kernels
from tests.policy_cases import KINDS, Case, build, ingredients

CASES = {
    'ragged': Case((2, 4, 6, 5), 8, (1.0, 0.7), (0.0, 0.25), (1.0, 0.9), 32, 3.2, True, 0),
    'one-component': Case((1, 3, 4, 4), 1, (0.3,), (0.0,), (1.0,), 8, 1.0, False, 1),
    'wide': Case((1, 16, 32, 32), 8, (1.0,), (0.0,), (0.3,), 64, 3.2, False, 2),
}
PRECISION = {torch.float64: 1e-11, torch.float32: 5e-6}
"""Of velocities and states, relative to the largest."""


def policy_of(kind, case, dtype, device):
    parts = ingredients(kind, case)
    output = {name: value.to(device, dtype) for name, value in parts.output.items()}
    return build(kind, case, output, parts.x_src.to(device, dtype)), parts.x_t.to(device, dtype)


def answers(kind, case, dtype, device):
    """Velocity, end of the rollout and mean velocity of a policy, on the host."""
    policy, x_t = policy_of(kind, case, dtype, device)
    sigmas = 0.6 * case.sigmas
    found = {
        'velocity': policy.pi(x_t, sigmas.to(device, dtype)),
        'rollout': policy.rollout(policy.x_t_src, case.schedule()),
        'detached': policy.detach().rollout(x_t, case.schedule()),
    }
    if isinstance(policy, GMFlowPolicy):
        dropped = policy.dropout(0.3, SeededSource(1))
        found['dropout'] = dropped.temperature(0.3).rollout(policy.x_t_src, case.schedule())
    assert all(value.device.type == device and value.dtype == dtype for value in found.values())
    return {name: value.cpu() for name, value in found.items()}


def error(found, expected):
    return float((found.double() - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize('allow_tf32', [False, True], ids=['float32', 'tf32-allowed'])
@pytest.mark.parametrize('dtype', PRECISION, ids=['double', 'single'])
@pytest.mark.parametrize('name', CASES)
@pytest.mark.parametrize('kind', KINDS, ids='-'.join)
def test_policies(kind, name, dtype, allow_tf32):
    """As precise as their dtype, also where runs allow networks to multiply in less."""
    exact = answers(kind, CASES[name], torch.float64, 'cpu')
    with tf32(allow_tf32):
        found = answers(kind, CASES[name], dtype, DEVICE)
    on_cpu = answers(kind, CASES[name], dtype, 'cpu')
    for key, value in exact.items():
        # a policy that amplifies rounding does so everywhere
        assert error(found[key], value) < max(PRECISION[dtype], 3 * error(on_cpu[key], value)), key


@pytest.mark.parametrize('name', kernels.CASES)
def test_kernels(name):
    results = {dtype: kernels.rollout_and_gradients(name, 'triton', dtype, DEVICE) for dtype in PRECISION}
    kernels.assert_double_precision(results[torch.float64], name)
    # sums in another order differ by some 1e-6 where components weigh the same
    for key, expected in kernels.rollout_and_gradients(name, 'torch', torch.float64).items():
        assert kernels.relative_error(results[torch.float32][key], expected) < 2e-5, key


def test_kernels_are_used():
    assert backend_module('auto', torch.device(DEVICE)).__name__.endswith('triton_backend')


@pytest.mark.parametrize(('components', 'channels', 'size'), [(8, 16, 128), (32, 4, 32), (8, 64, 64)])
def test_published_sizes(components, channels, size):
    """Rollout and gradient at the sizes of published students."""
    generator = torch.Generator().manual_seed(0)
    output = {
        'means': torch.randn(1, components, channels, size, size, generator=generator, dtype=torch.float64),
        'logweights': torch.randn(1, components, 1, size, size, generator=generator, dtype=torch.float64),
        'logstds': torch.full((1, 1, 1, 1, 1), -2.0, dtype=torch.float64),
    }
    x = torch.randn(1, channels, size, size, generator=generator, dtype=torch.float64)
    schedule = rollout_schedule(torch.ones(1), torch.full((1,), 0.7), 128, 3.2)
    results = {}
    for backend, dtype in (('torch', torch.float64), ('auto', torch.float64), ('auto', torch.float32)):
        leaves = {key: value.to(DEVICE, dtype).requires_grad_() for key, value in output.items()}
        source = x.to(DEVICE, dtype)
        policy = GMFlowPolicy(leaves, source, torch.ones(1, device=DEVICE), rollout_backend=backend)
        state = policy.rollout(source, schedule)
        gradients = torch.autograd.grad(state.square().mean(), tuple(leaves.values()))
        results[backend, dtype] = [state.detach(), *gradients]
    exact = results['torch', torch.float64]
    for dtype, limit in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
        for found, expected in zip(results['auto', dtype], exact):
            assert error(found, expected) < limit
