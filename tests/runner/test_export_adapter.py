"""What is exported of the configs of published models, and of checkpoints."""

import json
from pathlib import Path

import pytest
import torch

from lakonlab.config.load import load_config
from lakonlab.pipelines.recipe import Recipe
from lakonlab.runner.export_adapter import adapter_config, recipe_of, scaled_lora

CONFIGS = Path(__file__).parents[2] / 'configs'
#: config.json as the published tool writes it, without what it is called and who wrote it.
GM = dict(constant_logstd=None, gm_num_logstd_layers=2, logstd_inner_dim=1024, logweights_channels=4, num_gaussians=8)
COMMON = dict(attention_head_dim=128, axes_dims_rope=[16, 56, 56], in_channels=64, num_attention_heads=24)
QWEN = dict(**COMMON, joint_attention_dim=3584, num_layers=60)
FLUX = dict(
    **COMMON,
    guidance_embeds=True,
    joint_attention_dim=4096,
    num_layers=19,
    num_single_layers=38,
    pooled_projection_dim=768,
)
EXPECTED = {
    'piqwen/gmqwen_k8_piid_4step_32gpus': ('GMQwenImageTransformer2DModel', dict(**QWEN, **GM, out_channels=64)),
    'piqwen/dxqwen_n10_piid_4step_32gpus': (
        'QwenImageTransformer2DModel',
        dict(**QWEN, out_channels=640, patch_size=1),
    ),
    'piqwen/dxqwen_p10_piid_4step_32gpus': (
        'QwenImageTransformer2DModel',
        dict(**QWEN, out_channels=640, patch_size=1),
    ),
    'piflux/gmflux_k8_piid_8step_32gpus': ('GMFluxTransformer2DModel', dict(**FLUX, **GM, out_channels=None)),
    'piflux/dxflux_n10_piid_4step_32gpus': ('FluxTransformer2DModel', dict(**FLUX, out_channels=640, patch_size=1)),
}


@pytest.mark.parametrize('name', EXPECTED)
def test_config_of_published_students(name):
    cfg = load_config(CONFIGS / f'{name}.py')
    kind, arguments = EXPECTED[name]
    config = adapter_config(cfg.model.diffusion.denoising)
    config.pop('_diffusers_version')
    assert config == dict(_class_name=kind, **arguments)
    json.dumps(config)


def test_recipes():
    recipes = {name: recipe_of(load_config(CONFIGS / f'{name}.py')) for name in EXPECTED}
    shared = dict(shift=3.2, final_step_size_scale=0.5, total_substeps=128)
    assert recipes['piqwen/gmqwen_k8_piid_4step_32gpus'] == Recipe(nfe=4, temperature=0.3, **shared)
    assert recipes['piqwen/dxqwen_n10_piid_4step_32gpus'] == Recipe(nfe=4, **shared)
    flux = recipes['piflux/gmflux_k8_piid_8step_32gpus']
    assert flux == Recipe(nfe=8, temperature=0.7, guidance_scale=3.5, **shared)
    assert Recipe.from_mapping({**json.loads(flux.to_json()), 'of_later_versions': 1}) == flux


def test_factor_of_the_matrices_is_one():
    """Readers of the layout know no alpha, so that it goes into the matrices."""
    down, up = torch.randn(4, 6), torch.randn(5, 4)
    tensors = {'x.lora_A.weight': down, 'x.lora_B.weight': up, 'proj_out.weight': torch.ones(2, 2)}
    scaled = scaled_lora(tensors, dict(lora_rank=4, lora_alpha=8))
    torch.testing.assert_close(scaled['x.lora_B.weight'] @ scaled['x.lora_A.weight'], 2 * up @ down)
    assert torch.equal(scaled['proj_out.weight'], tensors['proj_out.weight'])
    assert all(torch.equal(value, tensors[name]) for name, value in scaled_lora(tensors, dict(lora_rank=4)).items())
