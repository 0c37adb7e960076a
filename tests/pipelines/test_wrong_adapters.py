"""Adapters that do not fit are refused with a reason, and leave the pipeline as it was."""

import json

import pytest
import torch
from diffusers import FluxTransformer2DModel

from lakonlab.models.diffusions.schedulers import FlowMapSDEScheduler
from lakonlab.pipelines.adapter_files import AdapterError
from lakonlab.pipelines.contradictions import contradictions
from lakonlab.pipelines.piflux_pipeline import PiFluxPipeline
from tests.pipelines.adapters import random_lora, random_tensors, write_adapter
from tests.pipelines.calls import said
from tests.tiny_components import SIZES

PARTS = dict.fromkeys(('vae', 'text_encoder', 'text_encoder_2', 'tokenizer', 'tokenizer_2'))


def transformer(**changes):
    return FluxTransformer2DModel(patch_size=1, **{**SIZES['Flux'], **changes})


@pytest.fixture
def pipe():
    from diffusers import FlowMatchEulerDiscreteScheduler

    return PiFluxPipeline(scheduler=FlowMatchEulerDiscreteScheduler(), transformer=transformer(), **PARTS)


def refused(pipe, folder, match, **options):
    base, scheduler = pipe.transformer, pipe.scheduler
    with pytest.raises(AdapterError, match=match):
        pipe.load_piflow_adapter(folder, **options)
    assert pipe.transformer is base
    assert pipe.scheduler is scheduler


def test_of_another_base(pipe, tmp_path):
    write_adapter(tmp_path, pipe.transformer, config={'_class_name': 'GMQwenImageTransformer2DModel'})
    refused(pipe, tmp_path, "an adapter of 'GMQwenImageTransformer2DModel', this pipeline has FluxTransformer2DModel")


def test_of_another_size_by_its_config(pipe, tmp_path):
    other = transformer(num_layers=2)
    write_adapter(tmp_path, other, config={'_class_name': 'FluxTransformer2DModel', **other.config})
    refused(pipe, tmp_path, 'another size: num_layers 2, here 1')


@pytest.mark.parametrize(
    ('changes', 'match'),
    [
        (dict(num_layers=2), r'there is no layer transformer_blocks\.1\.ff\.net\.2'),
        (dict(num_attention_heads=4), r'is an adapter of another base: its proj_out_means\.weight is'),
    ],
)
def test_of_another_size_by_its_tensors(pipe, tmp_path, changes, match):
    write_adapter(tmp_path, transformer(**changes))
    refused(pipe, tmp_path, match)


def test_of_another_width_of_text(pipe, tmp_path):
    tensors = random_tensors(pipe.transformer)
    tensors['transformer_blocks.0.ff.net.2.lora_A.weight'] = torch.ones(2, 100)
    write_adapter(tmp_path, pipe.transformer, tensors=tensors)
    refused(pipe, tmp_path, r'transformer_blocks\.0\.ff\.net\.2 has weights')


def test_of_two_ranks(pipe, tmp_path):
    tensors = random_tensors(pipe.transformer)
    name = 'transformer_blocks.0.ff.net.2.lora_A.weight'
    for value, match in (
        (tensors[name][:1], r'the matrices of transformer_blocks\.0\.ff\.net\.2 have the ranks 2 and 1'),
        (tensors[name][0], r'transformer_blocks\.0\.ff\.net\.2 has weights'),
    ):
        write_adapter(tmp_path, pipe.transformer, tensors={**tensors, name: value.clone()})
        refused(pipe, tmp_path, match)


def test_style(pipe, tmp_path):
    write_adapter(tmp_path, pipe.transformer, policy={}, recipe=None, tensors=random_lora(pipe.transformer, ('to_q',)))
    refused(pipe, tmp_path, 'no adapter of pi-Flow: it has no policy head.*load_lora_weights')


def test_whole_model(pipe, tmp_path):
    pipe.transformer.save_pretrained(tmp_path)
    refused(pipe, tmp_path, 'its output layer is as wide as that of the base')


