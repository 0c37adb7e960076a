"""What an evaluation would do, without doing it: nothing is sampled, loaded or written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmengine.config import Config

from lakonlab.config.errors import ConfigError
from lakonlab.config.load import resolved_text
from lakonlab.evaluation.entries import entry_name, metric_configs, prefixed
from lakonlab.runner.data_plan import planned_data_problems, used_splits
from lakonlab.runner.dry_run import MISSING, build_on_meta, cannot_start, parameter_table, pretrained_files, title
from lakonlab.runner.testing import find_weights
from lakonlab.storage.checkpoint import CheckpointError
from lakonlab.storage.errors import StorageError
from lakonlab.storage.paths import as_local, is_remote


def evaluation_plan(cfg: Config, checkpoint: str | None = None, splits: Sequence[str] | None = None) -> str:
    """Describe the evaluations that a checked config would make.

    Args:
        cfg: The config, with ``work_dir``.
        checkpoint: Named on the command line.
        splits: Only entries of these data splits; None for all.

    Returns:
        The description; its last line says so if weights that are needed are missing.
    """
    files = pretrained_files(cfg)
    missing = [key for key, found in files.items() if found.startswith(MISSING)]
    try:
        weights = find_weights(cfg, checkpoint)
        origin = f'{weights.checkpoint or "those the model is built with"} ({weights.reason})'
    except (CheckpointError, ConfigError, StorageError) as error:
        origin = f'{MISSING}: {error}'
        missing.append('a checkpoint')
    entries = [entry for entry in cfg.evaluation if splits is None or entry.get('data', 'val') in splits]
    lines = [
        title('config'),
        resolved_text(cfg).rstrip(),
        title('parameters'),
        parameter_table(build_on_meta(cfg, locate=False)),
        title('weights'),
        f'  {origin}',
        *(f'  {key}\n{" " * 18}{found}' for key, found in files.items()),
        title('evaluations'),
        *(line for entry in entries for line in _describe(entry, cfg)),
        f'  results         {cfg.work_dir}/results.json{_copied(cfg)}',
    ]
    references = list(dict.fromkeys(path for entry in entries for path in _missing_references(entry)))
    problems = planned_data_problems(cfg, splits or used_splits(cfg, training=False))
    lines += [f'  data            {MISSING}: {problem}' for problem in problems]
    lines += cannot_start('evaluation', missing, problems, references)
    return '\n'.join(lines)


def _copied(cfg: Config) -> str:
    mirror = cfg.get('work_dir_mirror')
    return f', copied to {mirror}' if mirror else ''


def _describe(entry: Mapping[str, Any], cfg: Config) -> list[str]:
    split = entry.get('data', 'val')
    metrics = metric_configs(entry.get('metrics'))
    names = ', '.join(prefixed(metric.get('prefix') or '', metric['type']) for metric in metrics)
    settings = {**(cfg.get('test_cfg') or {}), **((entry.get('sample_kwargs') or {}).get('test_cfg_override') or {})}
    return [
        f'  {entry_name(split, entry.get("prefix"))}',
        f'    data          {cfg.data[split]["type"]}, split {split!r}',
        f'    sampling      {", ".join(f"{key}={value!r}" for key, value in settings.items()) or "defaults"}',
        f'    metrics       {names or "none"}',
        *(f'    reference     {path}{_found(path)}' for path in _references(entry)),
    ]


def _references(entry: Mapping[str, Any]) -> list[str]:
    """Files of reference statistics that the metrics of an entry name."""
    metrics = metric_configs(entry.get('metrics'))
    named = [metric.get(key) for metric in metrics for key in ('reference', 'reference_pkl')]
    return list(dict.fromkeys(path for path in named if isinstance(path, str)))


def _missing_references(entry: Mapping[str, Any]) -> list[str]:
    """Those that are not there; remote ones are not looked for."""
    return [path for path in _references(entry) if not is_remote(path) and not as_local(path).is_file()]


def _found(path: str) -> str:
    return '' if is_remote(path) or as_local(path).is_file() else f', {MISSING}'
