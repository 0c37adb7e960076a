"""The published layout of a cache: a file ``<12 digits>.zst`` per prompt, a Zstandard stream of a pickled dict."""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Iterator, Sequence
from typing import Any

from lakonlab.datasets.prompt_cache.errors import CacheError
from lakonlab.datasets.prompt_cache.record import Record, record_of
from lakonlab.datasets.prompt_cache.restricted_pickle import UnsafePickleError, read_pickle
from lakonlab.datasets.prompt_cache.zstd import DamagedStreamError, pack, unpack
from lakonlab.storage import files

SUFFIX = '.zst'
PUBLISHED_LEVEL = 3
#: Protocol of Python 3.8 and later, which every reader of the published layout knows.
PROTOCOL = 4


def read_published_record(content: bytes, where: str) -> Record:
    """A record of the published layout; nothing that a file may hide in it is run.

    Args:
        content: Content of the file.
        where: Its path, for messages.

    Raises:
        CacheError: It is truncated, damaged or no record, or holds more than tensors, containers, texts and numbers.
    """
    try:
        return record_of(read_pickle(unpack(content)), where)
    except DamagedStreamError as error:
        raise CacheError(
            f'record {where} cannot be read: {error}. Remove the file and cache its prompt again.'
        ) from error
    except (MemoryError, RecursionError) as error:
        raise CacheError(
            f'record {where} cannot be read: unpacking it takes more memory than there is ({type(error).__name__})'
        ) from None
    except UnsafePickleError as error:
        raise CacheError(
            f'record {where} cannot be read: its pickle is refused, {error}. Only tensors, containers, texts and '
            'numbers are read, since anything else could run code; cache its prompt again.'
        ) from error


def write_published_record(record: Record) -> bytes:
    """Content of a file of the published layout; its stream has a checksum, which all readers verify."""
    content: dict[str, Any] = {'prompt': record.prompt, 'prompt_embed_kwargs': record.embeds, **record.latents}
    if record.latent_size is not None:
        content['latent_size'] = tuple(record.latent_size)
    stream = io.BytesIO()
    pickle.dump(content, stream, protocol=PROTOCOL)
    return pack(stream.getvalue(), PUBLISHED_LEVEL)


class PublishedPromptCache:
    """A folder of one file per prompt.

    Args:
        folder: The folder, anywhere.
        names: Stems of the files, in order; None to list the folder.

    Raises:
        CacheError: The folder holds none.
    """

    kind = 'published'

    def __init__(self, folder: str, names: Sequence[str] | None = None):
        self.folder = str(folder)
        self.names: Sequence[str] = list_records(self.folder) if names is None else list(names)
        if not self.names:
            raise CacheError(f'{self.folder} holds no record of a cache: no file ends in {SUFFIX}')

    def __len__(self) -> int:
        return len(self.names)

    def path_of(self, name: str) -> str:
        """The file of a record."""
        if not re.fullmatch(r'[^/\\]+', name) or name in ('.', '..'):
            raise CacheError(f'{self.folder}: {name!r} is no name of a record')
        return files.join(self.folder, name + SUFFIX)

    def stored(self, name: str) -> Record:
        """A record as it is stored.

        Args:
            name: One of ``names``.

        Raises:
            CacheError: There is no such file, or it is damaged.
        """
        path = self.path_of(name)
        try:
            content = files.read_bytes(path)
        except FileNotFoundError as error:
            raise CacheError(f'record {path} is missing: cache its prompt again, or mend the data list') from error
        return read_published_record(content, path)

    def record(self, name: str) -> dict[str, Any]:
        """A record as data sets use it, see :meth:`Record.decoded`."""
        return self.stored(name).decoded()

    def records(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """Several records."""
        return [self.record(name) for name in names]

    def check(self) -> Iterator[tuple[str, CacheError | None]]:
        """Read every record; yields its path and what is wrong with it, None if nothing is."""
        for name in self.names:
            try:
                self.record(name)
            except CacheError as error:
                yield self.path_of(name), error
            else:
                yield self.path_of(name), None


def list_records(folder: str) -> list[str]:
    """Stems of the records of a folder, sorted."""
    return sorted(name.removesuffix(SUFFIX) for name in files.list_names(folder) if name.endswith(SUFFIX))
