"""GMFlow's formulas, training loss and samplers reproduce the recorded vectors."""

import pytest
import torch

from lakonlab.models.architecture.gmflow.spectrum_mlp import SpectrumMLP
from lakonlab.models.diffusions.gmflow import GMFlow
from lakonlab.models.diffusions.gmflow_steps import ReverseTransition, posterior_mixture, x_0_mixture
from lakonlab.ops.isotropic_mixture import GaussianMixture, mixture_mean
from lakonlab.ops.random_source import RecordedSource
from lakonlab.ops.shapes import expand_like
from tests import golden
from tests.toy_nets import ToyGM

MATH, MODEL = golden.load('gmflow_math'), golden.load('gmflow_model')


def results_of_formula(name, case):
    x, num_timesteps = case['in'], case['params']['num_timesteps']
    kind = name.rsplit('.', 1)[-1]
    state = x['x_t_high'] if 'x_t_high' in x else x['x_t']
    sigma = {key: expand_like(t / num_timesteps, state) for key, t in x.items() if key.startswith('t')}
    mixture = None
    if 'gm.means' in x:
        mixture = GaussianMixture(*(x[f'gm.{key}'] for key in ('means', 'logweights', 'logstds')))
    if kind == 'u_to_x0':
        return x_0_mixture(mixture, state, sigma['t'])._asdict()
    if kind.startswith('reverse'):
        transition = ReverseTransition.between(sigma['t_high'], sigma['t_low'])
        if kind == 'reverse_sample':
            (noise,) = case['draw'].values()
            return {'y': transition.of_point(state, state - sigma['t_high'] * x['u'], noise)}
        if kind.startswith('reverse_u'):
            mixture = x_0_mixture(mixture, state, sigma['t_high'])
        return transition.of_mixture(state, mixture)._asdict()
    if kind == 'posterior_u':
        mixture = x_0_mixture(mixture, x['x_t_src'], sigma['t_src'])
    posterior = posterior_mixture(mixture, x['x_t_src'], sigma['t_src'], state, sigma['t'], case['params']['eps'])
    return {'y': mixture_mean(posterior)}


@pytest.mark.parametrize('name', list(MATH))
def test_formula(name):
    case = MATH[name]
    results = results_of_formula(name, case)
    assert set(results) == set(case['out'])
    for key, expected in case['out'].items():
        tolerance = 1e-9 if expected.dtype == torch.float64 else 2e-5
        golden.assert_close(results[key].expand_as(expected), expected, tolerance)


def build(case, **kwargs):
    params, weights = case['params'], case['net']
    num_timesteps = params.get('num_timesteps', 1000)
    net = ToyGM(
        len(weights['gain']), len(weights['amp']), num_classes=len(weights['emb']) - 1, time_scale=num_timesteps
    )
    net.load_state_dict(weights)
    if 'spectrum' in case:
        kwargs['spectrum_net'] = SpectrumMLP(base_size=params['base_size'], layers=(16, 8))
        kwargs['spectrum_net'].load_state_dict(case['spectrum'])
        kwargs['spectral_loss_weight'] = params.get('spectral_loss_weight', 1.0)
    if 'test_cfg' in params:
        kwargs['test_cfg'] = params['test_cfg']
    return GMFlow(net, num_timesteps=num_timesteps, **kwargs)


@pytest.mark.parametrize('name', golden.names('gmflow_model', 'forward_u'))
def test_velocity(name):
    case = MODEL[name]
    x = case['in']
    u = build(case)(
        return_u=True,
        x_t=x['x_t'],
        t=x['t'],
        class_labels=x['class_labels'],
        guidance_scale=case['params']['guidance_scale'],
        test_cfg=case['params'].get('test_cfg'),
    )
    golden.assert_close(u, case['out']['u'], 2e-5)


@pytest.mark.parametrize('name', golden.names('gmflow_model', 'forward_test'))
def test_sampling(name):
    case = MODEL[name]
    params = case['params']
    override = params.get('test_cfg')
    names = ['component', 'component_noise', 'step_noise']
    if 'spectrum' in case:
        override = dict(sampler='FlowSDE', output_mode='sample', order=params['order'])
        override['num_timesteps'] = params['num_timesteps']
        case = {**case, 'params': {**params, 'num_timesteps': 1000}}
        names = names[1:]
    draws = golden.draws(case, *names)
    if 'step_noise' in draws:
        draws['step_noise'] = draws['step_noise'][:-1]  # the last step adds none
    x_0 = build(case)(
        noise=case['in']['noise'],
        class_labels=case['in']['class_labels'],
        guidance_scale=params.get('guidance_scale', 0.0),
        test_cfg_override=override,
        source=RecordedSource(draws),
    )
    golden.assert_close(x_0, case['out']['x_0'], 2e-4)


@pytest.mark.parametrize('name', golden.names('gmflow_model', 'forward_train'))
def test_training_loss(name):
    case = MODEL[name]
    params = case['params']
    loss_cfg = {
        'type': 'GMFlowNLLLoss',
        'rescale_mode': 'constant',
        'rescale_cfg': {'scale': params['scale']},
        'log_cfgs': {'type': 'quartile', 'prefix_name': 'loss_trans', 'total_timesteps': 1000},
    }
    model = build(
        case,
        flow_loss=loss_cfg,
        timestep_sampler={'logit_normal_enable': params['logit_normal_enable']},
        train_cfg={'trans_ratio': params['trans_ratio']},
    )
    raw_t, noise = (tensor for _, tensor in sorted(case['draw'].items()))
    source = RecordedSource({'raw_t': [raw_t], 'noise': noise.chunk(2)})
    loss, log_vars = model(case['in']['x_0'], return_loss=True, class_labels=case['in']['class_labels'], source=source)
    loss.backward()
    golden.assert_close(loss, case['out']['loss'], 2e-4)
    recorded = {key.removeprefix('log_vars.') for key in case['out'] if key.startswith('log_vars.')}
    assert set(log_vars) == recorded
    for key in recorded:
        golden.assert_close(log_vars[key], case['out'][f'log_vars.{key}'], 2e-4)
    for key, parameter in model.denoising.named_parameters():
        golden.assert_close(parameter.grad, case['out'][f'grad.{key}'], 2e-4)
    if model.spectrum_net is not None:
        for key, parameter in model.spectrum_net.named_parameters():
            golden.assert_close(parameter.grad, case['out'][f'grad_spectrum.{key}'], 2e-4)
