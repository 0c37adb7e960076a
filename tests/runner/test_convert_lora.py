"""LoRA of FLUX of other programs, written in the layout of diffusers."""

from argparse import Namespace

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.loaders import FluxLoraLoaderMixin
from safetensors.torch import load_file, save_file

from lakonlab.models.architecture.loading import PretrainedError
from lakonlab.runner.convert_lora import convert_flux_lora

WIDTH, RANK, ALPHA = 32, 4, 1.0
BLOCK = 'transformer_blocks.0.attn'
#: Of each layout: names of the matrices of a projection, of those of query, key and value in one, and of alpha.
LAYOUTS = {
    'kohya': (
        'lora_unet_double_blocks_0_img_attn_proj.lora_{}.weight',
        'lora_unet_double_blocks_0_img_attn_qkv.lora_{}.weight',
        ('down', 'up'),
        '.alpha',
    ),
    'ComfyUI': (
        'diffusion_model.double_blocks.0.img_attn.proj.lora_{}.weight',
        'diffusion_model.double_blocks.0.img_attn.qkv.lora_{}.weight',
        ('down', 'up'),
        '.alpha',
    ),
    'ComfyUI, by A and B': (
        'diffusion_model.double_blocks.0.img_attn.proj.lora_{}.weight',
        'diffusion_model.double_blocks.0.img_attn.qkv.lora_{}.weight',
        ('A', 'B'),
        None,
    ),
    'the names of the authors': (
        'double_blocks.0.img_attn.proj.lora_{}.weight',
        'double_blocks.0.img_attn.qkv.lora_{}.weight',
        ('A', 'B'),
        None,
    ),
    'XLabs': (
        'double_blocks.0.processor.proj_lora1.{}.weight',
        'double_blocks.0.processor.qkv_lora1.{}.weight',
        ('down', 'up'),
        None,
    ),
}


def convert(folder, state):
    save_file(state, folder / 'theirs.safetensors')
    target = folder / 'converted' / 'ours.safetensors'
    assert convert_flux_lora(Namespace(source=str(folder / 'theirs.safetensors'), target=str(target))) == 0
    return load_file(target)


@pytest.mark.parametrize('layout', list(LAYOUTS))
def test_layouts(layout, tmp_path, capsys):
    """They change the same weights by the same amount, in a transformer of diffusers that is given the file."""
    projection, fused, sides, alpha = LAYOUTS[layout]
    generator = torch.Generator().manual_seed(0)
    state, expected = {}, {}
    for name, parts in ((projection, ['to_out.0']), (fused, ['to_q', 'to_k', 'to_v'])):
        down = torch.randn(RANK, WIDTH, generator=generator)
        up = torch.randn(len(parts) * WIDTH, RANK, generator=generator)
        state.update({name.format(side): matrix for side, matrix in zip(sides, (down, up))})
        if alpha is not None:
            state[name.partition('.lora_')[0] + alpha] = torch.tensor(ALPHA)
        change = (1.0 if alpha is None else ALPHA / RANK) * up @ down
        expected.update({f'{BLOCK}.{part}': rows for part, rows in zip(parts, change.split(WIDTH))})
    result = convert(tmp_path, state)
    assert capsys.readouterr().out.endswith('ours.safetensors: 4 layers\n')
    assert all(name.startswith('transformer.') for name in result)
    transformer = FluxTransformer2DModel(
        num_layers=1, num_single_layers=0, attention_head_dim=16, num_attention_heads=2, axes_dims_rope=(4, 6, 6)
    )
    before = {layer: transformer.get_submodule(layer).weight.clone() for layer in expected}
    FluxLoraLoaderMixin.load_lora_into_transformer(FluxLoraLoaderMixin.lora_state_dict(result), None, transformer)
    transformer.fuse_lora()
    for layer, change in expected.items():
        weight = transformer.get_submodule(layer).weight
        torch.testing.assert_close(weight - before[layer], change, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ('layer', 'said'),
    [
        ('transformer.layers.0.attention.to_q', 'FLUX does not have: layers.0.attention.to_q'),
        ('diffusion_model.layers.0.attention.qkv', 'has no layout that FluxLoraLoaderMixin knows'),
    ],
)
def test_what_is_no_lora_of_flux_is_an_error(layer, said, tmp_path):
    with pytest.raises(PretrainedError, match=said):
        convert(tmp_path, {f'{layer}.lora_A.weight': torch.zeros(2, 8), f'{layer}.lora_B.weight': torch.zeros(8, 2)})
    assert not (tmp_path / 'converted').exists()
