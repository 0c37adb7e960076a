"""The class-conditional whole: roles, who is trained, labels and guidance, and messages for bad input."""

import copy

import pytest
import torch

from lakonlab.models.latent_diffusion_class_image import LatentDiffusionClassImage
from lakonlab.ops.random_source import SeededSource

ARCHITECTURE = {
    'num_attention_heads': 2,
    'attention_head_dim': 8,
    'in_channels': 1,
    'num_layers': 1,
    'sample_size': 4,
    'patch_size': 2,
    'num_embeds_ada_norm': 3,
}
LOSS = {'type': 'DiffusionMSELoss', 'rescale_mode': 'constant', 'rescale_cfg': {'scale': 3.0}}
TEACHER = {
    'type': 'GaussianFlow',
    'denoising': {'type': 'DiTTransformer2DModelMod', **ARCHITECTURE},
    'num_timesteps': 1,
}
STUDENT = {
    'type': 'PiFlowImitation',
    'policy_type': 'GMFlow',
    'denoising': {
        'type': 'GMDiTTransformer2DModelV2',
        'num_gaussians': 3,
        'logstd_inner_dim': 8,
        'gm_num_logstd_layers': 2,
        **ARCHITECTURE,
    },
    'flow_loss': LOSS,
    'num_timesteps': 1,
}
TRAIN = {'nfe': 2, 'total_substeps': 16, 'teacher_test_cfg': {'guidance_scale': 2.0}}


def build(train_cfg=None, test_cfg=None, **kwargs):
    torch.manual_seed(0)
    kwargs = {'diffusion': STUDENT, 'teacher': TEACHER, 'diffusion_use_ema': True, **kwargs}
    train_cfg = {**TRAIN, **(train_cfg or {})}
    model = LatentDiffusionClassImage(train_cfg=train_cfg, test_cfg={'nfe': 2, **(test_cfg or {})}, **kwargs)
    for module in (model.diffusion, model.teacher):
        if module is not None:  # a fresh DiT begins as the zero function; give it something to say
            for parameter in module.parameters():
                parameter.data.add_(0.05 * torch.randn_like(parameter))
    return model


def batch(size=4):
    return {
        'latents': torch.randn(size, 1, 4, 4, generator=torch.Generator().manual_seed(1)),
        'noise': torch.randn(size, 1, 4, 4, generator=torch.Generator().manual_seed(2)),
        'labels': torch.arange(size) % 3,
        'negative_labels': torch.full((size,), 3),
    }


def train(model, data, iteration=0):
    optimizer = {'diffusion': torch.optim.AdamW(model.diffusion.parameters(), lr=1e-3)}
    return model.train_step(data, optimizer, running_status={'iteration': iteration}, source=SeededSource(0, iteration))


@pytest.mark.parametrize('kind', ['PiFlowImitation', 'PiFlowImitationDataFree'])
def test_only_the_student_is_trained(kind):
    model = build(diffusion={**STUDENT, 'type': kind})
    before = copy.deepcopy(model.state_dict())
    train(model, batch())
    after = model.state_dict()
    changed = {key.split('.')[0] for key in before if not torch.equal(before[key], after[key])}
    assert changed == {'diffusion'}
    assert all(parameter.grad is None for parameter in model.teacher.parameters())
    assert not any(parameter.requires_grad for parameter in model.teacher.parameters())
    assert all(parameter.grad is None for parameter in model.diffusion_ema.parameters())
    assert all(parameter.grad is not None for parameter in model.diffusion.parameters())


def test_a_step_is_a_function_of_seed_and_iteration():
    results = []
    for _ in range(2):
        model = build()
        torch.rand(3)  # the global state must not matter
        results.append((train(model, batch(), 7)['log_vars'], copy.deepcopy(model.state_dict())))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(value, results[1][1][key]) for key, value in results[0][1].items())


