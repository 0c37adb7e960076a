"""Pipelines that are brought to another precision after an adapter was loaded."""

import pytest
import torch
from diffusers import FluxPipeline, QwenImagePipeline
from safetensors.torch import load_file

from lakonlab.pipelines.piflux_pipeline import PiFluxPipeline
from lakonlab.pipelines.piqwen_pipeline import PiQwenImagePipeline
from tests.pipelines.calls import CALL, images, load

STOCK = {PiFluxPipeline: FluxPipeline, PiQwenImagePipeline: QwenImagePipeline}


def test_saving_and_unloading_give_a_base_of_one_precision(folders, kind, tmp_path):
    pipe = load(folders, kind, tmp_path)
    pipe.to(torch.bfloat16)
    expected = images(pipe)
    pipe.save_pretrained(tmp_path / 'saved')
    (file,) = (tmp_path / 'saved' / 'transformer').glob('*.safetensors')
    tensors = load_file(file)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    again = kind.from_pretrained(tmp_path / 'saved', torch_dtype=torch.bfloat16)
    again.set_progress_bar_config(disable=True)
    torch.testing.assert_close(images(again), expected, rtol=0, atol=0.05)  # text encoders keep their frequencies
    pipe.unload_piflow_adapter()
    plain = STOCK[kind](**pipe.components)
    plain.set_progress_bar_config(disable=True)
    assert plain('a', num_inference_steps=2, output_type='latent', **CALL).images.isfinite().all()
    pipe.load_piflow_adapter(tmp_path / 'adapter')
    pipe.to(torch.float32)
    pipe.unload_piflow_adapter()
    assert {tensor.dtype for tensor in pipe.transformer.state_dict().values()} == {torch.float32}


@pytest.mark.parametrize('when', ['before', 'after'])
def test_layers_that_were_parted_to_fuse(folders, tmp_path, when):
    pipe = load(folders, PiFluxPipeline, tmp_path)
    pipe.fuse_lora()
    if when == 'before':
        pipe.to(torch.bfloat16)
        pipe.unfuse_lora()
    else:
        pipe.unfuse_lora()
        pipe.to(torch.bfloat16)
    assert {tensor.dtype for tensor in pipe.transformer.state_dict().values()} == {torch.bfloat16}
    assert images(pipe).isfinite().all()
