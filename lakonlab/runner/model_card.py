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
    is_class_conditional: bool
    """Whether it is asked for classes, and is a network of its own."""
    origin: str
    """The checkpoint."""
    licence: str
    """Identifier of its licence."""
    results: Path
    """Evaluations of the run, if there are any."""
    model_sha256: str | None = None
    """Digest of the checkpoint's model, by which evaluations say what they are of; None if it is not known."""
    fingerprint: str | None = None
    """Of the config, as evaluations have it."""


def model_card(facts: CardFacts, cfg: Mapping[str, Any], where: str) -> str:
    """The text of a card.

    Args:
        facts: What is exported.
        cfg: Config of the run.
        where: The folder that is exported.
    """
    base = [f'base_model: {facts.base}'] if facts.base and re.fullmatch(r'[\w.-]+/[\w.-]+', facts.base) else []
    header = ['---', f'license: {facts.licence}', 'library_name: diffusers', *base, 'tags:', '- pi-flow', '---']
    sections = [
        f'# {facts.name}',
        f'A few-step student of {facts.base or "its teacher"}, distilled with pi-Flow: its network answers with a '
        f'{facts.policy["type"]} policy, which is followed without calling the network again.',
        '## Use',
        usage(facts, cfg, where),
        '## Recipe',
        _table({'sampling': 'value', **_sampling(facts)}),
        _table({'training': 'value', **_training(facts, cfg)}),
        *_metrics(facts, cfg),
    ]
    return '\n'.join(header) + '\n\n' + '\n\n'.join(sections) + '\n'


def usage(facts: CardFacts, cfg: Mapping[str, Any], where: str) -> str:
    """Six lines of Python that generate an image, and two more where an autoencoder is loaded."""
    if facts.is_class_conditional:
        return _usage_of_classes(cfg['model'].get('vae'), where)
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
        f"pipe = {name}.from_pretrained({base!r}, dtype=torch.bfloat16).to('cuda')",
        f'pipe.load_piflow_adapter({where!r})',
        "image = pipe('a photo of a brown bear', height=1024, width=1024).images[0]",
        "image.save('image.png')",
    ]
    return _python(lines)


def _usage_of_classes(vae: Mapping[str, Any] | None, where: str) -> str:
    lines = ['import torch', 'from lakonlab.pipelines.pidit_pipeline import PiDiTPipeline']
    arguments = repr(where)
    if vae is not None:
        options = {'subfolder': vae['subfolder']} if vae.get('subfolder') else {}
        name = ', '.join([repr(vae.get('model_name_or_path') or vae.get('from_pretrained')), *_keywords(options)])
        lines += ['from diffusers import AutoencoderKL', f'vae = AutoencoderKL.from_pretrained({name})']
        arguments += ', vae=vae'
    lines += [
        f'pipe = PiDiTPipeline.from_pretrained({arguments})',
        'generator = torch.Generator().manual_seed(0)',
        'image = pipe(3, generator=generator).images[0]  # of class 3',
        "image.save('image.png')",
    ]
    return _python(lines)


def _keywords(options: Mapping[str, Any]) -> list[str]:
    return [f'{name}={value!r}' for name, value in options.items()]


def _python(lines: list[str]) -> str:
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


def _metrics(facts: CardFacts, cfg: Mapping[str, Any]) -> list[str]:
    """Numbers of the run's own evaluations, if they are of the weights that are exported."""
    if facts.model_sha256 is None or not facts.results.is_file():
        return []
    content = json.loads(facts.results.read_text(encoding='utf-8'))
    if content.get('model_sha256') != facts.model_sha256:
        return []
    sections = []
    for evaluation in content.get('evaluations') or ():
        values = evaluation.get('metrics') or {}
        if values and evaluation.get('generated') and _role_of(evaluation, cfg['model']) == facts.role:
            rows = {name: f'{v:.4g}' if isinstance(v, float) else v for name, v in values.items()}
            sections.append(
                '\n\n'.join([_conditions(evaluation), _table({'metric': 'value', **rows}), *_protocols(evaluation)])
            )
    if sections and content.get('fingerprint') != facts.fingerprint:
        sections.insert(0, 'Measured under a config whose model, sampling or data differ from those of this export.')
    return ['## Metrics', *sections] if sections else []


def _role_of(evaluation: Mapping[str, Any], model: Mapping[str, Any]) -> str:
    """Whose samples were measured."""
    has_average = bool(model.get('diffusion_use_ema'))
    role = (evaluation.get('sample_kwargs') or {}).get('role')
    if role is None or (role == 'student' and has_average and model.get('inference_only')):
        return 'ema' if has_average else 'student'  # a model for inference only has no student beside its average
    return role


#: What an evaluation says of all its metrics.
CONDITIONS = ('num_samples', 'nfe', 'sampling_seed', 'quantize', 'image_sizes')


def _conditions(evaluation: Mapping[str, Any]) -> str:
    name = evaluation.get('name') or evaluation['data']
    overridden = (evaluation.get('sample_kwargs') or {}).get('test_cfg_override') or {}
    known = {key: evaluation[key] for key in CONDITIONS if evaluation.get(key) is not None}
    return f'`{name}`: {_listed({**known, **overridden})}'


def _protocols(evaluation: Mapping[str, Any]) -> list[str]:
    """How each metric is measured, without what all say alike."""
    lines = []
    for metric, protocol in (evaluation.get('protocol') or {}).items():
        said = {'numbers', *(key for key in CONDITIONS if protocol.get(key) == evaluation.get(key))}
        own = {key: value for key, value in protocol.items() if key not in said}
        lines.append(f'* {metric}: {_listed(own)}' if own else f'* {metric}')
    reference = evaluation.get('reference_kwargs')
    if reference:
        lines.append(f'* reference samples: {_listed(reference)}')
    return ['\n'.join(lines)] if lines else []


def _listed(values: Mapping[str, Any]) -> str:
    return ', '.join(
        f'{name} ({_listed(value)})' if isinstance(value, Mapping) else f'{name} {value}'
        for name, value in values.items()
        if value is not None and value != {}
    )


def _table(rows: Mapping[str, Any]) -> str:
    head, *body = rows.items()
    lines = [f'| {head[0]} | {head[1]} |', '|---|---|']
    return '\n'.join([*lines, *(f'| {name} | {value} |' for name, value in body)])
