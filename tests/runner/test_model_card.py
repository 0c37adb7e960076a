"""Model cards say what is known, and no more."""

import json
from dataclasses import replace

import pytest

from lakonlab.pipelines.recipe import Recipe
from lakonlab.runner.model_card import CardFacts, model_card

CFG = dict(
    model=dict(
        diffusion=dict(type='PiFlowImitation', denoising=dict(use_lora=True, lora_rank=256)),
        teacher=dict(denoising=dict(pretrained='huggingface://Qwen/Qwen-Image/transformer')),
    ),
    train_cfg=dict(teacher_test_cfg=dict(guidance_scale=4.0)),
)


@pytest.fixture
def facts(tmp_path):
    return CardFacts(
        name='student',
        class_name='GMQwenImageTransformer2DModel',
        policy=dict(type='GMFlow'),
        recipe=Recipe(nfe=4, shift=3.2, final_step_size_scale=0.5, total_substeps=128, temperature=0.3),
        base='Qwen/Qwen-Image',
        role='ema',
        step=3000,
        origin='iter_3000',
        licence='apache-2.0',
        where='exports/student',
        results=tmp_path / 'results.json',
    )


def test_recipe_and_origin(facts):
    card = model_card(facts, CFG)
    assert card.startswith('---\nlicense: apache-2.0\nlibrary_name: diffusers\nbase_model: Qwen/Qwen-Image\n')
    for row in (
        '| network evaluations | 4 |',
        '| shift of the schedule | 3.2 |',
        '| temperature | 0.3 |',
        '| teacher | huggingface://Qwen/Qwen-Image/transformer |',
        '| guidance scale of the teacher | 4.0 |',
        '| iterations | 3000 |',
        '| rank of the adapter | 256 |',
    ):
        assert row in card
    assert 'embedded guidance' not in card
    assert '## Metrics' not in card


def test_metrics_of_the_exported_checkpoint_only(facts):
    evaluation = dict(data='val', num_samples=1000, nfe=4, metrics=dict(frechet_distance=0.38412345), entry={})
    content = dict(iteration=3000, evaluations=[evaluation, dict(evaluation, metrics={})])
    facts.results.write_text(json.dumps(content))
    card = model_card(facts, CFG)
    assert 'Measured with: data val, num_samples 1000, nfe 4.' in card
    assert '| frechet_distance | 0.3841 |' in card
    assert card.count('Measured with') == 1
    assert '## Metrics' not in model_card(replace(facts, step=2000), CFG)


def test_transformer_without_a_pipeline(facts):
    card = model_card(replace(facts, class_name='SD3Transformer2DModel', base=None), CFG)
    assert 'PiFlowPipelineMixin' in card
    assert '```' not in card
    assert 'base_model' not in card