@pytest.mark.parametrize('kind', ['PiFlowImitation', 'PiFlowImitationDataFree'])
def test_accumulation_draws_the_same_numbers(kind):
    """Two micro-batches of two give the step of one batch of four."""
    weights = []
    for size in (None, 2):
        model = build(
            {'grad_accum_batch_size': size, 'policy_dropout': 0.3}, diffusion={**STUDENT, 'type': kind}
        ).double()
        data = {key: value.double() if value.is_floating_point() else value for key, value in batch().items()}
        train(model, data)
        weights.append({key: p.grad.clone() for key, p in model.diffusion.named_parameters()})
    for key, gradient in weights[0].items():
        torch.testing.assert_close(weights[1][key], gradient, rtol=1e-6, atol=1e-9)


def test_teacher_is_bitwise_unchanged_by_training():
    model = build()
    data = batch()
    kwargs = {'return_u': True, 'x_t': data['noise'], 't': torch.full((4,), 0.6), 'class_labels': data['labels']}
    before = model.teacher(**kwargs)
    for iteration in range(5):
        train(model, data, iteration)
    assert torch.equal(model.teacher(**kwargs), before)


def test_roles_and_sampling():
    model = build()
    images = {
        role: model.val_step(batch(), role=role, test_cfg_override={'num_timesteps': 3})
        for role in ('student', 'ema', 'teacher')
    }
    for role, outputs in images.items():
        assert outputs['num_samples'] == 4
        assert outputs['nfe'] == (3 if role == 'teacher' else 2)
        assert outputs['pred_imgs'].shape == (4, 1, 4, 4)
        assert outputs['pred_imgs'].min() >= 0
        assert outputs['pred_imgs'].max() <= 1
    assert torch.equal(model.val_step(batch())['pred_imgs'], images['ema']['pred_imgs'])
    with pytest.raises(ValueError, match='role'):
        model.val_step(batch(), role='pupil')
    with pytest.raises(ValueError, match='without it'):
        build(teacher=None).val_step(batch(), role='teacher')


def test_teacher_is_sampled_with_the_guidance_of_training():
    model = build()
    guided = model.val_step(batch(), role='teacher', test_cfg_override={'num_timesteps': 2})['pred_imgs']
    explicit = model.val_step(batch(), role='teacher', test_cfg_override={'num_timesteps': 2, 'guidance_scale': 2.0})[
        'pred_imgs'
    ]
    plain = model.val_step(batch(), role='teacher', test_cfg_override={'num_timesteps': 2, 'guidance_scale': 1.0})[
        'pred_imgs'
    ]
    assert torch.equal(guided, explicit)
    assert not torch.equal(guided, plain)


def test_inference_only_loads_either_prefix_into_one_student():
    model = build(inference_only=True)
    assert model.teacher is None
    assert model.diffusion_ema is model.diffusion


def test_ema_shares_what_is_frozen():
    frozen = {**STUDENT, 'denoising': {**STUDENT['denoising'], 'freeze': True, 'freeze_exclude': ['proj_out_means']}}
    model = build(diffusion=frozen)
    pairs = zip(model.diffusion.named_parameters(), model.diffusion_ema.parameters())
    for (name, student), ema in pairs:
        assert (student is ema) == (not student.requires_grad), name


def test_tying_replaces_frozen_modules_that_agree_and_refuses_others():
    student = {**STUDENT, 'denoising': {**STUDENT['denoising'], 'freeze': True, 'freeze_exclude': ['proj_out']}}
    with pytest.raises(ValueError, match='differ'):
        build(diffusion=student, tie_teacher=True)
    with pytest.raises(ValueError, match='no frozen submodule'):
        build(tie_teacher=True)


