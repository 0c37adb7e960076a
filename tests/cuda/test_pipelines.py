"""Pipelines on a GPU: as on a CPU, offloaded in every way, quantised, compiled."""

import gc

import pytest
import torch
from diffusers import FluxTransformer2DModel

from lakonlab.pipelines.piflux_pipeline import PiFluxPipeline
from lakonlab.ui.generate_example import time_pipeline
from tests.cuda.device import DEVICE
from tests.pipelines.adapters import random_lora, write_adapter
from tests.pipelines.calls import CALL, PROMPTS, generators, images, load

TOLERANCE = 1e-4
"""Of pixels in [0, 1], in float32."""
OFFLOADS = ('model', 'sequential', 'group-block', 'group-leaf')


def close(found, expected, atol=TOLERANCE):
    torch.testing.assert_close(found.cpu(), expected.cpu(), rtol=0, atol=atol)


def distance(found, expected):
    return float((found.cpu() - expected.cpu()).std() / expected.cpu().std())


def offload(pipe, how):
    if how == 'model':
        pipe.enable_model_cpu_offload(device=DEVICE)
    elif how == 'sequential':
        pipe.enable_sequential_cpu_offload(device=DEVICE)
    else:
        # diffusers moves what it groups by blocks at a network's forward pass, and autoencoders are called by decode
        blocks = dict(num_blocks_per_group=1, exclude_modules='vae') if how == 'group-block' else {}
        kind = {'block': 'block_level', 'leaf': 'leaf_level'}[how.removeprefix('group-')]
        pipe.enable_group_offload(onload_device=torch.device(DEVICE), offload_type=kind, **blocks)
        if blocks:
            pipe.vae.to(DEVICE)


@pytest.mark.parametrize('policy', ['GM', 'DX'])
def test_as_on_a_cpu(folders, kind, tmp_path, policy):
    pipe = load(folders, kind, tmp_path, kind=policy)
    expected = images(pipe), images(pipe, output_type='latent')
    pipe.to(DEVICE)
    found = images(pipe), images(pipe, output_type='latent')
    assert found[1].device.type == DEVICE
    for one, other in zip(found, expected):
        close(one, other)
    late = load(folders, kind).to(DEVICE)
    late.load_piflow_adapter(tmp_path / 'adapter')
    assert {tensor.device.type for tensor in late.transformer.parameters()} == {DEVICE}
    close(images(late), found[0], 1e-5)
    late.unload_piflow_adapter()
    late.load_piflow_adapter(tmp_path / 'adapter')
    close(images(late), found[0], 1e-5)
    late.to('cpu')
    close(images(late), expected[0], 1e-5)


def test_generators_of_the_device(folders, kind, tmp_path):
    pipe = load(folders, kind, tmp_path).to(DEVICE)

    def drawn(*seeds):
        return [torch.Generator(DEVICE).manual_seed(seed) for seed in seeds]

    first = images(pipe, PROMPTS, generator=drawn(1, 2))
    assert torch.equal(first, images(pipe, PROMPTS, generator=drawn(1, 2)))
    close(first[1:], images(pipe, PROMPTS[1], generator=drawn(2)))
    if DEVICE != 'cpu':
        assert not torch.allclose(first, images(pipe, PROMPTS, generator=generators(1, 2)), atol=1e-3)


@pytest.mark.parametrize('how', OFFLOADS)
def test_offloading(folders, kind, tmp_path, how):
    """After the adapter is loaded, and before."""
    pipe = load(folders, kind, tmp_path)
    expected = images(load(folders, kind, tmp_path / 'other').to(DEVICE))
    offload(pipe, how)
    for _ in range(2):
        close(images(pipe), expected)
    if how in ('model', 'sequential'):
        places = {tensor.device.type for tensor in pipe.transformer.parameters()}
        assert places == {'cpu' if how == 'model' else 'meta'}
    before = load(folders, kind)
    offload(before, how)
    if how.startswith('group'):
        with pytest.raises(ValueError, match='before enable_group_offload'):
            before.load_piflow_adapter(tmp_path / 'adapter')
        return
    before.load_piflow_adapter(tmp_path / 'adapter')
    close(images(before), expected)
    before.unload_piflow_adapter()
    before.load_piflow_adapter(tmp_path / 'adapter')
    close(images(before), expected)


def test_low_precision(folders, kind, tmp_path):
    expected = images(load(folders, kind, tmp_path), output_type='latent')
    half = kind.from_pretrained(folders[kind], torch_dtype=torch.bfloat16)
    half.set_progress_bar_config(disable=True)
    half.load_piflow_adapter(tmp_path / 'adapter')
    half.to(DEVICE)
    latents = images(half, output_type='latent')
    assert latents.dtype == torch.float32
    assert distance(latents, expected) < 0.2
    timing = time_pipeline(half, dict(prompt=PROMPTS[0], **CALL), calls=1)
    assert timing.num_steps == 4
    assert 0 < timing.rollout_share < 1


