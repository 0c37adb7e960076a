"""Writing the list of a cache of prompts, which says that the cache is complete."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from lakonlab.datasets.datalist import SUFFIXES, read_datalist
from lakonlab.datasets.prompt_cache.errors import CacheError
from lakonlab.datasets.prompt_cache.published import SUFFIX
from lakonlab.storage import files


def require_writable_datalist(path: str, has_buckets: bool, setting: str = 'cache_datalist_path') -> None:
    """Refuse a list that could not be written, before what it lists is made.

    Args:
        path: The list.
        has_buckets: Whether it must tell buckets.
        setting: Argument that names it, for messages.

    Raises:
        ValueError: The file ends in something else than a list does, or has no place for buckets.
    """
    if not path.endswith(SUFFIXES):
        raise ValueError(f'{setting}={path!r}: expected a file that ends in {", ".join(SUFFIXES)}')
    if has_buckets and path.endswith('.json'):
        raise ValueError(f'{setting}={path!r}: bucketize=True needs a list with buckets, .jsonl or .jsonl.gz')


def is_written(path: str, names: Sequence[str], bucket_ids: np.ndarray | None, setting: str) -> bool:
    """Whether a list is there; it is never overwritten.

    Args:
        path: The list.
        names: Names that it should hold, in order.
        bucket_ids: Their buckets.
        setting: Argument that names it, for messages.

    Raises:
        CacheError: It lists something else.
        ValueError: It is damaged.
    """
    if not files.is_file(path):
        return False
    found = read_datalist(path, setting)
    buckets = None if bucket_ids is None else [int(number) for number in bucket_ids]
    if found.names != list(names) or found.bucket_ids != buckets:
        raise CacheError(
            f'{setting}={path!r} is there and lists other records or buckets ({len(found.names)} names) than the cache '
            f'that is to be made ({len(names)}); nothing is overwritten: name another list, or move that one away'
        )
    return True


def write_datalist(path: str, names: Sequence[str], bucket_ids: np.ndarray | None = None) -> None:
    """Write the list of a cache, which says that it is complete.

    Args:
        path: ``.jsonl``, ``.jsonl.gz`` or ``.json``.
        names: Names of the records in order.
        bucket_ids: Bucket of every record, not for ``.json``.

    Raises:
        ValueError: The file ends in something else, or has no place for buckets.
    """
    require_writable_datalist(path, bucket_ids is not None)
    if path.endswith('.json'):
        files.write_text(path, json.dumps([name + SUFFIX for name in names], indent=0))
        return
    lines = []
    for number, name in enumerate(names):
        line: dict[str, Any] = {'filename': name}
        if bucket_ids is not None:
            line['bucket_id'] = int(bucket_ids[number])
        lines.append(json.dumps(line) + '\n')
    content = ''.join(lines).encode()
    # no time in the file, so that the same list is the same file
    files.write_bytes(path, gzip.compress(content, mtime=0) if path.endswith('.gz') else content)
