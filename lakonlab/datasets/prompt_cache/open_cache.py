"""Opening a cache of prompts, whichever its layout."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from lakonlab.datasets.prompt_cache.errors import CacheError
from lakonlab.datasets.prompt_cache.index import INDEX_FILE, PLAN_FILE
from lakonlab.datasets.prompt_cache.published import PublishedPromptCache, list_records
from lakonlab.datasets.prompt_cache.record import Record
from lakonlab.datasets.prompt_cache.sharded import ShardedPromptCache
from lakonlab.storage import files


class PromptCache(Protocol):
    """Embedded prompts by name; may be pickled, and used in processes that are forked or spawned."""

    kind: str
    folder: str
    names: Sequence[str]

    def __len__(self) -> int:
        """Number of records."""

    def stored(self, name: str) -> Record:
        """A record as it is stored."""

    def record(self, name: str) -> dict[str, Any]:
        """A record as data sets use it: ``prompt`` a text, ``prompt_embed_kwargs`` tensors without batch dimension
        (floating-point ones in float32, padded no further than they are stored) and, where it has them, ``latents``
        and ``condition_latents`` in float32 and ``latent_size``, a tuple.

        Raises:
            CacheError: It is missing or damaged; the message names file and record.
        """

    def records(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """Several records at once, which from far away takes hardly longer than one."""

    def check(self) -> Iterator[tuple[str, CacheError | None]]:
        """Read everything; yields what was read and what is wrong with it, None if nothing is."""


def open_prompt_cache(folder: str | Path, names: Sequence[str] | None = None) -> PromptCache:
    """Open a cache of embedded prompts.

    Args:
        folder: Folder of the published layout, a file ``<12 digits>.zst`` per prompt, or of ours, which has an index.
        names: Names of the records in order, as a data list gives them; None for all of the cache.

    Returns:
        The cache.

    Raises:
        CacheError: The folder holds no cache, one that is not finished, or lacks a record of ``names``.
    """
    if files.is_file(files.join(folder, INDEX_FILE)):
        return ShardedPromptCache(str(folder), names)
    if files.is_file(files.join(folder, PLAN_FILE)):
        raise CacheError(
            f'the cache {folder} is not finished: it has a {PLAN_FILE} but no {INDEX_FILE}. Run the command that makes '
            'it again; it goes on where it was stopped.'
        )
    return PublishedPromptCache(str(folder), names)


def is_prompt_cache(folder: str | Path) -> bool:
    """Whether a folder holds a finished cache of ours, or at least one record of the published layout."""
    if files.is_file(files.join(folder, INDEX_FILE)):
        return True
    return files.is_directory(folder) and bool(list_records(str(folder)))
