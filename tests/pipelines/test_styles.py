"""Styles beside an adapter: what they change, and that it is gone with them."""

import pytest
import torch
from safetensors.torch import save_file

from lakonlab.pipelines.piflux_pipeline import PiFluxPipeline
from tests.pipelines.adapters import random_lora, write_adapter
from tests.pipelines.calls import images, load

NORM = 'transformer_blocks.0.attn.norm_q.weight'


def state_of(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def write_style(folder, parts, norms=None):
    """A style of modules, with random matrices for the layers whose names end as said."""
    state = {f'transformer.{name}': tensor for name, tensor in (norms or {}).items()}
    for name, (module, layers) in parts.items():
        lora = random_lora(module, layers, seed=len(state) + 4)
        state.update({f'{name}.{key.replace(".base_layer", "")}': tensor for key, tensor in lora.items()})
    folder.mkdir(exist_ok=True)
    save_file(state, folder / 'pytorch_lora_weights.safetensors')
    return folder


def test_a_base_with_fused_styles_is_refused(folders, kind, tmp_path):
    pipe = load(folders, kind)
    adapter = write_adapter(tmp_path / 'adapter', pipe.transformer)
    before = state_of(pipe.transformer)
    pipe.load_lora_weights(write_style(tmp_path, {'transformer': (pipe.transformer, ('to_q',))}), adapter_name='style')
    pipe.fuse_lora()
    base, fused = pipe.transformer, state_of(pipe.transformer)
    with pytest.raises(ValueError, match=r'styles are fused with the weights of the transformer.*unfuse_lora first'):
        pipe.load_piflow_adapter(adapter)
    assert pipe.transformer is base
    assert all(torch.equal(tensor, fused[name]) for name, tensor in base.state_dict().items())
    pipe.unload_lora_weights()  # leaves them in the weights
    pipe.load_piflow_adapter(adapter)
    styled = images(pipe)
    pipe.unload_piflow_adapter()
    with torch.no_grad():
        for name, tensor in pipe.transformer.state_dict().items():
            tensor.copy_(before[name])
    pipe.load_piflow_adapter(adapter)
    assert not torch.allclose(images(pipe), styled, atol=1e-3)


def test_unloading_styles_of_text_encoders(folders, tmp_path):
    pipe = load(folders, PiFluxPipeline, tmp_path)
    plain = images(pipe)
    parts = {'text_encoder': (pipe.text_encoder, ('q_proj', 'fc1'))}
    for other in ({}, {'transformer': (pipe.transformer, ('to_q',))}):
        pipe.load_lora_weights(write_style(tmp_path / 'style', {**parts, **other}), adapter_name='style')
        pipe.set_adapters(['transformer_piflow', 'style'])
        assert not torch.allclose(images(pipe), plain, atol=1e-3)
        pipe.unload_lora_weights()
        assert pipe.get_list_adapters() == {'transformer': ['transformer_piflow']}
        torch.testing.assert_close(images(pipe), plain, rtol=0, atol=1e-5)


@pytest.mark.parametrize('order', ['adapter first', 'adapter between', 'adapter last'])
def test_unloading_styles_with_normalisation_layers(folders, tmp_path, order):
    """Of FLUX, two of them: the layers are as they were, in the student and, if it got no style, in the base."""
    pipe = load(folders, PiFluxPipeline)
    base = pipe.transformer
    adapter = write_adapter(tmp_path / 'adapter', base)
    pipe.load_piflow_adapter(adapter)
    plain = images(pipe)
    if order != 'adapter first':
        pipe.unload_piflow_adapter()
    parts = {'transformer': (base, ('to_q',))}
    styles = [
        write_style(tmp_path / str(factor), parts, {NORM: torch.full_like(base.get_parameter(NORM), factor)})
        for factor in (3.0, 5.0)
    ]
    states = []
    for index, style in enumerate(styles):
        pipe.load_lora_weights(style, adapter_name=f'style_{index}')
        if order == ('adapter between', 'adapter last')[index]:
            states.append(state_of(base))
            pipe.load_piflow_adapter(adapter)
    pipe.set_adapters(['transformer_piflow', 'style_0', 'style_1'], [1.0, 0.0, 0.0])
    assert not torch.allclose(images(pipe), plain, atol=1e-3)
    pipe.fuse_lora()
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    torch.testing.assert_close(images(pipe), plain, rtol=0, atol=1e-5)
    for state in states:
        assert all(torch.equal(tensor, state[name]) for name, tensor in base.state_dict().items())
    if order == 'adapter first':
        assert torch.equal(base.get_parameter(NORM), torch.ones_like(base.get_parameter(NORM)))
