"""What users of a pipeline do once an adapter is loaded."""

import inspect
import logging

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from safetensors.torch import save_file

from lakonlab.models.diffusions.schedulers import FlowMapSDEScheduler
from lakonlab.pipelines.piflux_pipeline import PiFluxPipeline
from lakonlab.pipelines.piqwen_pipeline import PiQwenImagePipeline
from tests.pipelines.adapters import RECIPE, random_lora, random_tensors, write_adapter
from tests.pipelines.calls import PROMPTS, generators, images, load, said


def test_batches_give_the_images_of_single_calls(folders, kind, tmp_path):
    pipe = load(folders, kind, tmp_path)
    single = torch.cat([images(pipe, prompt, seed) for prompt, seed in zip(PROMPTS, (1, 2))])
    batch = images(pipe, PROMPTS, generator=generators(1, 2))
    torch.testing.assert_close(batch, single, rtol=0, atol=1e-5)
    several = images(pipe, PROMPTS, generator=generators(1, 7, 8, 2), num_images_per_prompt=2)
    assert several.shape[0] == 4
    torch.testing.assert_close(several[[0, 3]], single, rtol=0, atol=1e-5)
    assert not torch.allclose(several[0], several[1], atol=1e-2)


def test_elastic_steps(folders, kind, tmp_path):
    """More evaluations than the student was trained for; the temperature follows."""
    pipe = load(folders, kind, tmp_path)
    results = {}
    for steps in (4, 6, 8, 16):
        seen = []
        results[steps] = images(
            pipe,
            num_inference_steps=steps,
            callback_on_step_end=lambda pipe, i, t, values, seen=seen: seen.append((i, float(t))) or {},
        )
        assert [i for i, _ in seen] == list(range(steps))
        assert seen[0][1] == 1000
        times = [t for _, t in seen]
        assert times == sorted(times, reverse=True)
        assert bool(results[steps].isfinite().all())
    assert torch.equal(results[4], images(pipe))
    assert not torch.equal(results[8], images(pipe, num_inference_steps=8, temperature=0.3))


def test_dx_at_four_steps(folders, kind, tmp_path, caplog):
    pipe = load(folders, kind, tmp_path, kind='DX')
    first = images(pipe)
    assert torch.equal(first, images(pipe, num_inference_steps=4))
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        images(pipe, num_inference_steps=2)
    assert 'segments of 0.2857' in caplog.text
    with pytest.raises(ValueError, match='the DX policy has none'):
        images(pipe, temperature=0.5)


def test_kinds_of_output(folders, kind, tmp_path):
    pipe = load(folders, kind, tmp_path)
    (picture,) = images(pipe, output_type='pil')
    assert isinstance(picture, Image.Image)
    assert picture.size == (48, 32)
    array = images(pipe, output_type='np')
    assert array.shape == (1, 32, 48, 3)
    latents = images(pipe, output_type='latent')
    assert latents.shape == (1, 6, 16)
    assert latents.dtype == torch.float32


def test_latents_and_changes_by_a_callback(folders, kind, tmp_path):
    pipe = load(folders, kind, tmp_path)
    start = torch.randn(1, 6, 16, generator=torch.Generator().manual_seed(3))
    first = images(pipe, latents=start)
    assert torch.equal(first, images(pipe, latents=start, seed=5))

    def stay(pipe, i, t, values):
        return {'latents': start}

    changed = images(
        pipe,
        latents=start,
        callback_on_step_end=stay,
        callback_on_step_end_tensor_inputs=['latents'],
        output_type='latent',
    )
    assert torch.equal(changed, start)


def test_low_precision(folders, kind, tmp_path):
    """States stay in float32 while the networks compute in bfloat16."""
    pipe = load(folders, kind, tmp_path)
    expected = images(pipe, output_type='latent')
    half = kind.from_pretrained(folders[kind], dtype=torch.bfloat16)
    half.set_progress_bar_config(disable=True)
    half.load_piflow_adapter(tmp_path / 'adapter')
    assert {p.dtype for p in half.transformer.parameters()} == {torch.bfloat16}
    latents = images(half, output_type='latent')
    assert latents.dtype == torch.float32
    assert float((latents - expected).std() / expected.std()) < 0.2
    assert not torch.equal(latents, latents.bfloat16().float())
    assert images(half).shape == (1, 3, 32, 48)


