"""What the content of a cache depends on, as plain data beside it, so that no other cache is gone on with."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from typing import Any

from lakonlab.datasets.prompt_cache.errors import CacheError
from lakonlab.storage import files

logger = logging.getLogger('lakonlab.datasets')

#: Beside a folder of the published layout, in which every file would be taken for a record.
PUBLISHED_PLAN_SUFFIX = '.plan.json'
AGAIN = (
    'Remove it, and index.json if there is one, and run the command that made the cache again: what is there and '
    'whole is kept'
)


def plain(plan: Mapping[str, Any]) -> dict[str, Any]:
    """A plan as it will be read again."""
    return json.loads(json.dumps(plan))


def read_plan(path: str) -> dict[str, Any]:
    """Read a plan.

    Raises:
        CacheError: It is damaged.
    """
    try:
        found = json.loads(files.read_bytes(path))
    except (ValueError, RecursionError) as error:
        raise CacheError(f'{path} is damaged: it is no JSON ({type(error).__name__}). {AGAIN}') from error
    if not isinstance(found, dict):
        raise CacheError(f'{path} is damaged: it is a {type(found).__name__}, expected a dict. {AGAIN}')
    return found


def require_plan(path: str, plan: Mapping[str, Any], folder: str) -> None:
    """Compare the plan that a cache was begun with and another one.

    Args:
        path: The plan that is there.
        plan: What it should be, see :func:`plain`.
        folder: The cache.

    Raises:
        CacheError: It differs, or is damaged.
    """
    found = read_plan(path)
    differing = [key for key in sorted(set(found) | set(plan)) if found.get(key) != plan.get(key)]
    if differing:
        listed = ', '.join(f'{key} {found.get(key)!r} there and {plan.get(key)!r} here' for key in differing)
        raise CacheError(
            f'{folder} holds a cache that was begun differently ({path}): {listed}. Nothing is overwritten: '
            'choose another folder, or move that one away.'
        )


def published_plan_path(folder: str) -> str:
    """Where the plan of a folder of the published layout is."""
    return files.sibling(folder, files.name_of(folder) + PUBLISHED_PLAN_SUFFIX)


def keep_published_plan(folder: str, plan: Mapping[str, Any], has_records: Callable[[], bool]) -> None:
    """Write beside a folder of the published layout what its files depend on, or compare it with what is there.

    Args:
        folder: The folder.
        plan: Plain data.
        has_records: Tells whether there are files already. If they have no plan, for another program made them, none is
            written, and the log says so.

    Raises:
        CacheError: The files were begun with another plan.
    """
    path, plan = published_plan_path(folder), plain({'layout': 'published', **plan})
    if files.is_file(path):
        require_plan(path, plan, folder)
    elif has_records():
        logger.warning(
            '%s holds files that this tool did not begin (there is no %s), so nothing says what made them: they are '
            'kept where what they are of and their precision are right, whichever the encoder and the seed were',
            folder,
            path,
        )
    else:
        files.write_text(path, json.dumps(plan, indent=1))
