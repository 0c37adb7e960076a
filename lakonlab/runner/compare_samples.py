"""Several pages of samples as one: what ``tools/compare_samples.py`` does."""

from __future__ import annotations

import logging
from argparse import Namespace

from lakonlab.evaluation.viewer import side_by_side
from lakonlab.runner.launch import impossible_values, logged_to_console
from lakonlab.storage import files

logger = logging.getLogger('lakonlab.evaluation')


def compare_samples(args: Namespace) -> int:
    """Write the common page.

    Args:
        args: ``pages``, ``out``, ``names``, ``embed``, ``any_noise``.

    Returns:
        The exit status.

    Raises:
        ConfigError: The pages cannot be shown together.
        OSError: A page is missing, or the common one cannot be written.
    """
    with logged_to_console(), impossible_values():
        files.require(args.out, 'write', setting='--out')
        gallery = side_by_side(args.pages, args.out, args.names, args.embed, args.any_noise)
        gallery.write(args.out)
        logger.info(
            '%s shows %d samples of %d runs; %d started from the same noise in all runs that have them',
            args.out,
            len(gallery.items),
            len(gallery.columns),
            sum(item.shares_noise is True for item in gallery.items),
        )
    return 0