def test_style_beside_the_adapter(folders, kind, tmp_path, caplog):
    pipe = load(folders, kind, tmp_path)
    plain = images(pipe)
    style = random_lora(pipe.transformer, ('to_q', 'to_v', 'mlp.net.2', 'ff.net.2', 'attn.to_out.0'), seed=4)
    style = {name.replace('.base_layer', ''): tensor for name, tensor in style.items()}
    head = {'proj_out.lora_A.weight': torch.ones(2, 32), 'proj_out.lora_B.weight': torch.ones(16, 2)}
    state = {f'transformer.{name}': tensor for name, tensor in {**style, **head}.items()}
    save_file(state, tmp_path / 'pytorch_lora_weights.safetensors')
    pipe.load_lora_weights(tmp_path, adapter_name='style')
    assert 'policy head in place of proj_out' in caplog.text
    pipe.set_adapters(['transformer_piflow', 'style'], [1.0, 0.0])
    torch.testing.assert_close(images(pipe), plain, rtol=0, atol=1e-5)
    pipe.set_adapters(['transformer_piflow', 'style'], [1.0, 0.8])
    styled = images(pipe)
    assert not torch.allclose(styled, plain, atol=1e-3)
    assert 'is not active' not in caplog.text
    pipe.set_adapters('style')
    images(pipe)
    assert "the adapter 'transformer_piflow' of pi-Flow is not active" in caplog.text
    pipe.unload_lora_weights()
    torch.testing.assert_close(images(pipe), plain, rtol=0, atol=1e-5)


def test_save_and_load(folders, kind, tmp_path):
    pipe = load(folders, kind, tmp_path)
    pipe.scheduler = FlowMapSDEScheduler(shift=3.2, final_step_size_scale=0.5)
    expected = images(pipe)
    pipe.save_pretrained(tmp_path / 'saved')
    again = kind.from_pretrained(tmp_path / 'saved')
    again.set_progress_bar_config(disable=True)
    torch.testing.assert_close(images(again), expected, rtol=0, atol=1e-5)
    assert type(again.scheduler) is FlowMapSDEScheduler
    base = load(folders, kind)
    base.load_piflow_adapter(tmp_path / 'saved', subfolder='piflow_adapters/transformer', adapter_name='mine')
    torch.testing.assert_close(images(base), expected, rtol=0, atol=1e-5)
    assert base.transformer.piflow.adapter_name == 'mine'


def test_two_pipelines_share_a_base(folders, kind, tmp_path):
    first = load(folders, kind)
    second = kind(**first.components)
    second.set_progress_bar_config(disable=True)
    base = first.transformer
    weights = {name: (tensor, tensor.clone()) for name, tensor in base.state_dict().items()}
    for index, pipe in enumerate((first, second)):
        pipe.load_piflow_adapter(write_adapter(tmp_path / str(index), base, seed=index))
    shared = {tensor.data_ptr() for tensor in base.parameters()}
    for pipe in (first, second):
        own = [name for name, tensor in pipe.transformer.named_parameters() if tensor.data_ptr() not in shared]
        assert all('lora_' in name or name.startswith(('proj_out', 'norm_out')) for name in own)
    assert not torch.allclose(images(first), images(second), atol=1e-3)
    first.unload_piflow_adapter()
    assert first.transformer is base
    assert all(torch.equal(tensor, before) for tensor, before in weights.values())
    first.load_piflow_adapter(tmp_path / '1')
    torch.testing.assert_close(images(first), images(second), rtol=0, atol=1e-5)


