"""Writes a trained student as a folder that the pipelines load: ``tools/export_piflow_to_diffusers.py``."""

from __future__ import annotations

import inspect
import json
import logging
import re
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lakonlab.config.check import check_config
from lakonlab.config.errors import ConfigError
from lakonlab.config.load import load_config
from lakonlab.config.options import parse_options
from lakonlab.models.architecture.adapters import POLICY_KEY
from lakonlab.pipelines.adapter_files import CONFIG_FILE, weights_name
from lakonlab.pipelines.recipe import RECIPE_KEY, Recipe
from lakonlab.registry import MODULES
from lakonlab.runner.checkpoint_tools import in_precision
from lakonlab.runner.model_card import CARD_FILE, CardFacts, model_card
from lakonlab.runner.paths import settle_work_dir
from lakonlab.runner.testing import find_weights
from lakonlab.storage.checkpoint import CheckpointError, load_model_state, read_manifest
from lakonlab.storage.published_checkpoint import read_published_checkpoint

logger = logging.getLogger(__name__)

ROLES = {'ema': 'diffusion_ema', 'student': 'diffusion'}
DTYPES = ('float32', 'float16', 'bfloat16')
SCHEDULER_FOLDER = 'scheduler'
#: Of diffusers' own scheduler for DX policies.
PIFLOW_SCHEDULER_FOLDER = 'piflow_scheduler'
SAME = 1e-6
PUBLISHED_MLP_RATIO = 4.0
UP_MATRIX = '.lora_B.weight'
#: Number of timesteps of diffusers' flow pipelines.
NUM_TRAIN_TIMESTEPS = 1000


def export_command(args: Namespace) -> int:
    """What the tool does after reading its arguments."""
    cfg = load_config(args.config, parse_options(args.cfg_options or ()))
    check_config(cfg)
    cfg.work_dir = str(cfg.get('work_dir') or Path('work_dirs') / cfg.name)
    settle_work_dir(cfg)
    out = export_adapter(
        cfg,
        Path(args.out_dir or f'checkpoints/{cfg.name}/diffusers'),
        checkpoint=args.ckpt,
        role='student' if args.non_ema else 'ema',
        dtype=args.dtype,
        licence=args.license,
    )
    logger.info('wrote %s; load it with pipe.load_piflow_adapter(%r)', out, str(out))
    return 0


def export_adapter(
    cfg: Mapping[str, Any],
    out: Path,
    checkpoint: str | None = None,
    role: str = 'ema',
    dtype: str | None = None,
    licence: str = 'other',
) -> Path:
    """Write a student in the published layout.

    Args:
        cfg: Config of the run.
        out: Folder, made if need be; a present export is replaced.
        checkpoint: A checkpoint of the run, its directory, or a published ``.pth``; None for the newest of the run.
        role: ``'ema'`` or ``'student'``.
        dtype: Of the weights, see :data:`DTYPES`; None for that of the checkpoint.
        licence: For the model card, an identifier of the Hugging Face hub.

    Returns:
        ``out``, with ``config.json``, ``diffusion_pytorch_model.safetensors``, ``scheduler/`` and ``README.md``.

    Raises:
        ConfigError: The config is none of a pi-Flow student.
        CheckpointError: There is no checkpoint, or it does not hold the student.
    """
    from safetensors.torch import save_file

    diffusion = cfg['model'].get('diffusion') or {}
    if not diffusion.get('policy_type'):
        raise ConfigError('model.diffusion.policy_type is not set: this is no config of a pi-Flow student')
    denoising = diffusion['denoising']
    tensors, origin, step = _student_weights(cfg, checkpoint, role)
    tensors = scaled_lora(tensors, denoising)
    if dtype is not None:
        tensors = in_precision(tensors, getattr(torch, dtype))
    recipe, policy = recipe_of(cfg), policy_of(cfg)
    described = describe_adapter(cfg)
    metadata = {'format': 'pt', **described['metadata']}
    out.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out / weights_name(), metadata)
    for name, text in described['texts'].items():
        (out / name).write_text(text, encoding='utf-8')
    _write_scheduler(recipe, out)
    num_points = (denoising.get('head') or denoising).get('n_grid')
    if policy['type'] == 'DX' and num_points is not None:
        write_piflow_scheduler(recipe, policy, num_points, out)
    facts = CardFacts(
        name=str(cfg.get('name') or out.name),
        class_name=adapter_config(denoising)['_class_name'],
        policy=policy,
        recipe=recipe,
        base=base_of(cfg),
        role=role,
        step=step,
        origin=origin,
        licence=licence,
        where=str(out),
        results=Path(cfg.get('work_dir') or '', 'results.json'),
    )
    (out / CARD_FILE).write_text(model_card(facts, cfg), encoding='utf-8')
    return out


