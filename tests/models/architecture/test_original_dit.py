"""Checkpoints of the original DiT, SiT and REPA: names and the order of every layer, against an independent forward."""

import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from safetensors.torch import save_file

from lakonlab.models.architecture.embeddings import position_table
from tests.models.architecture.networks import TINY, build, inputs

WIDTH, CLASSES, LAYERS = 32, 10, 2


def original_state(learns_variance):
    """Random tensors under the names of the original repository."""
    channels = 8 if learns_variance else 4
    shapes = {
        'pos_embed': (1, 16, WIDTH),
        'x_embedder.proj.weight': (WIDTH, 4, 2, 2),
        'x_embedder.proj.bias': (WIDTH,),
        't_embedder.mlp.0.weight': (WIDTH, 256),
        't_embedder.mlp.0.bias': (WIDTH,),
        't_embedder.mlp.2.weight': (WIDTH, WIDTH),
        't_embedder.mlp.2.bias': (WIDTH,),
        'y_embedder.embedding_table.weight': (CLASSES + 1, WIDTH),
        'final_layer.linear.weight': (4 * channels, WIDTH),
        'final_layer.linear.bias': (4 * channels,),
        'final_layer.adaLN_modulation.1.weight': (2 * WIDTH, WIDTH),
        'final_layer.adaLN_modulation.1.bias': (2 * WIDTH,),
        'projectors.0.0.weight': (7, WIDTH),
    }
    for index in range(LAYERS):
        shapes.update(
            {
                f'blocks.{index}.attn.qkv.weight': (3 * WIDTH, WIDTH),
                f'blocks.{index}.attn.qkv.bias': (3 * WIDTH,),
                f'blocks.{index}.attn.proj.weight': (WIDTH, WIDTH),
                f'blocks.{index}.attn.proj.bias': (WIDTH,),
                f'blocks.{index}.mlp.fc1.weight': (4 * WIDTH, WIDTH),
                f'blocks.{index}.mlp.fc1.bias': (4 * WIDTH,),
                f'blocks.{index}.mlp.fc2.weight': (WIDTH, 4 * WIDTH),
                f'blocks.{index}.mlp.fc2.bias': (WIDTH,),
                f'blocks.{index}.adaLN_modulation.1.weight': (6 * WIDTH, WIDTH),
                f'blocks.{index}.adaLN_modulation.1.bias': (6 * WIDTH,),
            }
        )
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in shapes.items()}


def original_forward(state, x, t, y):
    """The network of Peebles & Xie (2023), figure 3 with adaLN-Zero, in terms of the original names."""

    def linear(name, value):
        return F.linear(value, state[f'{name}.weight'], state[f'{name}.bias'])

    def normed(value, shift, scale, eps):
        return F.layer_norm(value, (WIDTH,), eps=eps) * (1 + scale[:, None]) + shift[:, None]

    frequencies = torch.exp(-math.log(10000) * torch.arange(128) / 128)
    angles = t[:, None] * frequencies
    embedded = torch.cat([angles.cos(), angles.sin()], dim=-1)
    condition = linear('t_embedder.mlp.2', F.silu(linear('t_embedder.mlp.0', embedded)))
    condition = F.silu(condition + state['y_embedder.embedding_table.weight'][y])
    tokens = F.conv2d(x, state['x_embedder.proj.weight'], state['x_embedder.proj.bias'], stride=2)
    rows, columns = tokens.shape[-2:]
    tokens = tokens.flatten(2).transpose(1, 2) + position_table(WIDTH, 4, rows, columns)
    for index in range(LAYERS):
        block = f'blocks.{index}'
        modulation = linear(f'{block}.adaLN_modulation.1', condition).chunk(6, dim=1)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation
        query, key, value = (
            linear(f'{block}.attn.qkv', normed(tokens, shift_a, scale_a, 1e-6))
            .unflatten(-1, (3, 2, 16))
            .permute(2, 0, 3, 1, 4)
        )
        attention = (query @ key.transpose(-1, -2) / 4).softmax(-1) @ value
        attention = attention.transpose(1, 2).flatten(2)
        tokens = tokens + gate_a[:, None] * linear(f'{block}.attn.proj', attention)
        hidden = F.gelu(linear(f'{block}.mlp.fc1', normed(tokens, shift_m, scale_m, 1e-6)), approximate='tanh')
        tokens = tokens + gate_m[:, None] * linear(f'{block}.mlp.fc2', hidden)
    shift, scale = linear('final_layer.adaLN_modulation.1', condition).chunk(2, dim=1)
    output = linear('final_layer.linear', normed(tokens, shift, scale, 1e-6))
    images = output.unflatten(1, (rows, columns)).unflatten(-1, (2, 2, -1)).permute(0, 5, 1, 3, 2, 4)
    return images.reshape(len(x), -1, 2 * rows, 2 * columns)[:, :4]


@pytest.mark.parametrize('learns_variance', [False, True])
def test_original_checkpoint(learns_variance, tmp_path):
    state = original_state(learns_variance)
    save_file(state, tmp_path / 'original.safetensors')
    network = build('DiTTransformer2DModelMod', pretrained=str(tmp_path / 'original.safetensors'), norm_eps=1e-6)
    assert TINY['num_layers'] == LAYERS
    x, t, y = inputs()
    with torch.no_grad():
        found = network(x, t, y)
    torch.testing.assert_close(found, original_forward(state, x, t, y), rtol=1e-4, atol=1e-5)


def test_student_of_an_original_checkpoint(tmp_path):
    save_file(original_state(True), tmp_path / 'original.safetensors')
    weights = str(tmp_path / 'original.safetensors')
    teacher = build('DiTTransformer2DModelMod', pretrained=weights)
    student = build('DXDiTTransformer2DModel', pretrained=weights)
    given = inputs()
    with torch.no_grad():
        torch.testing.assert_close(student(*given), teacher(*given)[:, None].expand(-1, 3, -1, -1, -1))
