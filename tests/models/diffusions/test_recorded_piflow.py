"""Rollouts, pi-ID training and pi-Flow sampling reproduce the recorded vectors through the public entry points."""

import pytest
import torch

from lakonlab.models.diffusions.gaussian_flow import GaussianFlow
from lakonlab.models.diffusions.piflow import PiFlowImitation, PiFlowImitationDataFree
from lakonlab.ops.random_source import RecordedSource
from tests import golden
from tests.models.diffusions.test_recorded_flow import toy_velocity
from tests.toy_nets import ToyDX, ToyGM

PIFLOW, ROLLOUT = golden.load('piflow'), golden.load('rollout')


def toy_student(case: dict):
    params, weights = case['params'], case['net']
    num_classes, channels = weights['emb'].shape[0] - 1, len(weights['amp'])
    size = len(weights['gain'])
    kwargs = {'num_classes': num_classes, 'time_scale': params['num_timesteps']}
    is_dx = params.get('policy') == 'DX'
    net = ToyDX(size, channels, **kwargs) if is_dx else ToyGM(size, channels, **kwargs)
    net.load_state_dict(weights)
    return net.to(weights['amp'].dtype)


def loss_cfg(scale):
    return {'type': 'DiffusionMSELoss', 'rescale_mode': 'constant', 'rescale_cfg': {'scale': scale}}


def build(case: dict, cls=PiFlowImitation):
    params = case['params']
    return cls(
        toy_student(case) if 'net' in case else torch.nn.Identity(),
        policy_type=params.get('policy', 'GMFlow'),
        policy_kwargs=params.get('policy_kwargs'),
        flow_loss=loss_cfg(params.get('loss_scale', 1.0)),
        num_timesteps=params.get('num_timesteps', 1),
        timestep_sampler=params.get('timestep_sampler', {'shift': params.get('shift', 1.0)}),
        train_cfg=params.get('train_cfg'),
        test_cfg=params.get('test_cfg'),
    )


def build_teacher(case: dict):
    params = case['params']
    guidance = dict(params.get('teacher_test_cfg') or {})
    scale = guidance.pop('guidance_scale', 1.0)
    teacher = GaussianFlow(
        toy_velocity(case['teacher'], params['num_timesteps']).to(case['teacher']['amp'].dtype),
        num_timesteps=params['num_timesteps'],
        timestep_sampler=params.get('timestep_sampler'),
        test_cfg=guidance,
    )
    teacher.requires_grad_(False)
    labels = case['in'].get('class_labels')
    if labels is None:
        return teacher, {}
    if scale not in (0, 1):
        labels = torch.cat([case['in']['neg_labels'], labels])
    return teacher, {'class_labels': labels, 'guidance_scale': scale}


def assert_gradients(model, case, tolerance=2e-4):
    for key, parameter in model.denoising.named_parameters():
        expected = case['out'].get(f'grad.{key}')
        if expected is None:
            continue
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        golden.assert_close(gradient, expected, tolerance)


@pytest.mark.parametrize('name', golden.names('piflow', 'forward_test'))
def test_sampling(name):
    case = PIFLOW[name]
    x_0 = build(case)(
        noise=case['in']['noise'],
        class_labels=case['in']['class_labels'],
        test_cfg_override=case['params'].get('override'),
        source=RecordedSource(golden.draws(case, 'step_noise')),
    )
    golden.assert_close(x_0, case['out']['x_0'], 2e-4)


@pytest.mark.parametrize('name', golden.names('piflow', 'sample_t'))
def test_segments(name):
    case = PIFLOW[name]
    params = case['params']
    keys = {key: params[key] for key in ('nfe', 'final_step_size_scale') if key in params}
    model = PiFlowImitation(
        torch.nn.Identity(),
        policy_type='GMFlow',
        num_timesteps=1,
        timestep_sampler=params['timestep_sampler'],
        train_cfg=keys,
    )
    raw_src, segment_size = model.sample_t(params['batch'], RecordedSource(golden.draws(case, 'raw_t')))
    golden.assert_close(raw_src, case['out']['raw_t_src'], 1e-6)
    golden.assert_close(segment_size, case['out']['segment_size'], 1e-6)
    golden.assert_close(model.timestep_sampler.warp_t(raw_src), case['out']['sigma_t_src'].flatten(), 1e-6)


def draw_names(case, first, with_noise=True):
    dropout = case['params']['train_cfg'].get('gm_dropout', 0) > 0
    return [*first, *(['dropout'] if dropout else []), 'student_intervals', 'teacher_intervals']