def test_everything_is_built_on_the_meta_device():
    with torch.device('meta'):
        model = LatentDiffusionClassImage(diffusion=STUDENT, teacher=TEACHER, diffusion_use_ema=True, train_cfg=TRAIN)
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize(
    ('train_cfg', 'change', 'message'),
    [
        ({}, {'latents': None}, 'neither latents nor images'),
        ({'prob_class': 0.5}, {'negative_labels': None}, 'negative_label'),
        ({}, {'negative_labels': None}, 'negative_label'),
    ],
)
def test_incomplete_batches_are_refused(train_cfg, change, message):
    data = {key: value for key, value in {**batch(), **change}.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        train(build(train_cfg), data)


def test_label_dropout_gives_the_student_the_negative_label():
    seen = []
    model = build({'prob_class': 0.5, 'teacher_test_cfg': None})
    hooks = [
        module.denoising.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs['class_labels']), with_kwargs=True
        )
        for module in (model.diffusion, model.teacher)
    ]
    data = batch(64)
    train(model, data)
    for hook in hooks:
        hook.remove()
    student, teacher = seen[0], seen[1]
    assert torch.equal(teacher, data['labels'].repeat(2))  # asked once for both intermediate states
    dropped = student == 3
    assert 10 < int(dropped.sum()) < 54
    assert torch.equal(student[~dropped], data['labels'][~dropped])


def test_units_of_time_must_agree():
    with pytest.raises(ValueError, match='num_timesteps'):
        train(build(teacher={**TEACHER, 'num_timesteps': 1000}), batch())


def test_teacher_is_required():
    with pytest.raises(ValueError, match='set model'):
        train(build(teacher=None), batch())


class HalvingAutoencoder(torch.nn.Module):
    """Latents are half the pixels."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(2.0))

    def encode(self, images, sample_mode='sample', source=None):
        return images / self.scale

    def decode(self, latents):
        return latents * self.scale


def test_autoencoder_is_frozen_and_used_both_ways():
    model = build(vae={'type': HalvingAutoencoder})
    assert not any(parameter.requires_grad for parameter in model.vae.parameters())
    assert model.diffusion.training
    assert not any(module.training for module in (model.vae, model.diffusion_ema, model.teacher))
    images = torch.rand(2, 1, 4, 4)
    torch.testing.assert_close(model.encode_batch({'images': images}), images - 0.5)
    torch.testing.assert_close(model.decode_latents(images - 0.5), images * 2 - 1)


def test_clamping_keeps_every_prediction_in_range():
    seen = []
    model = build()
    original = model.clamp_latents
    model.clamp_latents = lambda x_0: seen.append(original(x_0)) or seen[-1]
    model.val_step(batch(), role='teacher', test_cfg_override={'num_timesteps': 3, 'clamp_denoised': True})
    assert len(seen) == 3
    assert all(x_0.abs().max() <= 1 for x_0 in seen)
    with pytest.raises(ValueError, match='clamp_denoised'):
        model.val_step(batch(), test_cfg_override={'clamp_denoised': True})


def test_older_place_of_the_guidance_of_the_teacher():
    outputs = [
        build(train_cfg).val_step(batch(), role='teacher', test_cfg_override={'num_timesteps': 2})['pred_imgs']
        for train_cfg in ({}, {'teacher_test_cfg': None, 'teacher_guidance_scale': 2.0})
    ]
    assert torch.equal(*outputs)


@pytest.mark.parametrize(
    ('train_cfg', 'message'),
    [
        ({'nfe': 0}, 'nfe=0'),
        ({'num_intermediate_states': 0}, 'num_intermediate_states=0'),
        ({'policy_dropout': 1.5}, 'policy_dropout=1.5'),
        ({'prob_class': 1.9}, 'prob_class=1.9'),
        ({'substep_rounding': 'floor'}, "substep_rounding='floor'"),
        ({'grad_accum_batch_size': 0}, 'grad_accum_batch_size=0'),
    ],
)
def test_impossible_values_are_named(train_cfg, message):
    with pytest.raises(ValueError, match=message):
        train(build(train_cfg), batch())


def test_policy_networks_predict_velocities():
    with pytest.raises(ValueError, match='denoising_mean_mode'):
        build(diffusion={**STUDENT, 'denoising_mean_mode': 'X0'})


def test_dropout_inside_the_network_draws_from_the_source():
    teacher = {**TEACHER, 'flow_loss': LOSS}
    teacher['denoising'] = {**teacher['denoising'], 'class_dropout_prob': 0.5}
    losses = []
    for _ in range(2):
        model = build(diffusion=teacher, teacher=None)
        torch.rand(1)
        losses.append(train(model, batch(16))['log_vars']['loss_diffusion'])
    assert losses[0] == losses[1]