@pytest.mark.parametrize(
    'missing', ['proj_out_logweights', 'proj_out_logstds', 'proj_out_logstds.3', 'proj_out_means.bias']
)
def test_incomplete_head(pipe, tmp_path, missing):
    tensors = {name: t for name, t in random_tensors(pipe.transformer).items() if not name.startswith(missing)}
    write_adapter(tmp_path, pipe.transformer, tensors=tensors)
    refused(pipe, tmp_path, 'its policy head is not complete')


def test_pickle(pipe, tmp_path):
    write_adapter(tmp_path, pipe.transformer)
    (tmp_path / 'diffusion_pytorch_model.safetensors').unlink()
    torch.save(random_tensors(pipe.transformer), tmp_path / 'diffusion_pytorch_model.bin')
    refused(pipe, tmp_path, r'diffusion_pytorch_model\.bin is a pickle, which could execute code')
    refused(pipe, tmp_path, 'use_safetensors=False', use_safetensors=False)


def test_nothing_there(pipe, tmp_path):
    refused(pipe, tmp_path / 'missing', 'there is no folder')
    refused(pipe, tmp_path, 'has no diffusion_pytorch_model.safetensors; found nothing')
    write_adapter(tmp_path / 'inner', pipe.transformer)
    refused(pipe, tmp_path, 'give one of its folders as subfolder: inner')
    refused(pipe, tmp_path, 'there is no folder', subfolder='outer')
    (tmp_path / 'inner' / 'config.json').unlink()
    refused(pipe, tmp_path / 'inner', r'has no config\.json beside')


def test_damaged(pipe, tmp_path):
    write_adapter(tmp_path, pipe.transformer)
    (tmp_path / 'diffusion_pytorch_model.safetensors').write_bytes(b'\x00' * 100)
    refused(pipe, tmp_path, 'cannot be read')
    write_adapter(tmp_path, pipe.transformer)
    (tmp_path / 'config.json').write_text('[')
    refused(pipe, tmp_path, r'config\.json is damaged')


def test_policy(pipe, tmp_path):
    write_adapter(tmp_path, pipe.transformer, policy=dict(type='DX'))
    refused(pipe, tmp_path, "the file says 'DX', but its head is that of 'GMFlow'")
    write_adapter(tmp_path, pipe.transformer, kind='DX', policy=dict(type='DX', shift=3.2))
    refused(pipe, tmp_path, 'does not say how long its segments are')
    told = PiFluxPipeline(**pipe.components, policy_type='DX', policy_kwargs=dict(segment_size=1 / 3.5))
    told.load_piflow_adapter(tmp_path)
    assert told.transformer.piflow.policy_kwargs == dict(segment_size=1 / 3.5, shift=3.2)
    other = PiFluxPipeline(**pipe.components, policy_type='GMFlow')
    refused(other, tmp_path, "policy_type says 'GMFlow'")


def test_target(pipe, tmp_path):
    write_adapter(tmp_path, pipe.transformer)
    with pytest.raises(
        ValueError, match="target_module_name='unet' is no module of PiFluxPipeline: it has transformer"
    ):
        pipe.load_piflow_adapter(tmp_path, target_module_name='unet')


def test_names_with_the_module_before_them(pipe, tmp_path):
    tensors = {f'transformer.{name}': tensor for name, tensor in random_tensors(pipe.transformer).items()}
    write_adapter(tmp_path, pipe.transformer, tensors=tensors)
    assert pipe.load_piflow_adapter(tmp_path) == 'transformer_piflow'
    assert json.loads((tmp_path / 'config.json').read_text()) == pipe.transformer.piflow.adapter_config


@pytest.mark.parametrize(
    ('policy', 'match'),
    [
        (dict(momentum_x=1), "GMFlow policy has no argument 'momentum_x'; it has checkpointing"),
        (dict(eps='small'), "eps='small' of the GMFlow policy: expected a positive number"),
    ],
)
def test_arguments_of_policies(pipe, tmp_path, policy, match):
    write_adapter(tmp_path, pipe.transformer, policy=dict(type='GMFlow', **policy))
    refused(pipe, tmp_path, match)


