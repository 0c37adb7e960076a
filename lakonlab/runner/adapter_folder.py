"""What the folder of an exported adapter says beside its weights, by the config of the run that trained it."""

from __future__ import annotations

import inspect
import json
import logging
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from lakonlab.models.architecture.adapters import POLICY_KEY
from lakonlab.pipelines.adapter_files import CONFIG_FILE
from lakonlab.pipelines.recipe import RECIPE_KEY, Recipe
from lakonlab.registry import MODULES
from lakonlab.runner.model_card import CARD_FILE, CardFacts, model_card

logger = logging.getLogger(__name__)

SCHEDULER = 'scheduler/scheduler_config.json'
#: Of diffusers' own scheduler for DX policies.
PIFLOW_SCHEDULER = 'piflow_scheduler/scheduler_config.json'
SAME = 1e-6
PUBLISHED_MLP_RATIO = 4.0
#: Number of timesteps of diffusers' flow pipelines.
NUM_TRAIN_TIMESTEPS = 1000
#: Classes whose arguments say how a network is trained and run, not what it is.
GENERIC = ('DiffusersTransformer', 'Network')


class AdapterFolder(NamedTuple):
    """Content of a folder; the fields are arguments of ``add_inference_weights``."""

    metadata: dict[str, str]
    """Of the file with the weights."""
    texts: dict[str, str]
    """Name -> content of the files whose content does not depend on where they are."""
    card: tuple[str, Callable[[str], str]]
    """Name of the model card, and what makes its content from the place of the folder; it can be pickled."""
    lora_factor: float
    """See :func:`~lakonlab.storage.adapter_layout.published_tensors`."""


def describe_adapter(
    cfg: Mapping[str, Any],
    *,
    role: str,
    step: int,
    origin: str,
    licence: str = 'other',
    model_sha256: str | None = None,
    fingerprint: str | None = None,
) -> AdapterFolder:
    """What makes an adapter of the weights of a student.

    Args:
        cfg: The config, of a student with a policy.
        role: ``'ema'`` or ``'student'``.
        step: Iterations it was trained for.
        origin: What its checkpoint is called.
        licence: For the model card, an identifier of the Hugging Face hub.
        model_sha256: Digest of the checkpoint's model; None if it is not known, then no evaluation can be of it.
        fingerprint: Of the config, see :func:`lakonlab.runner.testing.fingerprint`.
    """
    denoising = cfg['model']['diffusion']['denoising']
    recipe, policy, config = recipe_of(cfg), policy_of(cfg), adapter_config(denoising)
    texts = {CONFIG_FILE: json.dumps(config, indent=2) + '\n', SCHEDULER: _scheduler(recipe)}
    num_points = (denoising.get('head') or denoising).get('n_grid')
    if policy['type'] == 'DX' and num_points is not None:
        theirs = piflow_scheduler(recipe, policy, num_points)
        if theirs is not None:
            texts[PIFLOW_SCHEDULER] = theirs
    facts = CardFacts(
        name=str(cfg.get('name') or Path(cfg.get('work_dir') or 'student').name),
        class_name=config['_class_name'],
        policy=policy,
        recipe=recipe,
        base=base_of(cfg),
        role=role,
        step=step,
        origin=origin,
        licence=licence,
        model_sha256=model_sha256,
        fingerprint=fingerprint,
        is_class_conditional=is_class_conditional(cfg),
        results=Path(cfg.get('work_dir') or '', 'results.json'),
    )
    plain = cfg.to_dict() if hasattr(cfg, 'to_dict') else dict(cfg)
    sections = {key: plain.get(key) for key in ('model', 'train_cfg', 'test_cfg')}
    metadata = {POLICY_KEY: json.dumps(policy), RECIPE_KEY: recipe.to_json()}
    return AdapterFolder(metadata, texts, (CARD_FILE, partial(model_card, facts, sections)), lora_factor(denoising))


def has_policy(cfg: Mapping[str, Any]) -> bool:
    """Whether a config trains a student that answers with a policy."""
    return bool(((cfg.get('model') or {}).get('diffusion') or {}).get('policy_type'))


def is_class_conditional(cfg: Mapping[str, Any]) -> bool:
    """Whether a config's student is one that :class:`~lakonlab.pipelines.pidit_pipeline.PiDiTPipeline` samples."""
    model = cfg['model']
    return model.get('type') == 'LatentDiffusionClassImage' and model.get('patch_size', 1) == 1


