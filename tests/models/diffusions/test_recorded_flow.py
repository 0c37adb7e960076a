"""Gaussian flow and timestep sampler reproduce the recorded vectors."""

import pytest
import torch

from lakonlab.models.diffusions.gaussian_flow import GaussianFlow
from lakonlab.models.diffusions.sampler import ContinuousTimeStepSampler
from lakonlab.ops.random_source import RecordedSource
from tests import golden
from tests.toy_nets import ToyVelocity

FLOW, LEGACY, SCHEDULERS = (golden.load(name) for name in ('gaussian_flow', 'gaussian_flow_legacy', 'schedulers'))


def toy_velocity(weights: dict, num_timesteps: float) -> ToyVelocity:
    net = ToyVelocity(len(weights['amp']), num_classes=len(weights['emb']) - 1, time_scale=num_timesteps)
    net.load_state_dict(weights)
    return net


def build(case: dict, **kwargs) -> GaussianFlow:
    params = case['params']
    return GaussianFlow(
        toy_velocity(case['net'], params['num_timesteps']),
        num_timesteps=params['num_timesteps'],
        timestep_sampler=params.get('timestep_sampler'),
        flip_model_timesteps=params.get('flip_model_timesteps', False),
        test_cfg=params.get('test_cfg'),
        **kwargs,
    )


@pytest.mark.parametrize('name', golden.names('gaussian_flow', 'forward_u'))
def test_guided_velocity(name):
    case = FLOW[name]
    u = build(case)(
        return_u=True,
        x_t=case['in']['x_t'],
        t=case['in']['t'],
        guidance_scale=case['params']['guidance_scale'],
        class_labels=case['in']['class_labels'],
    )
    golden.assert_close(u.detach(), case['out']['u'], 2e-5)


@pytest.mark.parametrize('name', golden.names('gaussian_flow_legacy', 'forward_u'))
def test_guidance_orthogonal_to_the_velocity_as_published_before_0_1_2(name):
    case = LEGACY[name]
    u = build(case)(
        return_u=True,
        x_t=case['in']['x_t'],
        t=case['in']['t'],
        guidance_scale=case['params']['guidance_scale'],
        test_cfg={'orthogonal_guidance': 1.0, 'orthogonal_guidance_axis': 'velocity'},
        class_labels=case['in']['class_labels'],
    )
    golden.assert_close(u.detach(), case['out']['u'], 2e-5)


@pytest.mark.parametrize('name', golden.names('gaussian_flow', 'forward_test'))
def test_sampling(name):
    case = FLOW[name]
    x_0 = build(case)(
        noise=case['in']['noise'],
        guidance_scale=case['params']['guidance_scale'],
        class_labels=case['in']['class_labels'],
        source=RecordedSource(golden.draws(case, 'step_noise')),
    )
    golden.assert_close(x_0, case['out']['x_0'], 2e-4)


@pytest.mark.parametrize('name', golden.names('gaussian_flow', 'forward_train'))
def test_training_loss_and_gradients(name):
    case = FLOW[name]
    loss_cfg = {
        'type': 'DiffusionMSELoss',
        'data_info': {'pred': 'u_t_pred', 'target': 'u_t'},
        'rescale_mode': 'constant',
        'rescale_cfg': {'scale': case['params']['scale']},
    }
    model = build(case, flow_loss=loss_cfg)
    loss, log_vars = model(
        case['in']['x_0'],
        return_loss=True,
        class_labels=case['in']['class_labels'],
        source=RecordedSource(golden.draws(case, 'raw_t', 'noise')),
    )
    loss.backward()
    golden.assert_close(loss.detach(), case['out']['loss'], 2e-5)
    golden.assert_close(log_vars['loss_diffusion'], case['out']['log_vars.loss_diffusion'], 2e-5)
    for key, parameter in model.denoising.named_parameters():
        golden.assert_close(parameter.grad, case['out'][f'grad.{key}'], 2e-4)


def test_forward_process():
    case = FLOW['forward_diffusion']
    flow = GaussianFlow(torch.nn.Identity(), num_timesteps=case['params']['num_timesteps'])
    results = flow.sample_forward_diffusion(*(case['in'][key] for key in ('x_0', 't', 'noise')))
    for key, value in zip(('x_t', 'mean', 'std'), results):
        golden.assert_close(value, case['out'][key], 1e-9)
    case = FLOW['forward_transition']
    results = flow.sample_forward_transition(*(case['in'][key] for key in ('x_src', 't_src', 't_tgt', 'noise')))
    for key, value in zip(('x_tgt', 'mean', 'var'), results):
        golden.assert_close(value, case['out'][key], 1e-9)


@pytest.mark.parametrize('name', [n for n in golden.names('schedulers', 'sampler') if not n.endswith('.warp')])
def test_timestep_sampler(name):
    case = SCHEDULERS[name]
    params = case['params']
    sampler = ContinuousTimeStepSampler(num_timesteps=params['num_timesteps'], **params['kwargs'])
    source = RecordedSource(golden.draws(case, 'raw_t'))
    golden.assert_close(sampler(params['batch'], source=source, **params.get('call', {})), case['out']['t'], 2e-6)


@pytest.mark.parametrize('name', [n for n in golden.names('schedulers', 'sampler') if n.endswith('.warp')])
def test_shift_and_its_inverse(name):
    case = SCHEDULERS[name]
    sampler = ContinuousTimeStepSampler(**case['params']['kwargs'])
    seq_len = case['params'].get('seq_len')
    sigma = sampler.warp_t(case['in']['raw_t'], seq_len)
    golden.assert_close(sigma, case['out']['sigma'], 1e-9)
    golden.assert_close(sampler.unwarp_t(sigma, seq_len), case['out']['back'], 1e-9)
    assert sampler.get_shift(seq_len) == pytest.approx(case['out']['shift'].item(), rel=1e-9)
