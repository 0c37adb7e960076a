"""Whether the data sets of a config bring what its model needs, asked before weights are loaded."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from lakonlab.config.errors import ConfigError
from lakonlab.datasets.image_prompt import CACHE_COMMAND
from lakonlab.registry import DATASETS, MODULES


def used_splits(cfg: Mapping[str, Any], training: bool, evaluating: bool = True) -> list[str]:
    """Names of the data sets that a run reads.

    Args:
        cfg: The config.
        training: Whether it trains.
        evaluating: Whether its evaluations run.
    """
    entries = (cfg.get('evaluation') or ()) if evaluating else ()
    names = ['train'] if training else []
    names += [entry.get('data', 'val') for entry in entries]
    return [name for name in dict.fromkeys(names) if name in cfg['data']]


def check_data(cfg: Mapping[str, Any], splits: Iterable[str]) -> None:
    """Refuse a run whose data sets do not bring what its model needs.

    Args:
        cfg: The config.
        splits: Names of the data sets that are read.

    Raises:
        ConfigError: See :func:`data_problems`.
    """
    problems = list(data_problems(cfg, splits))
    if problems:
        raise ConfigError('\n'.join(problems))


def data_problems(cfg: Mapping[str, Any], splits: Iterable[str]) -> Iterator[str]:
    """What data sets do not bring and the model needs: embedded prompts, images to train on.

    A data set says of itself ``needs_text_encoder``, a reason or None, and ``has_images``.

    Args:
        cfg: The config.
        splits: Names of the data sets that are read.

    Yields:
        Sentences that begin with the key of the data set.
    """
    model = cfg['model']
    for split in splits:
        dataset = DATASETS.build(copy.deepcopy(dict(cfg['data'][split])))
        reason = getattr(dataset, 'needs_text_encoder', None)
        if reason is not None and model.get('text_encoder') is None:
            yield (
                f'data.{split}: {reason}, and the model has no text encoder: set model.text_encoder (configs of '
                'published models: add ./_text_encoder.py to the bases), or embed the prompts first with '
                f'{CACHE_COMMAND}'
            )
        if split != 'train' or getattr(dataset, 'has_images', True):
            continue
        trainer = model['diffusion'].get('type')
        if not getattr(MODULES.get(trainer), 'is_multistep', False):
            yield (
                f'data.{split}: holds neither images nor latents, and {trainer} is trained on data: set image_dir, '
                'cache latents, or set model.diffusion.type to PiFlowImitationDataFree'
            )


def planned_data_problems(cfg: Mapping[str, Any], splits: Iterable[str]) -> list[str]:
    """The same for a plan, in which files of data may be missing yet.

    Args:
        cfg: The config.
        splits: Names of the data sets that are read.
    """
    problems = []
    for split in splits:
        try:
            problems += data_problems(cfg, [split])
        except (ImportError, OSError, ValueError) as error:
            problems.append(f'data.{split}: {error}')
    return problems