def test_adapter_without_lora_replaces_the_transformer(folders, kind, tmp_path):
    pipe = load(folders, kind)
    base = pipe.transformer
    assert pipe.load_piflow_adapter(write_adapter(tmp_path / 'head', base, lora=False)) is None
    assert pipe.transformer is not base
    expected = images(pipe)
    # a student that was trained in full brings all layers
    pipe.unload_piflow_adapter()
    everything = {name: tensor for name, tensor in base.state_dict().items() if not name.startswith('proj_out.')}
    tensors = {**everything, **random_tensors(base, lora=False)}
    write_adapter(tmp_path / 'all', base, tensors=tensors)
    with torch.no_grad():
        for tensor in base.parameters():
            tensor.zero_()
    assert pipe.load_piflow_adapter(tmp_path / 'all') is None
    torch.testing.assert_close(images(pipe), expected, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_regional_compilation(folders, kind, tmp_path):
    """The repeated blocks, adapters included, are one graph each."""
    pipe = load(folders, kind, tmp_path)
    expected = images(pipe)
    pipe.transformer.compile_repeated_blocks(backend='eager', fullgraph=True)
    torch.testing.assert_close(images(pipe), expected, rtol=0, atol=1e-5)


def test_group_offloading(folders, tmp_path):
    """After the adapter; before it, the tensors that are shared would be somewhere else."""
    pipe = load(folders, PiFluxPipeline, tmp_path)
    expected = images(pipe)
    options = dict(onload_device=torch.device('cpu'), offload_type='leaf_level')
    pipe.enable_group_offload(**options)
    torch.testing.assert_close(images(pipe), expected, rtol=0, atol=1e-5)
    other = load(folders, PiFluxPipeline)
    other.enable_group_offload(**options)
    base = other.transformer
    with pytest.raises(ValueError, match='before enable_group_offload'):
        other.load_piflow_adapter(tmp_path / 'adapter')
    assert other.transformer is base


def test_stochastic_sampling_is_reproducible(folders, kind, tmp_path):
    pipe = load(folders, kind, tmp_path)
    calm = images(pipe)
    pipe.scheduler = FlowMapSDEScheduler.from_config(pipe.scheduler.config, h=1.0)
    noisy = images(pipe, PROMPTS, generator=generators(1, 2))
    assert torch.equal(noisy, images(pipe, PROMPTS, generator=generators(1, 2)))
    torch.testing.assert_close(noisy[:1], images(pipe, generator=generators(1)), rtol=0, atol=1e-5)
    assert not torch.allclose(noisy[:1], calm, atol=1e-3)


def test_schedules(folders, tmp_path, caplog):
    """The adapter sets the scheduler; what contradicts it is said once; what no student is sampled with is refused."""
    pipe = load(folders, PiQwenImagePipeline, tmp_path)
    config = pipe.scheduler.config
    assert (config.shift, config.shift_terminal, config.use_dynamic_shifting) == (3.2, None, False)
    expected = images(pipe)
    theirs = FlowMatchEulerDiscreteScheduler.from_config(
        pipe.scheduler.config, shift=3.2, shift_terminal=None, use_dynamic_shifting=False
    )
    pipe.scheduler = FlowMapSDEScheduler.from_config(
        pipe.scheduler.config, shift=3.2, use_dynamic_shifting=False, final_step_size_scale=0.5
    )
    assert torch.equal(images(pipe), expected)
    pipe.scheduler = theirs
    assert torch.equal(images(pipe), expected)
    assert pipe.scheduler is theirs
    assert not said(caplog)
    pipe.scheduler = FlowMapSDEScheduler(shift=1.5, final_step_size_scale=0.5)
    images(pipe)
    images(pipe, final_step_size_scale=1.0)
    images(pipe)
    assert [record.message.partition('trained for ')[2] for record in said(caplog)] == [
        'shift=3.2, but the scheduler has 1.5',
        'final_step_size_scale=0.5, but it is sampled with 1.0',
    ]
    images(pipe, num_inference_steps=3)
    assert '4 steps, but num_inference_steps=3' in caplog.text
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.2, shift_terminal=0.02)
    with pytest.raises(ValueError, match=r'shift_terminal=0\.02'):
        images(pipe)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    images(pipe)
    assert 'the scheduler has dynamic' in caplog.text
    for other in (FlowMatchEulerDiscreteScheduler(500, shift=3.2), FlowMapSDEScheduler(num_train_timesteps=1)):
        pipe.scheduler = other
        with pytest.raises(ValueError, match=r'num_train_timesteps=\d+, but pipelines count 1000: pipe.scheduler = '):
            images(pipe)


