"""What the commands that make and check caches have in common."""

from __future__ import annotations

import contextlib
import logging
import os
from argparse import Namespace
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from mmengine.config import Config
from torch import nn
from tqdm import tqdm

from lakonlab.config.check import check_config
from lakonlab.config.errors import ConfigError
from lakonlab.config.load import load_config
from lakonlab.config.options import parse_options
from lakonlab.datasets.prompt_cache.errors import CacheError
from lakonlab.ranks import Ranks
from lakonlab.registry import MODULES

logger = logging.getLogger('lakonlab.runner')

#: Damaged records that are named one by one.
MOST_NAMED = 20


def prepared_config(args: Namespace) -> Config:
    """The checked config, with the text encoder that was asked for.

    Args:
        args: ``config``, ``text_encoder`` and ``cfg_options``.

    Raises:
        ConfigError: It cannot be used.
    """
    cfg = load_config(args.config, parse_options(args.cfg_options or ()))
    if args.text_encoder:
        other = load_config(args.text_encoder)
        encoder = (other.get('model') or {}).get('text_encoder')
        if encoder is None:
            raise ConfigError(f'--text-encoder {args.text_encoder}: this config has no model.text_encoder')
        cfg.model.text_encoder = encoder
    check_config(cfg, training='optimizer' in cfg, planning=True)
    return cfg


def built_text_encoder(cfg: Mapping[str, Any], device: torch.device) -> nn.Module:
    """The text encoder of a config, on a device.

    Raises:
        ConfigError: There is none.
    """
    section = cfg['model'].get('text_encoder')
    if section is None:
        raise ConfigError(
            'model.text_encoder: missing; embedding prompts needs one: add --text-encoder with a config that has it, '
            'such as configs/piqwen/_text_encoder.py'
        )
    return MODULES.build(dict(section)).to(device).eval()


@contextlib.contextmanager
def joined(args: Namespace, dist_params: Mapping[str, Any] | None = None) -> Iterator[tuple[Ranks, torch.device]]:
    """The processes of a command, under ``--launcher`` or, where there is no such option given, torchrun.

    Args:
        args: ``launcher``, ``deterministic``.
        dist_params: That of a config.
    """
    from lakonlab.parallel.launch import joined_processes
    from lakonlab.runner.seeding import make_deterministic

    launcher = args.launcher
    if launcher is None:
        launcher = 'pytorch' if 'TORCHELASTIC_RUN_ID' in os.environ else 'none'
    if args.deterministic:
        make_deterministic()
    with joined_processes(launcher, dist_params) as (ranks, device):
        if not ranks.is_main:
            logging.getLogger('lakonlab').setLevel('WARNING')
        yield ranks, device


def positive(value: int, option: str) -> int:
    """A number that must be at least 1.

    Raises:
        ConfigError: It is not.
    """
    if value < 1:
        raise ConfigError(f'{option} {value}: expected at least 1')
    return value


def report_check(
    what: str, total: int, checked: Iterator[tuple[str, CacheError | None]], progress_label: str = 'checking'
) -> int:
    """Read everything of a cache, and say what is damaged.

    Args:
        what: The cache, for messages.
        total: About how many steps the check has.
        checked: Name of what was read, and what is wrong with it.
        progress_label: For the progress bar.

    Returns:
        The exit status: 0 if nothing is damaged.
    """
    damaged: list[CacheError] = []
    count = 0
    for _, error in tqdm(checked, total=total, desc=progress_label, unit=''):
        count += 1
        if error is not None:
            damaged.append(error)
            if len(damaged) <= MOST_NAMED:
                logger.error('%s', error)
    if len(damaged) > MOST_NAMED:
        logger.error('and %d more', len(damaged) - MOST_NAMED)
    if damaged:
        logger.error('%s: %d of %d are damaged', what, len(damaged), count)
        return 1
    logger.info('%s: %d read, all whole', what, count)
    return 0