@pytest.mark.parametrize('name', golden.names('piflow', 'forward_train'))
def test_imitation_from_data(name):
    case = PIFLOW[name]
    model = build(case)
    teacher, teacher_kwargs = build_teacher(case)
    loss, log_vars = model(
        case['in']['x_0'],
        return_loss=True,
        teacher=teacher,
        teacher_kwargs=teacher_kwargs,
        running_status={'iteration': case['params']['iteration']},
        source=RecordedSource(golden.draws(case, *draw_names(case, ['raw_t', 'noise']))),
        class_labels=case['in']['class_labels'],
    )
    loss.backward()
    golden.assert_close(loss.detach(), case['out']['loss'], 2e-5)
    for key, value in case['out'].items():
        if key.startswith('log_vars.'):
            golden.assert_close(log_vars[key.removeprefix('log_vars.')], value, 2e-5)
    assert_gradients(model, case)
    assert all(parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.parametrize('stepwise', [False, True])
@pytest.mark.parametrize('name', golden.names('piflow', 'data_free'))
def test_data_free_imitation(name, stepwise):
    case = PIFLOW[name]
    model = build(case, PiFlowImitationDataFree)
    teacher, teacher_kwargs = build_teacher(case)
    tensors = [tensor for _, tensor in sorted(case['draw'].items())]
    names = draw_names(case, [])
    recorded = {'noise': tensors[:1], **{key: tensors[1 + i :: len(names)] for i, key in enumerate(names)}}
    source = RecordedSource(recorded)
    kwargs = {
        'teacher': teacher,
        'teacher_kwargs': teacher_kwargs,
        'running_status': {'iteration': case['params']['iteration']},
        'source': source,
        'class_labels': case['in']['class_labels'],
    }
    x_0 = case['in']['x_0_dummy']
    if stepwise:
        log_vars, state = {}, model.initial_segment_state(x_0, source)
        while state is not None:
            loss, logs, state = model(x_0, return_loss=True, segment_state=state, **kwargs)
            loss.backward()
            log_vars = {**log_vars, **{key: log_vars.get(key, 0) + value for key, value in logs.items()}}
    else:
        loss, log_vars = model(x_0, return_loss=True, **kwargs)
        loss.backward()
    for key, value in case['out'].items():
        if key.startswith('log_vars.'):
            golden.assert_close(log_vars[key.removeprefix('log_vars.')], value, 2e-5)
    assert_gradients(model, case)


@pytest.mark.parametrize('name', golden.names('piflow', 'segment64'))
def test_one_segment_in_double_precision(name):
    case = PIFLOW[name]
    params = case['params']
    model = build(case)
    teacher, teacher_kwargs = build_teacher(case)
    x_src, raw_src = case['in']['x_t_src'], case['in']['raw_t_src']
    output = model.pred(x_src, case['in']['sigma_t_src'].flatten() * params['num_timesteps'])
    policy = model.build_policy(output, x_src, case['in']['sigma_t_src'], eps=params['eps'])
    segment_size = torch.full((len(raw_src),), params['segment_size'], dtype=torch.float64)
    source = RecordedSource(golden.draws(case, 'student_intervals', 'teacher_intervals'))
    loss, pairs, explorer = model.piid_segment(
        teacher, policy, x_src, raw_src, segment_size, params['teacher_ratio'], teacher_kwargs, source=source
    )
    loss.backward()
    golden.assert_close(loss.detach(), case['out']['loss'], 1e-9)
    assert_gradients(model, case, 1e-7)
    raw_dst = (raw_src - segment_size).clamp(min=0)
    golden.assert_close(raw_dst, case['out']['raw_t_dst'].flatten(), 1e-9)
    with torch.no_grad():
        x_dst, _, _ = model.policy_rollout(
            pairs.x_last, pairs.raw_last, raw_dst, params['train_cfg']['total_substeps'], explorer
        )
    golden.assert_close(x_dst, case['out']['x_t_dst'], 1e-9)


def rollout_case(name):
    case = ROLLOUT[name]
    params, tensors = case['params'], {key: value.clone() for key, value in case['in'].items()}
    is_gm = params['policy'] == 'gm'
    model = PiFlowImitation(
        torch.nn.Identity(),
        policy_type='GMFlow' if is_gm else 'DX',
        policy_kwargs=params.get('policy_kwargs'),
        num_timesteps=1,
        timestep_sampler=params.get('dynamic_shift') or {'shift': params['shift']},
    )
    keys = ('means', 'logweights', 'logstds') if is_gm else ('out',)
    output = {key: tensors[key].requires_grad_() for key in keys}
    policy = model.build_policy(output if is_gm else output['out'], tensors['x_src'], tensors['sigma_src'])
    return case, model, tensors, output, policy


@pytest.mark.parametrize('name', [name for name in ROLLOUT if not name.startswith('avg')])
def test_rollout(name):
    case, model, tensors, _, policy = rollout_case(name)
    x_end, sigma_end, t_end = model.policy_rollout(
        tensors.get('x_start', tensors['x_src']),
        tensors['raw_t_start'],
        tensors['raw_t_end'],
        case['params']['total_substeps'],
        policy,
        seq_len=case['params']['seq_len'],
    )
    tolerance = 1e-9 if x_end.dtype == torch.float64 else 2e-5
    golden.assert_close(x_end.detach(), case['out']['x_end'], tolerance)
    assert (sigma_end - case['out']['sigma_end']).abs().max() < tolerance
    assert (t_end - case['out']['t_end']).abs().max() < tolerance


@pytest.mark.parametrize('name', golden.names('rollout', 'avg'))
def test_average_velocity_and_gradients(name):
    case, model, tensors, output, policy = rollout_case(name)
    u = model.policy_average_u(
        tensors['x_start'],
        tensors['raw_t_start'],
        tensors['raw_t_end'],
        case['params']['total_substeps'],
        policy,
        seq_len=case['params']['seq_len'],
        eps=case['params']['eps'],
    )
    ((u * tensors['w']).mean() + u.square().mean()).backward()
    is_double = u.dtype == torch.float64
    golden.assert_close(u.detach(), case['out']['u'], 1e-9 if is_double else 2e-5)
    for key, tensor in output.items():
        golden.assert_close(tensor.grad, case['out'][f'grad_{key}'], 1e-7 if is_double else 2e-4)
