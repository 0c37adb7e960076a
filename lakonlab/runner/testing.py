"""Evaluating a checkpoint: which weights, which entries, and the file of results."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from mmengine.config import Config
from torch import nn

from lakonlab import __version__
from lakonlab.config.errors import ConfigError
from lakonlab.evaluation.circumstances import circumstances
from lakonlab.evaluation.entries import metric_configs
from lakonlab.evaluation.extractor import ExtractorPool
from lakonlab.evaluation.kept_results import changes
from lakonlab.evaluation.results import RESULTS_FILE, run_evaluations, write_results
from lakonlab.registry import MODELS, STRATEGIES
from lakonlab.runner.dry_run import MISSING, pretrained_files
from lakonlab.runner.paths import run_directory
from lakonlab.runner.resume import StartingPoint
from lakonlab.runner.sections import saves_trainable_only
from lakonlab.runner.seeding import make_deterministic, seed_globals
from lakonlab.storage.checkpoint import (
    LATEST_NAMES,
    CheckpointError,
    content_digest,
    find_checkpoint,
    read_manifest,
    require_checkpoint,
)
from lakonlab.storage.local import sha256_of
from lakonlab.storage.paths import is_remote
from lakonlab.storage.remote_path import AnyPath, as_path

logger = logging.getLogger('lakonlab.evaluation')

TIMED_METRICS = ('SamplingSpeed', 'SamplingCost')
"""Metrics of making samples, which images in files say nothing about."""
VERSIONED_PACKAGES = ('torch', 'torchvision', 'numpy', 'mmengine', 'diffusers')


def find_weights(cfg: Mapping[str, Any], checkpoint: str | None, required: bool = True) -> StartingPoint:
    """Choose the weights to evaluate.

    Args:
        cfg: The config.
        checkpoint: Named on the command line; it must exist.
        required: Whether anything is sampled, so that there must be weights.

    Returns:
        The named checkpoint; else the newest of the run itself; else ``resume_from``, else ``load_from`` of the config;
        else none, which leaves the weights that the model is built with: those of ``pretrained``, or of a model that is
        ``inference_only``.

    Raises:
        CheckpointError: What must exist does not, or is damaged; or there are no weights at all.
    """
    if checkpoint is not None:
        return StartingPoint(require_checkpoint(checkpoint), 'weights', 'named by --ckpt')
    out_dir = (cfg.get('checkpoint_config') or {}).get('out_dir')
    run_dir = run_directory(out_dir, cfg['work_dir'], cfg.get('work_dir_mirror'))
    newest = find_checkpoint(run_dir)
    if newest is not None:
        return StartingPoint(newest, 'weights', f'the newest of this run in {run_dir}')
    for key in ('resume_from', 'load_from'):
        named = cfg.get(key)
        if not named:
            continue
        path = as_path(named)
        parent = path.parent if path.name in LATEST_NAMES else path
        if parent.absolute() != run_dir.absolute():
            return StartingPoint(require_checkpoint(named), 'weights', f'{key} of the config')
    looked = (
        f'none is named with --ckpt, {run_dir} holds none, and resume_from and load_from of the config name no other'
    )
    built_with = _built_with(cfg['model'])
    if required and built_with is None:
        raise CheckpointError(
            f'there is no checkpoint to evaluate: {looked}. Train first, name a checkpoint with --ckpt, or set '
            'model.diffusion.denoising.pretrained, or model.inference_only=True for a model that needs none.'
        )
    return StartingPoint(None, 'fresh', looked if built_with is None else f'{looked}; {built_with}')


def _built_with(model: Mapping[str, Any]) -> str | None:
    """Why a model can be evaluated without a checkpoint; None if it cannot."""
    if model.get('inference_only'):
        return 'model.inference_only=True'
    pretrained = ((model.get('diffusion') or {}).get('denoising') or {}).get('pretrained')
    return f'model.diffusion.denoising.pretrained={pretrained!r}' if pretrained else None


def evaluate_checkpoint(
    cfg: Config,
    *,
    checkpoint: str | None = None,
    splits: Sequence[str] | None = None,
    seed: int = 0,
    deterministic: bool = False,
    skip_existing: bool = False,
    timer: bool = False,
    reuse_viz: bool = False,
    command: str = '',
    strategy: Any = None,
) -> dict[str, Any]:
    """Run the evaluations of a checked config and write ``results.json`` into its ``work_dir``.

    Several processes do so together; the main one alone looks at files of results and checkpoints, and writes.

    Args:
        cfg: The config, with ``work_dir``.
        checkpoint: See :func:`find_weights`.
        splits: Only entries of these data splits; results of others stay in the file if they are of the same weights.
            None for all.
        seed: Seed of the initial weights, where none are loaded, of what samplers draw beyond the noise that a data set
            gives each sample, and of the global random state.
        deterministic: Whether to allow deterministic algorithms only.
        skip_existing: Keep results of the same entries, weights and seed from the present file, unless what their
            metrics compare with, or see through, has changed.
        timer: Measure sampling speed in every entry that makes samples.
        reuse_viz: Measure images that an evaluation of the same weights has written, instead of making them again; all
            samples are then measured with 8 bits per channel.
        command: Command line, kept with the results that it made.
        strategy: Processes and devices; None for one process.

    Returns:
        What was written, in every process.

    Raises:
        ConfigError: There is nothing to evaluate.
        CheckpointError: See :func:`find_weights`; or the checkpoint does not fit the model.
        Exception: What failed in any process, in all of them.
    """
    if strategy is None:
        strategy = STRATEGIES.build({'type': 'single', 'trainable_only': saves_trainable_only(cfg)})
    ranks = strategy.ranks
    if deterministic:
        make_deterministic()
    entries = _entries(cfg, splits, timer, reuse_viz)
    if not entries:
        where = '' if splits is None else f' for data {", ".join(splits)}'
        raise ConfigError(f'evaluation has no entry{where}: nothing to evaluate; add a GenerativeEvalHook')
    sampling = any(entry.get('generate', True) for entry in entries)
    weights = ranks.on_main(lambda: _announced(find_weights(cfg, checkpoint, required=sampling)))
    path = Path(cfg.work_dir) / RESULTS_FILE
    origin, present = ranks.on_main(lambda: _origin_and_present(cfg, weights, seed, path))
    finished = ranks.on_main(lambda: _current(entries, present)) if skip_existing else {}
    pending = [entry for entry in entries if _identity(entry) not in finished]
    if len(pending) < len(entries) and ranks.is_main:
        logger.info('%d of %d evaluations are finished in %s and kept', len(entries) - len(pending), len(entries), path)
    fresh: dict[str, dict[str, Any]] = {}
    if pending:
        model = _build(cfg, weights.checkpoint, seed, strategy)
        seed_globals(seed)
        tag = 'default' if weights.checkpoint is None else weights.checkpoint.name
        results = run_evaluations(
            model,
            {**cfg.to_dict(), 'evaluation': pending},
            tag=tag,
            seed=seed,
            ranks=ranks,
            is_divided=strategy.is_sharded,
            origin=origin,
            reuse=reuse_viz,
        )
        made = dict(**circumstances(), command=command, versions=_versions(), strategy=strategy.name)
        for entry, result in zip(pending, results, strict=True):
            fresh[_identity(entry)] = {**result, 'entry': entry, 'made': made}
    results_by_entry = {**finished, **fresh}
    kept = {_identity(entry): results_by_entry[_identity(entry)] for entry in entries}
    if splits is not None:
        kept.update({key: result for key, result in present.items() if result['data'] not in splits})
    order = [_identity(entry) for entry in _entries(cfg, None, timer, reuse_viz)]
    position = {key: number for number, key in enumerate(order)}
    ordered = [kept[key] for key in sorted(kept, key=lambda key: position.get(key, len(order)))]
    facts = dict(
        name=cfg.name,
        config=cfg.filename,
        weights=weights.reason,
        **origin,
    )
    content = ranks.on_main(lambda: write_results(path, ordered, **facts))
    if ranks.is_main:
        logger.info('results are in %s', path)
    return content


def _announced(weights: StartingPoint) -> StartingPoint:
    if weights.checkpoint is None:
        logger.warning(
            'no checkpoint is loaded (%s): evaluating the weights that the model is built with', weights.reason
        )
    else:
        logger.info('evaluating %s (%s)', weights.checkpoint, weights.reason)
    return weights


def _origin_and_present(
    cfg: Config, weights: StartingPoint, seed: int, path: Path
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """What results are of, and the results of the same that are in a file already."""
    origin = {
        'iteration': None if weights.checkpoint is None else int(read_manifest(weights.checkpoint)['step']),
        'checkpoint': None if weights.checkpoint is None else str(weights.checkpoint),
        'model_sha256': None if weights.checkpoint is None else content_digest(weights.checkpoint, 'model'),
        'pretrained': _pretrained_digests(cfg),
        'seed': seed,
        'fingerprint': fingerprint(cfg),
    }
    return origin, _finished(path, origin)


def _current(entries: Sequence[Mapping[str, Any]], present: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Present results of entries that are still those of the files that their metrics read."""
    extractors, current = ExtractorPool(), {}
    for entry in entries:
        result = present.get(_identity(entry))
        if result is None:
            continue
        changed = changes(entry, result, extractors)
        if changed:
            logger.warning('%s is evaluated again: %s', result['name'], '; '.join(changed))
        else:
            current[_identity(entry)] = result
    return current


