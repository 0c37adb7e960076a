"""Converting a published cache of prompts into our layout: what ``tools/convert_prompt_cache.py`` does."""

from __future__ import annotations

import logging
from argparse import Namespace

from lakonlab.config.errors import ConfigError
from lakonlab.datasets.datalist import read_datalist
from lakonlab.datasets.prompt_cache import open_prompt_cache
from lakonlab.datasets.prompt_cache.index import INDEX_FILE
from lakonlab.datasets.prompt_cache.published import PublishedPromptCache
from lakonlab.datasets.prompt_converting import compare, convert_prompt_cache
from lakonlab.runner.cache_command import positive, report_check
from lakonlab.runner.launch import impossible_values, logged_to_console
from lakonlab.storage import files

logger = logging.getLogger('lakonlab.runner')


def convert_cache(args: Namespace) -> int:
    """Convert a cache, or compare a converted one with what it was made of.

    Args:
        args: ``source``, ``out``, ``datalist``, ``shard_size``, ``check``.

    Returns:
        The exit status.

    Raises:
        ConfigError: The source is no published cache.
        CacheError: A record is damaged, or ``out`` holds another cache.
    """
    with logged_to_console(), impossible_values():
        positive(args.shard_size, '--shard-size')
        if files.is_file(files.join(args.source, INDEX_FILE)):
            raise ConfigError(f'{args.source} has an {INDEX_FILE}: it is of our layout already')
        names = None if args.datalist is None else read_datalist(args.datalist, '--datalist').names
        source = PublishedPromptCache(args.source, names)
        if args.check:
            return report_check(args.out, len(source), compare(source, open_prompt_cache(args.out)), 'comparing')
        files.require(args.out, 'read', 'write', setting='OUT')
        made = convert_prompt_cache(source, args.out, args.shard_size)
        logger.info('%s %s', args.out, 'is finished' if made else 'was finished already')
        logger.info('it has the records of %s under the same names, so the same data list fits both', args.source)
    return 0
