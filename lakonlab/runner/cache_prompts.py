"""Embedding the prompts of a config's data sets: what ``tools/cache_image_prompt_data.py`` does."""

from __future__ import annotations

import logging
import re
from argparse import Namespace
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from mmengine.config import Config

from lakonlab.config.errors import ConfigError, describe_unknown
from lakonlab.datasets.datalist import read_datalist
from lakonlab.datasets.datalist_writing import is_written, require_writable_datalist, write_datalist
from lakonlab.datasets.image_prompt import ImagePrompt
from lakonlab.datasets.prompt_cache import open_prompt_cache
from lakonlab.datasets.prompt_cache.index import INDEX_FILE, PLAN_FILE
from lakonlab.datasets.prompt_cache.published import list_records
from lakonlab.datasets.prompt_cache.sharded import RecordNames
from lakonlab.datasets.prompt_making import PromptEncoder, PromptItems, make_prompt_cache
from lakonlab.datasets.published_making import make_published_cache
from lakonlab.ranks import Ranks
from lakonlab.registry import DATASETS, MODULES
from lakonlab.runner.cache_command import built_text_encoder, joined, positive, prepared_config, report_check
from lakonlab.runner.launch import DEFAULT_SEED, impossible_values, logged_to_console, note_deprecated
from lakonlab.storage import files

logger = logging.getLogger('lakonlab.runner')

CACHED_SPLIT = re.compile(r'train|(val|test)\d*')
#: Arguments of a data set that do not belong to what is cached.
LEFT_OUT = (
    *('start_ind', 'end_ind', 'repeat', 'cache_dir', 'cache_datalist_path', 'ignore_cached_latents', 'pad_seq_len'),
    *('negative_prompt_embeds_path', 'negative_prompt_kwargs', 'test_mode'),
)
#: What decides how images are brought to a size.
IMAGE_SETTING = re.compile('image|vae_scale_factor|latent_patch_size')
NESTED = 'ConcatDataset'


@dataclass(frozen=True)
class Target:
    """A cache that a config names.

    Args:
        key: Where in the config.
        dataset: Config of the data set.
        folder: Folder of the cache.
        datalist: Its list, written when it is complete; None if the config names none.
    """

    key: str
    dataset: Mapping[str, Any]
    folder: str
    datalist: str | None

    @property
    def list_setting(self) -> str:
        """Where in the config the list is named."""
        return f'{self.key}.cache_datalist_path'

    def is_finished(self) -> bool:
        """Whether the cache is there, of whichever layout, and its list if one is named.

        Raises:
            ValueError: The list is damaged.
        """
        has_list = self.datalist is not None and files.is_file(self.datalist)
        if files.is_file(files.join(self.folder, INDEX_FILE)):
            return has_list or self.datalist is None
        if not has_list or files.is_file(files.join(self.folder, PLAN_FILE)):
            return False
        names = read_datalist(self.datalist, self.list_setting).names
        return set(names) <= set(list_records(self.folder))


def cache_prompts(args: Namespace) -> int:
    """Make or check the caches of the data sets of a config.

    Args:
        args: ``config``, ``text_encoder``, ``cfg_options``, ``data``, ``max_size``, ``batch_size``, ``skip_existing``,
            ``format``, ``shard_size``, ``precision``, ``latents_precision``, ``check``, ``launcher``, ``seed``,
            ``diff_seed``, ``deterministic`` and the deprecated ``gpus``, ``gpu_ids``, ``gpu_id``.

    Returns:
        The exit status.

    Raises:
        ConfigError: The config names no cache, or cannot be used.
        CacheError: A folder holds another cache, or what was made is of no use.
    """
    with logged_to_console(), impossible_values():
        note_deprecated(args)
        positive(args.batch_size, '--batch-size')
        positive(args.shard_size, '--shard-size')
        if args.max_size is not None:
            positive(args.max_size, '--max-size')
        cfg = prepared_config(args)
        targets = list(targets_of(cfg, args.data))
        if args.check:
            return max(check(target) for target in targets)
        with joined(args, cfg.get('dist_params')) as (ranks, device):
            for target in targets:
                if ranks.on_main(target.is_finished):
                    logger.info('%s: %s is finished (%s)', target.key, target.folder, target.datalist or INDEX_FILE)
                    continue
                make(target, cfg, args, ranks, device)
    return 0


def targets_of(cfg: Config, splits: list[str] | None) -> Iterator[Target]:
    """The caches that the data sets of a config name, each once.

    Args:
        cfg: The config.
        splits: Names of data sets; None for ``train``, ``val...`` and ``test...``.

    Raises:
        ConfigError: There is none, or a named data set has none.
    """
    data = cfg.to_dict()['data']
    known = [name for name, value in data.items() if isinstance(value, Mapping) and 'type' in value]
    for split in splits or ():
        if split not in known:
            raise ConfigError(describe_unknown('--data', 'data set of this config', split, known))
    seen = set()
    for split in splits or [name for name in known if CACHED_SPLIT.fullmatch(name)]:
        for key, entry in _prompt_sets(f'data.{split}', data[split]):
            if entry.get('cache_dir') is None:
                if splits:
                    raise ConfigError(f'{key}.cache_dir: missing; it names the folder of the cache')
                continue
            if entry.get('prompt_dataset_kwargs') is None:
                raise ConfigError(f'{key}.prompt_dataset_kwargs: missing; it says where the prompts come from')
            folder = files.join(entry['data_root'], entry['cache_dir'])
            target = Target(key, entry, folder, entry.get('cache_datalist_path'))
            if (target.folder, target.datalist) not in seen:
                seen.add((target.folder, target.datalist))
                yield target
    if not seen:
        raise ConfigError('data: no data set of this config is an ImagePrompt with cache_dir, so nothing can be cached')


