"""What is exported of the configs of published models, and of checkpoints."""

import gzip
import json
from pathlib import Path

import pytest
import torch

from lakonlab.config.load import load_config
from lakonlab.pipelines.recipe import Recipe
from lakonlab.runner.adapter_folder import adapter_config, describe_adapter, lora_factor, recipe_of
from lakonlab.storage.adapter_layout import published_tensors

CONFIGS = Path(__file__).parents[2] / 'configs'
MANIFESTS = Path(__file__).parents[1] / 'data' / 'manifests'
STUDENTS = sorted(path.name.split('.')[:2] for path in MANIFESTS.glob('*.adapter.json.gz'))
STUDENTS = [f'{folder}/{name}' for folder, name in STUDENTS]


@pytest.mark.parametrize('name', STUDENTS)
def test_files_of_published_students(name):
    """config.json and the policy in the metadata are what the published tool writes."""
    cfg = load_config(CONFIGS / f'{name}.py')
    recorded = json.loads(gzip.decompress((MANIFESTS / f'{name.replace("/", ".")}.adapter.json.gz').read_bytes()))
    described = describe_adapter(cfg, role='ema', step=1, origin='iter_1')
    config = json.loads(described.texts['config.json'])
    expected = recorded['config_json']
    for content in (config, expected):
        content.pop('_diffusers_version')
    # the transformer as it is in diffusers, by its own name, which readers of published adapters know
    expected['_class_name'] = expected['_class_name'].removeprefix('DX')
    assert config == expected
    assert json.loads(described.metadata['policy_config']) == json.loads(
        recorded['safetensors_metadata']['policy_config']
    )
    assert described.lora_factor == 1
    assert len(STUDENTS) == 11


def test_configs_that_leave_out_or_change_arguments():
    denoising = dict(load_config(CONFIGS / 'piqwen/gmqwen_k8_piid_4step_32gpus.py').model.diffusion.denoising)
    del denoising['logweights_channels']
    assert adapter_config(denoising)['logweights_channels'] == 4
    denoising = load_config(
        CONFIGS / 'piflow_imagenet/gmdit_k32_imagenet_piid_1step_8gpus.py'
    ).model.diffusion.denoising
    assert adapter_config({**denoising, 'mlp_ratio': 3.0})['mlp_ratio'] == 3.0


def test_recipes():
    recipes = {name: recipe_of(load_config(CONFIGS / f'{name}.py')) for name in STUDENTS}
    shared = dict(shift=3.2, final_step_size_scale=0.5, total_substeps=128)
    assert recipes['piqwen/gmqwen_k8_piid_4step_32gpus'] == Recipe(nfe=4, temperature=0.3, **shared)
    assert recipes['piqwen/dxqwen_n10_piid_4step_32gpus'] == Recipe(nfe=4, **shared)
    flux = recipes['piflux/gmflux_k8_piid_8step_32gpus']
    assert flux == Recipe(nfe=8, temperature=0.7, guidance_scale=3.5, **shared)
    assert Recipe.from_mapping({**json.loads(flux.to_json()), 'of_later_versions': 1}) == flux


def test_factor_of_the_matrices_is_one():
    """Readers of the layout know no alpha, so that it goes into the matrices."""
    down, up = torch.randn(4, 6), torch.randn(5, 4)
    tensors = {'x.lora_A.default.weight': down, 'x.lora_B.default.weight': up, 'proj_out.weight': torch.ones(2, 2)}
    state = {**{f'a.{name}': tensor for name, tensor in tensors.items()}, 'b.x': torch.zeros(1)}
    scaled = published_tensors(state, 'a.', lora_factor(dict(lora_rank=4, lora_alpha=8)))
    torch.testing.assert_close(scaled['x.lora_B.weight'] @ scaled['x.lora_A.weight'], 2 * up @ down)
    assert torch.equal(scaled['proj_out.weight'], tensors['proj_out.weight'])
    plain = published_tensors(state, 'a.', lora_factor(dict(lora_rank=4)))
    assert sorted(plain) == ['proj_out.weight', 'x.lora_A.weight', 'x.lora_B.weight']
    assert plain['x.lora_B.weight'] is up
