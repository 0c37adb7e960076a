"""Policies reproduce the recorded vectors of the published numerics."""

import pytest
import torch

from lakonlab.models.diffusions.piflow_policies import DXPolicy, GMFlowPolicy
from lakonlab.ops.random_source import RecordedSource
from tests import golden

CASES = golden.load('policies')


def build(case: dict, requires_grad: bool = False, dtype=None):
    params, tensors = case['params'], {name: tensor.clone() for name, tensor in case['in'].items()}
    if dtype is not None:
        tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    names = ('means', 'logstds', 'logweights') if params['policy'] == 'GMFlow' else ('out',)
    output = {name: tensors[name].requires_grad_(requires_grad) for name in names}
    if params['policy'] == 'GMFlow':
        policy = GMFlowPolicy(output, tensors['x_src'], tensors['sigma_src'], eps=params.get('eps', 1e-6))
    else:
        kwargs = {key: params[key] for key in ('segment_size', 'shift', 'mode') if key in params}
        policy = DXPolicy(output['out'], tensors['x_src'], tensors['sigma_src'], eps=params['eps'], **kwargs)
    return policy, tensors, output


@pytest.mark.parametrize('name', [name for name in CASES if name.endswith('.x0')])
def test_x_0_mixture(name):
    case = CASES[name]
    policy, *_ = build(case)
    mixture = policy.x_0_mixture()
    tolerance = 1e-9 if mixture['means'].dtype == torch.float64 else 2e-5
    for ours, recorded in (('means', 'means'), ('logweights', 'logweights'), ('variances', 'gm_vars')):
        golden.assert_close(mixture[ours], case['out'][recorded], tolerance)


@pytest.mark.parametrize('name', [name for name in CASES if '.pi' in name])
def test_velocity_and_gradients(name):
    case = CASES[name]
    policy, tensors, output = build(case, requires_grad=True)
    u = policy.pi(tensors['x_t'], tensors['sigma_t'])
    is_double = u.dtype == torch.float64
    suffix = '_f64' if 'u_f64' in case['out'] else ''
    golden.assert_close(u.detach(), case['out']['u' + suffix], 1e-9 if is_double else 2e-6)
    u.square().mean().backward()
    for key, tensor in output.items():
        expected = case['out'][f'grad_{key}{suffix}']
        gradient = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
        if expected.abs().max() > 1e-12:
            # The recorded gradients come from (x_t - E[x_0]) / sigma, whose rounding grows with 1 / sigma^2 (about ten
            # units of double precision); ours are compared with many-digit arithmetic in test_gmflow.py.
            floor = max(float(tensors['sigma_t'].min()), case['params']['eps'])
            golden.assert_close(gradient, expected, max(1e-8, 2.2e-15 / floor**2) if is_double else 2e-4)
        else:
            assert gradient.abs().max() < 1e-12


@pytest.mark.parametrize('name', [name for name in CASES if name.startswith('gm.dropout')])
def test_dropout(name):
    case = CASES[name]
    policy, tensors, _ = build(case)
    dropped = policy.dropout(case['params']['p'], RecordedSource(golden.draws(case, 'dropout')))
    golden.assert_close(dropped.logweights.clamp(min=-1e30), case['out']['logweights'], 1e-9)
    golden.assert_close(dropped.pi(tensors['x_t'], tensors['sigma_t']), case['out']['u'], 1e-9)
    if 'u_nodrop' in case['out']:
        golden.assert_close(policy.pi(tensors['x_t'], tensors['sigma_t']), case['out']['u_nodrop'], 1e-9)


@pytest.mark.parametrize('name', [name for name in CASES if name.startswith('gm.temperature')])
def test_temperature(name):
    case = CASES[name]
    policy, tensors, _ = build(case)
    tempered = policy.temperature(case['params']['temperature'])
    mixture = tempered.x_0_mixture()
    ours = {
        'means': mixture['means'],
        'logweights': tempered.logweights,
        'gm_vars': mixture['variances'],
        'u': tempered.pi(tensors['x_t'], tensors['sigma_t']),
        'u_start': tempered.pi(tensors['x_src'], tensors['sigma_src']),
        'u_before': policy.pi(tensors['x_t'], tensors['sigma_t']),
    }
    for key, value in case['out'].items():
        golden.assert_close(ours[key], value, 1e-8)
