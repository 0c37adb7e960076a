"""Adapters written by the published export tool, sampled as the published pipelines sample them."""

import json

import pytest
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel, QwenImageTransformer2DModel
from safetensors.torch import save_file

from lakonlab.models.diffusions.schedulers import FlowMapSDEScheduler
from lakonlab.pipelines.piflux_pipeline import PiFluxPipeline
from lakonlab.pipelines.piqwen_pipeline import PiQwenImagePipeline
from tests.golden import assert_close, load, names


def layers(state, prefix):
    return len({name.split('.')[1] for name in state if name.startswith(f'{prefix}.')})


def base_of(family, state):
    """The tiny transformer that the recorded weights are of."""
    width = state['norm_out.linear.weight'].shape[1]
    heads = state['transformer_blocks.0.attn.norm_q.weight'].shape[0]
    size = dict(
        in_channels=16,
        attention_head_dim=heads,
        num_attention_heads=width // heads,
        joint_attention_dim=20,
        num_layers=layers(state, 'transformer_blocks'),
    )
    axes = (4, 6, 6)
    if family == 'flux':
        single = layers(state, 'single_transformer_blocks')
        model = FluxTransformer2DModel(
            **size, num_single_layers=single, pooled_projection_dim=12, guidance_embeds=True, axes_dims_rope=axes
        )
    else:
        model = QwenImageTransformer2DModel(**size, out_channels=16, patch_size=1, axes_dims_rope=axes)
    model.load_state_dict(state)
    return model.eval()


def pipeline_of(family, base, scheduler, **options):
    if family == 'flux':
        parts = dict.fromkeys(('vae', 'text_encoder', 'text_encoder_2', 'tokenizer', 'tokenizer_2'))
        return PiFluxPipeline(scheduler=scheduler, transformer=base, **parts, **options)
    parts = dict.fromkeys(('vae', 'text_encoder', 'tokenizer'))
    return PiQwenImagePipeline(scheduler=scheduler, transformer=base, **parts, **options)


@pytest.mark.parametrize('style', ['ours', 'diffusers', 'adapter sets it'])
@pytest.mark.parametrize('name', names('pipelines'))
def test_latents(name, style, tmp_path):
    case = load('pipelines')[name]
    params, inputs = case['params'], case['in']
    family = params['family']
    folder = tmp_path / 'student_4step'
    folder.mkdir()
    save_file(case['adapter'], folder / 'diffusion_pytorch_model.safetensors', params['adapter_metadata'])
    base = base_of(family, case['base'])
    (folder / 'config.json').write_text(json.dumps(params['adapter_config']))
    theirs = FlowMatchEulerDiscreteScheduler(
        shift=3.0 if family == 'flux' else 1.0,
        use_dynamic_shifting=True,
        shift_terminal=None if family == 'flux' else 0.02,  # as Qwen-Image has it
    )
    pipe = pipeline_of(family, base, theirs)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_piflow_adapter(tmp_path, subfolder='student_4step')
    settings = dict(shift=3.2, shift_terminal=None, use_dynamic_shifting=False)
    if style == 'ours':
        del settings['shift_terminal']  # which it does not have
        pipe.scheduler = FlowMapSDEScheduler.from_config(theirs.config, **settings, final_step_size_scale=0.5)
    elif style == 'diffusers':
        pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(theirs.config, **settings)
    latents = pipe(**inputs, **params['call']).images
    assert_close(latents, case['out']['latents'], 2e-4)