def test_styles_fused_and_saved(folders, kind, tmp_path):
    pipe = load(folders, kind, tmp_path)
    plain = images(pipe)
    style = random_lora(pipe.transformer, ('to_q', 'to_v'), seed=4)
    pipe.to(DEVICE)
    pipe.load_lora_weights({f'transformer.{name}': tensor for name, tensor in style.items()}, adapter_name='style')
    pipe.set_adapters(['transformer_piflow', 'style'], [1.0, 0.8])
    styled = images(pipe)
    assert not torch.allclose(styled.cpu(), plain, atol=1e-3)
    pipe.fuse_lora()
    close(images(pipe), styled)
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    close(images(pipe), plain)
    pipe.save_pretrained(tmp_path / 'saved')
    again = kind.from_pretrained(tmp_path / 'saved').to(DEVICE)
    again.set_progress_bar_config(disable=True)
    close(images(again), plain)


def quantised(folder, config):
    options = dict(torch_dtype=torch.bfloat16, quantization_config=config)
    return FluxTransformer2DModel.from_pretrained(folder, subfolder='transformer', **options)


def latents_of(folder, adapter, transformer=None, place=lambda pipe: pipe.to(DEVICE)):
    options = {} if transformer is None else {'transformer': transformer}
    pipe = PiFluxPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16, **options)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_piflow_adapter(adapter)
    place(pipe)
    return pipe, images(pipe, output_type='latent')


@pytest.mark.parametrize('bits', [8, 4])
def test_bitsandbytes(folders, tmp_path, bits):
    """The student shares the packed weights; its own layers are whole."""
    bitsandbytes = pytest.importorskip('bitsandbytes', reason='pip install bitsandbytes')
    from diffusers import BitsAndBytesConfig

    folder = folders[PiFluxPipeline]
    config = {
        8: dict(load_in_8bit=True),
        4: dict(load_in_4bit=True, bnb_4bit_quant_type='nf4', bnb_4bit_compute_dtype=torch.bfloat16),
    }[bits]
    base = quantised(folder, BitsAndBytesConfig(**config))
    layer = {8: bitsandbytes.nn.Linear8bitLt, 4: bitsandbytes.nn.Linear4bit}[bits]
    adapter = write_adapter(tmp_path, FluxTransformer2DModel.from_pretrained(folder, subfolder='transformer'))
    _, expected = latents_of(folder, adapter)
    pipe, latents = latents_of(folder, adapter, base)
    student = pipe.transformer
    assert isinstance(student.transformer_blocks[0].attn.to_q, layer)
    assert isinstance(student.transformer_blocks[0].ff.net[2].base_layer, layer)
    assert student.transformer_blocks[0].attn.to_q.weight is base.transformer_blocks[0].attn.to_q.weight
    assert type(student.norm_out.linear.weight) is torch.nn.Parameter
    assert student.proj_out.means.weight.is_floating_point()
    assert 0 < distance(latents, expected) < {8: 0.2, 4: 0.7}[bits]
    offloaded, again = latents_of(folder, adapter, base, lambda pipe: pipe.enable_model_cpu_offload(device=DEVICE))
    assert distance(again, latents) < 1e-3
    offloaded.unload_piflow_adapter()
    assert offloaded.transformer is base


def test_torchao(folders, tmp_path):
    pytest.importorskip('torchao', reason='pip install torchao')
    from diffusers import TorchAoConfig
    from torchao.quantization import Int8WeightOnlyConfig

    folder = folders[PiFluxPipeline]
    base = quantised(folder, TorchAoConfig(Int8WeightOnlyConfig()))
    adapter = write_adapter(tmp_path, FluxTransformer2DModel.from_pretrained(folder, subfolder='transformer'))
    _, expected = latents_of(folder, adapter)
    pipe, latents = latents_of(folder, adapter, base)
    attention = pipe.transformer.transformer_blocks[0].attn
    assert type(attention.to_q.weight) is not torch.nn.Parameter
    assert attention.to_q.weight.device.type == DEVICE
    assert 0 < distance(latents, expected) < 0.1


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=['float32', 'bfloat16'])
def test_regional_compilation(folders, tmp_path, dtype):
    """The repeated blocks, low-rank matrices included, compiled by inductor."""
    pipe = load(folders, PiFluxPipeline, tmp_path).to(DEVICE, dtype)
    expected = images(pipe, output_type='latent')
    pipe.transformer.compile_repeated_blocks(fullgraph=True)
    found = images(pipe, output_type='latent')
    assert distance(found, expected) < {torch.float32: 1e-4, torch.bfloat16: 0.1}[dtype]


def test_memory_is_given_back(folders, tmp_path):
    """Neither a student that was unloaded nor a call keeps anything on the device."""
    if DEVICE == 'cpu':
        pytest.skip('counts memory of GPUs')
    pipe = load(folders, PiFluxPipeline).to(DEVICE)
    write_adapter(tmp_path / 'adapter', pipe.transformer)
    held = []
    for _ in range(3):
        pipe.load_piflow_adapter(tmp_path / 'adapter')
        images(pipe)
        pipe.unload_piflow_adapter()
        gc.collect()
        held.append(torch.cuda.memory_allocated())
    assert held[2] <= held[1]
