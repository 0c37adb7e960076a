"""Writes a trained student as a folder that the pipelines load: ``tools/export_piflow_to_diffusers.py``."""

from __future__ import annotations

import logging
from argparse import Namespace
from pathlib import Path
from typing import NamedTuple

import torch
from mmengine.config import Config
from torch import Tensor

from lakonlab.config.check import check_config
from lakonlab.config.errors import ConfigError
from lakonlab.config.load import load_config
from lakonlab.config.options import parse_options
from lakonlab.pipelines.adapter_files import weights_name
from lakonlab.runner.adapter_folder import PIFLOW_SCHEDULER, describe_adapter, has_policy
from lakonlab.runner.checkpoint_tools import in_precision
from lakonlab.runner.model_card import CARD_FILE
from lakonlab.runner.paths import settle_work_dir
from lakonlab.runner.testing import find_weights, fingerprint
from lakonlab.storage.adapter_layout import published_tensors
from lakonlab.storage.checkpoint import CheckpointError, content_digest, load_model_state, read_manifest
from lakonlab.storage.published_checkpoint import read_published_checkpoint

logger = logging.getLogger(__name__)

ROLES = {'ema': 'diffusion_ema', 'student': 'diffusion'}
DTYPES = ('float32', 'float16', 'bfloat16')


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
    logger.info('wrote %s; its %s says how to generate with it', out, CARD_FILE)
    return 0


def export_adapter(
    cfg: Config,
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

    if not has_policy(cfg):
        raise ConfigError('model.diffusion.policy_type is not set: this is no config of a pi-Flow student')
    weights = _weights(cfg, checkpoint)
    folder = describe_adapter(
        cfg,
        role=role,
        step=weights.step,
        origin=weights.origin,
        licence=licence,
        model_sha256=weights.model_sha256,
        fingerprint=fingerprint(cfg),
    )
    prefix = f'{ROLES[role]}.denoising.'
    tensors = published_tensors(weights.state, prefix, folder.lora_factor)
    if not tensors:
        roles = sorted({name.partition('.')[0] for name in weights.state})
        advice = '; the student itself is exported with --non-ema' if role == 'ema' and 'diffusion' in roles else ''
        raise CheckpointError(f'{weights.origin} holds no {prefix.removesuffix(".")}, only {", ".join(roles)}{advice}')
    if dtype is not None:
        tensors = in_precision(tensors, getattr(torch, dtype))
    (out / PIFLOW_SCHEDULER).unlink(missing_ok=True)  # of an export before, of another policy
    card, card_at = folder.card
    out.mkdir(parents=True, exist_ok=True)
    metadata = {'format': 'pt', **folder.metadata}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out / weights_name(), metadata)
    for name, text in {**folder.texts, card: card_at(str(out))}.items():
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text(text, encoding='utf-8')
    return out


class _Weights(NamedTuple):
    """What there is to export."""

    state: dict[str, Tensor]
    """Tensors of the model."""
    origin: str
    """Name of the checkpoint."""
    step: int
    """Iterations."""
    model_sha256: str | None
    """See ``content_digest``; None for published checkpoints."""


def _weights(cfg: Config, checkpoint: str | None) -> _Weights:
    if checkpoint is not None and Path(checkpoint).is_file():
        published = read_published_checkpoint(checkpoint, with_optimizers=False)
        return _Weights(published.model, str(checkpoint), published.iteration, None)
    found = find_weights(cfg, checkpoint).checkpoint
    if found is None:
        raise CheckpointError('there is no checkpoint to export: train first, or name one with --ckpt')
    digest = content_digest(found, 'model')
    return _Weights(load_model_state(found), found.name, int(read_manifest(found)['step']), digest)
