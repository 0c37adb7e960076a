"""Latents of labelled images, computed before: our layout, in shards; see docs/caching.md."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

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
        verify: Whether to compare the checksum of every row that is read.

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

        Args:
            numbers: Numbers of the images.
            mirrored: Whether of the mirror image of each; None for none.

        Returns:
            (B, C, H, W), float32, whose rows are apart in memory only as a tensor's are.

        Raises:
            CacheError: They are damaged, or differ in shape.
        """
        columns = [MIRRORED if flip else PLAIN for flip in mirrored or [False] * len(numbers)]
        first = self.store.shard(self.store.table.place(numbers[0])[0])
        form = first.form(columns[0], self.store.table.place(numbers[0])[1])
        if form is None or not self.store.whole:
            rows = self.store.map(lambda pair: self.latents(pair[0], pair[1] == MIRRORED), list(zip(numbers, columns)))
            return torch.stack(rows)
        dtype, shape = form
        result = torch.empty((len(numbers), *shape), dtype=dtype)
        into = result.view(len(numbers), -1).view(torch.uint8).numpy()
        for position, (number, column) in enumerate(zip(numbers, columns)):
            shard, row = self.store.table.place(number)
            if self.store.shard(shard).stack(column, [row], into[position : position + 1], self.verify):
                value = self.latents(number, column == MIRRORED)  # says what is wrong
                if value.shape != shape:
                    raise CacheError(f'{self.folder}: image {number} has latents {tuple(value.shape)}, not {shape}')
                result[position] = value.to(dtype)
        return result.float()

    def check(self) -> Iterator[tuple[str, CacheError | None]]:
        """Read everything; yields what was read and what is wrong with it, None if nothing is."""
        yield from self.store.check(lambda row: f'image {self.path_of(row)}')


def is_latent_cache(folder: str | Path) -> bool:
    """Whether a folder holds a finished cache of our layout."""
    return files.is_file(files.join(folder, INDEX_FILE))
