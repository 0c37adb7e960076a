"""Text-to-image models: conditions, guidance, embedded guidance, and that samples do not depend on their neighbours."""

import pytest
import torch
from torch import nn

from lakonlab.ops.random_source import SeededSource
from lakonlab.registry import MODULES
from lakonlab.runner.optimizer import build_optimizers
from tests import tiny_text_image as tiny


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp('weights')
    return {family: tiny.teacher_file(family, folder) for family in tiny.SIZES}


def negatives(data, length=3):
    """Negative prompts of another length than the prompts."""
    generator = torch.Generator().manual_seed(7)
    return {
        'encoder_hidden_states': torch.randn(2, length, 20, generator=generator),
        'encoder_hidden_states_mask': torch.ones(2, length, dtype=torch.long),
    }


def build(family, weights, policy='GM', **train_cfg):
    return tiny.build(tiny.config(family, policy, weights[family]), family, **train_cfg)


def test_guidance_of_the_teacher_is_the_formula(weights):
    """The teacher is asked once for both halves; masks keep prompts of different lengths apart."""
    model = build('QwenImage', weights)
    data = tiny.batch('QwenImage')
    data['negative_prompt_embed_kwargs'] = negatives(data)
    conditions = model.conditions_of(data, needs_negative=True)
    x_t, t = data['latents'], torch.tensor([0.3, 0.8])
    with torch.no_grad():
        found = model.teacher(return_u=True, x_t=x_t, t=t, guidance_scale=4.0, **model.with_guidance(conditions, 4.0))
        positive = model.teacher.pred(x_t, t, **data['prompt_embed_kwargs'])
        negative = model.teacher.pred(x_t, t, **data['negative_prompt_embed_kwargs'])
    expected = positive + 3 * (positive - negative)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_teacher_guidance_reaches_training(weights):
    data = tiny.batch('QwenImage')
    data['negative_prompt_embed_kwargs'] = negatives(data)
    losses = []
    for scale in (None, 4.0):
        model = build('QwenImage', weights, teacher_test_cfg=dict(guidance_scale=scale) if scale else {})
        optimizer = build_optimizers(model, {'diffusion': dict(type='AdamW', lr=1e-3)})
        logs = model.train_step(data, optimizer, running_status={'iteration': 0}, source=SeededSource(0, 0))
        losses.append(logs['log_vars']['loss_diffusion'])
    assert losses[0] != losses[1]


def test_guidance_without_negative_prompts(weights):
    model = build('QwenImage', weights, teacher_test_cfg=dict(guidance_scale=4.0))
    optimizer = build_optimizers(model, {'diffusion': dict(type='AdamW', lr=1e-3)})
    with pytest.raises(ValueError, match=r'guidance_scale=4\.0 needs negative conditions.*negative_prompt_embeds_path'):
        model.train_step(tiny.batch('QwenImage'), optimizer, running_status={'iteration': 0})


def test_prompts_of_different_lengths_without_a_mask(weights):
    model = build('Flux', weights)
    data = tiny.batch('Flux')
    data['negative_prompt_embed_kwargs'] = {
        'encoder_hidden_states': torch.randn(2, 3, 20),
        'pooled_projections': torch.randn(2, 12),
    }
    with pytest.raises(ValueError, match=r'encoder_hidden_states.*5 and 3 tokens and no mask'):
        model.conditions_of(data, needs_negative=True)


@pytest.mark.parametrize('which', ['prompt_embed_kwargs', 'negative_prompt_embed_kwargs'])
def test_prompts_that_were_embedded_in_different_ways(weights, which):
    model = build('QwenImage', weights)
    data = tiny.batch('QwenImage')
    data['negative_prompt_embed_kwargs'] = negatives(data)
    del data[which]['encoder_hidden_states_mask']
    with pytest.raises(ValueError, match=r'embed both with the same text encoder'):
        model.conditions_of(data, needs_negative=True)


def test_embedded_guidance_of_student_and_teacher(weights):
    """Each is told its own scale; what a transformer is given is recorded on its way in."""
    seen = {'student': [], 'teacher': []}
    model = build('Flux', weights, distilled_guidance_scale=1.5, teacher_test_cfg=dict(distilled_guidance_scale=2.5))
    for role in seen:
        network = model.role(role).denoising
        network.register_forward_pre_hook(
            lambda module, args, kwargs, role=role: seen[role].append(kwargs['guidance']), with_kwargs=True
        )
    optimizer = build_optimizers(model, {'diffusion': dict(type='AdamW', lr=1e-3)})
    model.train_step(tiny.batch('Flux'), optimizer, running_status={'iteration': 0})
    for role, scale in (('student', 1.5), ('teacher', 2.5)):
        assert seen[role]
        assert all(bool((guidance == scale).all()) and guidance.dtype == torch.float32 for guidance in seen[role])


def test_no_embedded_guidance(weights):
    model = build('Flux', weights, distilled_guidance_scale=None)
    optimizer = build_optimizers(model, {'diffusion': dict(type='AdamW', lr=1e-3)})
    with pytest.raises(ValueError, match='distilled_guidance_scale'):
        model.train_step(tiny.batch('Flux'), optimizer, running_status={'iteration': 0})


@pytest.mark.parametrize('family', list(tiny.SIZES))
@pytest.mark.parametrize('role', ['student', 'ema', 'teacher'])
def test_samples_do_not_depend_on_their_batch(weights, family, role):
    """Also where prompts of a batch have different lengths."""
    model = build(family, weights).eval()
    data = tiny.batch(family)
    noise = data.pop('latents')
    override = dict(num_timesteps=3) if role == 'teacher' else {}
    together = model.val_step({**data, 'noise': noise}, role=role, test_cfg_override=override)
    assert together['nfe'] == (3 if role == 'teacher' else 2)
    for row in range(2):
        own = {key: value[row : row + 1] for key, value in data['prompt_embed_kwargs'].items()}
        single = {'prompt_embed_kwargs': own, 'noise': noise[row : row + 1]}
        alone = model.val_step(single, role=role, test_cfg_override=override)
        assert (alone['pred_imgs'] - together['pred_imgs'][row : row + 1]).abs().max() < 1e-5


