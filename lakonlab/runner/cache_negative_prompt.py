"""Embedding a negative prompt: what ``tools/cache_negative_prompt.py`` does."""

from __future__ import annotations

import logging
from argparse import Namespace
from collections.abc import Iterator, Mapping
from typing import Any

from mmengine.config import Config

from lakonlab.config.errors import ConfigError
from lakonlab.datasets.collate import collate
from lakonlab.datasets.prompt_cache import read_embeds, write_embeds
from lakonlab.datasets.prompt_cache.embeds_file import require_embeds_suffix
from lakonlab.datasets.prompt_making import rows_of
from lakonlab.runner.cache_command import built_text_encoder, joined, prepared_config
from lakonlab.runner.launch import impossible_values, logged_to_console, note_deprecated
from lakonlab.storage import files

logger = logging.getLogger('lakonlab.runner')


def cache_negative_prompt(args: Namespace) -> int:
    """Write the embeddings of the negative prompts that a config names, or of one.

    Args:
        args: ``config``, ``text_encoder``, ``cfg_options``, ``out``, ``prompt``, ``precision``, ``launcher``,
            ``deterministic``.

    Returns:
        The exit status.

    Raises:
        CacheError: A file has a suffix that says of no form.
        ConfigError: Neither the config nor an option says where to write, or two data sets want different prompts in
            one file.
    """
    with logged_to_console(), impossible_values():
        note_deprecated(args)
        cfg = prepared_config(args)
        wanted = wanted_prompts(cfg, args.out, args.prompt)
        for path in wanted:
            require_embeds_suffix(path)
            files.require(path, 'read', 'write', setting='negative_prompt_embeds_path' if args.out is None else '--out')
        with joined(args, cfg.get('dist_params')) as (ranks, device):
            if not ranks.is_main:
                return 0
            missing = {path: prompt for path, prompt in wanted.items() if not files.is_file(path)}
            for path in wanted.keys() - missing.keys():
                read_embeds(path)
                logger.info('%s is there already, and whole; nothing is overwritten', path)
            encoder = built_text_encoder(cfg, device) if missing else None
            for path, arguments in missing.items():
                (embeds,) = rows_of(encoder(**collate([arguments])), 1)
                write_embeds(path, embeds, args.precision)
                shapes = ', '.join(f'{name} {tuple(value.shape)}' for name, value in read_embeds(path).items())
                logger.info('%s: %r as %s', path, arguments['prompt'], shapes)
    return 0


def wanted_prompts(cfg: Config, out: str | None, prompt: str | None) -> dict[str, dict[str, Any]]:
    """Files of negative prompts -> arguments of the text encoder.

    Args:
        cfg: The config.
        out: The file; None for those that the config names.
        prompt: The text; None for what the config says, or the empty one.

    Raises:
        ConfigError: See :func:`cache_negative_prompt`.
    """
    replaced = {} if prompt is None else {'prompt': prompt}
    found = [(path, {**arguments, **replaced}) for path, arguments in _named(cfg.to_dict()['data'])]
    if out is not None:
        return {out: _arguments_for(out, found) if found else {'prompt': '', **replaced}}
    wanted: dict[str, dict[str, Any]] = {}
    for path, arguments in found:
        if wanted.setdefault(path, arguments) != arguments:
            raise ConfigError(f'{path}: data sets want it to hold different negative prompts; choose another file')
    if not wanted:
        raise ConfigError('data: no data set of this config has negative_prompt_embeds_path; name a file with --out')
    return wanted


def _arguments_for(out: str, found: list[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    """What a file is to hold: what the data sets that name it want, or what all of them want."""
    named = [arguments for path, arguments in found if path == out] or [arguments for _, arguments in found]
    if any(arguments != named[0] for arguments in named):
        listed = '; '.join(f'{arguments!r} in {path}' for path, arguments in found)
        raise ConfigError(
            f'--out {out}: the data sets want different negative prompts ({listed}), so it is not known which one this '
            'file is to hold: name it as one of them does, or add --prompt'
        )
    return named[0]


def _named(section: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(section, Mapping):
        if section.get('negative_prompt_embeds_path') is not None:
            arguments = section.get('negative_prompt_kwargs') or {'prompt': ''}
            yield str(section['negative_prompt_embeds_path']), dict(arguments)
        for value in section.values():
            yield from _named(value)
    elif isinstance(section, list | tuple):
        for value in section:
            yield from _named(value)
