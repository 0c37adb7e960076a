"""Model cards say what is known, and no more."""

import ast
import json
import re
from dataclasses import replace

import pytest

from lakonlab.pipelines.recipe import Recipe
from lakonlab.runner.model_card import CardFacts, model_card

CFG = dict(
    model=dict(
        diffusion=dict(type='PiFlowImitation', denoising=dict(use_lora=True, lora_rank=256)),
        diffusion_use_ema=True,
        teacher=dict(denoising=dict(pretrained='huggingface://Qwen/Qwen-Image/transformer')),
    ),
    train_cfg=dict(teacher_test_cfg=dict(guidance_scale=4.0)),
)

WHERE = 'exports/student'


@pytest.fixture
def facts(tmp_path):
    return CardFacts(
        name='student',
        class_name='GMQwenImageTransformer2DModel',
        is_class_conditional=False,
        policy=dict(type='GMFlow'),
        recipe=Recipe(nfe=4, shift=3.2, final_step_size_scale=0.5, total_substeps=128, temperature=0.3),
        base='Qwen/Qwen-Image',
        role='ema',
        step=3000,
        origin='iter_3000',
        licence='apache-2.0',
        results=tmp_path / 'results.json',
        model_sha256='5ca1ab1e',
        fingerprint='f00d',
    )


def test_recipe_and_origin(facts):
    card = model_card(facts, CFG, WHERE)
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


EVALUATION = dict(
    name='val_student',
    data='val',
    generated=True,
    num_samples=1000,
    nfe=4,
    sampling_seed=2021,
    quantize='uint8',
    sample_kwargs={},
    metrics=dict(fid=0.38412345),
    protocol={
        'FID': dict(
            numbers=['fid'],
            num_images=1000,
            extractor=dict(name='inception'),
            sampling_seed=2021,
            quantize='uint8',
        )
    },
)


def card_with(facts, *evaluations, cfg=CFG, **content):
    content = dict(model_sha256='5ca1ab1e', fingerprint='f00d', evaluations=evaluations, **content)
    facts.results.write_text(json.dumps(content))
    return model_card(facts, cfg, WHERE)


def test_metrics_with_their_protocol(facts):
    card = card_with(
        facts,
        EVALUATION,
        dict(EVALUATION, metrics={}),
        dict(EVALUATION, name='hot', sample_kwargs=dict(test_cfg_override=dict(temperature=1.0)), metrics=dict(fid=7)),
    )
    assert '`val_student`: num_samples 1000, nfe 4, sampling_seed 2021, quantize uint8\n' in card
    assert '| fid | 0.3841 |' in card
    assert '* FID: num_images 1000, extractor (name inception)\n' in card
    assert '`hot`: num_samples 1000, nfe 4, sampling_seed 2021, quantize uint8, temperature 1.0\n' in card
    assert '| fid | 7 |' in card
    assert card.count('`: num_samples') == 2
    assert 'Measured under a config' not in card
    changed = model_card(replace(facts, fingerprint='other'), CFG, WHERE)
    assert 'Measured under a config whose model, sampling or data differ from those of this export.' in changed


def test_metrics_of_the_exported_weights_only(facts):
    """Neither of another checkpoint, nor of the student, the teacher or real images beside the average."""
    student = dict(EVALUATION, name='of_student', sample_kwargs=dict(role='student'))
    others = [
        dict(EVALUATION, name='of_teacher', sample_kwargs=dict(role='teacher')),
        dict(EVALUATION, name='of_images', generated=False),
    ]
    card = card_with(facts, EVALUATION, student, *others)
    assert '`val_student`' in card
    assert '`of_' not in card
    card = model_card(replace(facts, role='student'), CFG, WHERE)
    assert '`of_student`' in card
    assert card.count('| fid |') == 1
    assert '## Metrics' not in model_card(replace(facts, model_sha256='another'), CFG, WHERE)
    assert '## Metrics' not in model_card(replace(facts, model_sha256=None), CFG, WHERE)
    without = {**CFG, 'model': {**CFG['model'], 'diffusion_use_ema': False}}
    assert '`val_student`' in card_with(replace(facts, role='student'), EVALUATION, cfg=without)
    merged = {**CFG, 'model': {**CFG['model'], 'inference_only': True}}
    assert '`of_student`' in card_with(facts, student, cfg=merged)


@pytest.mark.parametrize('place', ["exports/x'2", 'exports/a "student"', 'C:\\exports'])
def test_any_place_is_quoted(facts, place):
    code = re.search(r'```python\n(.*?)```', model_card(replace(facts, base=place), CFG, place), re.DOTALL)[1]
    constants = [node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)]
    assert constants.count(place) == 2


def test_transformer_without_a_pipeline(facts):
    card = model_card(replace(facts, class_name='SD3Transformer2DModel', base=None), CFG, WHERE)
    assert 'PiFlowPipelineMixin' in card
    assert '```' not in card
    assert 'base_model' not in card
