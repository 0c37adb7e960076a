"""What a pipeline with an adapter does to the base and to pipelines that share it: nothing."""

import json
import shutil

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from safetensors.torch import save_file

from lakonlab.models.diffusions.schedulers import FlowMapSDEScheduler
from lakonlab.pipelines.adapter_files import read_index
from lakonlab.pipelines.piflux_pipeline import PiFluxPipeline
from lakonlab.pipelines.piqwen_pipeline import PiQwenImagePipeline
from tests.pipelines.adapters import random_lora, write_adapter
from tests.pipelines.calls import images, load, said

DX = dict(type='DX', segment_size=1 / 3.5, shift=2.0)


def state_of(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize('part', ['pipeline', 'transformer'])
def test_fusing(folders, kind, tmp_path, part):
    """By the method of the pipeline, and by that of its transformer."""
    first = load(folders, kind)
    second = kind(**first.components)
    second.set_progress_bar_config(disable=True)
    base = first.transformer
    before = state_of(base)
    for index, pipe in enumerate((first, second)):
        pipe.load_piflow_adapter(write_adapter(tmp_path / str(index), base, seed=index))
    expected = [images(pipe) for pipe in (first, second)]
    fused = first if part == 'pipeline' else first.transformer
    fused.fuse_lora()
    fused.fuse_lora()
    torch.testing.assert_close(images(first), expected[0], rtol=0, atol=1e-4)
    assert torch.equal(images(second), expected[1])
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())
    refused = [
        lambda: first.save_pretrained(tmp_path / 'fused'),
        lambda: first.save_piflow_adapter(tmp_path / 'fused'),
        first.unload_piflow_adapter,
    ]
    for attempt in refused:
        with pytest.raises(ValueError, match='call unfuse_lora first'):
            attempt()
    assert not (tmp_path / 'fused').exists()
    fused.unfuse_lora()
    assert torch.equal(images(first), expected[0])
    shared = {tensor.data_ptr() for tensor in base.parameters()}
    own = [name for name, tensor in first.transformer.named_parameters() if tensor.data_ptr() not in shared]
    assert all('lora_' in name or name.startswith(('proj_out', 'norm_out')) for name in own)
    first.save_pretrained(tmp_path / 'saved')
    again = kind.from_pretrained(tmp_path / 'saved')
    again.set_progress_bar_config(disable=True)
    torch.testing.assert_close(images(again), expected[0], rtol=0, atol=1e-5)


def test_a_style_with_normalisation_layers(folders, tmp_path):
    """Of FLUX; it is written into the layers of the student, not into those of the base."""
    pipe = load(folders, PiFluxPipeline, tmp_path)
    base = pipe.transformer.piflow.base
    before, plain = state_of(base), images(pipe)
    style = random_lora(base, ('to_q',), seed=4)
    name = 'transformer_blocks.0.attn.norm_q.weight'
    style[name] = torch.full_like(before[name], 3.0)
    save_file({f'transformer.{name}': t for name, t in style.items()}, tmp_path / 'pytorch_lora_weights.safetensors')
    pipe.load_lora_weights(tmp_path, adapter_name='style')
    pipe.set_adapters(['transformer_piflow', 'style'], [1.0, 0.0])
    assert not torch.allclose(images(pipe), plain, atol=1e-3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())
    pipe.unload_lora_weights()
    torch.testing.assert_close(images(pipe), plain, rtol=0, atol=1e-5)


def test_what_was_fused_stays_when_styles_are_unloaded(folders, kind, tmp_path):
    """As with other pipelines; unfusing goes back to the student without them."""
    pipe = load(folders, kind, tmp_path)
    plain = images(pipe)
    style = random_lora(pipe.transformer.piflow.base, ('to_q', 'to_v'), seed=4)
    save_file({f'transformer.{name}': t for name, t in style.items()}, tmp_path / 'pytorch_lora_weights.safetensors')
    pipe.load_lora_weights(tmp_path, adapter_name='style')
    pipe.set_adapters(['transformer_piflow', 'style'], [1.0, 0.8])
    styled = images(pipe)
    assert not torch.allclose(styled, plain, atol=1e-3)
    pipe.fuse_lora(adapter_names=['transformer_piflow', 'style'])
    torch.testing.assert_close(images(pipe), styled, rtol=0, atol=1e-4)
    pipe.unload_lora_weights()
    torch.testing.assert_close(images(pipe), styled, rtol=0, atol=1e-4)
    pipe.unfuse_lora()
    assert torch.equal(images(pipe), plain)