def test_recipe_with_another_last_step_or_shift(folders, tmp_path, caplog):
    pipe = load(folders, PiQwenImagePipeline)
    write_adapter(tmp_path / 'short', pipe.transformer, recipe=dict(nfe=2, shift=2.0, final_step_size_scale=0.0))
    pipe.load_piflow_adapter(tmp_path / 'short')
    seen = []
    images(pipe, callback_on_step_end=lambda pipe, i, t, values: seen.append(float(t)) or {})
    assert len(seen) == 2
    assert seen[1] < 1  # the last segment is as short as it can be
    assert not said(caplog)
    pipe.unload_piflow_adapter()
    write_adapter(tmp_path / 'dynamic', pipe.transformer, recipe=dict(nfe=2, final_step_size_scale=1.0))
    pipe.load_piflow_adapter(tmp_path / 'dynamic')
    assert 'a shift that depends on the size of images' in caplog.text


def test_arguments_that_contradict_the_recipe_are_reported_once(folders, kind, tmp_path, caplog):
    recipe = dict(RECIPE, temperature=0.3, guidance_scale=1.5)
    pipe = load(folders, kind, tmp_path, recipe=recipe)
    agreeing = dict(temperature=0.3, total_substeps=32)
    contradicting = dict(temperature=0.9, total_substeps=4)
    if kind is PiFluxPipeline:  # the other has no scale to embed
        agreeing['guidance_scale'], contradicting['guidance_scale'] = 1.5, 9.0
    images(pipe, **agreeing)
    images(pipe, num_inference_steps=8, temperature=0.9)
    assert not said(caplog)
    for _ in range(2):
        images(pipe, **contradicting)
    assert sorted(record.message.partition('trained for ')[2] for record in said(caplog)) == sorted(
        f'{name}={recipe[name]}, but it is called with {value}' for name, value in contradicting.items()
    )


def test_refusals(folders, kind, tmp_path):
    bare = load(folders, kind)
    with pytest.raises(ValueError, match='call load_piflow_adapter first'):
        images(bare)
    pipe = load(folders, kind, tmp_path)
    with pytest.raises(ValueError, match='true_cfg_scale: the guidance of the teacher is distilled'):
        images(pipe, true_cfg_scale=4.0)
    with pytest.raises(ValueError, match='no negative prompt'):
        images(pipe, negative_prompt='blurry')
    with pytest.raises(TypeError, match='num_steps'):
        images(pipe, num_steps=4)
    with pytest.raises(ValueError, match='unload_piflow_adapter first'):
        pipe.load_piflow_adapter(tmp_path / 'adapter')
    with pytest.raises(ValueError, match="temperature='cold'"):
        images(pipe, temperature='cold')
    wrong = dict(
        num_inference_steps=(0, 4.0, True),
        total_substeps=(-3, 0),
        final_step_size_scale=(0, float('nan')),
        temperature=(5, None, float('nan')),
    )
    for name, values in wrong.items():
        for value in values:
            with pytest.raises(ValueError, match=f'{name}={value}: expected'):
                images(pipe, **{name: value})
    stock = next(base for base in kind.__mro__ if base.__module__.startswith('diffusers'))
    place = list(inspect.signature(stock.__call__).parameters).index('num_inference_steps') - 2  # after self, prompt
    with pytest.raises(ValueError, match='num_inference_steps=0: expected'):
        pipe('a red heart', *[None] * place, 0)


def test_nothing_is_said_in_vain(folders, kind, tmp_path, caplog):
    """Also by diffusers, also about schedulers that were made of others."""
    pipe = load(folders, kind, tmp_path)
    pipe.scheduler = FlowMapSDEScheduler.from_config(
        pipe.scheduler.config, shift=3.2, use_dynamic_shifting=False, final_step_size_scale=0.5
    )
    caplog.clear()
    spoken = logging.getLogger('diffusers')
    spoken.addHandler(caplog.handler)
    try:
        images(pipe)
    finally:
        spoken.removeHandler(caplog.handler)
    assert not caplog.records
