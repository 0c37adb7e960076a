"""IP-adapters of FLUX beside an adapter of pi-Flow."""

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image

from lakonlab.pipelines.piflux_pipeline import PiFluxPipeline
from tests.pipelines.adapters import write_adapter, write_euler_adapter
from tests.pipelines.calls import images, load

FEATURES, TOKENS, WIDTH = 12, 4, 32


@pytest.fixture
def ip_adapter(tmp_path):
    """Arguments of ``load_ip_adapter``: random weights, and an encoder of pictures."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=32,
        patch_size=16,
        projection_dim=FEATURES,
    )
    CLIPVisionModelWithProjection(config).save_pretrained(tmp_path / 'encoder')
    layers = {f'0.to_{part}_ip.weight': torch.randn(WIDTH, WIDTH) for part in 'kv'}
    layers.update({f'0.to_{part}_ip.bias': torch.randn(WIDTH) for part in 'kv'})
    projection = {
        'proj.weight': torch.randn(TOKENS * WIDTH, FEATURES),
        'proj.bias': torch.randn(TOKENS * WIDTH),
        'norm.weight': torch.ones(WIDTH),
        'norm.bias': torch.zeros(WIDTH),
    }
    (tmp_path / 'ip').mkdir()
    torch.save({'image_proj': projection, 'ip_adapter': layers}, tmp_path / 'ip' / 'ip_adapter.bin')
    return dict(
        pretrained_model_name_or_path_or_dict=str(tmp_path / 'ip'),
        weight_name='ip_adapter.bin',
        image_encoder_pretrained_model_name_or_path=str(tmp_path / 'encoder'),
        image_encoder_dtype=torch.float32,
    )


def picture(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8))


@pytest.mark.parametrize('first', ['student', 'ip'])
def test_one_step_is_that_of_the_base(folders, tmp_path, ip_adapter, first):
    """With an IP-adapter too, whichever is loaded first."""
    plain, pipe = FluxPipeline.from_pretrained(folders[PiFluxPipeline]), load(folders, PiFluxPipeline)
    plain.set_progress_bar_config(disable=True)
    plain.load_ip_adapter(**ip_adapter)
    folder = write_euler_adapter(tmp_path / 'adapter', pipe.transformer)
    base = pipe.transformer
    if first == 'ip':
        pipe.load_ip_adapter(**ip_adapter)
    pipe.load_piflow_adapter(folder)
    if first == 'student':
        pipe.load_ip_adapter(**ip_adapter)
        assert getattr(base, 'encoder_hid_proj', None) is None
    for seed in (1, 2):
        call = dict(num_inference_steps=1, output_type='latent', ip_adapter_image=picture(seed))
        torch.testing.assert_close(images(pipe, **call), images(plain, **call), rtol=0, atol=1e-4)
    assert not torch.allclose(images(pipe, **call), images(pipe, **{**call, 'ip_adapter_image': picture(3)}), atol=1e-3)


def test_strength_embeds_and_unloading(folders, tmp_path, ip_adapter):
    pipe = load(folders, PiFluxPipeline)
    pipe.load_piflow_adapter(write_adapter(tmp_path / 'adapter', pipe.transformer))
    without = images(pipe)
    pipe.load_ip_adapter(**ip_adapter)
    expected = images(pipe, ip_adapter_image=picture(1))
    assert not torch.allclose(expected, without, atol=1e-3)
    embeds = pipe.prepare_ip_adapter_image_embeds(picture(1), None, 'cpu', 1)
    given = dict(ip_adapter_image_embeds=embeds, negative_ip_adapter_image_embeds=embeds)
    torch.testing.assert_close(images(pipe, **given), expected, rtol=0, atol=1e-5)
    pipe.set_ip_adapter_scale(0.0)
    torch.testing.assert_close(images(pipe, ip_adapter_image=picture(1)), without, rtol=0, atol=1e-5)
    pipe.unload_ip_adapter()
    torch.testing.assert_close(images(pipe), without, rtol=0, atol=1e-5)
