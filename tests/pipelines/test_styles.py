"""Styles beside an adapter: what they change, and that it is gone with them."""

import copy
import pickle

import pytest
import torch
from safetensors.torch import save_file

from lakonlab.pipelines.piflux_pipeline import PiFluxPipeline
from tests.pipelines.adapters import random_lora, write_adapter
from tests.pipelines.calls import images, load, said

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


@pytest.fixture
def styled(folders, kind, tmp_path):
    """A pipeline with an adapter and a style, some of it on layers that the adapter changes; its images."""
    pipe = load(folders, kind, tmp_path)
    layers = ('to_q', 'mlp.net.2', 'ff.net.2')
    style = write_style(tmp_path / 'style', {'transformer': (pipe.transformer.piflow.base, layers)})
    pipe.load_lora_weights(style, adapter_name='style')

    def weighted(style, student=1.0):
        pipe.set_adapters(['transformer_piflow', 'style'], [student, style])
        return images(pipe)

    return pipe, weighted


def test_scales_are_for_styles_only(styled, caplog):
    pipe, weighted = styled
    half, full = weighted(0.5), weighted(1.0)
    name = 'joint_attention_kwargs' if isinstance(pipe, PiFluxPipeline) else 'attention_kwargs'
    for scale, expected in {0.5: half, 0.0: weighted(0.0)}.items():
        weighted(1.0)
        torch.testing.assert_close(images(pipe, **{name: {'scale': scale}}), expected, rtol=0, atol=1e-5)
        assert torch.equal(images(pipe), full)
    pipe.fuse_lora(lora_scale=0.5)
    torch.testing.assert_close(images(pipe), half, rtol=0, atol=1e-4)
    pipe.unfuse_lora()
    assert torch.equal(images(pipe), full)
    pipe.fuse_lora(adapter_names=['style'])
    torch.testing.assert_close(images(pipe), full, rtol=0, atol=1e-4)
    pipe.unfuse_lora()
    assert torch.equal(images(pipe), full)
    assert not said(caplog)

    def fail(*args):
        raise RuntimeError('in the middle')

    handle = pipe.transformer.proj_out.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match='in the middle'):
        images(pipe, **{name: {'scale': 0.5}})
    handle.remove()
    assert torch.equal(images(pipe), full)


def test_a_weakened_student_is_reported_at_each_change(styled, caplog):
    pipe, weighted = styled
    weighted(1.0, student=0.5)
    weighted(0.8, student=0.5)
    weighted(1.0)
    weighted(1.0, student=0.0)
    weighted(1.0)
    for _ in range(2):
        pipe.set_adapters('style')
        images(pipe)
        weighted(1.0)
    pipe.set_adapters('style')
    pipe.fuse_lora(adapter_names=['style'])
    images(pipe)
    messages = [record.message.partition('of pi-Flow ')[2] for record in said(caplog)]
    assert messages[0].startswith('has the weight 0.5 instead of 1')
    assert [message[:13] for message in messages[1:]] == ['is not active'] * 4


def test_copies_keep_off_the_base_too(styled):
    pipe, weighted = styled
    full = weighted(1.0)
    twin = copy.deepcopy(pipe)
    before = state_of(twin.transformer.piflow.base)
    twin.transformer.fuse_lora(lora_scale=0.5)
    assert all(torch.equal(t, before[name]) for name, t in twin.transformer.piflow.base.state_dict().items())
    assert torch.equal(images(pipe), full)
    twin.transformer.unfuse_lora()
    assert torch.equal(images(twin), full)
    pipe.transformer = pickle.loads(pickle.dumps(pipe.transformer))
    assert torch.equal(images(pipe), full)