def policy_of(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Type and arguments of a config's policy."""
    diffusion = cfg['model']['diffusion']
    return {**(diffusion.get('policy_kwargs') or {}), 'type': diffusion['policy_type']}


def lora_factor(denoising: Mapping[str, Any]) -> float:
    """What the product of a network's low-rank matrices is multiplied with; readers of exports know only 1."""
    alpha = denoising.get('lora_alpha')
    return 1.0 if alpha is None else alpha / denoising.get('lora_rank', 16)


def recipe_of(cfg: Mapping[str, Any]) -> Recipe:
    """How a config samples its student.

    Args:
        cfg: The config; what ``test_cfg`` leaves open is taken from ``train_cfg``.
    """
    train, test = dict(cfg.get('train_cfg') or {}), dict(cfg.get('test_cfg') or {})
    sampler = cfg['model']['diffusion'].get('timestep_sampler') or {}
    dynamic = test.get('use_dynamic_shifting', sampler.get('use_dynamic_shifting', False))
    values = {
        'nfe': test.get('nfe', train.get('nfe')),
        'shift': None if dynamic else float(test.get('shift') or sampler.get('shift', 1.0)),
        'final_step_size_scale': float(test.get('final_step_size_scale', train.get('final_step_size_scale', 1.0))),
        'total_substeps': int(test.get('total_substeps', train.get('total_substeps', 128))),
        'guidance_scale': test.get('distilled_guidance_scale'),
    }
    if cfg['model']['diffusion']['policy_type'] == 'GMFlow':
        values['temperature'] = float(test.get('temperature', 1.0))
    if is_class_conditional(cfg):
        values.update(
            num_timesteps=cfg['model']['diffusion'].get('num_timesteps', 1000),
            flip_model_timesteps=cfg['model']['diffusion'].get('flip_model_timesteps', False),
        )
    return Recipe(**values)


def adapter_config(denoising: Mapping[str, Any]) -> dict[str, Any]:
    """Content of ``config.json``: the transformer that it is an adapter of, by diffusers' names, and the head.

    Args:
        denoising: Section of the network.
    """
    import diffusers

    kind = MODULES.get(denoising['type'])
    if denoising['type'] == 'DiffusersTransformer':
        arguments = dict(denoising['transformer'])
        constant = (denoising.get('head') or {}).get('constant_logstd')
        if constant is not None:
            arguments['constant_logstd'] = constant
        return _plain({'_class_name': arguments.pop('type'), '_diffusers_version': diffusers.__version__, **arguments})
    known: dict[str, Any] = {}
    for base in reversed(kind.__mro__):
        if '__init__' not in vars(base) or not base.__module__.startswith('lakonlab') or base.__name__ in GENERIC:
            continue
        known.update(
            {
                name: parameter.default
                for name, parameter in inspect.signature(base.__init__).parameters.items()
                if parameter.kind is not parameter.VAR_KEYWORD and name not in ('self', 'head')
            }
        )
    config = {name: denoising.get(name, default) for name, default in known.items()}
    if config.get('mlp_ratio') == PUBLISHED_MLP_RATIO:
        del config['mlp_ratio']  # published networks have no such argument
    if 'logweights_channels' in config and config['logweights_channels'] is None:
        config['logweights_channels'] = config['patch_size'] ** 2
    name = denoising['type']
    if issubclass(kind, MODULES.get('DiffusersTransformer')):
        config.pop('patch_size', None)  # published tokens are cut outside of the transformer
        points = [config.pop(name) for name in ('n_grid', 'p_order') if name in config]
        if points:  # the transformer as it is in diffusers, with a wider output layer
            name = name.removeprefix('DX')
            width = config['in_channels'] if config.get('out_channels') is None else config['out_channels']
            defaults = inspect.signature(getattr(diffusers, name).__init__).parameters
            if 'guidance_embeds' in defaults:
                config.setdefault('guidance_embeds', defaults['guidance_embeds'].default)
            config.update(patch_size=1, out_channels=width * next(n for n in points if n is not None))
    return _plain({'_class_name': name, '_diffusers_version': diffusers.__version__, **config})


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in sorted(config.items())}


def base_of(cfg: Mapping[str, Any]) -> str | None:
    """Repository or folder of the pipeline that a student belongs to; None if the config does not tell."""
    model = cfg['model']
    for part in () if is_class_conditional(cfg) else ('vae', 'text_encoder'):
        named = (model.get(part) or {}).get('model_name_or_path')
        if named:
            return str(named)
    teacher = ((model.get('teacher') or {}).get('denoising') or {}).get('pretrained') or ''
    match = re.match(r'huggingface://([^/]+/[^/@]+)', str(teacher))
    return match[1] if match else None


def _scheduler(recipe: Recipe) -> str:
    from lakonlab.models.diffusions.schedulers.flow_map_sde import FlowMapSDEScheduler

    return FlowMapSDEScheduler(
        num_train_timesteps=NUM_TRAIN_TIMESTEPS,
        shift=recipe.shift or 1.0,
        use_dynamic_shifting=recipe.shift is None,
        final_step_size_scale=recipe.final_step_size_scale,
    ).to_json_string()


def piflow_scheduler(recipe: Recipe, policy: Mapping[str, Any], num_points: int) -> str | None:
    """The config of diffusers' ``PiflowScheduler``, which follows DX policies of one kind.

    It takes the wide output of the transformer, (B, L, N C), and states (B, L, C), and its segments are those between
    its steps.

    Args:
        recipe: How the student is sampled.
        policy: Type and arguments of its policy.
        num_points: ``N`` of the grid.

    Returns:
        The content of its file; None if that scheduler cannot follow this policy.
    """
    from diffusers import PiflowScheduler

    if recipe.shift is None or recipe.nfe is None or num_points < 2 or not 0 < recipe.final_step_size_scale <= 1:
        return None
    length = 1 / (recipe.nfe - 1 + recipe.final_step_size_scale)
    same_segments = abs(policy.get('segment_size', 1.0) - length) < SAME
    if not same_segments or abs(policy.get('shift', 1.0) - recipe.shift) > SAME or policy.get('mode', 'grid') != 'grid':
        logger.info("diffusers' PiflowScheduler cannot follow this policy: its segments or its shift are others")
        return None
    return PiflowScheduler(
        num_train_timesteps=NUM_TRAIN_TIMESTEPS,
        shift=recipe.shift,
        n_grid=num_points,
        final_step_size_scale=recipe.final_step_size_scale,
        num_policy_substeps=recipe.total_substeps,
    ).to_json_string()