def policy_of(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Type and arguments of a config's policy."""
    diffusion = cfg['model']['diffusion']
    return {**(diffusion.get('policy_kwargs') or {}), 'type': diffusion['policy_type']}


def describe_adapter(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """What makes an adapter of the weights of a student: arguments of ``add_inference_weights``.

    Args:
        cfg: The config; of one without a policy nothing is described.
    """
    diffusion = (cfg.get('model') or {}).get('diffusion') or {}
    if not diffusion.get('policy_type'):
        return {}
    return {
        'metadata': {POLICY_KEY: json.dumps(policy_of(cfg)), RECIPE_KEY: recipe_of(cfg).to_json()},
        'texts': {CONFIG_FILE: json.dumps(adapter_config(diffusion['denoising']), indent=2) + '\n'},
        'lora_factor': lora_factor(diffusion['denoising']),
    }


def lora_factor(denoising: Mapping[str, Any]) -> float:
    """What the product of a network's low-rank matrices is multiplied with; readers of exports know only 1."""
    alpha = denoising.get('lora_alpha')
    return 1.0 if alpha is None else alpha / denoising.get('lora_rank', 16)


def _student_weights(cfg: Mapping[str, Any], checkpoint: str | None, role: str) -> tuple[dict[str, Tensor], str, int]:
    """Published name -> tensor of the student, which checkpoint they are of, and its number of iterations."""
    if checkpoint is not None and Path(checkpoint).is_file():
        published = read_published_checkpoint(checkpoint, with_optimizers=False)
        state, origin, step = published.model, str(checkpoint), published.iteration
    else:
        found = find_weights(cfg, checkpoint).checkpoint
        if found is None:
            raise CheckpointError('there is no checkpoint to export: train first, or name one with --ckpt')
        state, origin, step = load_model_state(found), found.name, int(read_manifest(found)['step'])
    prefix = f'{ROLES[role]}.denoising.'
    tensors = {
        re.sub(r'(\.lora_[AB])\.default(?=\.)', r'\1', name.removeprefix(prefix)): tensor
        for name, tensor in state.items()
        if name.startswith(prefix)
    }
    tensors.pop('pos_embed.pos_embed', None)  # a table that published checkpoints hold, which is computed
    if not tensors:
        roles = sorted({name.partition('.')[0] for name in state})
        advice = '; the student itself is exported with --non-ema' if role == 'ema' and 'diffusion' in roles else ''
        raise CheckpointError(f'{origin} holds no {prefix.removesuffix(".")}, only {", ".join(roles)}{advice}')
    return tensors, origin, step


def scaled_lora(tensors: Mapping[str, Tensor], denoising: Mapping[str, Any]) -> dict[str, Tensor]:
    """Matrices whose product is added with a factor of 1, as all readers of the layout expect.

    Args:
        tensors: Published name -> tensor.
        denoising: Section of the network, with ``lora_alpha`` and ``lora_rank``.
    """
    factor = lora_factor(denoising)
    return {name: tensor * factor if name.endswith(UP_MATRIX) else tensor for name, tensor in tensors.items()}


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
    points = [config.pop(name) for name in ('n_grid', 'p_order') if name in config]
    if config.get('mlp_ratio') == PUBLISHED_MLP_RATIO:
        del config['mlp_ratio']  # published networks have no such argument
    if 'logweights_channels' in config and config['logweights_channels'] is None:
        config['logweights_channels'] = config['patch_size'] ** 2
    name = denoising['type']
    if issubclass(kind, MODULES.get('DiffusersTransformer')):
        config.pop('patch_size', None)  # published tokens are cut outside of the transformer
        if points:  # the transformer as it is in diffusers, with a wider output layer
            name = name.removeprefix('DX')
            width = config['in_channels'] if config.get('out_channels') is None else config['out_channels']
            defaults = inspect.signature(getattr(diffusers, name).__init__).parameters
            if 'guidance_embeds' in defaults:
                config.setdefault('guidance_embeds', defaults['guidance_embeds'].default)
            config.update(patch_size=1, out_channels=width * next(n for n in points if n is not None))
    return _plain({'_class_name': name, '_diffusers_version': diffusers.__version__, **config})


#: Classes whose arguments say how a network is trained and run, not what it is.
GENERIC = ('DiffusersTransformer', 'Network')


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in sorted(config.items())}


def base_of(cfg: Mapping[str, Any]) -> str | None:
    """Repository or folder of the pipeline that a student belongs to; None if the config does not tell."""
    model = cfg['model']
    named = (model.get('vae') or {}).get('model_name_or_path') or (model.get('text_encoder') or {}).get(
        'model_name_or_path'
    )
    if named:
        return str(named)
    teacher = ((model.get('teacher') or {}).get('denoising') or {}).get('pretrained') or ''
    match = re.match(r'huggingface://([^/]+/[^/@]+)', str(teacher))
    return match[1] if match else None


def _write_scheduler(recipe: Recipe, out: Path) -> None:
    from lakonlab.models.diffusions.schedulers.flow_map_sde import FlowMapSDEScheduler

    FlowMapSDEScheduler(
        num_train_timesteps=NUM_TRAIN_TIMESTEPS,
        shift=recipe.shift or 1.0,
        use_dynamic_shifting=recipe.shift is None,
        final_step_size_scale=recipe.final_step_size_scale,
    ).save_pretrained(out / SCHEDULER_FOLDER)


def write_piflow_scheduler(recipe: Recipe, policy: Mapping[str, Any], num_points: int, out: Path) -> bool:
    """Write the config of diffusers' ``PiflowScheduler``, which follows DX policies of one kind.

    It takes the wide output of the transformer, (B, L, N C), and states (B, L, C), and its segments are those between
    its steps.

    Args:
        recipe: How the student is sampled.
        policy: Type and arguments of its policy.
        num_points: ``N`` of the grid.
        out: Folder of the export, in which ``piflow_scheduler/`` is written.

    Returns:
        Whether that scheduler can follow this policy.
    """
    from diffusers import PiflowScheduler

    if recipe.shift is None or recipe.nfe is None or num_points < 2 or not 0 < recipe.final_step_size_scale <= 1:
        return False
    length = 1 / (recipe.nfe - 1 + recipe.final_step_size_scale)
    same_segments = abs(policy.get('segment_size', 1.0) - length) < SAME
    if not same_segments or abs(policy.get('shift', 1.0) - recipe.shift) > SAME or policy.get('mode', 'grid') != 'grid':
        logger.info("diffusers' PiflowScheduler cannot follow this policy: its segments or its shift are others")
        return False
    PiflowScheduler(
        num_train_timesteps=NUM_TRAIN_TIMESTEPS,
        shift=recipe.shift,
        n_grid=num_points,
        final_step_size_scale=recipe.final_step_size_scale,
        num_policy_substeps=recipe.total_substeps,
    ).save_pretrained(out / PIFLOW_SCHEDULER_FOLDER)
    return True
