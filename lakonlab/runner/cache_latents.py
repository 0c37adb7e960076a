"""Latents of labelled images: what ``tools/cache_imagenet_data_sdvae.py`` does."""

from __future__ import annotations

import logging
from argparse import Namespace
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

from lakonlab.config.errors import ConfigError
from lakonlab.datasets.imagenet import read_datalist
from lakonlab.datasets.latent_cache import LatentCache
from lakonlab.datasets.latent_making import (
    LabelledImages,
    LatentEncoder,
    make_latent_cache,
    make_published_latents,
    published_names,
)
from lakonlab.datasets.prompt_cache.errors import CacheError
from lakonlab.datasets.prompt_cache.torch_file import read_published_latents
from lakonlab.datasets.prompt_cache.writer import num_threads
from lakonlab.registry import MODULES
from lakonlab.runner.cache_command import joined, positive, report_check
from lakonlab.runner.launch import DEFAULT_SEED, impossible_values, logged_to_console, note_deprecated
from lakonlab.storage import files

logger = logging.getLogger('lakonlab.runner')

DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}


def cache_latents(args: Namespace) -> int:
    """Make or check latents of labelled images.

    Args:
        args: ``data_root``, ``datalist_path``, ``out_data_root``, ``out_datalist_path``, ``image_size``,
            ``batch_size``, ``dtype``, ``vae``, ``flip``, ``posterior``, ``format``, ``shard_size``, ``check``,
            ``launcher``, ``seed``, ``deterministic``.

    Returns:
        The exit status.

    Raises:
        ConfigError: An option is out of range.
        CacheError: The folder holds another cache, or the latents are of no use.
    """
    with logged_to_console(), impossible_values():
        note_deprecated(args)
        positive(args.batch_size, '--batch-size')
        positive(args.shard_size, '--shard-size')
        positive(args.image_size, '--image-size')
        if args.check:
            return _check(args)
        is_ours = args.format == 'ours'
        flip = args.flip or ('both' if is_ours else 'random')
        if flip == 'both' and not is_ours:
            raise ConfigError('--flip both: the published layout has one file per image; use --format ours')
        files.require(args.out_data_root, 'read', 'write', setting='--out-data-root')
        if not is_ours:
            files.require(args.out_datalist_path, 'read', 'write', setting='--out-datalist-path')
        with joined(args) as (ranks, device):
            if not is_ours and ranks.on_main(lambda: _is_finished(args.out_data_root, args.out_datalist_path)):
                logger.info('%s is there, so %s is finished', args.out_datalist_path, args.out_data_root)
                return 0
            images = ranks.together(lambda: LabelledImages(args.data_root, args.datalist_path, args.image_size))
            if not is_ours:
                ranks.together(lambda: published_names(images))
            section = {'type': 'PretrainedVAEEncoder', 'from_pretrained': args.vae, 'torch_dtype': args.dtype}
            vae = ranks.together(lambda: MODULES.build(dict(section)).to(device).eval())
            seed = DEFAULT_SEED if args.seed is None else args.seed
            encoder = LatentEncoder(images, vae, seed, args.posterior, DTYPES[args.dtype])
            if is_ours:
                made = make_latent_cache(
                    encoder,
                    args.out_data_root,
                    flip=flip,
                    batch_size=args.batch_size,
                    rows_per_shard=args.shard_size,
                    plan={'vae': args.vae},
                    ranks=ranks,
                )
                logger.info('%s %s', args.out_data_root, 'is finished' if made else 'was finished already')
            else:
                count = make_published_latents(
                    encoder,
                    args.out_data_root,
                    args.out_datalist_path,
                    flip=flip,
                    batch_size=args.batch_size,
                    plan={'vae': args.vae},
                    ranks=ranks,
                )
                logger.info('%d files were written, %d were there', count, len(images) - count)
    return 0


def _is_finished(folder: str, datalist_path: str) -> bool:
    """Whether the list of a cache of the published layout is there, and all that it lists."""
    if not files.is_file(datalist_path):
        return False
    paths, _ = read_datalist(datalist_path)
    return set(paths) <= {info.name for info in files.list_files(folder)}


def _check(args: Namespace) -> int:
    if args.format == 'ours':
        cache = LatentCache(args.out_data_root)
        return report_check(args.out_data_root, len(cache), cache.check())
    paths, labels = read_datalist(args.out_datalist_path)
    checked = _published(args.out_data_root, paths, labels)
    return report_check(args.out_data_root, len(paths), checked)


def _published(folder: str, paths: list[str], labels: list[int | None]) -> Iterator[tuple[str, CacheError | None]]:
    def look(path: str, label: int | None) -> tuple[str, CacheError | None]:
        where = files.join(folder, path)
        try:
            latents, found = read_published_latents(where)
        except CacheError as error:
            return where, error
        if label is not None and found != label:
            return where, CacheError(f'{where} has label {found}, its list says {label}')
        if not bool(latents.isfinite().all()):
            return where, CacheError(f'{where} holds latents that are not finite')
        return where, None

    with ThreadPoolExecutor(num_threads(), thread_name_prefix='check') as threads:
        yield from threads.map(look, paths, labels)
