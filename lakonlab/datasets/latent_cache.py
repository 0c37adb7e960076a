"""Latents of labelled images, computed before: our layout, in shards; see docs/caching.md."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lakonlab.datasets.collate import empty_batch
from lakonlab.datasets.prompt_cache.errors import CacheError
from lakonlab.datasets.prompt_cache.index import INDEX_FILE, LATENTS, read_index, unpack_text
from lakonlab.datasets.prompt_cache.record import dequantise
from lakonlab.datasets.prompt_cache.store import ShardStore
from lakonlab.storage import files

#: Columns of an image as it is, and mirrored.
PLAIN, MIRRORED = 'latents', 'mirrored'


class LatentCache:
    """Latents of images, with their labels; may be pickled, and used in processes that are forked or spawned.

    Args:
        folder: The cache, local or a URL.
        verify: Whether to compare checksums: of every row when it is first read, and in :meth:`latents` each time.

    Raises:
        CacheError: It is not finished, damaged, or of another kind.
    """

    def __init__(self, folder: str | Path, verify: bool = True):
        self.folder, self.verify = str(folder), verify
        self.index = read_index(self.folder, LATENTS)
        self.store = ShardStore(self.folder, self.index.tables[LATENTS])

    def __len__(self) -> int:
        """Number of images."""
        return self.index.records

    @property
    def labels(self) -> np.ndarray:
        """Label of every image, (N,), int64."""
        return self.index.columns['labels']

    @property
    def has_mirrored(self) -> bool:
        """Whether the latents of the mirror images are there too."""
        return MIRRORED in self.index.facts['columns']

    def path_of(self, number: int) -> str:
        """Relative path of the image that latents are of."""
        return unpack_text(self.index.columns, 'paths', number)

    def paths_of(self, numbers: Sequence[int]) -> list[str]:
        """Relative paths of several images."""
        content, ends = self.index.columns['paths'].data, self.index.columns['paths_ends']
        numbers = np.asarray(numbers, dtype=np.int64)
        starts = np.where(numbers == 0, 0, ends[numbers - 1])
        return [bytes(content[a:b]).decode() for a, b in zip(starts.tolist(), ends[numbers].tolist())]

    def latents(self, number: int, mirrored: bool = False) -> Tensor:
        """Latents of one image.

        Args:
            number: Number of the image, ``0 <= number < len(self)``.
            mirrored: Whether of its mirror image.

        Returns:
            (C, H, W), float32.

        Raises:
            CacheError: They are damaged.
        """
        column = MIRRORED if mirrored else PLAIN
        found = self.store.read(number, [column], f'image {self.path_of(number)}')
        if column not in found:
            raise CacheError(f'{self.folder} has no {column} of image {number} ({self.path_of(number)})')
        return dequantise(found)[column]

    def batch(self, numbers: Sequence[int], mirrored: Sequence[bool] | None = None) -> Tensor:
        """Latents of several images of one shape.

        Where the shards are local, they are copied from the files right into the batch.

        Args:
            numbers: Numbers of the images, at least one.
            mirrored: Whether of the mirror image of each; None for none.

        Returns:
            (B, C, H, W), float32.

        Raises:
            CacheError: They are damaged, or differ in shape.
        """
        mirrored = [False] * len(numbers) if mirrored is None else mirrored
        self.store.open(numbers)
        places = [(*self.store.table.place(number), flip) for number, flip in zip(numbers, mirrored)]
        uniform = {
            (shard, flip): self.store.uniform(shard, MIRRORED if flip else PLAIN)
            for shard, flip in dict.fromkeys((shard, flip) for shard, _, flip in places)
        }
        kinds = {None if rows is None else (rows.dtype, rows.shape) for rows in uniform.values()}
        if len(kinds) > 1 or None in kinds:
            rows = self.store.map(lambda pair: self.latents(*pair), list(zip(numbers, mirrored)))
            if len({row.shape for row in rows}) > 1:
                raise CacheError(f'{self.folder}: images {list(numbers)} have latents of several shapes')
            return torch.stack(rows)
        ((dtype, shape),) = kinds
        result = empty_batch((len(numbers), *shape), dtype)
        into = result.view(len(numbers), -1).view(torch.uint8).numpy()
        for position, (shard, row, flip) in enumerate(places):
            rows = uniform[shard, flip]
            if self.verify and not rows.is_whole(row):
                self.latents(numbers[position], flip)  # says what is wrong
            into[position] = rows.content[row]
        return result.float()

    def check(self) -> Iterator[tuple[str, CacheError | None]]:
        """Read everything; yields what was read and what is wrong with it, None if nothing is."""
        yield from self.store.check(lambda row: f'image {self.path_of(row)}')


def is_latent_cache(folder: str | Path) -> bool:
    """Whether a folder holds a finished cache of our layout."""
    return files.is_file(files.join(folder, INDEX_FILE))