def test_the_base_keeps_its_schedule(folders, tmp_path):
    pipe = load(folders, PiFluxPipeline)
    before = dict(pipe.scheduler.config)
    assert before['use_dynamic_shifting']
    own = pipe.scheduler
    pipe.load_piflow_adapter(write_adapter(tmp_path / 'adapter', pipe.transformer), adapter_name='mine')
    expected = images(pipe)
    pipe.save_pretrained(tmp_path / 'saved')
    assert pipe.scheduler.config.shift == 3.2
    plain = FluxPipeline.from_pretrained(tmp_path / 'saved')
    assert {**plain.scheduler.config, **before} == dict(plain.scheduler.config)
    again = PiFluxPipeline.from_pretrained(tmp_path / 'saved')
    again.set_progress_bar_config(disable=True)
    assert again.scheduler.config.shift == 3.2
    assert again.transformer.piflow.adapter_name == 'mine'
    torch.testing.assert_close(images(again), expected, rtol=0, atol=1e-5)
    pipe.unload_piflow_adapter()
    assert pipe.scheduler is own


def test_a_schedule_that_was_chosen_is_kept(folders, tmp_path, caplog):
    pipe = load(folders, PiFluxPipeline, tmp_path)
    chosen = FlowMatchEulerDiscreteScheduler(shift=1.5)
    pipe.scheduler = chosen
    pipe.save_pretrained(tmp_path / 'saved')
    assert PiFluxPipeline.from_pretrained(tmp_path / 'saved').scheduler.config.shift == 1.5
    assert not said(caplog)
    pipe.unload_piflow_adapter()
    assert pipe.scheduler is chosen


def test_a_fixed_shift_is_not_replaced_silently(folders, tmp_path, caplog):
    pipe = load(folders, PiFluxPipeline)
    folder = write_adapter(tmp_path / 'adapter', pipe.transformer)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.5)
    pipe.load_piflow_adapter(folder)
    assert pipe.scheduler.config.shift == 3.2
    assert 'trained for shift=3.2, which the scheduler gets in place of its 1.5' in caplog.text


def test_dx_without_a_recipe_sets_the_shift_of_its_policy(folders, kind, tmp_path, caplog):
    pipe = load(folders, kind, tmp_path, kind='DX', recipe=None, policy=DX)
    assert (pipe.scheduler.config.shift, pipe.scheduler.config.use_dynamic_shifting) == (2.0, False)
    images(pipe)
    assert not said(caplog)


@pytest.mark.parametrize('points', ['GM', 'DX'])
def test_without_a_recipe_contradictions_are_reported(folders, kind, tmp_path, caplog, points):
    pipe = load(folders, kind, tmp_path, kind=points, recipe=None)
    images(pipe)
    assert not said(caplog)
    pipe.scheduler = FlowMapSDEScheduler(shift=1.5, final_step_size_scale=1.0)
    images(pipe)
    assert 'shift=3.2, but the scheduler has 1.5' in caplog.text
    assert 'final_step_size_scale=0.5, but it is sampled with 1.0' in caplog.text


@pytest.mark.parametrize('how', ['deleted', 'unloaded'])
def test_an_adapter_that_was_deleted_is_reported(folders, kind, tmp_path, caplog, how):
    pipe = load(folders, kind, tmp_path)
    if how == 'deleted':
        pipe.delete_adapters('transformer_piflow')
    else:
        pipe.transformer.unload_lora()
    images(pipe)
    with pytest.raises(ValueError, match="'transformer_piflow' of pi-Flow was deleted"):
        pipe.save_pretrained(tmp_path / 'saved')
    assert not (tmp_path / 'saved').exists()
    assert "the adapter 'transformer_piflow' of pi-Flow is not active" in caplog.text


def test_styles_that_were_loaded_before(folders, kind, tmp_path, caplog):
    pipe = load(folders, kind)
    style = random_lora(pipe.transformer, ('to_q', 'norm_out.linear'), seed=4)
    save_file({f'transformer.{name}': t for name, t in style.items()}, tmp_path / 'pytorch_lora_weights.safetensors')
    adapter = write_adapter(tmp_path / 'adapter', pipe.transformer)
    pipe.load_lora_weights(tmp_path, adapter_name='style')
    pipe.load_piflow_adapter(adapter)
    assert 'replaces norm_out.linear: what the styles that were loaded before it' in caplog.text
    pipe.set_adapters(['transformer_piflow', 'style'], [1.0, 0.8])
    styled = images(pipe)
    with pytest.raises(ValueError, match='load the styles after the adapter'):
        pipe.save_pretrained(tmp_path / 'saved')
    assert not (tmp_path / 'saved').exists()
    other = load(folders, kind)
    other.load_piflow_adapter(adapter)
    assert not torch.allclose(images(other), styled, atol=1e-3)


