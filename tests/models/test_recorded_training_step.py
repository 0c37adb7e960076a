"""The training step of the class-conditional whole reproduces the recorded vectors, parameters after AdamW included."""

import pytest
import torch

from lakonlab.models.latent_diffusion_class_image import LatentDiffusionClassImage
from lakonlab.ops.patchify import patchify, unpatchify
from lakonlab.ops.random_source import RecordedSource
from lakonlab.registry import MODULES
from tests import golden
from tests.toy_nets import ToyGM, ToyVelocity

CASES = golden.load('train_step')


def build(case):
    params = case['params']
    time = {'num_timesteps': params['num_timesteps'], 'timestep_sampler': {'shift': params['shift']}}
    channels = len(case['net']['amp'])
    toy = {'num_classes': len(case['net']['emb']) - 1, 'time_scale': params['num_timesteps']}
    student, teacher = ToyGM(params['K'], channels, **toy), ToyVelocity(channels, **toy)
    student.load_state_dict(case['net'])
    teacher.load_state_dict(case['teacher'])
    loss = {'type': 'DiffusionMSELoss', 'rescale_mode': 'constant', 'rescale_cfg': {'scale': params['loss_scale']}}
    return LatentDiffusionClassImage(
        diffusion={
            'type': 'PiFlowImitation',
            'denoising': student,
            'policy_type': 'GMFlow',
            'flow_loss': loss,
            **time,
        },
        teacher={'type': 'GaussianFlow', 'denoising': teacher, **time},
        patch_size=params['patch_size'],
        train_cfg=params['train_cfg'],
    )


@pytest.mark.parametrize('name', [name for name in CASES if not name.startswith('patchify')])
def test_training_step(name):
    case = CASES[name]
    params = case['params']
    assert MODULES.get('PiFlowImitation') is not None
    model = build(case)
    settings = dict(params['optimizer'])
    optimizer = getattr(torch.optim, settings.pop('type'))(model.diffusion.parameters(), **settings)
    data = {
        'latents': case['in']['latents'],
        'labels': case['in']['labels'],
        'negative_labels': case['in']['negative_labels'],
    }
    names = ('raw_t', 'noise', 'dropout', 'student_intervals', 'teacher_intervals')
    outputs = model.train_step(
        data,
        {'diffusion': optimizer},
        running_status={'iteration': params['iteration']},
        source=RecordedSource(golden.draws(case, *names)),
    )
    out = case['out']
    assert outputs['num_samples'] == int(out['num_samples'])
    assert outputs['skipped'] == ()
    for key, value in out.items():
        if key.startswith('log_vars.'):
            assert outputs['log_vars'][key.removeprefix('log_vars.')] == pytest.approx(value.item(), rel=2e-4)
    for key, parameter in model.diffusion.denoising.named_parameters():
        golden.assert_close(parameter.grad, out[f'grad.{key}'], 2e-4)
        golden.assert_close(parameter.detach(), out[f'param.{key}'], 2e-4)
    assert all(parameter.grad is None for parameter in model.teacher.parameters())


def test_patchify():
    case = CASES['patchify2']
    for dims in ('4', '5'):
        x = case['in'][f'x{dims}']
        y = patchify(x, case['params']['patch_size'])
        assert torch.equal(y, case['out'][f'y{dims}'])
        assert torch.equal(unpatchify(y, case['params']['patch_size']), x)