def _prompt_sets(key: str, entry: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if entry['type'] == NESTED:
        for number, part in enumerate(entry['datasets']):
            yield from _prompt_sets(f'{key}.datasets[{number}]', part)
        return
    kind = DATASETS.get(entry['type']) if isinstance(entry['type'], str) else entry['type']
    if isinstance(kind, type) and issubclass(kind, ImagePrompt):
        yield key, entry


def make(target: Target, cfg: Config, args: Namespace, ranks: Ranks, device: torch.device) -> None:
    """Make one cache, or what it lacks.

    Args:
        target: The cache.
        cfg: The config.
        args: See :func:`cache_prompts`.
        ranks: The processes.
        device: Device of the text encoder.

    Raises:
        ConfigError: Its folder cannot be written to.
        ValueError: Its list has another suffix or no place for the buckets, or a size is of no use.
        CacheError: See there.
    """
    if target.datalist is None and args.format == 'published':
        raise ConfigError(
            f'{target.key}.cache_datalist_path: missing; the published layout is complete when it is there'
        )
    for path, setting in ((target.folder, 'cache_dir'), (target.datalist, 'cache_datalist_path')):
        if path is not None:
            files.require(path, 'read', 'write', setting=f'{target.key}.{setting}')
    ranks.on_main(lambda: _refuse_other_layout(target, args.format))
    options = {key: value for key, value in target.dataset.items() if key not in LEFT_OUT}
    if args.max_size is not None:
        options['start_ind'] = -args.max_size
    items = PromptItems(ranks.together(lambda: DATASETS.build(options)))
    logger.info('%s: %d prompts, to %s', target.key, len(items), target.folder)
    names = RecordNames(len(items))
    has_list = ranks.on_main(lambda: _look_ahead(target, items, names))
    build = partial(_encoder, items, cfg, args, device)
    encoder: PromptEncoder = ranks.together(build)
    plan = {'text_encoder': _plain(cfg.model.text_encoder)}
    if items.images:
        plan['vae'] = _plain(cfg.model.vae)
        plan['images'] = {key: value for key, value in options.items() if IMAGE_SETTING.search(key)}
    if args.format == 'published':
        count = make_published_cache(encoder, target.folder, batch_size=args.batch_size, plan=plan, ranks=ranks)
        logger.info('%d files were written, %d were there', count, len(items) - count)
    else:
        make_prompt_cache(
            encoder,
            target.folder,
            batch_size=args.batch_size,
            rows_per_shard=args.shard_size,
            plan=plan,
            ranks=ranks,
        )
    if target.datalist is not None and not has_list:
        ranks.on_main(lambda: write_datalist(target.datalist, names, items.bucket_ids))
    logger.info('%s: finished', target.key)


def _look_ahead(target: Target, items: PromptItems, names: RecordNames) -> bool:
    """Ask for everything that may be refused before anything is embedded; returns whether the list is there."""
    buckets, _ = items.bucket_ids, items.latent_sizes
    if target.datalist is None:
        return False
    require_writable_datalist(target.datalist, buckets is not None, target.list_setting)
    return is_written(target.datalist, names, buckets, target.list_setting)


def _refuse_other_layout(target: Target, layout: str) -> None:
    is_ours = files.is_file(files.join(target.folder, PLAN_FILE))
    if layout == 'published' and is_ours:
        raise ConfigError(f'{target.key}.cache_dir: {target.folder} was begun with --format ours; go on with that')
    if layout == 'ours' and not is_ours and list_records(target.folder):
        raise ConfigError(
            f'{target.key}.cache_dir: {target.folder} holds records of the published layout; go on with --format '
            'published, name another folder, or convert them with tools/convert_prompt_cache.py'
        )


def _encoder(items: PromptItems, cfg: Config, args: Namespace, device: torch.device) -> PromptEncoder:
    vae = None
    if items.images:
        if cfg.model.get('vae') is None:
            raise ConfigError('model.vae: missing; the data set has images, whose latents are to be cached')
        vae = MODULES.build(dict(cfg.model.vae)).to(device).eval()
    seed = args.seed if args.seed is not None else cfg.get('seed', DEFAULT_SEED)
    return PromptEncoder(
        items,
        built_text_encoder(cfg, device),
        vae,
        seed=seed,
        precision=args.precision,
        latents_precision=args.latents_precision,
    )


def _plain(section: Mapping[str, Any]) -> dict[str, Any]:
    return dict(section)


def check(target: Target) -> int:
    """Read everything of a cache, and say what is damaged.

    Args:
        target: The cache.

    Returns:
        The exit status: 0 if nothing is damaged.

    Raises:
        CacheError: There is none, or it is not finished.
    """
    names = None if target.datalist is None else read_datalist(target.datalist, target.list_setting).names
    cache = open_prompt_cache(target.folder, names)
    return report_check(f'{target.key}: {target.folder}', len(cache), cache.check())
