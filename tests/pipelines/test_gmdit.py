"""The pipeline of GMFlow DiTs."""

import json

import pytest
import torch
from diffusers import AutoencoderKL

from lakonlab.models.diffusions.gmflow import GMFlow
from lakonlab.models.diffusions.schedulers import FlowEulerODEScheduler, FlowSDEScheduler
from lakonlab.pipelines import pipeline_gmdit
from lakonlab.pipelines.dit_pipeline import with_arguments
from lakonlab.pipelines.gmdit_pipeline import GMDiTPipeline
from lakonlab.registry import MODULES

DIT = dict(
    num_gaussians=3,
    logstd_inner_dim=12,
    num_attention_heads=2,
    attention_head_dim=8,
    in_channels=4,
    num_layers=1,
    sample_size=8,
    num_embeds_ada_norm=5,
)
SPECTRUM = dict(base_size=(4, 8, 8), layers=(8,))
LABELS = {0: 'tench, Tinca tinca', 1: 'jay', 2: 'ouzel', 3: 'kite', 4: 'owl'}
CALL = dict(num_inference_steps=4, num_inference_substeps=2, output_type='latent')


def network(kind, arguments):
    built = MODULES.build(dict(type=kind, **arguments))
    with torch.no_grad():
        for tensor in built.parameters():
            tensor.add_(torch.randn(tensor.shape) * 0.05)
    return with_arguments(built.eval(), arguments)


@pytest.fixture
def pipe():
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=4, latent_channels=4, layers_per_block=1)
    pipe = GMDiTPipeline(
        network('GMDiTTransformer2DModel', DIT),
        network('SpectrumMLP', SPECTRUM),
        vae.eval(),
        FlowEulerODEScheduler(),
        id2label=LABELS,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe, labels=(1, 3), seed=1, **call):
    return pipe(labels, generator=torch.Generator().manual_seed(seed), **{**CALL, **call}).images


def test_samples_of_the_model(pipe):
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    flow = GMFlow(pipe.transformer, num_timesteps=1000)
    section = dict(num_timesteps=4, num_substeps=2, order=2)
    expected = flow.forward_test(
        noise, guidance_scale=0.45, class_labels=torch.tensor([5, 5, 1, 3]), test_cfg_override=section
    )
    torch.testing.assert_close(sample(pipe), expected, rtol=0, atol=1e-5)
    assert not torch.equal(sample(pipe, guidance_scale=0), expected)


def test_modes(pipe):
    mean = sample(pipe)
    pipe.scheduler = FlowSDEScheduler()
    drawn = sample(pipe, output_mode='sample')
    assert torch.equal(drawn, sample(pipe, output_mode='sample'))
    assert not torch.allclose(drawn, mean, atol=1e-2)
    (picture, _) = sample(pipe, output_type='pil')
    assert picture.size == (8, 8)


def test_labels(pipe):
    assert pipe.get_label_ids(['jay', 'Tinca tinca']) == [1, 0]
    with pytest.raises(ValueError, match="'eagle' names no class"):
        pipe.get_label_ids('eagle')


def test_save_and_load_whatever_the_index_says(pipe, tmp_path):
    """Published indices name modules that no longer exist."""
    expected = sample(pipe, output_type='pt')
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / 'model_index.json').read_text())
    index['transformer'] = ['lib.models.architecture.gmflow', '_GMDiTTransformer2DModel']
    (tmp_path / 'model_index.json').write_text(json.dumps(index))
    again = pipeline_gmdit.GMDiTPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert again.spectrum_net is not None
    assert again.get_label_ids('kite') == [3]
    torch.testing.assert_close(sample(again, output_type='pt'), expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match='has no model_index'):
        GMDiTPipeline.from_pretrained(tmp_path / 'vae')


@pytest.mark.parametrize('with_spectrum', [True, False])
def test_generators_of_images(pipe, with_spectrum):
    """Not only the noise: also what the solver draws."""
    if not with_spectrum:
        pipe.spectrum_net = None
    pipe.scheduler = FlowSDEScheduler()
    call = dict(output_mode='sample', **CALL)

    def draw(labels, *seeds):
        return pipe(labels, generator=[torch.Generator().manual_seed(seed) for seed in seeds], **call).images

    both = draw([1, 3], 7, 8)
    torch.testing.assert_close(both, torch.cat([draw([1], 7), draw([3], 8)]), rtol=0, atol=2e-3)
    torch.testing.assert_close(draw([3, 1], 8, 7), both.flip(0), rtol=0, atol=2e-3)
    with pytest.raises(ValueError, match='2 generators for 1 labels'):
        draw([1], 7, 8)


def test_wrong_labels(pipe):
    for labels, named in (([5], r'\[5\]'), ([-1, 2], r'\[-1\]'), ([], r'\[\]'), ([1.7], r'\[1\.7'), (9, r'\[9\]')):
        with pytest.raises(ValueError, match=rf'class_labels={named}.*: expected integers, at least one, from 0 to 4'):
            sample(pipe, labels)
    assert torch.equal(sample(pipe, 1), sample(pipe, [1]))
    assert torch.equal(sample(pipe, torch.tensor([1, 3])), sample(pipe))


def test_offloading(pipe):
    """Everything computes where the hooks bring the networks, the spectrum network included."""
    pipe.scheduler = FlowSDEScheduler()
    call = dict(output_mode='sample', output_type='pt')
    expected = sample(pipe, **call)
    pipe.enable_model_cpu_offload(device='cpu')
    assert all(hasattr(part, '_hf_hook') for part in (pipe.transformer, pipe.spectrum_net, pipe.vae))
    torch.testing.assert_close(sample(pipe, **call), expected, rtol=0, atol=1e-5)
    place = torch.device('meta')
    pipe.transformer._hf_hook.execution_device = place
    assert pipe._execution_device == place


def test_arguments_and_schedulers_of_published_folders(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    file = tmp_path / 'scheduler' / 'scheduler_config.json'
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, '_class_name': 'GMFlowSDEScheduler'}))
    again = GMDiTPipeline.from_pretrained(tmp_path, low_cpu_mem_usage=True, use_safetensors=True, token='x')
    assert type(again.scheduler) is FlowSDEScheduler
    with pytest.raises(TypeError, match="no argument 'color'"):
        GMDiTPipeline.from_pretrained(tmp_path, color=1)