def test_published_treatment_of_padding_is_an_option(weights):
    """There, a short prompt's sample changes with the longest prompt beside it."""
    config = tiny.config('QwenImage', 'GM', weights['QwenImage'])
    for part in ('diffusion', 'teacher'):
        config[part]['denoising']['attend_to_padding'] = True
    model = tiny.build(config, 'QwenImage').eval()
    data = tiny.batch('QwenImage')
    noise = data.pop('latents')
    together = model.val_step({**data, 'noise': noise}, role='student')['pred_imgs']
    own = {key: value[:1] for key, value in data['prompt_embed_kwargs'].items()}
    alone = model.val_step({'prompt_embed_kwargs': own, 'noise': noise[:1]}, role='student')['pred_imgs']
    assert (alone - together[:1]).abs().max() > 1e-4


class ConstantEncoder(nn.Module):
    """Gives every prompt the embedding of its length."""

    def forward(self, prompt, **kwargs):
        lengths = torch.tensor([float(len(text)) for text in prompt])
        return {
            'encoder_hidden_states': lengths[:, None, None].expand(-1, 5, 20),
            'encoder_hidden_states_mask': torch.ones(len(prompt), 5, dtype=torch.long),
        }


def test_text_encoder(weights):
    MODULES.register_module(name='ConstantEncoder', module=ConstantEncoder, force=True)
    config = tiny.config('QwenImage', 'GM', weights['QwenImage'])
    model = tiny.build({**config, 'text_encoder': dict(type='ConstantEncoder')}, 'QwenImage')
    noise = torch.randn(2, *tiny.LATENT_SIZE)
    written = model.val_step({'noise': noise, 'prompt_kwargs': {'prompt': ['a', 'bcd']}})['pred_imgs']
    embedded = ConstantEncoder()(['a', 'bcd'])
    assert torch.equal(written, model.val_step({'noise': noise, 'prompt_embed_kwargs': embedded})['pred_imgs'])
    model.train()
    assert not model.text_encoder.training


def test_no_text_encoder(weights):
    model = build('QwenImage', weights)
    with pytest.raises(ValueError, match=r'prompt_kwargs, but the model has no text encoder'):
        model.val_step({'prompt_kwargs': {'prompt': ['a']}})
    with pytest.raises(ValueError, match=r'neither prompt_embed_kwargs nor prompt_kwargs'):
        model.val_step({'noise': torch.zeros(1, *tiny.LATENT_SIZE)})


def test_training_without_data_needs_no_latents(weights):
    config = tiny.config('QwenImage', 'GM', weights['QwenImage'], diffusion__type='PiFlowImitationDataFree')
    model = tiny.build(config, 'QwenImage')
    optimizer = build_optimizers(model, {'diffusion': dict(type='AdamW', lr=1e-3)})
    data = tiny.batch('QwenImage')
    data.pop('latents')
    logs = model.train_step(data, optimizer, running_status={'iteration': 0}, source=SeededSource(0, 0))['log_vars']
    assert {'loss_diffusion', 'loss_diffusion_step0', 'loss_diffusion_step1'} <= logs.keys()
    from_data = build('QwenImage', weights)
    with pytest.raises(ValueError, match=r'neither latents nor images'):
        from_data.train_step(data, build_optimizers(from_data, {'diffusion': dict(type='AdamW', lr=1e-3)}))


def test_the_shape_that_a_data_set_asks_for_is_that_of_training_without_data(weights):
    """The marker of a data set comes before test_cfg, and the result is that of latents of any values."""
    config = tiny.config('QwenImage', 'GM', weights['QwenImage'], diffusion__type='PiFlowImitationDataFree')
    sizes = [(4, 6, 4)] * 2
    logs = []
    for given in ({'latent_size': sizes}, {'latents': torch.full((2, *sizes[0]), 7.0)}):
        model = tiny.build(config, 'QwenImage')
        data = {**tiny.batch('QwenImage'), **given}
        if 'latent_size' in given:
            del data['latents']
            assert model.encode_batch(data).shape == (2, *sizes[0])
            assert not model.encode_batch(data).any()
        optimizer = build_optimizers(model, {'diffusion': dict(type='AdamW', lr=1e-3)})
        logs.append(model.train_step(data, optimizer, running_status={'iteration': 0}, source=SeededSource(0, 0)))
    assert logs[0]['log_vars'] == logs[1]['log_vars']


def test_rows_of_different_shape_are_refused(weights):
    config = tiny.config('QwenImage', 'GM', weights['QwenImage'], diffusion__type='PiFlowImitationDataFree')
    with pytest.raises(ValueError, match=r'\(4, 4, 6\) and \(4, 6, 4\).*bucketize=True'):
        tiny.build(config, 'QwenImage').encode_batch({'ids': [0, 1], 'latent_size': [(4, 6, 4), (4, 4, 6)]})


def test_a_trainer_on_data_refuses_a_shape(weights):
    model = build('QwenImage', weights)
    data = {**tiny.batch('QwenImage'), 'latent_size': [tiny.LATENT_SIZE] * 2}
    del data['latents']
    with pytest.raises(ValueError, match=r'PiFlowImitation is trained on data.*image_dir'):
        model.train_step(data, build_optimizers(model, {'diffusion': dict(type='AdamW', lr=1e-3)}))
