"""Transformers that nobody wrote a class for become teachers and students by configuration."""

import math

import diffusers
import pytest
import torch
from safetensors.torch import save_file

from lakonlab.models.architecture.roles import named_state
from lakonlab.ops.random_source import SeededSource
from lakonlab.registry import MODELS, MODULES
from lakonlab.runner.optimizer import build_optimizers
from tests import tiny_text_image as tiny

POSITIONS = dict(img_ids=dict(kind='image', width=4, row=1, column=2), txt_ids=dict(kind='text', width=4, index=3))
ROTARY = dict(attention_head_dim=16, num_attention_heads=2, joint_attention_dim=20)
OTHERS = {
    'stable diffusion 3': dict(
        transformer=dict(
            type='SD3Transformer2DModel',
            sample_size=8,
            patch_size=2,
            in_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=20,
            caption_projection_dim=32,
            pooled_projection_dim=12,
            out_channels=4,
            pos_embed_max_size=8,
        ),
        latents='images',
        patch_size=2,
        timestep_scale=1000.0,
    ),
    'FLUX.2': dict(
        transformer=dict(
            type='Flux2Transformer2DModel',
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            timestep_guidance_channels=16,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=True,
            **ROTARY,
        ),
        patch_size=2,
        positions=POSITIONS,
    ),
    'AuraFlow': dict(  # reads the number of channels from its config
        transformer=dict(
            type='AuraFlowTransformer2DModel',
            sample_size=8,
            patch_size=2,
            in_channels=4,
            num_mmdit_layers=1,
            num_single_dit_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=20,
            caption_projection_dim=32,
            out_channels=4,
            pos_embed_max_size=64,
        ),
        latents='images',
        patch_size=2,
    ),
    'LongCat-Image': dict(
        transformer=dict(
            type='LongCatImageTransformer2DModel',
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            axes_dims_rope=[4, 6, 6],
            **ROTARY,
        ),
        patch_size=2,
        positions=dict(img_ids=dict(kind='image'), txt_ids=dict(kind='text')),
    ),
}
HEADS = {
    'GMFlow': dict(type='GMFlow', num_gaussians=3, logstd_inner_dim=12),
    'GMFlow with a fixed deviation': dict(type='GMFlow', num_gaussians=2, constant_logstd=-2.0),
    'DX': dict(type='DX', n_grid=3),
}
everyone = pytest.mark.parametrize('name', OTHERS)
heads = pytest.mark.parametrize('head', HEADS)


def given(name, batch_size=2):
    generator = torch.Generator().manual_seed(0)
    conditions = {'encoder_hidden_states': torch.randn(batch_size, 5, 20, generator=generator)}
    if name == 'stable diffusion 3':
        conditions['pooled_projections'] = torch.randn(batch_size, 12, generator=generator)
    if name == 'FLUX.2':
        conditions['guidance'] = torch.full((batch_size,), 3.5)
    x_t = torch.randn(batch_size, *tiny.LATENT_SIZE, generator=generator)
    return x_t, torch.tensor([0.3, 0.8])[:batch_size], conditions


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    folder, paths = tmp_path_factory.mktemp('weights'), {}
    for name, options in OTHERS.items():
        torch.manual_seed(0)
        state = dict(named_state(MODULES.build({'type': 'DiffusersTransformer', **options})))
        state = {
            key: torch.randn_like(value) * value.shape[-1] ** -0.5 if value.requires_grad else value
            for key, value in state.items()
        }
        paths[name] = str(folder / f'{name}.safetensors')
        save_file({key: value.detach().contiguous() for key, value in state.items()}, paths[name])
    return paths


def build(name, **arguments):
    return MODULES.build({'type': 'DiffusersTransformer', **OTHERS[name], **arguments})


