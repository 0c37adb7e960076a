"""The model card of an exported adapter."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lakonlab.pipelines.recipe import Recipe

CARD_FILE = 'README.md'
#: Transformer of diffusers -> module and class of the pipeline that loads adapters of it.
PIPELINES = {
    'QwenImageTransformer2DModel': ('lakonlab.pipelines.piqwen_pipeline', 'PiQwenImagePipeline'),
    'FluxTransformer2DModel': ('lakonlab.pipelines.piflux_pipeline', 'PiFluxPipeline'),
    'Flux2Transformer2DModel': ('lakonlab.pipelines.pipeline_piflux2', 'PiFlux2Pipeline'),
}


@dataclass(frozen=True)
class CardFacts:
    """What a card says."""

    name: str
    """Of the run."""
    class_name: str
    """``_class_name`` of the adapter's config."""
    policy: Mapping[str, Any]
    """Type and arguments of the policy."""
    recipe: Recipe
    """How the student is sampled."""
    base: str | None
    """Repository or folder of the pipeline it belongs to."""
    role: str
    """``'ema'`` or ``'student'``."""
    step: int
    """Iterations it was trained for."""
    origin: str
    """The checkpoint."""
    licence: str
    """Identifier of its licence."""
    where: str
    """The folder that is exported."""
    results: Path
    """Evaluations of the run, if there are any."""


def model_card(facts: CardFacts, cfg: Mapping[str, Any]) -> str:
    """The text of a card.

    Args:
        facts: What is exported.
        cfg: Config of the run.
    """
    base = [f'base_model: {facts.base}'] if facts.base and re.fullmatch(r'[\w.-]+/[\w.-]+', facts.base) else []
    header = ['---', f'license: {facts.licence}', 'library_name: diffusers', *base, 'tags:', '- pi-flow', '---']
    sections = [
        f'# {facts.name}',
        f'A few-step student of {facts.base or "its teacher"}, distilled with pi-Flow: its network answers with a '
        f'{facts.policy["type"]} policy, which is followed without calling the network again.',
        '## Use',
        usage(facts),
        '## Recipe',
        _table({'sampling': 'value', **_sampling(facts)}),
        _table({'training': 'value', **_training(facts, cfg)}),
        *_metrics(facts),
    ]
    return '\n'.join(header) + '\n\n' + '\n\n'.join(sections) + '\n'


def usage(facts: CardFacts) -> str:
    """Six lines of Python that generate an image."""
    transformer = re.sub('^(GM|DX)', '', facts.class_name)
    if transformer not in PIPELINES:
        return (
            f'`{facts.class_name}` belongs to no pipeline that LakonLab ships. A pipeline of diffusers whose '
            'transformer it is loads it as a subclass: `class MyPipeline(PiFlowPipelineMixin, ThePipeline): ...`, with '
            '`PiFlowPipelineMixin` of `lakonlab.pipelines.piflow_mixin`.'
        )
    module, name = PIPELINES[transformer]
    base = facts.base or 'REPOSITORY_OF_THE_BASE'
    lines = [
        'import torch',
        f'from {module} import {name}',
        f"pipe = {name}.from_pretrained('{base}', torch_dtype=torch.bfloat16).to('cuda')",
        f"pipe.load_piflow_adapter('{facts.where}')",
        "image = pipe('a photo of a brown bear', height=1024, width=1024).images[0]",
        "image.save('image.png')",
    ]
    return '```python\n' + '\n'.join(lines) + '\n```'


def _sampling(facts: CardFacts) -> dict[str, Any]:
    recipe, policy = facts.recipe, dict(facts.policy)
    rows = {
        'policy': policy.pop('type'),
        **{f'policy: {name}': value for name, value in policy.items()},
        'network evaluations': recipe.nfe,
        'shift of the schedule': 'dynamic' if recipe.shift is None else recipe.shift,
        'length of the last step relative to the others': recipe.final_step_size_scale,
        'substeps of the policy': recipe.total_substeps,
        'temperature': recipe.temperature,
        'embedded guidance scale': recipe.guidance_scale,
    }
    return {name: value for name, value in rows.items() if value is not None}


def _training(facts: CardFacts, cfg: Mapping[str, Any]) -> dict[str, Any]:
    model = cfg['model']
    teacher = ((model.get('teacher') or {}).get('denoising') or {}).get('pretrained')
    guidance = ((cfg.get('train_cfg') or {}).get('teacher_test_cfg') or {}).get('guidance_scale')
    denoising = model['diffusion']['denoising']
    rows = {
        'trainer': model['diffusion'].get('type'),
        'teacher': teacher,
        'guidance scale of the teacher': guidance,
        'iterations': facts.step,
        'weights': {'ema': 'moving average', 'student': 'last'}[facts.role],
        'checkpoint': facts.origin,
        'rank of the adapter': denoising.get('lora_rank', 16) if denoising.get('use_lora') else None,
    }
    return {name: value for name, value in rows.items() if value is not None}


def _metrics(facts: CardFacts) -> list[str]:
    """Numbers of the run's own evaluations, if they are of the checkpoint that is exported."""
    if not facts.results.is_file():
        return []
    content = json.loads(facts.results.read_text(encoding='utf-8'))
    if content.get('iteration') != facts.step:
        return []
    sections = []
    for evaluation in content.get('evaluations') or ():
        values = evaluation.get('metrics') or {}
        if values:
            protocol = {key: evaluation[key] for key in ('data', 'prefix', 'num_samples', 'nfe') if key in evaluation}
            described = ', '.join(f'{key} {value}' for key, value in protocol.items())
            rows = {name: f'{v:.4g}' if isinstance(v, float) else v for name, v in values.items()}
            sections.append(f'Measured with: {described}.\n\n' + _table({'metric': 'value', **rows}))
    return ['## Metrics', *sections] if sections else []


def _table(rows: Mapping[str, Any]) -> str:
    head, *body = rows.items()
    lines = [f'| {head[0]} | {head[1]} |', '|---|---|']
    return '\n'.join([*lines, *(f'| {name} | {value} |' for name, value in body)])
