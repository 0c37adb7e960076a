"""Making a file of reference statistics: what ``tools/make_reference.py`` does."""

from __future__ import annotations

import json
import logging
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

import torch

from lakonlab.config.errors import ConfigError, describe_unknown
from lakonlab.config.signature import arguments_of
from lakonlab.evaluation.statistics import SUFFIX, ReferenceStatistics
from lakonlab.registry import FEATURE_EXTRACTORS
from lakonlab.runner.launch import impossible_values, logged_to_console
from lakonlab.storage import files

OF_IMAGES = ('extractor', 'no_resize', 'center_crop', 'resize_mode', 'num_images')
"""Arguments that say how features are made of images."""

DEFAULT_SPLIT = 'val'

logger = logging.getLogger('lakonlab.evaluation')


def make(args: Namespace) -> int:
    """Make reference statistics of images, or bring those of another layout into ours.

    Args:
        args: ``source``, ``out``, ``data``, ``extractor``, ``no_resize``, ``center_crop``, ``resize_mode``,
            ``num_images``, ``batch_size``, ``no_features``, ``device``.

    Returns:
        The exit status.

    Raises:
        ConfigError: The arguments or the source do not fit.
        OSError: A file is missing or cannot be written.
    """
    with logged_to_console(), impossible_values():
        if not args.out.endswith(SUFFIX):
            raise ConfigError(f'OUT={args.out!r}: expected a name that ends in {SUFFIX}')
        files.require(args.out, 'write', setting='OUT')
        if args.data is not None and not args.source.endswith('.py'):
            raise ConfigError(
                f'--data {args.data}: only a config has data splits, but SOURCE={args.source!r} is none; leave this '
                'out, or name a config'
            )
        statistics = _converted(args) or _made(args)
        statistics.save(args.out)
        kept = 'no features' if statistics.features is None else 'features'
        logger.info('%s has statistics of %s images, with %s', args.out, statistics.num_images or 'uncounted', kept)
    return 0


def _converted(args: Namespace) -> ReferenceStatistics | None:
    """Statistics of a file that holds some already; None if the source is something else."""
    from lakonlab.evaluation.statistics import read_reference

    if args.source.endswith('.npz') and _holds_images(args.source):
        return None
    if not args.source.endswith(('.pkl', '.npz')):
        return None
    read = read_reference(args.source, 'SOURCE')
    given = [name for name in OF_IMAGES if getattr(args, name) not in (None, False)]
    if given:
        options = ', '.join('--' + name.replace('_', '-') for name in given)
        raise ConfigError(
            f'{options}: SOURCE={args.source!r} holds statistics already, and how their features were made of images '
            'cannot be chosen any more; leave this out, or name the images'
        )
    provenance = {**read.provenance, 'source': dict(kind='statistics', path=args.source, sha256=read.sha256)}
    features = None if args.no_features else read.features
    return ReferenceStatistics(read.mean, read.covariance, read.num_images, features, provenance)


def _holds_images(path: str) -> bool:
    import zipfile

    local = files.fetch(path)
    if not zipfile.is_zipfile(local):
        return False
    with zipfile.ZipFile(local) as archive:
        names = {name.removesuffix('.npy') for name in archive.namelist()}
    return 'arr_0' in names and not names & {'mu', 'mean'}


def _made(args: Namespace) -> ReferenceStatistics:
    from lakonlab.evaluation.extractor import ExtractorPool
    from lakonlab.evaluation.preparation import Preparation
    from lakonlab.evaluation.reference_making import (
        images_of_folder,
        images_of_npz,
        images_of_split,
        make_reference,
    )

    config = extractor_config(args.extractor or 'InceptionV3')
    if args.source.endswith('.py'):
        from lakonlab.config.load import load_config

        cfg = load_config(args.source)
        batches, source = images_of_split(cfg.to_dict()['data'], args.data or DEFAULT_SPLIT)
    elif args.source.endswith('.npz'):
        batches, source = images_of_npz(args.source, args.batch_size)
    else:
        batches, source = images_of_folder(args.source, args.batch_size)
    extractor = ExtractorPool().build(config)
    size = extractor.input_size if args.center_crop or not args.no_resize else None
    return make_reference(
        batches,
        extractor,
        Preparation(size, args.center_crop, args.resize_mode or 'bicubic'),
        source,
        num_images=args.num_images,
        total=source['num_files'],
        keep_features=not args.no_features,
        device=args.device or ('cuda' if torch.cuda.is_available() else 'cpu'),
        batch_size=args.batch_size,
    )


def extractor_config(text: str) -> Mapping[str, Any]:
    """Config of an extractor from the command line: its name, or a dict in JSON.

    Raises:
        ConfigError: It is neither, or there is no such extractor, or it has no such argument.
    """
    config = _extractor_dict(text)
    kind = FEATURE_EXTRACTORS.get(config['type']) if isinstance(config['type'], str) else None
    if kind is None:
        raise ConfigError(
            describe_unknown('--extractor', 'feature extractor', config['type'], FEATURE_EXTRACTORS.names())
        )
    arguments = arguments_of(kind)
    for name, value in config.items():
        if name != 'type' and name not in arguments.names and not arguments.is_open:
            raise ConfigError(
                describe_unknown('--extractor', f'argument of {config["type"]}', name, arguments.names, value=value)
            )
    return config


def _extractor_dict(text: str) -> Mapping[str, Any]:
    if not text.lstrip().startswith('{'):
        return dict(type=text)
    try:
        config = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f'--extractor {text}: expected a name or a dict in JSON ({error})') from error
    if 'type' not in config:
        raise ConfigError(f"--extractor {text}: 'type' is missing; it names a feature extractor")
    return config
