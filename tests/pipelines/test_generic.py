"""Other pipelines of diffusers become few-step generators by one class, with the samples of the trainer."""

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxImg2ImgPipeline,
    FluxKontextPipeline,
    StableDiffusion3Pipeline,
)
from PIL import Image

from lakonlab.models.diffusions.piflow import PiFlowImitation
from lakonlab.pipelines.piflow_mixin import PiFlowPipelineMixin
from lakonlab.pipelines.piflux_pipeline import PiFluxPipeline
from lakonlab.pipelines.pipeline_piflux2 import PiFlux2Pipeline
from lakonlab.registry import MODULES
from tests.pipelines.adapters import RECIPE, write_adapter, write_euler_adapter
from tests.pipelines.calls import CALL
from tests.pipelines.trained import pack

SD3 = dict(
    type='SD3Transformer2DModel',
    sample_size=8,
    patch_size=2,
    in_channels=4,
    out_channels=4,
    num_layers=1,
    attention_head_dim=8,
    num_attention_heads=2,
    joint_attention_dim=20,
    caption_projection_dim=16,
    pooled_projection_dim=12,
    pos_embed_max_size=8,
)
FLUX2 = dict(
    type='Flux2Transformer2DModel',
    in_channels=16,
    num_layers=1,
    num_single_layers=1,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=20,
    timestep_guidance_channels=16,
    axes_dims_rope=(4, 4, 4, 4),
)
FLUX2_POSITIONS = dict(
    img_ids=dict(kind='image', width=4, row=1, column=2), txt_ids=dict(kind='text', width=4, index=3)
)
NUM_STEPS = 3
POLICIES = {
    'GM': (dict(type='GMFlow', num_gaussians=3, logstd_inner_dim=12), 'GMFlow', {}),
    'DX': (dict(type='DX', n_grid=3), 'DX', dict(segment_size=1 / 2.5, shift=3.2)),
}


class PiSD3Pipeline(PiFlowPipelineMixin, StableDiffusion3Pipeline):
    latent_layout = 'images'
    unguided = {'guidance_scale': 1.0}


def student_of(kind, transformer, **options):
    """A student of the training code, and the trainer around it."""
    torch.manual_seed(0)
    head, policy, arguments = POLICIES[kind]
    student = MODULES.build(dict(type='DiffusersTransformer', transformer=transformer, head=head, **options))
    with torch.no_grad():
        for tensor in student.parameters():
            tensor.add_(torch.randn(tensor.shape) * 0.05)
    trainer = PiFlowImitation(
        student,
        policy_type=policy,
        policy_kwargs=arguments,
        num_timesteps=1,
        timestep_sampler=dict(type='ContinuousTimeStepSampler', shift=3.2),
        test_cfg=dict(nfe=NUM_STEPS, final_step_size_scale=0.5, total_substeps=32),
    )
    return student, trainer.eval()


def base_and_adapter(kind, student, transformer, folder):
    """The transformer that a student replaces the head of, and a file with that head."""
    import diffusers

    arguments = dict(transformer)
    base = getattr(diffusers, arguments.pop('type'))(**arguments)
    state = {name: tensor.detach().contiguous() for name, tensor in student.role_state().items()}
    own = {name: tensor for name, tensor in state.items() if name.startswith(('proj_out', 'norm_out'))}
    output = {f'proj_out.{name}': tensor for name, tensor in base.proj_out.state_dict().items()}
    others = {name: tensor for name, tensor in state.items() if not name.startswith('proj_out')}
    base.load_state_dict({**others, **output})
    _, policy, arguments = POLICIES[kind]
    recipe = {**RECIPE, 'nfe': NUM_STEPS, 'temperature': 1.0}
    write_adapter(folder, base, policy=dict(type=policy, **arguments), recipe=recipe, tensors=own)
    return base.eval()


def test_pipelines_that_begin_with_an_image_are_refused():
    with pytest.raises(TypeError, match=r'PiFluxImg2Img: its base begins in the middle of the schedule.*\(strength\)'):
        type('PiFluxImg2Img', (PiFlowPipelineMixin, FluxImg2ImgPipeline), {})