def _build(cfg: Config, checkpoint: AnyPath | None, seed: int, strategy: Any) -> nn.Module:
    """The model with the weights of a checkpoint, spread over the processes."""
    sections = {key: cfg.get(key) or {} for key in ('train_cfg', 'test_cfg')}

    def build() -> nn.Module:
        seed_globals(seed)
        return MODELS.build({**cfg.model, **sections})

    ranks = strategy.ranks
    built = ranks.together(build)
    model = ranks.together(lambda: strategy.wrap(built), exchanges=True)
    if checkpoint is not None:
        ranks.together(lambda: strategy.load_model_state(model, checkpoint))
    return model.eval()


def _entries(cfg: Config, splits: Sequence[str] | None, timer: bool, reuse_viz: bool) -> list[dict[str, Any]]:
    entries = [
        entry for entry in cfg.to_dict().get('evaluation') or () if splits is None or entry.get('data', 'val') in splits
    ]
    for entry in entries:
        metrics = metric_configs(entry.get('metrics'))
        if timer and entry.get('generate', True) and all(metric['type'] != 'SamplingSpeed' for metric in metrics):
            entry['metrics'] = [*metrics, {'type': 'SamplingSpeed'}]
        if reuse_viz:  # what is read from files has 8 bits per channel and takes no time to sample
            entry['metrics'] = [metric for metric in metrics if metric['type'] not in TIMED_METRICS]
            entry['quantize'] = 'uint8'
    return entries


