"""Converting a cache of prompts from the published layout into ours; every number stays what it is."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lakonlab.datasets.prompt_cache.errors import CacheError
from lakonlab.datasets.prompt_cache.index import LATENTS, PROMPTS, Table, pack_texts
from lakonlab.datasets.prompt_cache.published import PublishedPromptCache
from lakonlab.datasets.prompt_cache.record import SCALE_SUFFIX, Record, without_padding
from lakonlab.datasets.prompt_cache.rows import text_tensor
from lakonlab.datasets.prompt_cache.shard import Shard
from lakonlab.datasets.prompt_cache.sharded import DIGEST, EMBEDS, LATENT_SIZE, PROMPT, RecordNames
from lakonlab.datasets.prompt_cache.writer import CacheWriter, num_threads
from lakonlab.storage import files


def convert_prompt_cache(source: PublishedPromptCache, folder: str, rows_per_shard: int, batch_size: int = 32) -> bool:
    """Write the records of a cache into shards, equal embeddings once, or those that are not there yet.

    One process does it, in order, since what was stored before decides what is not stored again.

    Args:
        source: The cache.
        folder: Folder of the new one.
        rows_per_shard: Records of a shard.
        batch_size: Records read at once.

    Returns:
        Whether there was anything to do.

    Raises:
        CacheError: A record is damaged, has other latents than the first one, or the folder holds another cache.
    """
    names = list(source.names)
    first = source.stored(names[0])
    tables = {EMBEDS: Table(len(names), rows_per_shard)}
    if first.latents:
        tables[LATENTS] = Table(len(names), rows_per_shard)
    latents = latents_of(first)
    plan = {
        'names_sha256': hashlib.sha256('\n'.join(names).encode()).hexdigest(),
        'first_sha256': digest_of_embeds(first).hex(),
        'latents': latents,
    }
    writer = CacheWriter(folder, PROMPTS, len(names), tables, plan)
    if not writer.start():
        return False
    converter = _Converter(source, names, latents, writer)
    writer.fill(EMBEDS, converter.embeds, batch_size, 'embeddings', before_shard=converter.remember)
    if first.latents:
        writer.fill(LATENTS, converter.latents, batch_size, 'latents', compressed=False)
    converter.remember(tables[EMBEDS].num_shards)
    writer.finish({}, converter.columns())
    return True


class _Converter:
    """Reads records and remembers which embeddings were stored where."""

    def __init__(self, source: PublishedPromptCache, names: Sequence[str], latents: list[str], writer: CacheWriter):
        self.source, self.names, self.expected, self.writer = source, names, latents, writer
        self.row_of: dict[bytes, int] = {}
        self.embeds_row = np.empty(len(names), dtype=np.int64)
        self.sizes: list[tuple[int, ...]] = []

    def read(self, numbers: Sequence[int]) -> list[Record]:
        """Records of some numbers."""
        with ThreadPoolExecutor(num_threads(), thread_name_prefix='records') as threads:
            return list(threads.map(self._read, [self.names[number] for number in numbers]))

    def _read(self, name: str) -> Record:
        record = self.source.stored(name)
        found = latents_of(record)
        if found != self.expected:
            raise CacheError(
                f'record {self.source.path_of(name)} has {" and ".join(found) or "no latents"}, but the first one, '
                f'{self.names[0]}, {" and ".join(self.expected) or "none"}: convert records of each kind by a list of '
                'their own (--datalist), or cache the differing ones again'
            )
        return record

    def embeds(self, numbers: Sequence[int]) -> Iterator[dict[str, Tensor]]:
        """Rows of embeddings; of those that are stored already only what tells that."""
        for number, record in zip(numbers, self.read(numbers), strict=True):
            digest = digest_of_embeds(record)
            row: dict[str, Tensor] = {DIGEST: torch.frombuffer(bytearray(digest), dtype=torch.uint8)}
            if record.latent_size is not None:
                row[LATENT_SIZE] = torch.tensor(record.latent_size)
            if self._place(number, digest, record.latent_size) == number:
                row.update({PROMPT: text_tensor(record.prompt), **without_padding(record.embeds)})
            yield row

    def latents(self, numbers: Sequence[int]) -> Iterator[dict[str, Tensor]]:
        """Rows of latents."""
        for record in self.read(numbers):
            yield record.latents

    def _place(self, number: int, digest: bytes, size: tuple[int, ...] | None) -> int:
        if number == len(self.sizes):
            self.sizes.append(() if size is None else size)
            self.embeds_row[number] = self.row_of.setdefault(digest, number)
        return int(self.embeds_row[number])

    def remember(self, shard: int) -> None:
        """Learn from the shards before a given one what they hold; those of an earlier run were not made here."""
        table = self.writer.tables[EMBEDS]
        while len(self.sizes) < min(shard * table.rows_per_shard, table.rows):
            number, _ = table.place(len(self.sizes))
            info = self.writer.made(EMBEDS, number)
            opened = Shard(files.join(self.writer.folder, info.file), info)
            for position, row in enumerate(table.rows_of(number)):
                where = f'record {self.names[row]}'
                digest = opened.row(DIGEST, position, where)
                size = opened.row(LATENT_SIZE, position, where) if LATENT_SIZE in opened.columns else None
                self._place(row, digest.numpy().tobytes(), None if size is None else tuple(size.tolist()))

    def columns(self) -> dict[str, Any]:
        """Columns of the index."""
        columns: dict[str, np.ndarray] = {'embeds_row': self.embeds_row}
        if any(self.sizes):
            sizes = np.zeros((len(self.sizes), max(map(len, self.sizes))), dtype=np.int64)
            for number, size in enumerate(self.sizes):
                sizes[number, : len(size)] = size
            columns['latent_size'] = sizes
        if self.names != list(RecordNames(len(self.names))):
            columns.update(pack_texts(self.names, 'names'))
        return columns


def latents_of(record: Record) -> list[str]:
    """Names of the latents of a record."""
    return sorted(name for name in record.latents if not name.endswith(SCALE_SUFFIX))


def digest_of_embeds(record: Record) -> bytes:
    """Digest of a prompt and its embeddings as they are stored, 16 bytes."""
    digest = hashlib.blake2b(record.prompt.encode(), digest_size=16)
    for name, value in sorted(without_padding(record.embeds).items()):
        digest.update(f'\0{name}:{value.dtype}:{tuple(value.shape)}\0'.encode())
        digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b'')
    return digest.digest()


def compare(source: PublishedPromptCache, converted: Any) -> Iterator[tuple[str, CacheError | None]]:
    """Compare every record with the one it was converted from; yields its name and what differs, None if nothing does.

    Args:
        source: The published cache.
        converted: The new one.
    """
    for name in source.names:
        try:
            before, after = source.stored(name), converted.stored(name)
        except CacheError as error:
            yield name, error
            continue
        same = (
            before.prompt == after.prompt
            and before.latent_size == after.latent_size
            and _same(without_padding(before.embeds), after.embeds)
            and _same(before.latents, after.latents)
        )
        yield name, None if same else CacheError(f'record {name} of {converted.folder} differs from {source.folder}')


def _same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    def content(value: Tensor) -> tuple:
        return value.dtype, tuple(value.shape), value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()

    return first.keys() == second.keys() and all(content(first[name]) == content(second[name]) for name in first)
