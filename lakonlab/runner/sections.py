"""Parts of a run from sections of a config."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mmengine.config import Config

from lakonlab.mmengine_parts import Hook
from lakonlab.registry import HOOKS


def training_loader_options(data: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the training loader in the section ``data`` of a config.

    Args:
        data: Data sets, loader arguments, and ``train_dataloader`` with arguments for training only.

    Raises:
        ValueError: No batch size is given.
    """
    options = {key: value for key, value in data.items() if not re.fullmatch(r'(train|val|test)\d*(_.*)?', key)}
    options.update(data.get('train_dataloader') or {})
    if 'samples_per_gpu' not in options:
        raise ValueError('data.train_dataloader.samples_per_gpu is not set: it is the batch size of one process')
    return options


def saves_trainable_only(cfg: Mapping[str, Any]) -> bool:
    """Whether checkpoints leave out the frozen parameters of trained modules (``runner.ckpt_trainable_only``).

    Args:
        cfg: The config.
    """
    return bool((cfg.get('runner') or {}).get('ckpt_trainable_only', True))


def build_hooks(cfg: Config, validate: bool = True) -> list[Hook]:
    """The hooks of the sections ``custom_hooks``, ``evaluation`` and ``checkpoint_config``.

    Args:
        cfg: The config.
        validate: Whether to include ``evaluation``.
    """
    entries = [dict(entry) for entry in cfg.get('custom_hooks') or ()]
    if validate:
        entries += [{'priority': 'LOW', **entry} for entry in cfg.get('evaluation') or ()]
    if cfg.get('checkpoint_config'):
        entries.append({'type': 'CheckpointHook', **cfg.checkpoint_config})
    hooks = []
    for entry in entries:
        priority = entry.pop('priority', None)
        hook = HOOKS.build(entry)
        if priority is not None:
            hook.priority = priority
        hooks.append(hook)
    return hooks