def test_from_pipe(folders, tmp_path):
    told = dict(policy_type='DX', policy_kwargs=dict(segment_size=1 / 3.5, shift=3.2))
    pipe = PiQwenImagePipeline.from_pretrained(folders[PiQwenImagePipeline], **told)
    again = PiQwenImagePipeline.from_pipe(pipe)
    again.set_progress_bar_config(disable=True)
    assert (again.policy_type, again.policy_kwargs) == tuple(told.values())
    folder = write_adapter(tmp_path, pipe.transformer, kind='DX', recipe=None, policy=dict(type='DX'))
    again.load_piflow_adapter(folder)
    assert images(again).isfinite().all()
    assert again.transformer.piflow.base is pipe.transformer


def test_adapters_are_pushed_too(folders, tmp_path, monkeypatch):
    """They are there before the base class uploads the folder."""
    pipe = load(folders, PiFluxPipeline, tmp_path)
    seen = []

    def save(self, folder, **options):
        seen.extend(sorted(str(path.relative_to(folder)) for path in folder.rglob('*') if path.is_file()))

    monkeypatch.setattr(FluxPipeline, 'save_pretrained', save)
    pipe.save_pretrained(tmp_path / 'saved', push_to_hub=True)
    places = [f'piflow_adapters/{name}' for name in ('adapters.json', 'transformer/config.json')]
    assert seen[:2] == places
    assert json.loads((tmp_path / 'saved' / places[0]).read_text())['transformer']['adapter_name']


def test_calls_at_the_same_time(folders, tmp_path):
    pipe = load(folders, PiFluxPipeline, tmp_path)
    expected = images(pipe)

    def again(pipe, i, t, values):
        with pytest.raises(RuntimeError, match='is sampling already'):
            images(pipe)
        return {}

    assert torch.equal(images(pipe, callback_on_step_end=again), expected)
    with pytest.raises(ValueError, match='callback_on_step_end_tensor_inputs'):
        images(pipe, callback_on_step_end_tensor_inputs=['nothing'])
    assert torch.equal(images(pipe), expected)


@pytest.mark.parametrize('when', ['before', 'after'])
def test_offloading(folders, kind, tmp_path, when):
    """Hooks are where they belong, whether the adapter comes before or after them."""
    pipe = load(folders, kind)
    folder = write_adapter(tmp_path / 'adapter', pipe.transformer)
    plain = load(folders, kind)
    plain.load_piflow_adapter(folder)
    expected = images(plain)
    if when == 'before':
        pipe.load_piflow_adapter(folder)
    pipe.enable_model_cpu_offload(device='cpu')
    if when == 'after':
        pipe.load_piflow_adapter(folder)
    assert hasattr(pipe.transformer, '_hf_hook')
    torch.testing.assert_close(images(pipe), expected, rtol=0, atol=1e-5)
    pipe.unload_piflow_adapter()
    pipe.load_piflow_adapter(folder)
    torch.testing.assert_close(images(pipe), expected, rtol=0, atol=1e-5)


def cached(folder, cache):
    """Keep a folder as the hub's library keeps a repository that it has downloaded; gives its name."""
    place = cache / 'models--org--saved'
    (place / 'refs').mkdir(parents=True)
    (place / 'refs' / 'main').write_text('a' * 40)
    shutil.copytree(folder, place / 'snapshots' / ('a' * 40))
    return 'org/saved'


def test_a_repository_is_loaded_with_its_adapters(folders, tmp_path):
    pipe = load(folders, PiFluxPipeline)
    pipe.load_piflow_adapter(write_adapter(tmp_path / 'adapter', pipe.transformer), adapter_name='mine')
    pipe.save_pretrained(tmp_path / 'saved')
    options = dict(cache_dir=tmp_path / 'hub', local_files_only=True)
    again = PiFluxPipeline.from_pretrained(cached(tmp_path / 'saved', tmp_path / 'hub'), **options)
    again.set_progress_bar_config(disable=True)
    assert again.transformer.piflow.adapter_name == 'mine'
    assert again.transformer.piflow.where == 'org/saved/piflow_adapters/transformer'
    torch.testing.assert_close(images(again), images(pipe), rtol=0, atol=1e-5)


def test_a_repository_of_a_base_has_no_adapters(folders, tmp_path, hub, caplog):
    name = cached(folders[PiFluxPipeline], tmp_path / 'cache')
    bare = PiFluxPipeline.from_pretrained(name, cache_dir=tmp_path / 'cache', local_files_only=True)
    assert getattr(bare.transformer, 'piflow', None) is None
    assert read_index('org/model', 'piflow_adapters', 'adapters.json', {}) == {}  # one that can be asked
    assert not said(caplog)
    assert read_index('org/other', 'piflow_adapters', 'adapters.json', {}) == {}  # one that needs a licence
    assert 'cannot tell whether there is piflow_adapters/adapters.json beside the pipeline' in caplog.text