@pytest.mark.parametrize(
    ('policy', 'match'),
    [
        (dict(mode='cubic'), "mode='cubic' of the DX policy: expected one of grid, polynomial"),
        (dict(segment_size=float('nan')), 'segment_size=nan of the DX policy: expected a positive number'),
    ],
)
def test_arguments_of_dx(pipe, tmp_path, policy, match):
    write_adapter(tmp_path, pipe.transformer, kind='DX', policy=dict(type='DX', **{'segment_size': 0.3, **policy}))
    refused(pipe, tmp_path, match)


def test_told_arguments_of_policies_that_contradict_the_file(pipe, tmp_path, caplog):
    file = dict(type='DX', segment_size=0.1333, shift=3.2)
    write_adapter(tmp_path, pipe.transformer, kind='DX', policy=file)
    parts = pipe.components
    PiFluxPipeline(**parts, policy_kwargs=dict(segment_size=0.13330001)).load_piflow_adapter(tmp_path)
    assert 'policy_kwargs' not in caplog.text
    told = PiFluxPipeline(**parts, policy_kwargs=dict(segment_size=0.25, shift=1.0))
    told.load_piflow_adapter(tmp_path)
    assert told.transformer.piflow.policy_kwargs == dict(segment_size=0.25, shift=1.0)
    messages = [record.message for record in said(caplog) if 'policy_kwargs' in record.message]
    assert 'segment_size=0.1333, which is replaced by segment_size=0.25 of policy_kwargs' in messages[0]
    assert 'shift=3.2, which is replaced by shift=1.0 of policy_kwargs' in messages[1]
    config = FlowMapSDEScheduler(shift=3.2, final_step_size_scale=0.5).config
    (about_shift, about_segments) = contradictions(told.transformer.piflow, config, 4, {})
    assert 'has shift=1.0, but the scheduler has 3.2' in about_shift
    assert 'segments of 0.25 in schedule time' in about_segments


def test_misspelt_arguments_of_policies(pipe, tmp_path):
    write_adapter(tmp_path, pipe.transformer, kind='DX', policy=dict(type='DX', segment_size=0.5))
    told = PiFluxPipeline(**pipe.components, policy_kwargs=dict(segment_siz=1 / 3.5))
    refused(told, tmp_path, "DX policy has no argument 'segment_siz'; it has segment_size")


@pytest.mark.parametrize(
    ('recipe', 'match'),
    [
        (['a'], r"its recipe is \['a'\], expected settings"),
        (dict(nfe='4'), "nfe='4' of its recipe: expected an integer"),
        (dict(nfe=0), 'nfe=0 of its recipe'),
        (dict(total_substeps=2.5), r'total_substeps=2\.5 of its recipe'),
        (dict(shift=[3.2]), r'shift=\[3\.2\] of its recipe: expected a number'),
        (dict(shift=0), 'shift=0 of its recipe'),
        (dict(shift=float('nan')), 'shift=nan of its recipe'),
        (dict(guidance_scale=float('inf')), 'guidance_scale=inf of its recipe'),
    ],
)
def test_recipes(pipe, tmp_path, recipe, match):
    write_adapter(tmp_path, pipe.transformer, recipe=recipe)
    refused(pipe, tmp_path, match)


def test_arguments_of_loading(pipe, tmp_path):
    write_adapter(tmp_path, pipe.transformer)
    for name in ('my.name', ''):
        with pytest.raises(ValueError, match='expected a name without dots'):
            pipe.load_piflow_adapter(tmp_path, adapter_name=name)
    with pytest.raises(ValueError, match='set HTTPS_PROXY'):
        pipe.load_piflow_adapter(tmp_path, proxies={'https': 'localhost'})
    assert pipe.load_piflow_adapter(tmp_path, 'transformer', 'mine', proxies=None) == 'mine'
