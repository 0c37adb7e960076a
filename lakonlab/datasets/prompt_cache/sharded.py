"""Our layout of a cache of prompts: shards of embeddings, each prompt once, and shards of latents."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from lakonlab.datasets.prompt_cache.errors import CacheError
from lakonlab.datasets.prompt_cache.index import LATENTS, PROMPTS, Index, read_index, unpack_text
from lakonlab.datasets.prompt_cache.record import Record, require_scales
from lakonlab.datasets.prompt_cache.rows import text_of
from lakonlab.datasets.prompt_cache.store import ShardStore

EMBEDS = 'embeds'
PROMPT = 'prompt'
#: Of converted caches: which embeddings are equal, and the shape of latents that a record does not have.
DIGEST, LATENT_SIZE = 'digest', 'latent_size'
NOT_EMBEDDINGS = (DIGEST, LATENT_SIZE)
DIGITS = 12


class RecordNames(Sequence):
    """Names of records that are their numbers, without a list of millions of texts."""

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, position):
        if isinstance(position, slice):
            return [number_name(number) for number in range(self.count)[position]]
        return number_name(range(self.count)[position])

    def index(self, value: Any, *_: Any) -> int:
        """Position of a name.

        Raises:
            ValueError: There is none of that name.
        """
        if isinstance(value, str) and value.isdecimal() and len(value) == DIGITS and int(value) < self.count:
            return int(value)
        raise ValueError(f'{value!r} is no name of {self.count} records')

    def __contains__(self, value: object) -> bool:
        try:
            self.index(value)
        except ValueError:
            return False
        return True


def number_name(number: int) -> str:
    """Name of a record in both layouts: its number in 12 digits."""
    return f'{number:0{DIGITS}d}'


class ShardedPromptCache:
    """A finished cache of ours.

    Args:
        folder: The folder, anywhere.
        names: Names of the records in order; None for all of the cache.

    Raises:
        CacheError: It is not finished or damaged, or lacks a record of ``names``.
    """

    kind = 'ours'

    def __init__(self, folder: str, names: Sequence[str] | None = None):
        self.folder = folder
        self.index: Index = read_index(folder, PROMPTS)
        self.embeds = ShardStore(folder, self.index.tables[EMBEDS])
        latents = self.index.tables.get(LATENTS)
        self.latents = None if latents is None else ShardStore(folder, latents)
        own = self._own_names()
        self._positions = None if isinstance(own, RecordNames) else {name: place for place, name in enumerate(own)}
        self._own: RecordNames | None = own if isinstance(own, RecordNames) else None
        self.names: Sequence[str] = own if names is None or _equal(names, own) else list(names)
        if self.names is not own:
            missing = [name for name in names if not self._has(name)]
            if missing:
                raise CacheError(
                    f'the cache {folder} lacks {len(missing)} of {len(names)} records, the first is {missing[0]}: is '
                    'the data list of another cache?'
                )

    def _own_names(self) -> Sequence[str]:
        if 'names' not in self.index.columns:
            return RecordNames(self.index.records)
        return [unpack_text(self.index.columns, 'names', number) for number in range(self.index.records)]

    def _has(self, name: str) -> bool:
        return name in (self._own if self._own is not None else self._positions)

    def __len__(self) -> int:
        return len(self.names)

    def number_of(self, name: str) -> int:
        """Number of a record in the cache.

        Raises:
            CacheError: There is none of that name.
        """
        try:
            return self._own.index(name) if self._own is not None else self._positions[name]
        except (KeyError, ValueError) as error:
            raise CacheError(f'the cache {self.folder} has no record {name!r}') from error

    def embeds_row(self, number: int) -> int:
        """Row of the embeddings of a record, which it may share with records of the same prompt."""
        rows = self.index.columns.get('embeds_row')
        return number if rows is None else int(rows[number])

    def stored(self, name: str) -> Record:
        """A record as it is stored.

        Args:
            name: One of ``names``.

        Raises:
            CacheError: It is damaged.
        """
        number = self.number_of(name)
        where = f'record {name}'
        row = self.embeds_row(number)
        columns = [name for name in self.embeds.all_columns(row) if name not in NOT_EMBEDDINGS]
        embeds = self.embeds.read(row, columns, where)
        prompt = text_of(embeds.pop(PROMPT))
        require_scales(embeds, f'{where} of {self.folder}')
        latents = {}
        if self.latents is not None:
            latents = self.latents.read(number, self.latents.all_columns(number), where)
        return Record(prompt, embeds, latents, self._latent_size(number))

    def _latent_size(self, number: int) -> tuple[int, ...] | None:
        sizes = self.index.columns.get('latent_size')
        if sizes is not None:
            size = tuple(int(length) for length in sizes[number] if length > 0)
            return size or None
        size = self.index.facts.get('latent_size')
        return None if size is None else tuple(size)

    def bucket_ids(self) -> list[int] | None:
        """Bucket of every record of the cache, in its own order; None if it has none."""
        ids = self.index.columns.get('bucket_ids')
        return None if ids is None else ids.tolist()

    def record(self, name: str) -> dict[str, Any]:
        """A record as data sets use it, see :meth:`Record.decoded`."""
        return self.stored(name).decoded()

    def records(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """Several records at once."""
        numbers = [self.number_of(name) for name in names]
        self.embeds.open(self.embeds_row(number) for number in numbers)
        if self.latents is not None:
            self.latents.open(numbers)
        waits = self.embeds if self.latents is None or not self.embeds.whole else self.latents
        return waits.map(self.record, names)

    def check(self) -> Iterator[tuple[str, CacheError | None]]:
        """Read everything; yields what was read and what is wrong with it, None if nothing is."""
        users: dict[int, int] = {}
        for number in range(self.index.records):
            users.setdefault(self.embeds_row(number), number)
        own = self._own if self._own is not None else list(self._positions)
        yield from self.embeds.check(lambda row: f'embeddings of record {own[users[row]] if row in users else row}')
        if self.latents is not None:
            yield from self.latents.check(lambda row: f'latents of record {own[row]}')


def _equal(first: Sequence[str], second: Sequence[str]) -> bool:
    return len(first) == len(second) and all(one == other for one, other in zip(first, second))