@torch.no_grad()
@everyone
def test_teacher_equals_the_transformer_called_by_hand(weights, name):
    network = build(name, pretrained=weights[name], freeze=True)
    x_t, t, conditions = given(name)
    found = network(x_t, t, **conditions)
    options = dict(OTHERS[name]['transformer'])
    kind = getattr(diffusers, options.pop('type'))
    transformer = kind(**options)
    # the very tensors: a copy lies elsewhere in memory, and sums over it may be ordered otherwise
    transformer.load_state_dict(dict(named_state(network)), assign=True)
    if OTHERS[name].get('latents') == 'images':
        scale = OTHERS[name].get('timestep_scale', 1)
        expected = transformer(hidden_states=x_t, timestep=scale * t, **conditions).sample
    else:
        # patches as the pipelines of these models cut them
        batch, channels, height, width = x_t.shape
        tokens = x_t.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
        tokens = tokens.reshape(batch, -1, channels * 4)
        rows, columns = torch.meshgrid(torch.arange(height // 2), torch.arange(width // 2), indexing='ij')
        axes = 4 if name == 'FLUX.2' else 3
        image_ids, text_ids = torch.zeros(rows.numel(), axes), torch.zeros(5, axes)
        image_ids[:, 1], image_ids[:, 2] = rows.flatten(), columns.flatten()
        if name == 'FLUX.2':
            text_ids[:, 3] = torch.arange(5)
        output = transformer(hidden_states=tokens, timestep=t, img_ids=image_ids, txt_ids=text_ids, **conditions).sample
        output = output.view(batch, height // 2, width // 2, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
        expected = output.reshape(x_t.shape)
    assert torch.equal(found, expected)


@torch.no_grad()
@everyone
@heads
def test_fresh_student_is_its_teacher(weights, name, head):
    """The components differ by the noise on their biases alone, and a DX grid by nothing."""
    teacher = build(name, pretrained=weights[name], freeze=True)
    student = build(name, pretrained=weights[name], head=HEADS[head])
    x_t, t, conditions = given(name)
    u, output = teacher(x_t, t, **conditions), student(x_t, t, **conditions)
    if head == 'DX':
        assert output.shape == (2, 3, *tiny.LATENT_SIZE)
        assert all((output[:, n] - u).abs().max() < 1e-5 for n in range(3))
        return
    K = HEADS[head]['num_gaussians']
    shapes = {'means': (2, K, *tiny.LATENT_SIZE), 'logweights': (2, K, 1, 4, 6), 'logstds': (2, 1, 1, 1, 1)}
    assert {key: tuple(value.shape) for key, value in output.items()} == shapes
    offset = output['means'] - u.unsqueeze(1)
    constant = offset.mean(dim=(0, 3, 4), keepdim=True)
    assert (offset - constant).abs().max() < 1e-5
    assert 0 < constant.abs().max() < 0.3
    assert torch.allclose(output['logweights'].exp(), torch.tensor(1 / K))
    assert torch.allclose(output['logstds'], torch.tensor(HEADS[head].get('constant_logstd', math.log(0.05))))


@everyone
@pytest.mark.parametrize('head', ['GMFlow', 'DX'])
def test_distillation_with_roles(weights, name, head):
    """One base for teacher, student and average, whatever the transformer; no sample depends on its neighbours."""
    network = {'type': 'DiffusersTransformer', **OTHERS[name], 'pretrained': weights[name], 'freeze': True}
    targets = ['attn.to_q']
    student = {
        **network,
        'head': HEADS[head],
        'freeze_exclude': ['proj_out_' if head == 'GMFlow' else 'self.proj_out', 'norm_out', 'lora'],
        'use_lora': True,
        'lora_target_modules': targets,
    }
    policy_kwargs = dict(segment_size=1 / 2) if head == 'DX' else None
    guidance = dict(distilled_guidance_scale=3.5) if name == 'FLUX.2' else {}
    sections = dict(
        train_cfg=dict(nfe=2, total_substeps=16, teacher_test_cfg=guidance, **guidance),
        test_cfg=dict(nfe=2, total_substeps=16, **guidance),
    )
    torch.manual_seed(0)
    model = MODELS.build(
        dict(
            type='LatentDiffusionTextImage',
            diffusion=dict(
                type='PiFlowImitation',
                policy_type=head,
                policy_kwargs=policy_kwargs,
                denoising=student,
                flow_loss=dict(type='DiffusionMSELoss', data_info=dict(pred='u_t_pred', target='u_t')),
                num_timesteps=1,
            ),
            diffusion_use_ema=True,
            teacher=dict(type='GaussianFlow', denoising=network, num_timesteps=1),
            tie_teacher=True,
            **sections,
        )
    )
    x_t, t, conditions = given(name)
    before = model.teacher.denoising(x_t, t, **conditions)
    conditions.pop('guidance', None)
    data = {'latents': x_t, 'prompt_embed_kwargs': conditions}
    optimizer = build_optimizers(model, {'diffusion': dict(type='AdamW', lr=1e-3)})
    losses = []
    for iteration in range(5):
        source = SeededSource(0, 0)
        logs = model.train_step(data, optimizer, running_status={'iteration': iteration}, source=source)['log_vars']
        losses.append(logs['loss_diffusion'])
    assert losses[-1] < losses[0]
    if name == 'FLUX.2':
        conditions = {**conditions, 'guidance': torch.full((2,), 3.5)}
    assert torch.equal(model.teacher.denoising(x_t, t, **conditions), before)
    base = sum(tensor.numel() for _, tensor in named_state(model.teacher))
    trained = sum(tensor.numel() for tensor in tiny.trainable(model).values())
    assert sum({id(v): v.numel() for _, v in named_state(model)}.values()) == base + 2 * trained
    samples = model.val_step({'noise': x_t, 'prompt_embed_kwargs': data['prompt_embed_kwargs']})['pred_imgs']
    alone = {key: value[1:] for key, value in data['prompt_embed_kwargs'].items()}
    single = model.val_step({'noise': x_t[1:], 'prompt_embed_kwargs': alone})['pred_imgs']
    assert (single - samples[1:]).abs().max() < 1e-5


@pytest.mark.parametrize('head', [None, 'GMFlow', 'DX'])
def test_compiles_into_one_graph(weights, head):
    arguments = {'pretrained': weights['FLUX.2'], 'checkpointing': False}
    if head is not None:
        arguments['head'] = HEADS[head]
    x_t, t, conditions = given('FLUX.2')
    torch.manual_seed(0)
    plain = build('FLUX.2', **arguments)
    torch.manual_seed(0)
    compiled = build(
        'FLUX.2', compile_forward=True, compile_kwargs=dict(backend='aot_eager', fullgraph=True), **arguments
    )
    with torch.no_grad():
        expected, found = (
            torch.cat([v.flatten() for v in (y.values() if isinstance(y, dict) else [y])])
            for y in (plain(x_t, t, **conditions), compiled(x_t, t, **conditions))
        )
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (dict(transformer=dict(type='SD3Transformer')), r"transformer.type='SD3Transformer'.*SD3Transformer2DModel"),
        (dict(transformer=dict(type='FluxTransformer2DModel', num_layer=1)), r"transformer.num_layer.*'num_layers'"),
        (dict(head=dict(type='GM')), r"head.type='GM': expected one of GMFlow, DX"),
        (dict(head=dict(type='GMFlow', num_gausians=3)), r"head.num_gausians.*'num_gaussians'"),
        (dict(head=dict(type='DX')), r'give either n_grid or p_order'),
        (dict(latents='pixels'), r"latents='pixels': expected one of tokens, images"),
        (dict(row_order='rows'), r"row_order='rows'"),
        (dict(patch_size=3), r'patch_size=3.*16'),
        (dict(positions=dict(img_ids=dict(kind='grid'))), r"positions.img_ids.kind='grid'"),
        (dict(positions=dict(img_ids=dict(kind='image', widht=3))), r'positions.img_ids.*widht'),
        (dict(use_lora=True), r'lora_target_modules is empty'),
        (dict(use_lora=True, lora_target_modules=['to_q'], lora_rank=0), r'lora_rank=0'),
        (dict(pretrained_lora='style.safetensors'), r'need pretrained'),
        (dict(transformer=dict(type='DiTTransformer2DModel', num_layers=1)), r"no linear output layer 'proj_out'"),
    ],
)
def test_errors_name_the_argument(arguments, message):
    with pytest.raises(ValueError, match=message):
        build('FLUX.2', **arguments)


def test_wrong_inputs():
    x_t, t, conditions = given('FLUX.2')
    network = build('FLUX.2')
    with pytest.raises(ValueError, match=r'multiples of patch_size=2'):
        network(x_t[..., :3], t, **conditions)
    with pytest.raises(ValueError, match=r'distilled_guidance_scale'):
        network(x_t, t, encoder_hidden_states=conditions['encoder_hidden_states'])


def test_positions_are_whole_numbers_in_any_precision():
    """bfloat16 cannot tell 257 from 256, so that a network in it would mistake long prompts' tokens for each other."""
    seen = {}
    network = build('FLUX.2', torch_dtype='bfloat16').eval()
    network.backbone.tree.register_forward_pre_hook(lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        network(
            torch.randn(1, 4, 2, 600, generator=generator),
            torch.tensor([0.5]),
            encoder_hidden_states=torch.randn(1, 512, 20, generator=generator),
            guidance=torch.tensor([3.5]),
        )
    assert seen['hidden_states'].dtype == torch.bfloat16
    assert torch.equal(seen['txt_ids'][:, 3].double(), torch.arange(512.0).double())
    assert torch.equal(seen['img_ids'][:, 2].double(), torch.arange(300.0).double())


def test_an_output_norm_without_a_condition_is_named():
    options = dict(
        transformer=dict(
            type='ChromaTransformer2DModel',
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            approximator_num_channels=16,
            approximator_hidden_dim=32,
            approximator_layers=1,
            axes_dims_rope=(4, 6, 6),
            **ROTARY,
        ),
        patch_size=2,
        positions=dict(img_ids=dict(kind='image'), txt_ids=dict(kind='text')),
    )
    x_t, t, conditions = given('LongCat-Image')
    network = MODULES.build({'type': 'DiffusersTransformer', **options, 'head': HEADS['GMFlow']})
    with pytest.raises(TypeError, match=r'expected the conditioning embedding.*set constant_logstd'):
        network(x_t, t, **conditions)
    head = HEADS['GMFlow with a fixed deviation']
    network = MODULES.build({'type': 'DiffusersTransformer', **options, 'head': head})
    assert network(x_t, t, **conditions)['means'].shape == (2, 2, *tiny.LATENT_SIZE)


def test_a_mixture_without_a_teacher_begins_with_distinct_constant_means():
    state = dict(named_state(build('FLUX.2', head=HEADS['GMFlow'])))
    assert not state['proj_out_means.weight'].any()
    bias = state['proj_out_means.bias'].reshape(3, 4, 4)
    assert torch.equal(bias, bias[..., :1].expand_as(bias))  # the same for all pixels of a patch
    assert len(bias[..., 0].unique()) == 12
    assert 0.03 < bias.std() < 0.3