def _identity(entry: Mapping[str, Any]) -> str:
    """An entry as text, the same before and after it went through a file."""
    return json.dumps(entry, sort_keys=True, default=str)


def fingerprint(cfg: Config) -> str:
    """Digest of the sections that decide what is sampled, and from what data."""
    values = cfg.to_dict()
    text = json.dumps(
        [values.get(key) for key in ('model', 'train_cfg', 'test_cfg', 'data')], sort_keys=True, default=str
    )
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _pretrained_digests(cfg: Config) -> dict[str, str | None]:
    """Dotted key of each ``pretrained`` -> digest of what it names, or its URL; None if it cannot be found."""
    digests: dict[str, str | None] = {}
    for key, found in pretrained_files(cfg).items():
        if found.startswith(MISSING):
            digests[key] = None
        elif is_remote(found):
            digests[key] = found
        else:
            path = Path(found)
            digests[key] = content_digest(path, 'model') if path.is_dir() else sha256_of(path)
    return digests


def _finished(path: Path, origin: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Results in a present file of the same weights, seed and config, by the entry that asked for them."""
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
    except json.JSONDecodeError as error:
        logger.warning('%s is not readable (%s) and will be replaced', path, error)
        return {}
    if any(content.get(key) != value for key, value in origin.items()):
        return {}
    return {_identity(result['entry']): result for result in content['evaluations'] if 'entry' in result}


def _versions() -> dict[str, str]:
    versions = {'lakonlab': __version__}
    for package in VERSIONED_PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = 'absent'
    return versions
