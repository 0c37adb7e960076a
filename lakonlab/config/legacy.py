"""What published configs hold that has another name here, or no effect."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

from mmengine.config import Config

from lakonlab.config import schema
from lakonlab.config.errors import ConfigError

logger = logging.getLogger('lakonlab.config')

HOOK_SECTIONS = ('custom_hooks', 'evaluation')
TEST_WORKERS = 'val_workers_per_gpu'


def drop_legacy_keys(cfg: Config, training: bool = True) -> None:
    """Remove keys of the published schema that have no effect here, and give classes their present names.

    What was removed is reported in one line of the log; of what has another name, each in a line.

    Args:
        cfg: The config, changed in place.
        training: Whether it is going to be trained.

    Raises:
        ConfigError: An older key contradicts the present one, or asks for what cannot be had.
    """
    _move_test_workers(cfg, training)
    _refuse_samplers(cfg)
    _refuse_other_inception(cfg)
    dropped = []
    for dotted, reason in schema.LEGACY_KEYS.items():
        *sections, key = dotted.split('.')
        node: Any = cfg
        for section in sections:
            node = node.get(section) if isinstance(node, (Config, Mapping)) else None
        if isinstance(node, (Config, Mapping)) and key in node:
            if node[key] is not None:
                dropped.append(f'{dotted} ({reason})')
            node.pop(key)
    dropped += _drop_legacy_arguments(cfg)
    dropped += _drop_empty_keys(cfg)
    dropped += _drop_by_type(cfg)
    if dropped:
        logger.info('config: without effect here: %s', '; '.join(dropped))
    _rename_types(cfg)
    _place_older_guidance(cfg)
    _report_older_names(cfg)


def _refuse_other_inception(cfg: Config) -> None:
    """Refuse ``inception_args`` that ask for another network than the one that is used without them."""
    for section, entry in _entries(cfg):
        wanted = entry.get('inception_args')
        if entry.get('type') != 'InceptionMetrics' or wanted is None:
            continue
        named = dict(wanted) if isinstance(wanted, Mapping) else {'inception_args': wanted}
        kind = named.pop('type', schema.INCEPTION_TYPE)
        path = str(named.pop('inception_path', schema.INCEPTION_FILE))
        if named or kind != schema.INCEPTION_TYPE or not path.rsplit('/', 1)[-1].startswith(schema.INCEPTION_FILE):
            raise ConfigError(
                f'{section}.inception_args: found {wanted!r}, but InceptionMetrics measures in the features of '
                f'{schema.INCEPTION_FILE} (type={schema.INCEPTION_TYPE!r}); leave it out, and name another network by '
                "extractor, or a file of this one's weights by extractor=dict(type='InceptionV3', weights=...)"
            )


def _refuse_samplers(cfg: Config) -> None:
    """Remove ``sampler=None`` of loaders, and refuse any other."""
    for dotted in schema.LOADER_SECTIONS:
        node: Any = cfg
        for section in dotted.split('.'):
            node = node.get(section) if isinstance(node, (Config, Mapping)) else None
        if not isinstance(node, Mapping) or 'sampler' not in node:
            continue
        found = node.pop('sampler')
        if found is not None:
            raise ConfigError(
                f'{dotted}.sampler: found {found!r}, expected none: the order of the data is a function of the seed, '
                'so that a run can be gone on with anywhere; remove it'
            )


def _report_older_names(cfg: Config) -> None:
    train_cfg = cfg.get('train_cfg')
    if not isinstance(train_cfg, Mapping):
        return
    for old, new in schema.OLDER_TRAIN_KEYS.items():
        if train_cfg.get(old) is None:
            continue
        node: Any = train_cfg
        for key in new.split('.'):
            node = node.get(key) if isinstance(node, Mapping) else None
        if node is not None and node != train_cfg[old]:
            raise ConfigError(
                f'train_cfg.{old}: found {train_cfg[old]!r}, but train_cfg.{new} is {node!r}; the first is an older '
                'name of the second: remove it'
            )
        logger.info('config: train_cfg.%s is the older name of train_cfg.%s', old, new)


def _move_test_workers(cfg: Config, training: bool) -> None:
    """``data.val_workers_per_gpu`` is for loaders of tools/test.py."""
    data = cfg.get('data')
    workers = data.get(TEST_WORKERS) if isinstance(data, Mapping) else None
    if workers is None:
        return
    del data[TEST_WORKERS]
    if training:
        logger.info('config: data.%s is for tools/test.py', TEST_WORKERS)
        return
    loader = data.get('test_dataloader') or {}
    data['test_dataloader'] = {'workers_per_gpu': workers, **loader}
    logger.info('config: data.%s is the older name of data.test_dataloader.workers_per_gpu', TEST_WORKERS)


def _drop_empty_keys(cfg: Config) -> list[str]:
    """Arguments that say what is the case here anyway; those that ask for something are left, to be refused."""
    dropped = []
    for dotted, reason in schema.EMPTY_KEYS.items():
        section, key = dotted.split('.')
        node = cfg.get(section)
        if isinstance(node, Mapping) and key in node and not node[key]:
            node.pop(key)
            dropped.append(f'{dotted} ({reason})')
    return dropped


def _drop_by_type(cfg: Config) -> list[str]:
    """Keys that some kinds of students do not read."""
    model = cfg.get('model')
    student = model.get('diffusion') if isinstance(model, Mapping) else None
    if not isinstance(student, Mapping):
        return []
    dropped = []
    for kind, keys in schema.UNREAD_BY.items():
        if kind not in (student.get('type'), student.get('policy_type')):
            continue
        for dotted, reason in keys.items():
            section, key = dotted.split('.')
            node = cfg.get(section)
            if isinstance(node, Mapping) and key in node:
                node.pop(key)
                dropped.append(f'{dotted} ({reason})')
    return dropped


def _entries(cfg: Config) -> Iterator[tuple[str, Any]]:
    """Section name and entry of all hooks, and of the metrics in them, that are given as dicts."""
    for section in HOOK_SECTIONS:
        entries = cfg.get(section)
        for entry in entries if isinstance(entries, (list, tuple)) else ():
            if isinstance(entry, Mapping):
                yield section, entry
                metrics = entry.get('metrics')
                for metric in metrics if isinstance(metrics, (list, tuple)) else (metrics,):
                    if isinstance(metric, Mapping):
                        yield f'{section}.metrics', metric
    hooks = (cfg.get('log_config') or {}).get('hooks')
    for entry in hooks if isinstance(hooks, (list, tuple)) else ():
        if isinstance(entry, Mapping):
            yield 'log_config.hooks', entry


def _drop_legacy_arguments(cfg: Config) -> list[str]:
    """Remove arguments of hooks and metrics; every key is reported once, however many entries have it."""
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
    present = train_cfg.get('teacher_test_cfg') or {}
    if 'orthogonal_guidance' in present:
        return
    if test_cfg.get('orthogonal_guidance') and 'orthogonal_guidance_axis' not in test_cfg:
        test_cfg['orthogonal_guidance_axis'] = 'velocity'
        logger.info(
            "config: test_cfg.orthogonal_guidance is that of 0.1.1 and before: orthogonal_guidance_axis='velocity'"
        )
