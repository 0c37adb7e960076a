"""Adapters on a base whose layers are quantised."""

import copy

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import save_file

from lakonlab.pipelines.piflux_pipeline import PiFluxPipeline
from tests import tiny_components
from tests.pipelines.adapters import random_lora, write_adapter

CALL = dict(height=32, width=48, max_sequence_length=32, output_type='latent')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return tiny_components.flux_folder(tmp_path_factory.mktemp('flux'))


def latents_of(folder, adapter, transformer=None):
    options = {} if transformer is None else {'transformer': transformer}
    pipe = PiFluxPipeline.from_pretrained(folder, dtype=torch.bfloat16, **options)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_piflow_adapter(adapter)
    return pipe, images(pipe)


def images(pipe):
    return pipe('a red heart', generator=torch.Generator().manual_seed(1), **CALL).images


def difference(latents, expected):
    return float((latents - expected).float().std() / expected.float().std())


def test_torchao(folder, tmp_path):
    pytest.importorskip('torchao', reason='pip install torchao')
    from diffusers import TorchAoConfig
    from torchao.quantization import Int8WeightOnlyConfig

    base = FluxTransformer2DModel.from_pretrained(
        folder,
        subfolder='transformer',
        dtype=torch.bfloat16,
        quantization_config=TorchAoConfig(Int8WeightOnlyConfig()),
    )
    kind = type(base.transformer_blocks[0].ff.net[2].weight)
    assert kind is not torch.nn.Parameter
    whole = FluxTransformer2DModel.from_pretrained(folder, subfolder='transformer')
    adapter = write_adapter(tmp_path / 'adapter', whole)
    _, expected = latents_of(folder, adapter)
    pipe, latents = latents_of(folder, adapter, base)
    student = pipe.transformer
    assert type(student.transformer_blocks[0].attn.to_q.weight) is kind
    assert type(student.transformer_blocks[0].ff.net[2].base_layer.weight) is kind
    assert student.transformer_blocks[0].attn.to_q.weight is base.transformer_blocks[0].attn.to_q.weight
    assert type(student.norm_out.linear.weight) is torch.nn.Parameter
    assert type(student.proj_out.means.weight) is torch.nn.Parameter
    assert 0 < difference(latents, expected) < 0.1
    # the low-rank matrices of peft for such layers cannot be fused where a style is on others
    load_style(pipe, tmp_path, whole)
    styled = images(pipe)
    with pytest.raises(ValueError, match='cannot be fused with these weights, and none is'):
        pipe.fuse_lora()
    assert torch.equal(images(pipe), styled)
    assert student.transformer_blocks[0].ff.net[2].base_layer.weight is base.transformer_blocks[0].ff.net[2].weight
    assert torch.equal(latents_of(folder, adapter, base)[1], latents)


def load_style(pipe, folder, plain):
    """With full weight, on layers that adapters of pi-Flow leave alone, which a whole base names."""
    style = random_lora(plain, ('to_q', 'to_v', 'proj_mlp', 'net.0.proj'), seed=4)
    save_file({f'transformer.{name}': tensor for name, tensor in style.items()}, folder / 'style.safetensors')
    pipe.load_lora_weights(folder, weight_name='style.safetensors', adapter_name='style')
    pipe.set_adapters(['transformer_piflow', 'style'])


def by_bitsandbytes(base, bits):
    """The transformer with the layers of bitsandbytes, as its config makes them, for which diffusers wants a GPU."""
    bnb = pytest.importorskip('bitsandbytes', reason='pip install bitsandbytes')
    for name, linear in list(base.named_modules()):
        if not isinstance(linear, torch.nn.Linear) or name == 'proj_out' or linear.in_features % BLOCK:
            continue
        sizes, weight = (linear.in_features, linear.out_features, linear.bias is not None), linear.weight.data
        if bits == 8:
            layer = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False)
            layer.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        else:
            layer = bnb.nn.Linear4bit(*sizes, compute_dtype=weight.dtype, quant_type='nf4')
            layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type='nf4')
        layer.bias = linear.bias
        base.set_submodule(name, layer.requires_grad_(False).to('cpu'))
    setattr(base, f'is_loaded_in_{bits}bit', True)
    return base


#: Weights in 4 bits share a factor within so many; on CPUs rows must be multiples of it.
BLOCK = 64
SIZES = {**tiny_components.SIZES['Flux'], 'attention_head_dim': 32, 'axes_dims_rope': (8, 12, 12), 'patch_size': 1}


@pytest.mark.filterwarnings('ignore:(Merge|Unmerge) lora module')
@pytest.mark.parametrize(('bits', 'most'), [(8, 0.03), (4, 0.2)])
def test_bitsandbytes(folder, tmp_path, bits, most):
    """Called, styled, fused, saved and unloaded like any other; the packed weights are those of the base all along."""
    torch.manual_seed(0)
    plain = FluxTransformer2DModel(**SIZES).to(torch.bfloat16)
    base = by_bitsandbytes(copy.deepcopy(plain), bits)
    block = base.transformer_blocks[0]
    packed = block.ff.net[2].weight
    assert packed.dtype == {8: torch.int8, 4: torch.uint8}[bits]
    adapter = write_adapter(tmp_path / 'adapter', plain)
    whole, expected = latents_of(folder, adapter, plain)
    pipe, latents = latents_of(folder, adapter, base)
    student = pipe.transformer
    assert 0 < difference(latents, expected) < most
    assert student.transformer_blocks[0].attn.to_q.weight is block.attn.to_q.weight
    assert student.transformer_blocks[0].ff.net[2].base_layer.weight is packed
    assert type(student.norm_out.linear.weight) is torch.nn.Parameter
    assert student.proj_out.means.weight.is_floating_point()

    for styled in (whole, pipe):
        load_style(styled, tmp_path, plain)
    assert difference(images(whole), expected) > 0.3
    assert difference(images(pipe), images(whole)) < most
    pipe.fuse_lora()
    assert difference(images(pipe), images(whole)) < 2 * most
    assert torch.equal(latents_of(folder, adapter, base)[1], latents)
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    assert torch.equal(images(pipe), latents)
    assert student.transformer_blocks[0].ff.net[2].base_layer.weight is packed

    pipe.save_piflow_adapter(tmp_path / 'saved')
    pipe.unload_piflow_adapter()
    assert pipe.transformer is base
    pipe.load_piflow_adapter(tmp_path / 'saved')
    assert torch.equal(images(pipe), latents)