def test_a_pipeline_that_conditions_on_an_image(folders, tmp_path):
    class PiFluxKontextPipeline(PiFlowPipelineMixin, FluxKontextPipeline):
        unguided = {'true_cfg_scale': 1.0}

    pipe = PiFluxKontextPipeline.from_pretrained(folders[PiFluxPipeline])
    pipe.set_progress_bar_config(disable=True)
    pipe.load_piflow_adapter(write_adapter(tmp_path, pipe.transformer))
    call = dict(CALL, output_type='latent', _auto_resize=False)
    first, other = (
        pipe(
            Image.new('RGB', (48, 32), color), 'a red heart', generator=torch.Generator().manual_seed(1), **call
        ).images
        for color in ('black', 'white')
    )
    assert first.isfinite().all()
    assert not torch.allclose(first, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize('kind', POLICIES)
def test_sd3(kind, tmp_path):
    student, trainer = student_of(kind, SD3, latents='images', patch_size=2, timestep_scale=1000.0)
    pipe = PiSD3Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=base_and_adapter(kind, student, SD3, tmp_path),
        **dict.fromkeys(('vae', 'text_encoder', 'text_encoder_2', 'text_encoder_3')),
        **dict.fromkeys(('tokenizer', 'tokenizer_2', 'tokenizer_3')),
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.load_piflow_adapter(tmp_path)
    generator = torch.Generator().manual_seed(1)
    noise, embeds, pooled = (torch.randn(shape, generator=generator) for shape in ((2, 4, 4, 6), (2, 5, 20), (2, 12)))
    latents = pipe(
        prompt_embeds=embeds, pooled_prompt_embeds=pooled, latents=noise, height=32, width=48, output_type='latent'
    ).images
    expected = trainer.forward_test(noise, encoder_hidden_states=embeds, pooled_projections=pooled)
    torch.testing.assert_close(latents, expected, rtol=0, atol=1e-5)


def flux2(kind, transformer):
    """A pipeline of FLUX.2 without text encoder."""
    pipe = kind(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        transformer=transformer,
        vae=AutoencoderKLFlux2(
            down_block_types=('DownEncoderBlock2D',) * 4,
            up_block_types=('UpDecoderBlock2D',) * 4,
            block_out_channels=(4, 8, 8, 8),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
        ),
        text_encoder=None,
        tokenizer=None,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize('kind', POLICIES)
def test_flux2(kind, tmp_path):
    student, trainer = student_of(kind, FLUX2, patch_size=2, positions=FLUX2_POSITIONS)
    pipe = flux2(PiFlux2Pipeline, base_and_adapter(kind, student, FLUX2, tmp_path))
    pipe.load_piflow_adapter(tmp_path)
    generator = torch.Generator().manual_seed(1)
    noise, embeds = (torch.randn(shape, generator=generator) for shape in ((2, 4, 4, 6), (2, 5, 20)))
    tokens = pack(noise)
    images = tokens.transpose(1, 2).unflatten(2, (2, 3))  # (B, C, H, W) of tokens, as this pipeline takes them
    latents = pipe(
        prompt_embeds=embeds, latents=images, height=32, width=48, guidance_scale=4.0, output_type='latent'
    ).images
    expected = trainer.forward_test(noise, encoder_hidden_states=embeds, guidance=torch.full((2,), 4.0))
    torch.testing.assert_close(latents, pack(expected), rtol=0, atol=1e-5)


def test_editing_with_flux2(tmp_path):
    """Pictures to be edited go to the student as to the base: one step is the base's own."""
    torch.manual_seed(0)
    arguments = {name: value for name, value in FLUX2.items() if name != 'type'}
    plain = flux2(Flux2Pipeline, Flux2Transformer2DModel(**arguments).eval())
    pipe = PiFlux2Pipeline(**plain.components)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_piflow_adapter(write_euler_adapter(tmp_path, plain.transformer))
    pixels = np.random.default_rng(0).integers(0, 256, (2, 64, 96, 3), dtype=np.uint8)
    call = dict(prompt_embeds=torch.randn(1, 5, 20), height=32, width=48, output_type='latent')
    results = {}
    for pictures in (None, [0], [0, 1]):
        image = None if pictures is None else [Image.fromarray(pixels[index]) for index in pictures]
        own, expected = (
            each(image=image, num_inference_steps=1, generator=torch.Generator().manual_seed(1), **call).images
            for each in (pipe, plain)
        )
        torch.testing.assert_close(own, expected, rtol=0, atol=1e-4)
        results[len(pictures or ())] = own
    assert not torch.allclose(results[0], results[1], atol=1e-3)
    assert not torch.allclose(results[1], results[2], atol=1e-3)
    several = pipe(image=Image.fromarray(pixels[0]), num_inference_steps=4, **call).images
    assert several.shape == (1, 6, 16)
    assert bool(several.isfinite().all())
