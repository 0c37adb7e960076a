"""What published configs hold that has another name here, or no effect."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

from mmengine.config import Config

from lakonlab.config import schema

logger = logging.getLogger('lakonlab.config')

HOOK_SECTIONS = ('custom_hooks', 'evaluation')


def drop_legacy_keys(cfg: Config) -> None:
    """Remove keys of the published schema that have no effect here, and give classes their present names.

    What was removed is reported in one line of the log; of what has another name, each in a line.

    Args:
        cfg: The config, changed in place.
    """
    dropped = []
    for dotted, reason in schema.LEGACY_KEYS.items():
        *sections, key = dotted.split('.')
        node: Any = cfg
        for section in sections:
            node = node.get(section) if isinstance(node, (Config, Mapping)) else None
        if isinstance(node, (Config, Mapping)) and key in node:
            if node[key]:
                dropped.append(f'{dotted} ({reason})')
            node.pop(key)
    dropped += _drop_legacy_arguments(cfg)
    if dropped:
        logger.info('config: without effect here: %s', '; '.join(dropped))
    _rename_types(cfg)
    _place_older_guidance(cfg)
    train_cfg = cfg.get('train_cfg')
    for old, new in schema.OLDER_TRAIN_KEYS.items():
        if isinstance(train_cfg, Mapping) and train_cfg.get(old) is not None:
            logger.info('config: train_cfg.%s is the older name of train_cfg.%s', old, new)


def _entries(cfg: Config) -> Iterator[tuple[str, Any]]:
    """Section name and entry of all hooks that are given as dicts."""
    for section in HOOK_SECTIONS:
        entries = cfg.get(section)
        for entry in entries if isinstance(entries, (list, tuple)) else ():
            if isinstance(entry, Mapping):
                yield section, entry


def _drop_legacy_arguments(cfg: Config) -> list[str]:
    """Remove arguments of hooks; every key is reported once, however many entries have it."""
    dropped = {}
    for section, entry in _entries(cfg):
        for key, reason in schema.LEGACY_ARGUMENTS.get(str(entry.get('type')), {}).items():
            if key in entry:
                entry.pop(key)
                dropped[f'{section}.{key}'] = reason
    return [f'{key} ({reason})' for key, reason in dropped.items()]


def _rename_types(cfg: Config) -> None:
    renamed = set()
    for _, entry in _entries(cfg):
        old = entry.get('type')
        if isinstance(old, str) and old in schema.RENAMED_TYPES:
            entry['type'] = schema.RENAMED_TYPES[old]
            renamed.add(old)
    for old in sorted(renamed):
        logger.info('config: %s is called %s here', old, schema.RENAMED_TYPES[old])


def _place_older_guidance(cfg: Config) -> None:
    """Guide the teacher as files did whose ``test_cfg`` says how: up to 0.1.1 it was read by the teacher too.

    ``test_cfg`` still is what the teacher starts from; only ``orthogonal_guidance`` meant another axis.
    """
    train_cfg, test_cfg = cfg.get('train_cfg'), cfg.get('test_cfg')
    if not isinstance(train_cfg, Mapping) or not isinstance(test_cfg, Mapping):
        return
    if train_cfg.get('teacher_guidance_scale') is None:
        return
    for key in schema.OLDER_TEACHER_KEYS:
        if test_cfg.get(key):
            logger.info(
                'config: test_cfg.%s guides the teacher too; train_cfg.teacher_test_cfg.%s would alone', key, key
            )
    if test_cfg.get('orthogonal_guidance') and 'orthogonal_guidance_axis' not in test_cfg:
        test_cfg['orthogonal_guidance_axis'] = 'velocity'
        logger.info(
            "config: test_cfg.orthogonal_guidance is that of 0.1.1 and before: orthogonal_guidance_axis='velocity'"
        )
