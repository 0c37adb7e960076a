"""Adapters on a base whose layers are quantised."""

import pytest
import torch
from diffusers import FluxTransformer2DModel

from lakonlab.pipelines.piflux_pipeline import PiFluxPipeline
from tests import tiny_components
from tests.pipelines.adapters import write_adapter

CALL = dict(height=32, width=48, max_sequence_length=32, output_type='latent')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return tiny_components.flux_folder(tmp_path_factory.mktemp('flux'))


def latents_of(folder, adapter, transformer=None):
    options = {} if transformer is None else {'transformer': transformer}
    pipe = PiFluxPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16, **options)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_piflow_adapter(adapter)
    return pipe, pipe('a red heart', generator=torch.Generator().manual_seed(1), **CALL).images


def test_torchao(folder, tmp_path):
    pytest.importorskip('torchao', reason='pip install torchao')
    from diffusers import TorchAoConfig
    from torchao.quantization import Int8WeightOnlyConfig

    base = FluxTransformer2DModel.from_pretrained(
        folder,
        subfolder='transformer',
        torch_dtype=torch.bfloat16,
        quantization_config=TorchAoConfig(Int8WeightOnlyConfig()),
    )
    kind = type(base.transformer_blocks[0].ff.net[2].weight)
    assert kind is not torch.nn.Parameter
    adapter = write_adapter(tmp_path, FluxTransformer2DModel.from_pretrained(folder, subfolder='transformer'))
    _, expected = latents_of(folder, adapter)
    pipe, latents = latents_of(folder, adapter, base)
    student = pipe.transformer
    assert type(student.transformer_blocks[0].attn.to_q.weight) is kind
    assert type(student.transformer_blocks[0].ff.net[2].base_layer.weight) is kind
    assert student.transformer_blocks[0].attn.to_q.weight is base.transformer_blocks[0].attn.to_q.weight
    assert type(student.norm_out.linear.weight) is torch.nn.Parameter
    assert type(student.proj_out.means.weight) is torch.nn.Parameter
    error = float((latents - expected).std() / expected.std())
    assert 0 < error < 0.1
